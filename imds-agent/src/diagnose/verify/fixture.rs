//! Devices that exist during a run: a network namespace with one end of a veth pair, like a pod, and a TAP device.
//!
//! A descriptor of this process owns the namespace, and another one the TAP device. The kernel removes both when the process
//! ends, and with the namespace the pair and its routes.

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

use super::{
    VerifyError,
    frames::{Mac, PacketSocket},
    verify_report::Skip,
};
use crate::{
    datapath::{attach::clsact, pin::dir::AttachPoint, sys::bpf},
    node::{
        link::VERIFY_PREFIX,
        netlink::{Netlink, NetlinkError},
        netns::Namespace,
    },
};

const POD_END: &str = "eth0";

#[derive(Clone, Debug)]
pub(crate) struct LinkName {
    pub(crate) name: String,
    pub(crate) ifindex: u32,
}

/// A device whose frames the node receives.
pub(crate) trait TestDevice {
    fn interface(&self) -> &LinkName;

    /// Sends a frame that the node receives from this device.
    fn send(&self, frame: &[u8]) -> io::Result<()>;
}

/// A network namespace that is linked to the node like a pod.
#[derive(Debug)]
pub(crate) struct TestPod {
    namespace: Namespace,
    /// Host-side interface of the pair.
    interface: LinkName,
    frames: io::Result<PacketSocket>,
}

impl TestPod {
    /// MAC address of the host-side interface. A bridge without an address of its own takes the lowest one of its ports. This
    /// one is too high to be chosen.
    pub(crate) const HOST_MAC: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xfe];
    pub(crate) const POD_MAC: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xfd];

    pub(crate) async fn new(netlink: &Netlink) -> Result<Self, VerifyError> {
        let namespace = Namespace::new().map_err(VerifyError::Namespace)?;
        let name = format!("{VERIFY_PREFIX}{}", process::id());
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(POD_END)
            .address(Self::POD_MAC.to_vec())
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(&name, POD_END)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .address(Self::HOST_MAC.to_vec())
            .up()
            .build();
        let request = RouteNetlinkMessage::NewLink(pair);
        netlink
            .acknowledged(
                format!("failed to create the veth pair {name}"),
                request,
                NLM_F_CREATE | NLM_F_EXCL,
            )
            .await?;
        let open = || {
            set_pod_end_up()?;
            Ok::<_, VerifyError>(PacketSocket::open(POD_END))
        };
        let frames = namespace.run(open).map_err(VerifyError::Namespace)??;
        let ifindex = index(&name)?;
        Ok(Self { namespace, interface: LinkName { name, ifindex }, frames })
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, VerifyError> {
        self.namespace.run(work).map_err(VerifyError::Namespace)
    }

    /// Returns the cookie of the namespace; `None` if the kernel does not report it.
    pub(crate) fn cookie(&self) -> Option<u64> {
        self.namespace.cookie().ok()
    }

    /// Returns why the pod can't send frames, if it can't.
    pub(crate) fn obstacle(&self) -> Option<Skip> {
        let error = self.frames.as_ref().err()?;
        Some(Skip::new(format!("failed to open a packet socket, which needs CAP_NET_RAW: {error}")))
    }

    pub(crate) async fn join_bridge(
        &self,
        netlink: &Netlink,
        bridge: u32,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        // A bridge without an MTU of its own takes the lowest one of its ports.
        let link = LinkMessageBuilder::<LinkUnspec>::new().index(self.interface.ifindex).mtu(mtu);
        let link = link.controller(bridge).build();
        let call = format!("failed to add {} to bridge {bridge}", self.interface.name);
        netlink.acknowledged(call, RouteNetlinkMessage::SetLink(link), 0).await
    }

    pub(crate) async fn leave_bridge(&self, netlink: &Netlink) -> Result<(), NetlinkError> {
        let link =
            LinkMessageBuilder::<LinkUnspec>::new().index(self.interface.ifindex).nocontroller().build();
        let call = format!("failed to remove {} from its bridge", self.interface.name);
        netlink.acknowledged(call, RouteNetlinkMessage::SetLink(link), 0).await
    }

    /// Removes the pair immediately. The kernel would remove it some time after the process ends.
    pub(crate) async fn remove(self, netlink: &Netlink) -> Result<(), NetlinkError> {
        let LinkName { name, ifindex } = &self.interface;
        let link = LinkMessageBuilder::<LinkUnspec>::new().index(*ifindex).build();
        let call = format!("failed to remove the veth pair {name}");
        match netlink.acknowledged(call, RouteNetlinkMessage::DelLink(link), 0).await {
            Err(error) if error.errno() != Some(libc::ENODEV) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl TestDevice for TestPod {
    fn interface(&self) -> &LinkName {
        &self.interface
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        match &self.frames {
            Ok(frames) => frames.send(frame),
            Err(error) => Err(error.kind().into()),
        }
    }
}

/// Sets up the pod's end, from within the namespace: the kernel accepts no such request before both ends exist.
fn set_pod_end_up() -> Result<(), VerifyError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(VerifyError::io("start", "a runtime"))?;
    runtime.block_on(async { Ok(set_up(&Netlink::connect()?, index(POD_END)?).await?) })
}

async fn set_up(netlink: &Netlink, ifindex: u32) -> Result<(), NetlinkError> {
    let link = LinkMessageBuilder::<LinkUnspec>::new().index(ifindex).up().build();
    let call = format!("failed to set up interface {ifindex}");
    netlink.acknowledged(call, RouteNetlinkMessage::SetLink(link), 0).await
}

/// A TAP device of the node that sends out every frame that it receives, like a packet that the node forwards.
#[derive(Debug)]
pub(crate) struct LoopbackTap {
    interface: LinkName,
    device: File,
    /// Detached when closed; a filter goes with the device.
    _link: Option<OwnedFd>,
}

impl LoopbackTap {
    pub(crate) async fn new(netlink: &Netlink) -> Result<Self, Skip> {
        let name = format!("{VERIFY_PREFIX}{}t", process::id());
        let device = make_tap(&name);
        let device = device.map_err(|error| {
            Skip::new(format!("failed to create a TAP device with /dev/net/tun: {error}"))
        })?;
        Self::finish(netlink, name, device).await.map_err(|error| Skip::new(error.in_full()))
    }

    async fn finish(netlink: &Netlink, name: String, device: File) -> Result<Self, VerifyError> {
        let ifindex = index(&name)?;
        let link = send_back(netlink, ifindex).await?;
        set_up(netlink, ifindex).await?;
        Ok(Self { interface: LinkName { name, ifindex }, device, _link: link })
    }
}

impl TestDevice for LoopbackTap {
    fn interface(&self) -> &LinkName {
        &self.interface
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.device).write_all(frame)
    }
}

/// Makes an interface send each frame that it receives.
async fn send_back(netlink: &Netlink, ifindex: u32) -> Result<Option<OwnedFd>, VerifyError> {
    let program = bpf::load_redirect(ifindex).map_err(VerifyError::io("load", "a program"))?;
    if bpf::has_tcx() {
        let link = bpf::link_create_first(&program, ifindex, bpf::MprogHook::TcxIngress);
        return Ok(Some(link.map_err(VerifyError::io("attach", "a program"))?));
    }
    clsact::ensure_qdisc(netlink, ifindex).await?;
    let point = AttachPoint { ifindex, hook: TcHook::FromPod };
    clsact::attach_first(netlink, point, program.as_fd(), "verify").await?;
    Ok(None)
}

fn index(name: &str) -> Result<u32, VerifyError> {
    if_nametoindex(name).map_err(|errno| VerifyError::io("find", name)(errno.into()))
}

/// Creates a TAP device that the kernel removes when the descriptor is closed.
fn make_tap(name: &str) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            #[expect(clippy::cast_possible_truncation, reason = "flags of 16 bits")]
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`; `request` is one, and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}
