//! What is made for the proof and is gone after it: a network namespace with the pod's end of a veth pair, and a TAP device
//! as an interface of the node's own. Neither has an address or a route, so that nothing on the node can clash with them.
//!
//! The namespace is held by a descriptor alone, and the TAP device by another: both go with this process, however it ends,
//! and the pair goes with the namespace.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    process,
};

use imds_ebpf_common::TcHook;
use nix::net::if_::if_nametoindex;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoVeth},
    },
};

use super::{VerifyError, wire::PacketSocket};
use crate::{
    datapath::{bpf, clsact, pins::AttachPoint},
    node::{
        netlink::{Netlink, NetlinkError},
        netns::Namespace,
    },
};

/// How the names begin of all that is made; the process id follows.
pub(crate) const PREFIX: &str = "imdsv";
/// The pod's end of the pair, in the namespace.
const POD_END: &str = "eth0";

/// An interface of the node's.
#[derive(Debug)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) ifindex: u32,
}

/// What has an interface that was made for the proof.
pub(super) trait Device {
    fn interface(&self) -> &Interface;

    /// Has it receive a frame.
    fn send(&self, frame: &[u8]) -> io::Result<()>;
}

/// A pod that has nothing but a link.
#[derive(Debug)]
pub(super) struct Pod {
    namespace: Namespace,
    /// The node's end of its link.
    interface: Interface,
    frames: PacketSocket,
}

impl Pod {
    pub(super) async fn new(netlink: &Netlink) -> Result<Self, VerifyError> {
        let namespace = Namespace::new().map_err(VerifyError::Namespace)?;
        let name = format!("{PREFIX}{}", process::id());
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(POD_END)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(&name, POD_END)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up()
            .build();
        let request = RouteNetlinkMessage::NewLink(pair);
        netlink
            .acknowledged(format!("making the veth pair {name}"), request, NLM_F_CREATE | NLM_F_EXCL)
            .await?;
        let open = || {
            set_pod_end_up()?;
            PacketSocket::open(POD_END).map_err(VerifyError::io("open", POD_END))
        };
        let frames = namespace.run(open).map_err(VerifyError::Namespace)??;
        let ifindex = index(&name)?;
        Ok(Self { namespace, interface: Interface { name, ifindex }, frames })
    }

    /// Runs `work` in the namespace.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, VerifyError> {
        self.namespace.run(work).map_err(VerifyError::Namespace)
    }

    /// Removes the pair at once. Without this it goes when the kernel comes to it.
    pub(super) async fn remove(self, netlink: &Netlink) -> Result<(), NetlinkError> {
        let Interface { name, ifindex } = &self.interface;
        let link = LinkMessageBuilder::<LinkUnspec>::new().index(*ifindex).build();
        let call = format!("removing the veth pair {name}");
        match netlink.acknowledged(call, RouteNetlinkMessage::DelLink(link), 0).await {
            Err(error) if error.errno() != Some(libc::ENODEV) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl Device for Pod {
    fn interface(&self) -> &Interface {
        &self.interface
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.frames.send(frame)
    }
}

/// Sets up the pod's end, from within the namespace: the kernel takes no request to do so before both ends are there.
fn set_pod_end_up() -> Result<(), VerifyError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(VerifyError::io("start", "a runtime"))?;
    runtime.block_on(async { Ok(set_up(&Netlink::connect()?, index(POD_END)?).await?) })
}

async fn set_up(netlink: &Netlink, ifindex: u32) -> Result<(), NetlinkError> {
    let link = LinkMessageBuilder::<LinkUnspec>::new().index(ifindex).up().build();
    let call = format!("setting up interface {ifindex}");
    netlink.acknowledged(call, RouteNetlinkMessage::SetLink(link), 0).await
}

/// An interface of the node's own that sends every frame back that it receives: as what the node forwards.
#[derive(Debug)]
pub(super) struct Loop {
    interface: Interface,
    device: File,
    /// Detached when closed; a filter goes with the device.
    _link: Option<OwnedFd>,
}

impl Loop {
    pub(super) async fn new(netlink: &Netlink) -> Result<Self, VerifyError> {
        let name = format!("{PREFIX}{}t", process::id());
        let device = make_tap(&name).map_err(VerifyError::io("make a TAP device with", "/dev/net/tun"))?;
        let ifindex = index(&name)?;
        let link = send_back(netlink, ifindex).await?;
        set_up(netlink, ifindex).await?;
        Ok(Self { interface: Interface { name, ifindex }, device, _link: link })
    }
}

impl Device for Loop {
    fn interface(&self) -> &Interface {
        &self.interface
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.device).write_all(frame)
    }
}

/// Has an interface send what it receives, at the end of its ingress hook or as a filter.
async fn send_back(netlink: &Netlink, ifindex: u32) -> Result<Option<OwnedFd>, VerifyError> {
    let program = bpf::load_redirect(ifindex).map_err(VerifyError::io("load", "a program"))?;
    if bpf::has_tcx() {
        let link = bpf::link_create_first(&program, ifindex, bpf::Direction::Ingress);
        return Ok(Some(link.map_err(VerifyError::io("attach", "a program"))?));
    }
    clsact::ensure_qdisc(netlink, ifindex).await?;
    let spot = AttachPoint { ifindex, edge: TcHook::FromPod };
    clsact::attach_first(netlink, spot, program.as_fd(), "verify").await?;
    Ok(None)
}

fn index(name: &str) -> Result<u32, VerifyError> {
    if_nametoindex(name).map_err(|errno| VerifyError::io("find", name)(errno.into()))
}

/// Makes a TAP device that goes when the descriptor is closed.
fn make_tap(name: &str) -> io::Result<File> {
    // Reading is never waited for, and never needed.
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            #[expect(clippy::cast_possible_truncation, reason = "flags of 16 bits")]
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    // SAFETY: the request is a struct ifreq, as this command wants it, and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}
