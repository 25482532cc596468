//! Pods that come and go: links into a few namespaces, which are made and deleted as often as the kernel is asked to.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    process::{Child, ChildStdin, Stdio},
    thread::{self, sleep},
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

/// How many links are made.
pub(crate) const LINKS: u32 = 750;
/// Between two of them: 50 a second.
const INTERVAL: Duration = Duration::from_millis(20);
/// Into how many namespaces they lead, and how many there are at a time.
pub(crate) const NAMESPACES: u32 = 50;
/// How long it may take until one is guarded.
const PATIENCE: TimeVal = TimeVal::new(5, 0);
/// `RTMGRP_LINK` and `RTMGRP_TC` of include/uapi/linux/rtnetlink.h: new links, and new filters on them.
const GROUPS: u32 = 1 | 1 << 3;
const NEW_LINK: u16 = 16;
const NEW_FILTER: u16 = 44;

/// Links that come and go.
#[derive(Debug)]
pub(crate) struct Churn<'n> {
    node: &'n Netns,
    /// What makes them: one `ip` for all.
    ip: Child,
    commands: ChildStdin,
    namespaces: &'n [Netns],
}

impl<'n> Churn<'n> {
    pub(crate) fn new(node: &'n Netns, namespaces: &'n [Netns]) -> Self {
        let mut ip = node.command("ip");
        let mut ip = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("start ip");
        let commands = ip.stdin.take().expect("a pipe");
        Self { node, ip, commands, namespaces }
    }

    /// Makes and deletes them all. Returns for each how many milliseconds it took from the kernel's news of it to its guard.
    pub(crate) fn run(mut self) -> Vec<f64> {
        let listener = self.node.run(listen).expect("listen to news of links");
        let node = self.node;
        let took = thread::scope(|scope| {
            let follower = scope.spawn(|| node.run(|| follow(&listener)));
            let start = Instant::now();
            for number in 0..LINKS + NAMESPACES {
                if let Some(number) = number.checked_sub(NAMESPACES) {
                    writeln!(self.commands, "link del churn{number}").expect("ask ip");
                }
                if number < LINKS {
                    self.add(number);
                }
                sleep((start + INTERVAL * (number + 1)).saturating_duration_since(Instant::now()));
            }
            follower.join().expect("the follower is well")
        });
        drop(self.commands);
        let ended = self.ip.wait().expect("wait for ip");
        assert!(ended.success(), "ip: {ended}");
        took
    }

    fn add(&mut self, number: u32) {
        let netns = self.namespaces[(number % NAMESPACES) as usize].name();
        writeln!(
            self.commands,
            "link add churn{number} type veth peer name eth0 netns {netns}\nlink set churn{number} up"
        )
        .expect("ask ip");
    }
}

fn listen() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkRoute;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(fd)
}

/// For each new link, how many milliseconds there were between the kernel's news of it and that of its first filter.
fn follow(listener: &OwnedFd) -> Vec<f64> {
    let (mut came, mut took) = (BTreeMap::new(), BTreeMap::new());
    let mut buffer = vec![0; 32768];
    while took.len() < LINKS as usize {
        let length = recv(listener.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .unwrap_or_else(|error| panic!("{} links of {LINKS} have filters: {error}", took.len()));
        let now = Instant::now();
        for (kind, index) in messages(&buffer[..length]) {
            match kind {
                NEW_LINK => drop(came.entry(index).or_insert(now)),
                NEW_FILTER => {
                    if let Some(came) = came.get(&index) {
                        took.entry(index).or_insert(now.duration_since(*came).as_secs_f64() * 1e3);
                    }
                }
                _ => {}
            }
        }
    }
    took.into_values().collect()
}

/// Types and interface indices of a datagram's messages. In struct nlmsghdr the length and the type come first; behind its
/// 16 bytes, the index has the same place in struct ifinfomsg and struct tcmsg.
fn messages(mut rest: &[u8]) -> Vec<(u16, u32)> {
    let mut messages = Vec::new();
    while let Some(length) = rest.first_chunk().map(|length| u32::from_ne_bytes(*length))
        && let Some(message) = rest.get(..length as usize)
        && let Some(&[.., a, b, c, d]) = message.first_chunk::<24>()
    {
        messages.push((u16::from_ne_bytes([message[4], message[5]]), u32::from_ne_bytes([a, b, c, d])));
        rest = rest.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}
