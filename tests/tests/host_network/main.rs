//! `host_network`: pods in the node's own network namespace are distinguished from the node by their cgroup.

mod every_vector;
mod followed_cgroups;
mod unrestricted_traffic;

use std::{
    fs, io,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use imds_tests::{Netns, TestEnv, probe::SHORT};
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};

const HOST_NETWORK: &str = "host_network";
const ALL: [&str; 4] = ["from_pod", "node_egress", "socket", HOST_NETWORK];
/// Configuration with endpoints of both address families.
const AWS: &str = "provider = 'aws'";
/// Cgroup of a container with systemd's cgroup driver, with shorter names than the kubelet's.
const CONTAINER: &str = "kubepods.slice/kubepods-besteffort.slice/pod7.slice/container.scope";
/// Cgroup of a container in kind.
const IN_KIND: &str = "kubelet.slice/kubelet-kubepods.slice/pod7.slice";
const ECHO_PORT: u16 = 7;

/// Sends a packet from a raw socket. The kernel adds the IP header.
fn send_raw(netns: &Netns, to: Ipv4Addr, protocol: libc::c_int) -> io::Result<()> {
    netns.run(|| {
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and has no other owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
        sendto(socket.as_raw_fd(), &[0, 7, 0, 7, 0, 16, 0, 0], &to, MsgFlags::empty())?;
        Ok(())
    })
}

fn udp_socket(netns: &Netns, any: &str) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(any)).expect("a UDP socket");
    socket.set_read_timeout(Some(SHORT)).expect("set a timeout");
    socket
}

fn is_denied<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Returns the names of the pinned links for cgroups of Kubernetes pods.
fn host_links(env: &TestEnv) -> Vec<String> {
    let entries = fs::read_dir(env.pin_dir().join("links")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("host_")).collect()
}
