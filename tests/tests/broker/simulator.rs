//! Metadata service that reads requests as leniently as any server does.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use imds_tests::Netns;

/// Request as the service has read it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Header lines, names in lower case.
    pub(crate) headers: Vec<String>,
    pub(crate) body: Vec<u8>,
}

/// Metadata service on the node. The thread ends with the process.
#[derive(Clone)]
pub(crate) struct Simulator {
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Simulator {
    /// Starts a service that responds with `respond`: all bytes of the response.
    pub(crate) fn start(
        node: &Netns,
        address: &str,
        respond: impl Fn(&Seen) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let listener = node.run(|| TcpListener::bind(address).expect("bind to the endpoint"));
        let (simulator, respond) = (Self { seen: Arc::default() }, Arc::new(respond));
        let service = simulator.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (service, respond) = (service.clone(), Arc::clone(&respond));
                thread::spawn(move || {
                    // The broker resets the connection after the response.
                    let _ = service.serve(stream, &*respond);
                });
            }
        });
        simulator
    }

    /// Starts a service that responds to each request with its target.
    pub(crate) fn start_echo(node: &Netns) -> Self {
        Self::start(node, super::harness::ENDPOINT, |seen| ok(&seen.target))
    }

    /// Returns the requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the last request.
    pub(crate) fn last(&self) -> Seen {
        self.seen().pop().expect("a request")
    }

    fn serve(&self, mut stream: TcpStream, respond: &impl Fn(&Seen) -> Vec<u8>) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut bytes = Vec::new();
        loop {
            while let Some(seen) = take_request(&mut bytes) {
                self.seen.lock().unwrap().push(seen.clone());
                stream.write_all(&respond(&seen))?;
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                length => bytes.extend_from_slice(&buffer[..length]),
            }
        }
    }
}

/// Returns a response with a body.
pub(crate) fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

/// Takes a request from the start of the bytes. Lines may end with LF only.
fn take_request(bytes: &mut Vec<u8>) -> Option<Seen> {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let ends = ["\r\n\r\n", "\n\n"].map(|end| text.find(end).map(|at| at + end.len()));
    let length = ends.into_iter().flatten().min()?;
    let mut lines = text[..length].lines().map(|line| line.trim_end_matches('\r'));
    let mut words = lines.next()?.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: Vec<_> = lines.filter(|line| !line.is_empty()).map(lower_name).collect();
    let content_length =
        headers.iter().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let end = length + content_length.unwrap_or(0);
    if bytes.len() < end {
        return None;
    }
    let body = bytes[length..end].to_vec();
    bytes.drain(..end);
    Some(Seen { method: method.to_owned(), target: target.to_owned(), headers, body })
}

fn lower_name(line: &str) -> String {
    match line.split_once(':') {
        Some((name, value)) => format!("{}:{value}", name.trim().to_ascii_lowercase()),
        None => line.to_owned(),
    }
}
