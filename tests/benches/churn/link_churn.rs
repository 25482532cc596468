//! Links of short-lived pods: veth pairs into a few network namespaces.

use std::{
    io::{self, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    process::{Child, ChildStdin, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use imds_tests::Netns;
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
        socket, sockopt,
    },
    time::TimeVal,
};

/// Number of pod network namespaces, and of links at a time.
pub(crate) const NAMESPACES: u32 = 50;
/// Index of the first link. Later links have consecutive indices, so that events identify them.
const FIRST_INDEX: u32 = 1_000_000;
/// Time limit for making one link.
const TIMEOUT: TimeVal = TimeVal::new(10, 0);
/// `RTMGRP_LINK` of include/uapi/linux/rtnetlink.h.
const GROUPS: u32 = 1;
const NEW_LINK: u16 = 16;
const IFF_UP: u32 = 1;

/// A link that the benchmark created.
#[derive(Clone, Debug)]
pub(crate) struct MadeLink {
    /// Name of the host-side interface.
    pub(crate) name: String,
    /// Time of the kernel's first event for the link.
    pub(crate) announced: Instant,
    /// Milliseconds from the request until the link was up.
    pub(crate) took: f64,
}

/// Creates links and deletes earlier ones.
#[derive(Debug)]
pub(crate) struct Churn<'n> {
    /// One `ip` process for all requests.
    ip: Child,
    commands: ChildStdin,
    events: OwnedFd,
    namespaces: &'n [Netns],
}

impl<'n> Churn<'n> {
    /// Prepares a node for links into `namespaces`.
    pub(crate) fn new(node: &Netns, namespaces: &'n [Netns]) -> Self {
        let mut ip = node.command("ip");
        let mut ip = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("start ip");
        let commands = ip.stdin.take().expect("a pipe");
        let events = node.run(listen).expect("listen to events of links");
        Self { ip, commands, events, namespaces }
    }

    /// Creates `count` links, one per `interval`, and deletes all of them.
    pub(crate) fn run(mut self, count: u32, interval: Duration) -> Vec<MadeLink> {
        let start = Instant::now();
        let mut made = Vec::new();
        for number in 0..count + NAMESPACES {
            if let Some(number) = number.checked_sub(NAMESPACES) {
                writeln!(self.commands, "link del churn{number}").expect("ask ip");
            }
            if number < count {
                made.push(self.make(number));
                sleep((start + interval * (number + 1)).saturating_duration_since(Instant::now()));
            }
        }
        drop(self.commands);
        let ended = self.ip.wait().expect("wait for ip");
        assert!(ended.success(), "ip: {ended}");
        made
    }

    fn make(&mut self, number: u32) -> MadeLink {
        let netns = self.namespaces[(number % NAMESPACES) as usize].name();
        let (name, index) = (format!("churn{number}"), FIRST_INDEX + number);
        let start = Instant::now();
        let add = format!("link add {name} index {index} type veth peer name eth0 netns {netns}");
        writeln!(self.commands, "{add}\nlink set {name} up").expect("ask ip");
        let mut announced = None;
        let mut buffer = vec![0; 32768];
        loop {
            let length = recv(self.events.as_raw_fd(), &mut buffer, MsgFlags::empty())
                .unwrap_or_else(|error| panic!("no event of {name}: {error}"));
            let now = Instant::now();
            for (_, flags) in new_links(&buffer[..length]).into_iter().filter(|&(found, _)| found == index) {
                let announced = *announced.get_or_insert(now);
                if flags & IFF_UP != 0 {
                    let took = now.duration_since(start).as_secs_f64() * 1e3;
                    return MadeLink { name, announced, took };
                }
            }
        }
    }
}

fn listen() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkRoute;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TIMEOUT)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(fd)
}

/// Returns the indices and flags of the new links in a datagram. A message starts with the 16 bytes of struct nlmsghdr,
/// whose length and type come first. struct ifinfomsg follows, with the index at byte 4 and the flags at byte 8.
fn new_links(mut rest: &[u8]) -> Vec<(u32, u32)> {
    let mut links = Vec::new();
    while let Some(length) = rest.first_chunk().map(|length| u32::from_ne_bytes(*length))
        && let Some(message) = rest.get(..length as usize)
        && let Some(header) = message.first_chunk::<28>()
    {
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if u16::from_ne_bytes([header[4], header[5]]) == NEW_LINK {
            links.push((word(20), word(24)));
        }
        rest = rest.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    links
}
