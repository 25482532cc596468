//! Calls to an endpoint, and descriptions of their results.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use imds_ebpf_common::{Service, endpoint::UDP};
use nix::errno::Errno;

/// Limit for one connection. A refusal returns immediately, and the check needs no answer.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);

/// Connects with TCP, or sends a datagram with UDP, from the calling thread's network namespace.
pub(crate) fn attempt(address: IpAddr, service: Service) -> io::Result<()> {
    let to = SocketAddr::new(address, service.port);
    if service.protocol != UDP {
        return TcpStream::connect_timeout(&to, CONNECT_TIMEOUT).map(drop);
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    UdpSocket::bind((any, 0))?.send_to(&[], to).map(drop)
}

/// Reports whether a cgroup hook ended the call.
pub(crate) fn is_refused(result: &io::Result<()>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
}

pub(crate) fn phrase(result: &io::Result<()>) -> String {
    let Err(error) = result else { return "done".to_owned() };
    let reason = error
        .raw_os_error()
        .map_or_else(|| error.to_string(), |errno| Errno::from_raw(errno).desc().to_owned());
    if is_refused(result) { format!("refused ({reason})") } else { format!("not refused ({reason})") }
}
