//! System calls that name a destination, common and uncommon ones. A process needs no privilege for any of them, and
//! each hook alone denies all.

use std::{
    io::{self, IoSlice},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use imds_tests::{
    AttackVectors, DNS_PORT, METADATA, Netns, Pod, PodLink, TestEnv,
    probe::{SHORT, http_exchange, http_get, http_get_at, udp_echo_at},
    skip,
};
use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg};

use crate::ALL;

const HTTP_PORT: u16 = 80;
const ECHO_PORT: u16 = 7;
const TCP_FASTOPEN_CONNECT: libc::c_int = 30;

/// Calls socket(2) for protocols that the standard library does not support.
pub(crate) fn socket(netns: &Netns, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    netns.run(|| {
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, kind | libc::SOCK_CLOEXEC, protocol) };
        // SAFETY: the descriptor was just created and has no other owner.
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    })
}

fn address(to: Ipv4Addr) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().expect("a small constant"),
        sin_port: 80_u16.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(to).to_be() },
        sin_zero: [0; 8],
    }
}

fn set_timeout(socket: &OwnedFd) {
    let timeout = libc::timeval { tv_sec: 0, tv_usec: SHORT.subsec_micros().into() };
    for option in [libc::SO_SNDTIMEO, libc::SO_RCVTIMEO] {
        set(socket, libc::SOL_SOCKET, option, &timeout);
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let value: *const T = value;
    // SAFETY: the length is the size of the value, which outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.cast(), length) };
    assert_eq!(result, 0, "setsockopt {option}: {}", io::Error::last_os_error());
}

/// Calls connect(2) for sockets that the standard library does not support.
fn connect(socket: &OwnedFd, to: Ipv4Addr) -> io::Result<()> {
    let address = address(to);
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the length is the size of the address, which outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Calls sendto(2) with `MSG_FASTOPEN`, which connects and sends at once.
fn fast_open(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    set_timeout(&socket);
    let (address, data) = (address(to), b"GET / HTTP/1.0\r\n\r\n");
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the lengths are the sizes of address and data, which outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_FASTOPEN,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { answer(&socket) }
}

/// Connects with the socket option `TCP_FASTOPEN_CONNECT`, with which connect(2) waits for the first write.
fn fast_open_connect(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    set_timeout(&socket);
    set(&socket, libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &1_i32);
    connect(&socket, to)?;
    exchange(&socket)
}

fn mptcp(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?;
    set_timeout(&socket);
    connect(&socket, to)?;
    exchange(&socket)
}

fn exchange(socket: &OwnedFd) -> io::Result<()> {
    let data = b"GET / HTTP/1.0\r\n\r\n";
    // SAFETY: the length is the size of the data.
    let sent =
        unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { answer(socket) }
}

fn answer(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0_u8; 16];
    // SAFETY: the length is the size of the buffer.
    let read = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if read > 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens a UDP socket in a pod with a receive timeout.
fn udp(netns: &Netns, any: &str) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(any)).expect("a UDP socket");
    socket.set_read_timeout(Some(SHORT)).expect("set a timeout");
    socket
}

fn echoes(socket: &UdpSocket, sent: io::Result<usize>) -> bool {
    sent.and_then(|_| socket.recv(&mut [0; 16])).is_ok()
}

/// Calls sendto(2) with an arbitrary address family.
fn send_to_family(netns: &Netns, family: libc::c_int, to: Ipv4Addr) -> bool {
    let socket = udp(netns, "0.0.0.0:0");
    let mut address = address(to);
    address.sin_family = family.try_into().expect("a small constant");
    address.sin_port = ECHO_PORT.to_be();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the lengths are the sizes of address and data, which outlive the call.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), [0_u8; 4].as_ptr().cast(), 4, 0, (&raw const address).cast(), length)
    };
    echoes(&socket, usize::try_from(sent).map_err(io::Error::other))
}

/// Sends to an IPv4 address from an IPv6 UDP socket, which Linux accepts.
fn ipv4_address_at_ipv6_socket(netns: &Netns, to: Ipv4Addr, connected: bool) -> bool {
    let socket = udp(netns, "[::]:0");
    let mut address = address(to);
    address.sin_port = ECHO_PORT.to_be();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    let pointer = (&raw const address).cast();
    let data = [0_u8; 4].as_ptr().cast();
    let sent = if connected {
        // SAFETY: the length is the size of the address, which outlives the call.
        let result = unsafe { libc::connect(socket.as_raw_fd(), pointer, length) };
        if result == 0 { socket.send(&[0; 4]) } else { Err(io::Error::last_os_error()) }
    } else {
        // SAFETY: the lengths are the sizes of address and data, which outlive the call.
        let sent = unsafe { libc::sendto(socket.as_raw_fd(), data, 4, 0, pointer, length) };
        usize::try_from(sent).map_err(io::Error::other)
    };
    echoes(&socket, sent)
}

/// Calls sendmsg(2) with `IP_PKTINFO`, which selects the source address and interface.
fn send_with_packet_info(pod: &Pod, to: Ipv4Addr) -> bool {
    let socket = udp(&pod.netns, "0.0.0.0:0");
    let interface =
        pod.netns.run(|| nix::net::if_::if_nametoindex(Pod::IFNAME)).expect("the pod's interface");
    let info = libc::in_pktinfo {
        ipi_ifindex: interface.try_into().expect("interface indexes are positive C ints"),
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(pod.address).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let (data, to) = ([IoSlice::new(b"echo")], SockaddrIn::from(SocketAddrV4::new(to, ECHO_PORT)));
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    let sent = sendmsg(socket.as_raw_fd(), &data, &control, MsgFlags::empty(), Some(&to));
    echoes(&socket, sent.map_err(io::Error::from))
}

/// Submits one operation to an `io_uring` and returns its result.
fn by_ring(entry: &squeue::Entry) -> io::Result<u32> {
    let mut ring = IoUring::new(1)?;
    // SAFETY: memory that the entry points to outlives this function, which waits until the kernel has completed it.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().expect("a completion was waited for");
    u32::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()))
}

fn connect_by_ring(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    set_timeout(&socket);
    // The ring itself would wait for the timeout of TCP.
    let milliseconds = u32::try_from(SHORT.as_millis()).unwrap();
    set(&socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, &milliseconds);
    let address = address(to);
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    let pointer = (&raw const address).cast();
    by_ring(&opcode::Connect::new(types::Fd(socket.as_raw_fd()), pointer, length).build())?;
    exchange(&socket)
}

fn send_by_ring(netns: &Netns, to: Ipv4Addr) -> bool {
    let socket = udp(netns, "0.0.0.0:0");
    let mut address = address(to);
    address.sin_port = ECHO_PORT.to_be();
    let mut data = *b"echo";
    let mut vector = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: msghdr consists of integers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    (message.msg_iov, message.msg_iovlen) = (&raw mut vector, 1);
    let sent = by_ring(&opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), &raw const message).build());
    echoes(&socket, sent.map(|_| data.len()))
}

/// Adds the calls of ordinary programs.
pub(crate) fn plain<'w>(vectors: AttackVectors<'w>, pod: &'w Pod) -> AttackVectors<'w> {
    let at = |port| SocketAddr::from((METADATA, port));
    let mapped = |port| SocketAddr::from((METADATA.to_ipv6_mapped(), port));
    vectors
        .vector("TCP to port 80", || http_get(&pod.netns, METADATA, SHORT).is_answer())
        .vector("TCP to another port", move || http_get_at(&pod.netns, at(DNS_PORT), SHORT).is_answer())
        .vector("TCP to a mapped address", move || {
            let stream = pod.netns.run(|| TcpStream::connect_timeout(&mapped(HTTP_PORT), SHORT));
            stream.and_then(|mut stream| http_exchange(&mut stream, SHORT)).is_ok()
        })
        .vector("UDP, connected", move || udp_echo_at(&pod.netns, at(ECHO_PORT), SHORT).is_answer())
        .vector("UDP by sendto", move || {
            let socket = udp(&pod.netns, "0.0.0.0:0");
            echoes(&socket, socket.send_to(b"echo", at(ECHO_PORT)))
        })
        .vector("UDP by sendto with AF_UNSPEC", || send_to_family(&pod.netns, libc::AF_UNSPEC, METADATA))
        .vector("UDP by sendmsg with IP_PKTINFO", || send_with_packet_info(pod, METADATA))
        .vector("UDP to a mapped address", move || {
            let socket = udp(&pod.netns, "[::]:0");
            echoes(&socket, socket.send_to(b"echo", mapped(ECHO_PORT)))
        })
        .vector("UDP to a mapped address, connected", move || {
            let socket = udp(&pod.netns, "[::]:0");
            let connected = socket.connect(mapped(ECHO_PORT));
            echoes(&socket, connected.and_then(|()| socket.send(b"echo")))
        })
        .vector("UDP of an IPv6 socket to an IPv4 address", || {
            ipv4_address_at_ipv6_socket(&pod.netns, METADATA, false)
        })
        .vector("UDP of an IPv6 socket to an IPv4 address, connected", || {
            ipv4_address_at_ipv6_socket(&pod.netns, METADATA, true)
        })
}

/// Adds uncommon calls that this kernel supports.
pub(crate) fn uncommon<'w>(vectors: AttackVectors<'w>, pod: &'w Pod) -> AttackVectors<'w> {
    let mut vectors = vectors
        .vector("MSG_FASTOPEN", || fast_open(&pod.netns, METADATA).is_ok())
        .vector("TCP_FASTOPEN_CONNECT", || fast_open_connect(&pod.netns, METADATA).is_ok());
    match socket(&pod.netns, libc::SOCK_STREAM, libc::IPPROTO_MPTCP) {
        Ok(_) => vectors = vectors.vector("MPTCP", || mptcp(&pod.netns, METADATA).is_ok()),
        Err(error) => skip("MPTCP", &error.to_string()),
    }
    match IoUring::new(1) {
        Ok(_) => {
            vectors = vectors
                .vector("connect with io_uring", || connect_by_ring(&pod.netns, METADATA).is_ok())
                .vector("sendmsg with io_uring", || send_by_ring(&pod.netns, METADATA));
        }
        Err(error) => skip("io_uring", &error.to_string()),
    }
    vectors
}

#[test]
fn tcp_and_udp_every_call() {
    for link in [PodLink::Routed, PodLink::Bridged] {
        let env = TestEnv::new();
        let pod = env.add_pod(link);
        plain(env.vectors(&ALL), &pod).assert_blocked_all();
    }
}

#[test]
fn tcp_fast_open_mptcp_and_io_uring() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Bridged);
    uncommon(env.vectors(&ALL), &pod).assert_blocked_all();
}
