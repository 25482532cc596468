//! Sink that sends syslog messages (RFC 5424).

use std::{
    fmt::Write as _,
    io::{self, ErrorKind, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket},
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt::TcpUserTimeout};

use super::{
    sink_error::{Sent, SinkError, io_failed},
    sink_record::SinkRecord,
};
use crate::config::{HostPort, SyslogAddress};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which a write fails if the receiver accepts nothing.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time in milliseconds after which a connection fails if the receiver acknowledges nothing.
const ACKNOWLEDGE_TIMEOUT: u32 = 30_000;
/// Facility `authpriv` (RFC 5424, 6.2.1) and severities `warning`, `notice` and `informational`.
const FACILITY: u8 = 10;
const WARNING: u8 = 4;
const NOTICE: u8 = 5;
const INFORMATIONAL: u8 = 6;
const APP_NAME: &str = "imds-agent";
/// Enterprise number in the name of the structured data: the one for documentation (RFC 5612), because the project has none of
/// its own.
const ENTERPRISE: u32 = 32473;

pub(super) struct SyslogSink {
    address: SyslogAddress,
    hostname: String,
    socket: Option<Socket>,
}

enum Socket {
    Unix(UnixDatagram),
    Udp(UdpSocket),
    Tcp(TcpStream),
}

impl SyslogSink {
    pub(super) fn new(address: SyslogAddress, hostname: &str) -> Self {
        Self { address, hostname: header_field(hostname), socket: None }
    }

    pub(super) fn send(&mut self, batch: &[Arc<SinkRecord>]) -> Sent {
        let mut sent = Sent::default();
        for record in batch {
            let message = message(record, &self.hostname, std::process::id());
            match self.send_one(&message) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => sent.failed += 1,
                Err(error) => {
                    // The next attempt connects again: journald replaces its socket when it is restarted.
                    self.socket = None;
                    let error = io_failed("send to", &self.address)(error);
                    return Sent { failed: sent.failed, ..Sent::until(sent.done, error) };
                }
            }
            sent.done += 1;
        }
        if sent.failed > 0 {
            let error = SinkError::TooLong { target: self.address.to_string() };
            sent.failure = Some(super::Failure::Rejected(error));
        }
        sent
    }

    fn send_one(&mut self, message: &str) -> io::Result<()> {
        if let Some(Socket::Tcp(stream)) = &self.socket
            && is_closed(stream)
        {
            self.socket = None;
        }
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => none.insert(connect(&self.address)?),
        };
        match socket {
            Socket::Unix(socket) => socket.send(message.as_bytes()).map(drop),
            Socket::Udp(socket) => socket.send(message.as_bytes()).map(drop),
            // Octet counting (RFC 6587, 3.4.1).
            Socket::Tcp(stream) => stream.write_all(format!("{} {message}", message.len()).as_bytes()),
        }
    }
}

fn connect(address: &SyslogAddress) -> io::Result<Socket> {
    match address {
        SyslogAddress::Unix(path) => {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
            Ok(Socket::Unix(socket))
        }
        SyslogAddress::Udp(to) => first_of(to, |address| {
            let any: SocketAddr = match address {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let socket = UdpSocket::bind(any)?;
            socket.connect(address)?;
            socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
            Ok(Socket::Udp(socket))
        }),
        SyslogAddress::Tcp(to) => first_of(to, |address| {
            let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
            stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
            // Otherwise a write to a host that is gone fails only after a quarter of an hour.
            setsockopt(&stream, TcpUserTimeout, &ACKNOWLEDGE_TIMEOUT)?;
            Ok(Socket::Tcp(stream))
        }),
    }
}

/// Returns the result for the first address of a host that succeeds, or the last error.
fn first_of(to: &HostPort, connect: impl Fn(SocketAddr) -> io::Result<Socket>) -> io::Result<Socket> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the host has no address");
    for address in (to.host.as_str(), to.port).to_socket_addrs()? {
        match connect(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reports whether the receiver has closed the connection. A write would succeed, and lose the message.
fn is_closed(stream: &TcpStream) -> bool {
    let peeked = recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
    !matches!(peeked, Ok(1..) | Err(nix::errno::Errno::EAGAIN))
}

/// Returns the message of a record.
pub(super) fn message(record: &SinkRecord, hostname: &str, pid: u32) -> String {
    let severity = match record {
        record if record.is_denied() => WARNING,
        record if record.is_audited() => NOTICE,
        _ => INFORMATIONAL,
    };
    let priority = FACILITY * 8 + severity;
    let time = record.time;
    let id = if record.http.is_some() { "request" } else { "denial" };
    let mut text = format!("<{priority}>1 {time:.6} {hostname} {APP_NAME} {pid} {id} [{id}@{ENTERPRISE}");
    for (name, value) in parameters(record) {
        // Writing to a string does not fail.
        let _ok = write!(text, " {name}=\"{}\"", escaped(&value));
    }
    text + "] " + &record.to_string()
}

/// Returns the parameters of the structured data: the fields of the record that have a value.
fn parameters(record: &SinkRecord) -> Vec<(&'static str, String)> {
    let SinkRecord { src_endpoint: source, dst_endpoint: destination, pod, actor, .. } = record;
    let port = |port: Option<u16>| port.map(|port| port.to_string());
    let (process, http) = (actor.process.as_ref(), record.http.as_ref());
    let all = [
        ("schema", Some(record.schema.to_string())),
        ("node", Some(record.node.clone())),
        ("verdict", Some(record.verdict.to_owned())),
        ("hook", Some(record.hook.to_owned())),
        ("protocol", record.protocol.clone()),
        ("src_ip", source.ip.map(|ip| ip.to_string())),
        ("src_port", port(source.port)),
        ("src_interface", source.interface_name.clone()),
        ("dst_name", destination.name.clone()),
        ("dst_ip", Some(destination.ip.to_string())),
        ("dst_port", port(destination.port)),
        ("namespace", pod.as_ref().map(|pod| pod.namespace.clone())),
        ("pod", pod.as_ref().map(|pod| pod.name.clone())),
        ("pod_uid", pod.as_ref().map(|pod| pod.uid.clone())),
        ("service_account", pod.as_ref().map(|pod| pod.service_account.clone())),
        ("container", pod.as_ref().and_then(|pod| pod.container.clone())),
        ("label", pod.as_ref().and_then(|pod| pod.label.clone())),
        ("pid", process.map(|process| process.pid.to_string())),
        ("process", process.and_then(|process| process.name.clone())),
        ("cgroup", actor.cgroup.clone()),
        ("rule", record.rule.clone()),
        ("http_method", http.map(|http| http.method.clone())),
        ("http_path", http.map(|http| http.path.clone())),
        ("imds_version", http.and_then(|http| http.imds_version).map(|version| version.to_string())),
        ("outcome", http.map(|http| http.outcome.to_owned())),
        ("http_status", http.and_then(|http| http.status).map(|status| status.to_string())),
        ("reason", http.and_then(|http| http.reason.clone())),
        ("other_rules", http.map(|http| http.other_rules.to_string())),
        ("count", Some(record.count.to_string())),
        ("bytes", Some(record.bytes.to_string())),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Escapes the value of a parameter (RFC 5424, 6.3.3). Records contain no control characters.
fn escaped(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, '"' | '\\' | ']') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Returns a field of the header, which consists of printable ASCII characters without spaces: `-` if it is empty.
fn header_field(text: &str) -> String {
    let printable: String = text.chars().filter(char::is_ascii_graphic).take(255).collect();
    if printable.is_empty() { "-".to_owned() } else { printable }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::record, *};

    #[test]
    fn message_has_header_data_and_sentence() {
        let message = message(&record("web"), &header_field("node 7\n"), 42);
        assert_eq!(
            message,
            "<84>1 1970-01-01T00:00:00.000000Z node7 imds-agent 42 denial [denial@32473 schema=\"1\" node=\"node-0\" \
             verdict=\"denied\" hook=\"from_pod\" protocol=\"tcp\" src_ip=\"10.244.0.7\" src_port=\"40312\" \
             src_interface=\"veth1\" dst_name=\"imds\" dst_ip=\"169.254.169.254\" dst_port=\"80\" namespace=\"default\" \
             pod=\"web\" pod_uid=\"u-1\" service_account=\"robot\" label=\"app=web\" count=\"42\" bytes=\"3108\"] \
             denied tcp 10.244.0.7:40312 -> 169.254.169.254:80 (imds) at from_pod, pod default/web, 42 times"
        );
    }

    #[test]
    fn hostile_names_stay_in_their_parameter() {
        let message = message(&record("a\"] <0>1\r\n\u{1b}[2J\u{202e}\\"), "h", 1);
        assert!(message.contains(r#" pod="a\"\] <0>1\\r\\n\\u{1b}[2J\\u{202e}\\" "#), "{message}");
        assert!(!message.chars().any(char::is_control), "{message}");
        assert_eq!(header_field("\u{e4} \n"), "-");
    }
}
