//! What the pod sends.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    thread::sleep,
    time::{Duration, Instant},
};

use imds_tests::{METADATA, METADATA_V6, Pod, SERVICE, SERVICE_V6, World, measure::run_on};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};

use crate::guard::Guard;

/// Packets that are measured together, of which a turn has some: what else the machine does then falls on few.
pub(crate) const PACKETS: u32 = 2_000;
pub(crate) const BATCHES: usize = 10;
/// The one of AKS' rule.
const PORT: u16 = 80;
/// The sender's, and so that of all that its packets cause.
const CPU: usize = 1;
/// A frame of 64 bytes by IPv4.
const PAYLOAD: [u8; 22] = [0; 22];

/// What is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Traffic {
    DeniedV4,
    DeniedV6,
    ConnectedV4,
    ConnectedV6,
    UnconnectedV4,
    UnconnectedV6,
}

impl Traffic {
    pub(crate) const ALL: [Self; 6] = [
        Self::DeniedV4,
        Self::DeniedV6,
        Self::ConnectedV4,
        Self::ConnectedV6,
        Self::UnconnectedV4,
        Self::UnconnectedV6,
    ];

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::DeniedV4 => "### To the metadata service, IPv4",
            Self::DeniedV6 => "### To the metadata service, IPv6",
            Self::ConnectedV4 => "### To anywhere else, IPv4",
            Self::ConnectedV6 => "### To anywhere else, IPv6",
            Self::UnconnectedV4 => {
                "### To anywhere else, IPv4, by sendto(2) on a socket that is not connected"
            }
            Self::UnconnectedV6 => {
                "### To anywhere else, IPv6, by sendto(2) on a socket that is not connected"
            }
        }
    }

    /// What guards are compared with.
    pub(crate) const fn baselines(self) -> &'static [Guard] {
        if self.is_denied() {
            &[Guard::DropAll, Guard::AksFilter, Guard::AksMangle]
        } else {
            &[Guard::Nothing, Guard::EmptyAll, Guard::Conntrack]
        }
    }

    const fn is_denied(self) -> bool {
        matches!(self, Self::DeniedV4 | Self::DeniedV6)
    }

    fn destination(self) -> SocketAddr {
        let address: IpAddr = match self {
            Self::DeniedV4 => METADATA.into(),
            Self::DeniedV6 => METADATA_V6.into(),
            Self::ConnectedV4 | Self::UnconnectedV4 => SERVICE.into(),
            Self::ConnectedV6 | Self::UnconnectedV6 => SERVICE_V6.into(),
        };
        (address, PORT).into()
    }
}

/// The sender's sockets and the receiver's.
pub(crate) struct Pair<'w> {
    world: &'w World,
    pod: &'w Pod,
    /// Full, so that what arrives goes all the way to it and no further.
    _sink: UdpSocket,
}

impl<'w> Pair<'w> {
    pub(crate) fn new(world: &'w World, pod: &'w Pod) -> Self {
        let sink = world.fabric.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))).expect("a UDP socket");
        setsockopt(&sink, RcvBuf, &1).expect("set a buffer's size");
        Self { world, pod, _sink: sink }
    }

    /// Nanoseconds that a packet takes, its sending and all that it causes, in the best of a turn's batches.
    pub(crate) fn cost(&self, traffic: Traffic) -> f64 {
        self.world.in_cgroup(|| self.pod.netns.run(|| in_pod(traffic)))
    }
}

fn in_pod(traffic: Traffic) -> f64 {
    run_on(CPU);
    let destination = traffic.destination();
    let any: IpAddr = if destination.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).expect("a UDP socket");
    let is_connected = matches!(traffic, Traffic::ConnectedV4 | Traffic::ConnectedV6);
    if is_connected {
        socket.connect(destination).expect("connect a UDP socket");
    }
    let send = |count| {
        for _ in 0..count {
            // Refused or not.
            let _ = if is_connected { socket.send(&PAYLOAD) } else { socket.send_to(&PAYLOAD, destination) };
        }
    };
    // Not measured.
    send(PACKETS);
    let batches = (0..BATCHES).map(|_| {
        loop {
            let lost = lost_in_backlog();
            let start = Instant::now();
            send(PACKETS);
            let took = start.elapsed().as_secs_f64() * 1e9 / f64::from(PACKETS);
            if lost == lost_in_backlog() {
                return took;
            }
            // The machine did something else there: not all was done for all packets.
            sleep(Duration::from_millis(10));
        }
    });
    batches.fold(f64::INFINITY, f64::min)
}

/// Packets that the CPU had no time for: the second column of its line (net/core/net-procfs.c).
fn lost_in_backlog() -> String {
    let lines = fs::read_to_string("/proc/net/softnet_stat").expect("read softnet_stat");
    let line = lines.lines().nth(CPU).expect("a line for each CPU");
    line.split(' ').nth(1).expect("several columns").to_owned()
}
