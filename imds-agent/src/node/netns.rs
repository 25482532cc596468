//! Network namespaces: the node's, in which the agent runs, and those of pods.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    panic::resume_unwind,
    thread,
};

use nix::{
    errno::Errno,
    getsockopt_impl,
    ifaddrs::{InterfaceAddress, getifaddrs},
    sched::{CloneFlags, setns, unshare},
    sockopt_impl,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, getsockname, getsockopt, listen,
        setsockopt, socket, sockopt,
    },
};

/// `SO_NETNS_COOKIE` (Linux 5.14, commit e8b9eab99232), which is missing in the libc crate.
const SO_NETNS_COOKIE: libc::c_int = 71;

sockopt_impl!(
    /// Netns cookie of the network namespace of a socket.
    NetnsCookie, GetOnly, libc::SOL_SOCKET, SO_NETNS_COOKIE, u64
);

/// Name of the threads that enter namespaces.
pub(crate) const THREAD: &str = "imds-netns";

/// Property by which the BPF programs recognize the node's network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OwnNetns {
    /// Netns cookie of the namespace.
    Cookie(u64),
    /// The namespace is the initial one, whose cookie the programs can query.
    Initial,
}

impl OwnNetns {
    /// Returns the value for [`Policy::netns_cookie`](imds_ebpf_common::Policy::netns_cookie).
    pub const fn cookie(self) -> u64 {
        match self {
            Self::Cookie(cookie) => cookie,
            Self::Initial => 0,
        }
    }
}

/// Returns the identity of the calling thread's network namespace. Returns `None` if the kernel is too old to report
/// the cookie, and the namespace is not recognizable as the initial one.
pub fn identity() -> io::Result<Option<OwnNetns>> {
    // Process 1 of the machine is in the initial namespace. In a container, process 1 is the container's, whose
    // namespace must not be mistaken for the initial one.
    let is_initial = || {
        // Without CAP_SYS_PTRACE, the namespace of process 1 is unknown.
        let is_first =
            inode("/proc/1/ns/net").is_ok_and(|first| inode("/proc/thread-self/ns/net").ok() == Some(first));
        is_first && is_node_pid_namespace()
    };
    identify(cookie(), is_initial)
}

/// Returns the identity of a network namespace with this cookie.
fn identify(cookie: io::Result<u64>, is_initial: impl FnOnce() -> bool) -> io::Result<Option<OwnNetns>> {
    match cookie {
        Ok(cookie) => Ok(Some(OwnNetns::Cookie(cookie))),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            Ok(is_initial().then_some(OwnNetns::Initial))
        }
        Err(error) => Err(error),
    }
}

/// Reports whether the agent runs in the node's pid namespace, where kernel threads are visible.
pub fn is_node_pid_namespace() -> bool {
    fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm.trim() == "kthreadd")
}

/// Returns the inode number of the calling thread's network namespace, which is unique among existing namespaces.
pub fn this_inode() -> io::Result<u32> {
    // proc_inum is an unsigned int (include/linux/ns_common.h).
    u32::try_from(inode("/proc/thread-self/ns/net")?).map_err(io::Error::other)
}

/// Properties by which the datapath recognizes senders in a network namespace.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NetnsIdentity {
    /// Netns cookie; `None` before Linux 5.14.
    pub cookie: Option<u64>,
    /// Inode number of the namespace.
    pub inode: u64,
    /// Addresses of the interfaces, without those of loopback.
    pub addresses: BTreeSet<IpAddr>,
}

/// Reads the identity of the network namespace of the file `namespace`. Enters the namespace, which requires
/// `CAP_SYS_ADMIN`.
pub fn identity_of(namespace: &File) -> io::Result<NetnsIdentity> {
    let (cookie, addresses) = inside(namespace, || (cookie(), addresses()))?;
    let cookie = match cookie {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        cookie => Some(cookie?),
    };
    Ok(NetnsIdentity { cookie, inode: namespace.metadata()?.ino(), addresses: addresses? })
}

/// Returns the cookie of the network namespace of the file `namespace`; `None` before Linux 5.14.
pub fn cookie_of(namespace: &File) -> io::Result<Option<u64>> {
    match inside(namespace, cookie)? {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        cookie => cookie.map(Some),
    }
}

/// Largest number of connections that wait until the broker accepts them.
const BACKLOG: i32 = 64;

/// Opens a TCP listener in the network namespace of the file `namespace`, at the loopback address of the IP version of `endpoint`
/// and a port that the kernel chooses. Returns it with its port. Returns `None` if the namespace has another cookie.
pub fn listen_in(namespace: &File, expected: u64, endpoint: IpAddr) -> io::Result<Option<(OwnedFd, u16)>> {
    inside(
        namespace,
        || if cookie()? == expected { listen_on_loopback(endpoint).map(Some) } else { Ok(None) },
    )?
}

/// Buffer sizes of the connections of a listener, in bytes.
const SOCKET_BUFFER: usize = 16 * 1024;
/// Time after which the kernel ends a connection whose peer does not read, in milliseconds.
const STALLED_AFTER: u32 = 5000;

/// Ports for a pod without a free one in its `net.ipv4.ip_local_port_range`, which any pod may narrow. They are seldom used, and above the
/// usual range.
const FALLBACK_PORTS: RangeInclusive<u16> = 65_500..=65_531;

/// Binds a port of the usual range, or else one of [`FALLBACK_PORTS`].
fn bind_free_port(listener: &OwnedFd, address: IpAddr) -> nix::Result<()> {
    let bind_to = |port| bind(listener.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, port)));
    let mut bound = bind_to(0);
    for port in FALLBACK_PORTS {
        if bound != Err(Errno::EADDRINUSE) {
            break;
        }
        bound = bind_to(port);
    }
    bound
}

/// Without `SO_REUSEADDR`, which would let another socket of the pod bind the port of a listener that has just closed.
fn listen_on_loopback(endpoint: IpAddr) -> io::Result<(OwnedFd, u16)> {
    let (family, address): (_, IpAddr) = match endpoint {
        IpAddr::V4(_) => (AddressFamily::Inet, Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(_) => (AddressFamily::Inet6, Ipv6Addr::LOCALHOST.into()),
    };
    let listener = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind_free_port(&listener, address)?;
    // Accepted sockets inherit the limits. Without them, a pod that reads nothing fills kernel memory of the agent's cgroup.
    setsockopt(&listener, sockopt::SndBuf, &SOCKET_BUFFER)?;
    setsockopt(&listener, sockopt::RcvBuf, &SOCKET_BUFFER)?;
    setsockopt(&listener, sockopt::TcpUserTimeout, &STALLED_AFTER)?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    let bound: SockaddrStorage = getsockname(listener.as_raw_fd())?;
    let v4 = bound.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::port);
    let port = v4.or_else(|| bound.as_sockaddr_in6().map(nix::sys::socket::SockaddrIn6::port));
    port.map(|port| (listener, port)).ok_or_else(|| io::Error::other("the listener has no port"))
}

/// Returns the addresses of the interfaces in the calling thread's network namespace, without those of loopback.
pub fn addresses() -> io::Result<BTreeSet<IpAddr>> {
    let address = |interface: InterfaceAddress| {
        let storage = interface.address?;
        let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    Ok(getifaddrs()?.filter_map(address).filter(|address| !address.is_loopback()).collect())
}

fn inode(path: &str) -> io::Result<u64> {
    Ok(fs::metadata(path)?.ino())
}

fn cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
    Ok(getsockopt(&socket, NetnsCookie)?)
}

/// New network namespace that only a descriptor of this process keeps alive. Closing the descriptor deletes the
/// namespace with all its interfaces.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Creates a namespace, which requires `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Self)
        })
    }

    /// Returns the netns cookie. Requires Linux 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(cookie)?
    }

    /// Runs `work` in the namespace, on a separate thread, so that the caller's thread stays in its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        inside(&self.0, work)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs `work` in the network namespace of the file `namespace`. The thread ends afterwards, so that no other work runs
/// in that namespace by mistake.
fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(THREAD.to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_without_cookie_identify_only_the_initial_namespace() {
        let of = |errno: Option<i32>, is_initial| {
            let cookie = errno.map_or(Ok(7), |errno| Err(io::Error::from_raw_os_error(errno)));
            identify(cookie, || is_initial)
        };
        for is_initial in [true, false] {
            assert_eq!(of(None, is_initial).unwrap(), Some(OwnNetns::Cookie(7)));
            let initial = is_initial.then_some(OwnNetns::Initial);
            assert_eq!(of(Some(libc::ENOPROTOOPT), is_initial).unwrap(), initial);
            assert!(of(Some(libc::EMFILE), is_initial).is_err());
        }
    }
}
