//! Network namespaces: the node's, in which the agent runs, and others.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    mem::size_of,
    net::{IpAddr, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    panic::resume_unwind,
    thread,
};

use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    sched::{CloneFlags, setns, unshare},
};

/// `SO_NETNS_COOKIE` (Linux 5.14, commit e8b9eab99232), which no library has yet.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Name of the threads that enter namespaces.
pub(crate) const THREAD: &str = "imds-netns";

/// How the programs can know the node's network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Identity {
    /// By its cookie.
    Cookie(u64),
    /// It is the initial one, whose cookie they can ask for.
    Initial,
}

impl Identity {
    /// As [`Policy::netns_cookie`](imds_ebpf_common::Policy::netns_cookie) has it.
    #[must_use]
    pub const fn cookie(self) -> u64 {
        match self {
            Self::Cookie(cookie) => cookie,
            Self::Initial => 0,
        }
    }
}

/// The identity of the calling thread's network namespace; `None` where an older kernel has no cookie to tell and it
/// can't be seen to be the initial one.
pub fn identity() -> io::Result<Option<Identity>> {
    match cookie() {
        Ok(cookie) => Ok(Some(Identity::Cookie(cookie))),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            // The first process of the machine is in the initial namespace, of a container in the container's: where
            // this is a container's, the agent must not take it for the machine's.
            let is_first = inode("/proc/1/ns/net")? == inode("/proc/thread-self/ns/net")?;
            Ok((is_first && is_node_pid_namespace()).then_some(Identity::Initial))
        }
        Err(error) => Err(error),
    }
}

/// Whether the processes of the whole machine can be seen: then the kernel's own are among them.
#[must_use]
pub fn is_node_pid_namespace() -> bool {
    fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm.trim() == "kthreadd")
}

/// Inode number of the calling thread's network namespace, which is unique among those that exist.
pub fn this_inode() -> io::Result<u32> {
    // proc_inum is an unsigned int (include/linux/ns_common.h).
    u32::try_from(inode("/proc/thread-self/ns/net")?).map_err(io::Error::other)
}

/// Properties of a network namespace by which the datapath knows its senders.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NetnsIdentity {
    /// Cookie of the namespace; `None` before Linux 5.14.
    pub cookie: Option<u64>,
    /// Addresses of its interfaces, without those of loopback.
    pub addresses: BTreeSet<IpAddr>,
}

/// Reads the identity of the network namespace that `namespace` is a file of. Enters it, which takes `CAP_SYS_ADMIN`.
pub fn identity_of(namespace: &File) -> io::Result<NetnsIdentity> {
    let (cookie, addresses) = inside(namespace, || (cookie(), addresses()))?;
    let cookie = match cookie {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        cookie => Some(cookie?),
    };
    Ok(NetnsIdentity { cookie, addresses: addresses? })
}

/// Addresses of the interfaces in the calling thread's network namespace, without those of loopback.
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
    let mut cookie = 0_u64;
    #[expect(clippy::cast_possible_truncation, reason = "8")]
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is as long as the length says, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// A new network namespace that only a descriptor of this process holds: it is gone, with all in it, when that is closed.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Makes one, which takes `CAP_SYS_ADMIN`.
    pub fn new() -> io::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Self)
        })
    }

    /// Cookie of the namespace, which Linux 5.14 and newer report.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(cookie)?
    }

    /// Runs `work` in it, on a thread of its own: the caller's never changes.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        inside(&self.0, work)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs `work` in the network namespace that `namespace` is a file of. The thread ends with it: no other work can come to run
/// in there.
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
