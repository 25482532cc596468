//! The last hook: a packet sink that counts and drops test packets, so that they do not leave the machine.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, OwnedFd},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya_obj::generated::bpf_map_type::{self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH};
use imds_ebpf_common::{TcHook, names::link_prefix};

use super::{VerifyError, sink_filter};
use crate::{
    datapath::{
        attach::clsact::TcFilter,
        pin::dir::{self, PinDir},
        sys::bpf,
    },
    diagnose::devices::Device,
    node::netlink::Netlink,
};

/// The packet sink at the egress of every interface through which packets leave the machine.
pub(crate) struct LastHook {
    counts: Array<MapData, u64>,
    cookies: HashMap<MapData, u64, u32>,
    marker: [u8; 4],
    next_id: u16,
    /// Links that detach the sink when they are closed.
    links: Vec<OwnedFd>,
    filtered: Vec<u32>,
}

impl LastHook {
    pub(crate) async fn attach(
        pins: &PinDir,
        netlink: &Netlink,
        exits: Vec<&Device>,
    ) -> Result<Self, VerifyError> {
        if exits.is_empty() {
            return Err(VerifyError::NoExit);
        }
        let marker = random().map_err(VerifyError::io("read", "/dev/urandom"))?;
        let counts = create_map(BPF_MAP_TYPE_ARRAY, size_of::<u32>(), size_of::<u64>())?;
        let cookies = create_map(BPF_MAP_TYPE_HASH, size_of::<u64>(), size_of::<u32>())?;
        let program = bpf::load_sink(marker, counts.fd().as_fd(), cookies.fd().as_fd());
        let program = program.map_err(VerifyError::io("load", "the packet sink"))?;
        let mut hook = Self {
            counts: Map::Array(counts).try_into().map_err(map_failed)?,
            cookies: Map::HashMap(cookies).try_into().map_err(map_failed)?,
            marker,
            next_id: 0,
            links: Vec::new(),
            filtered: Vec::new(),
        };
        for device in exits {
            if let Err(error) = hook.attach_to(pins, netlink, device, &program).await {
                hook.detach(netlink).await;
                return Err(error);
            }
        }
        Ok(hook)
    }

    async fn attach_to(
        &mut self,
        pins: &PinDir,
        netlink: &Netlink,
        device: &Device,
        program: &OwnedFd,
    ) -> Result<(), VerifyError> {
        let ifindex = device.link.index;
        let filters = sink_filter::remove(netlink, ifindex).await?;
        let agent = agents_link(pins, ifindex);
        let position = filters.iter().position(TcFilter::is_agent_filter);
        let link = match (agent, position.and_then(|position| filters.get(position..))) {
            (Some(agent), _) => bpf::link_create_after(program, ifindex, agent),
            (None, Some(filters)) => {
                if !sink_filter::add_after_agent(netlink, ifindex, filters, program.as_fd()).await? {
                    return Err(VerifyError::Bypassed(device.link.name.clone()));
                }
                self.filtered.push(ifindex);
                return Ok(());
            }
            (None, None) => bpf::link_create_first(program, ifindex, bpf::MprogHook::TcxEgress),
        };
        let subject = format!("the packet sink to egress of interface {ifindex}");
        self.links.push(link.map_err(VerifyError::io("attach", &subject))?);
        Ok(())
    }

    /// Returns the TCP sequence number that marks test segments.
    pub(crate) fn marker(&self) -> [u8; 4] {
        self.marker
    }

    /// Returns a number for a test packet, and sets its counter to zero. Numbers repeat once all are used.
    pub(crate) fn new_id(&mut self) -> u16 {
        self.next_id = (self.next_id + 1) % u16::try_from(bpf::MAX_SINK_IDS).unwrap_or(u16::MAX);
        if let Err(error) = self.counts.set(self.next_id.into(), 0, 0) {
            log::debug!("failed to reset the counter of a test packet: {error}");
        }
        self.next_id
    }

    /// Adds a socket, given by its cookie, whose segments the sink counts under `id`.
    pub(crate) fn expect_socket(&mut self, cookie: u64, id: u16) -> Result<(), VerifyError> {
        self.cookies.insert(cookie, u32::from(id), 0).map_err(map_failed)
    }

    /// Reports whether the test packet with this number arrived.
    pub(crate) fn has_received(&self, id: u16) -> bool {
        self.counts.get(&u32::from(id), 0).is_ok_and(|count| count > 0)
    }

    /// Detaches the sink. Without this call the kernel detaches links when the process ends, but not filters.
    pub(crate) async fn detach(&mut self, netlink: &Netlink) {
        self.links.clear();
        for ifindex in self.filtered.drain(..) {
            if let Err(error) = sink_filter::remove(netlink, ifindex).await {
                log::warn!("{error:#}");
            }
        }
    }
}

/// Returns the agent's TCX entry at egress of an interface, if it is attached there.
fn agents_link(pins: &PinDir, ifindex: u32) -> Option<bpf::HookEntry> {
    let pin = pins.named_link(&format!("{}{ifindex}", link_prefix(TcHook::NodeEgress)));
    let pinned = dir::link_at(&pin)?;
    let entries = bpf::entries(ifindex, bpf::MprogHook::TcxEgress).ok()?;
    entries.into_iter().find(|entry| entry.link == pinned.id)
}

fn create_map(map_type: bpf_map_type, key_size: usize, value_size: usize) -> Result<MapData, VerifyError> {
    let size = |size: usize| u32::try_from(size).unwrap_or_default();
    let map = aya_obj::Map::new_from_params(
        map_type as u32,
        size(key_size),
        size(value_size),
        bpf::MAX_SINK_IDS,
        0,
    );
    MapData::create(map, "imds_sink", None).map_err(map_failed)
}

fn map_failed(source: MapError) -> VerifyError {
    VerifyError::Map { map: "of the packet sink", source }
}

fn random() -> io::Result<[u8; 4]> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
