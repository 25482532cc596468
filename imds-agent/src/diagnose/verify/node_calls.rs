//! Connections of the node itself, up to the last hook.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, RawFd},
    pin::pin,
    time::Instant,
};

use futures_util::future::join_all;
use imds_ebpf_common::endpoint::TCP;
use tokio::{net::TcpSocket, time::timeout};

use super::{
    ARRIVAL_TIMEOUT, PATH, POLL_INTERVAL, VerifyError,
    last_hook::LastHook,
    syscalls::{is_refused, phrase},
    tc::closed,
    verify_report::{Outcome, Skip, VerifyCheck},
};
use crate::config::endpoint_set::Endpoint;

const EXPECTED: &str = "reaches the last hook";

/// Checks that connections of the node to each endpoint reach the last hook.
///
/// Endpoints with an address in `local` are on the node itself: their packets do not leave it.
pub(crate) async fn check(
    last_hook: &mut Result<LastHook, Skip>,
    endpoints: &[Endpoint],
    local: &BTreeSet<IpAddr>,
) -> Vec<VerifyCheck> {
    let last_hook = match last_hook {
        Ok(last_hook) => last_hook,
        Err(skip) => return self::skip(endpoints, skip),
    };
    let calls: Vec<_> = endpoints.iter().map(|endpoint| (endpoint, Call::new(endpoint, last_hook))).collect();
    let last_hook = &*last_hook;
    let results = calls.into_iter().map(|(endpoint, call)| async move {
        let (observed, outcome) = match call {
            Ok(call) => call.run(last_hook, local.contains(&endpoint.address)).await,
            Err(error) => (error.in_full(), Outcome::Skipped),
        };
        VerifyCheck::new(PATH, EXPECTED, observed, outcome).with_sender("node").with_endpoint(endpoint)
    });
    join_all(results).await
}

pub(crate) fn skip(endpoints: &[Endpoint], skip: &Skip) -> Vec<VerifyCheck> {
    let skipped =
        |endpoint| VerifyCheck::skipped(PATH, EXPECTED, skip).with_sender("node").with_endpoint(endpoint);
    endpoints.iter().map(skipped).collect()
}

struct Call {
    socket: TcpSocket,
    to: SocketAddr,
    id: u16,
}

impl Call {
    fn new(endpoint: &Endpoint, last_hook: &mut LastHook) -> Result<Self, VerifyError> {
        let socket = if endpoint.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = socket.map_err(VerifyError::io("open", "a socket"))?;
        let cookie =
            socket_cookie(socket.as_raw_fd()).map_err(VerifyError::io("read", "a socket's cookie"))?;
        let id = last_hook.new_id();
        last_hook.expect_socket(cookie, id)?;
        let to = SocketAddr::new(endpoint.address, closed(&endpoint.allow_ports, TCP).port);
        Ok(Self { socket, to, id })
    }

    /// Connects, and waits until the segment arrives at the last hook, which drops it.
    async fn run(self, last_hook: &LastHook, is_local: bool) -> (String, Outcome) {
        let mut connecting = pin!(self.socket.connect(self.to));
        let start = Instant::now();
        while start.elapsed() < ARRIVAL_TIMEOUT {
            let result = timeout(POLL_INTERVAL, &mut connecting).await;
            if last_hook.has_received(self.id) {
                return ("reached it".to_owned(), Outcome::Passed);
            }
            if let Ok(result) = result {
                // A connect program of the node, such as that of a proxy, changes the destination.
                let peer = result.as_ref().ok().and_then(|stream| stream.peer_addr().ok());
                let is_local = is_local || peer.is_some_and(|peer| peer.ip().is_loopback());
                return call_outcome(&result.map(drop), is_local);
            }
        }
        let observed = "dropped on this node: by imds-agent, or by another program or firewall rule";
        (observed.to_owned(), Outcome::Failed)
    }
}

/// Returns the result of a connection that ended before its segment arrived at the last hook.
fn call_outcome(result: &io::Result<()>, is_local: bool) -> (String, Outcome) {
    match result.as_ref().map_err(io::Error::raw_os_error) {
        Ok(()) if is_local => ("answered on this node".to_owned(), Outcome::Passed),
        Ok(()) => {
            let observed = "not tested: a rule of this node redirects the packets, or they pass no last hook";
            (observed.to_owned(), Outcome::Skipped)
        }
        Err(_) if is_refused(result) => (phrase(result), Outcome::Failed),
        Err(_) if is_local => (format!("an address of this node: {}", phrase(result)), Outcome::Skipped),
        // A hook with `on_deny = "reject"` or a firewall rule sends a reset.
        Err(Some(libc::ECONNREFUSED | libc::ECONNRESET)) => {
            ("reset on this node: by imds-agent, or by a firewall rule".to_owned(), Outcome::Failed)
        }
        Err(_) => (format!("not reachable from the node: {}", phrase(result)), Outcome::Skipped),
    }
}

fn socket_cookie(socket: RawFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    #[expect(clippy::cast_possible_truncation, reason = "8")]
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is as long as the length says, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_of_calls() {
        let outcome = |errno, is_local| call_outcome(&Err(io::Error::from_raw_os_error(errno)), is_local).1;
        assert_eq!(outcome(libc::EPERM, true), Outcome::Failed);
        assert_eq!(outcome(libc::ENETUNREACH, false), Outcome::Skipped);
        assert_eq!(outcome(libc::EHOSTUNREACH, false), Outcome::Skipped);
        assert_eq!(outcome(libc::ECONNREFUSED, false), Outcome::Failed);
        assert_eq!(outcome(libc::ECONNREFUSED, true), Outcome::Skipped);
        assert_eq!(call_outcome(&Ok(()), true).1, Outcome::Passed);
        assert_eq!(call_outcome(&Ok(()), false).1, Outcome::Skipped);
    }
}
