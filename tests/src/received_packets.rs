//! Counts packets that arrive at the metadata service's side of the node's uplink.

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, PipeWriter},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{METADATA, METADATA_V6, Netns, PacketSocket, SERVICE, SERVICE_V6, measure::run_on};

/// The discard port, on which no server listens.
const BARRIER_PORT: u16 = 9;
const UDP: u8 = 17;
/// Number of veth pairs between a pod and the fabric. Packets wait in the CPU backlog once behind each pair.
const HOPS: usize = 2;
/// [`METADATA`] in the groups of an IPv6 address.
const METADATA_V4_SEGMENTS: [u16; 2] = [0xa9fe, 0xa9fe];
const RETRIES: u32 = 100;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const BUFFER: libc::c_int = 32 << 20;

/// Packets that arrived for the metadata service, of any protocol, malformed ones and retransmissions included. Counts
/// destinations that are its IPv4 address, its IPv6 address, or an IPv6 address that embeds the former.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReceivedPackets {
    by_source: BTreeMap<IpAddr, u64>,
    /// Packets that arrived faster than the counter read them, from any source to any destination.
    unread: u64,
}

impl ReceivedPackets {
    /// Returns the number of packets with this source address, spoofed or not.
    #[must_use]
    pub fn from(&self, source: impl Into<IpAddr>) -> u64 {
        self.by_source.get(&source.into()).copied().unwrap_or(0)
    }

    /// Returns the number of packets from all sources. The number can be too high if packets were dropped unread, never
    /// too low.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_source.values().sum::<u64>() + self.unread
    }
}

/// Reads packets in the background until dropped.
#[derive(Debug)]
pub(crate) struct Counter {
    shared: Arc<Shared>,
    /// Destination address of the marks.
    barrier: IpAddr,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    barrier_passed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    received_packets: ReceivedPackets,
    barriers: HashSet<u64>,
}

impl Counter {
    /// Starts to count arrivals on `interface` of `fabric`. Sends marks to `barrier`, [`SERVICE`] or [`SERVICE_V6`].
    pub(crate) fn start(fabric: &Netns, interface: &str, barrier: IpAddr) -> Self {
        let sockets = [libc::ETH_P_IP, libc::ETH_P_IPV6]
            .map(|protocol| PacketSocket::packets(fabric, interface, protocol));
        for socket in &sockets {
            socket.buffer(BUFFER);
        }
        let shared = Arc::new(Shared::default());
        let (stopped, stop) = io::pipe().expect("a pipe");
        let of_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let [v4, v6] = &sockets;
            // The socket that receives marks is read first: the other socket then already holds every packet that
            // arrived before the mark.
            let [of_v4, of_v6]: [(_, See); 2] = [(v4, State::see_v4), (v6, State::see_v6)];
            let order = if barrier.is_ipv4() { [of_v4, of_v6] } else { [of_v6, of_v4] };
            let mut fds =
                [stopped.as_fd(), v4.as_fd(), v6.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            loop {
                poll(&mut fds, PollTimeout::NONE).expect("poll");
                if fds[0].any() == Some(true) {
                    return;
                }
                of_thread.read_all(order);
            }
        });
        Self { shared, barrier, stop: Some(stop), thread: Some(thread) }
    }

    /// Returns the arrivals, including every packet that was sent before the call.
    ///
    /// Packets wait in per-CPU queues. The function therefore sends a mark from every CPU of the node to an unprotected
    /// address and waits until all marks have arrived.
    pub(crate) fn read(&self, node: &Netns) -> ReceivedPackets {
        let cpus = thread::available_parallelism().expect("number of CPUs").get();
        node.run(|| {
            let any: IpAddr = match self.barrier {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).expect("a UDP socket");
            for _ in 0..HOPS {
                for cpu in 0..cpus {
                    run_on(cpu);
                    self.pass_barrier(&socket);
                }
            }
        });
        self.shared.state.lock().expect("the reader has not panicked").received_packets.clone()
    }

    fn pass_barrier(&self, socket: &UdpSocket) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mark = NEXT.fetch_add(1, Ordering::Relaxed);
        let arrived = (0..RETRIES).any(|_| {
            // Sent repeatedly, because a full queue drops the mark.
            let sent = socket.send_to(&mark.to_be_bytes(), (self.barrier, BARRIER_PORT));
            sent.is_ok() && self.shared.wait_for(mark)
        });
        assert!(arrived, "the node's packets do not reach the fabric");
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Counts a packet of one address family.
type See = fn(&mut State, &[u8]);

impl Shared {
    /// Reads both sockets, in the order of the array.
    fn read_all(&self, sockets: [(&PacketSocket, See); 2]) {
        let mut buffer = [0; 128];
        let mut state = self.state.lock().expect("no reader panicked");
        for (socket, see) in sockets {
            while let Ok(packet) = socket.receive(&mut buffer) {
                see(&mut state, packet);
            }
            state.received_packets.unread += socket.take_dropped();
        }
        self.barrier_passed.notify_all();
    }

    fn wait_for(&self, mark: u64) -> bool {
        let state = self.state.lock().expect("the reader has not panicked");
        let is_missing = |state: &mut State| !state.barriers.remove(&mark);
        let waited = self.barrier_passed.wait_timeout_while(state, RETRY_INTERVAL, is_missing);
        !waited.expect("the reader has not panicked").1.timed_out()
    }
}

impl State {
    /// Reads fixed offsets only, so that malformed packets count too.
    fn see_v4(&mut self, packet: &[u8]) {
        let Some(&source) = packet.get(12..).and_then(<[u8]>::first_chunk::<4>) else { return };
        let Some(&destination) = packet.get(16..).and_then(<[u8]>::first_chunk::<4>) else { return };
        match Ipv4Addr::from(destination) {
            METADATA => self.count(Ipv4Addr::from(source)),
            SERVICE => self.barriers.extend(barrier_mark(packet.get(9), packet.get(22..))),
            _ => {}
        }
    }

    fn see_v6(&mut self, packet: &[u8]) {
        let Some(&source) = packet.get(8..).and_then(<[u8]>::first_chunk::<16>) else { return };
        let Some(&destination) = packet.get(24..).and_then(<[u8]>::first_chunk::<16>) else { return };
        match Ipv6Addr::from(destination) {
            SERVICE_V6 => self.barriers.extend(barrier_mark(packet.get(6), packet.get(42..))),
            destination if is_metadata_v6(destination) => self.count(Ipv6Addr::from(source)),
            _ => {}
        }
    }

    fn count(&mut self, source: impl Into<IpAddr>) {
        *self.received_packets.by_source.entry(source.into()).or_default() += 1;
    }
}

/// Reports whether the address is the metadata service's, or embeds its IPv4 address with the NAT64 (RFC 6052) or 6to4
/// (RFC 3056) prefix.
fn is_metadata_v6(destination: Ipv6Addr) -> bool {
    let [high, low] = METADATA_V4_SEGMENTS;
    destination == METADATA_V6
        || destination == Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low)
        || destination.segments()[..3] == [0x2002, high, low]
}

/// Returns the mark in a packet of this protocol. `rest` begins with the destination port.
fn barrier_mark(protocol: Option<&u8>, rest: Option<&[u8]>) -> Option<u64> {
    let rest = rest?;
    let to_barrier = protocol == Some(&UDP) && rest.get(..2)? == BARRIER_PORT.to_be_bytes();
    // Length and checksum lie between the port and the payload.
    let mark = rest.get(6..)?.first_chunk()?;
    to_barrier.then_some(u64::from_be_bytes(*mark))
}
