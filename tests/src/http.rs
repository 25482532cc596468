//! What the agent serves by HTTP, as a monitoring system asks for it.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
};

use crate::{World, probe::LONG};

/// Where it serves unless it is told otherwise.
pub const DEFAULT: &str = "127.0.0.1:9254";

/// Status and body of the answer to a GET.
pub fn exchange(mut stream: impl Read + Write, path: &str) -> io::Result<(u16, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other(answer.clone()))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| io::Error::other(head))?, body.to_owned()))
}

/// The same at an address of the node's.
pub fn try_get(world: &World, at: &str, path: &str) -> io::Result<(u16, String)> {
    let address: SocketAddr = at.parse().expect("an address with a port");
    world.node.run(|| {
        let stream = TcpStream::connect_timeout(&address, LONG)?;
        stream.set_read_timeout(Some(LONG))?;
        exchange(stream, path)
    })
}
