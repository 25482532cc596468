//! Counts what arrives at the metadata service's side of the node's uplink.

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, PipeWriter},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::{METADATA, Netns, PacketSocket, SERVICE};

/// The discard port: nothing listens there.
const BARRIER_PORT: u16 = 9;
const UDP: u8 = 17;
/// Between the pod and the fabric a packet waits in a CPU's backlog twice: behind either veth pair.
const HOPS: usize = 2;
const RETRIES: u32 = 100;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const BUFFER: libc::c_int = 32 << 20;

/// IPv4 packets that arrived for the metadata service, of any protocol and however broken, retransmissions included.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Arrivals {
    by_source: BTreeMap<Ipv4Addr, u64>,
    /// Arrived faster than they could be read: for somebody, by somebody.
    unread: u64,
}

impl Arrivals {
    /// How many came with this source address, forged or not.
    #[must_use]
    pub fn from(&self, source: Ipv4Addr) -> u64 {
        self.by_source.get(&source).copied().unwrap_or(0)
    }

    /// How many came from all sources. Counts too many where packets came too fast to be looked at, never too few.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_source.values().sum::<u64>() + self.unread
    }
}

/// Reads packets in the background until dropped.
#[derive(Debug)]
pub(crate) struct Counter {
    shared: Arc<Shared>,
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
    arrivals: Arrivals,
    barriers: HashSet<u64>,
}

impl Counter {
    /// Counts what arrives on `interface` of `fabric`.
    pub(crate) fn start(fabric: &Netns, interface: &str) -> Self {
        let socket = PacketSocket::ipv4(fabric, interface);
        socket.buffer(BUFFER);
        let shared = Arc::new(Shared::default());
        let (stopped, stop) = io::pipe().expect("a pipe");
        let of_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let mut fds = [
                PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            ];
            loop {
                poll(&mut fds, PollTimeout::NONE).expect("poll");
                if fds[1].any() == Some(true) {
                    return;
                }
                of_thread.read_all(&socket);
            }
        });
        Self { shared, stop: Some(stop), thread: Some(thread) }
    }

    /// What arrived, with everything that was sent before the call.
    ///
    /// Packets wait in per-CPU queues, so marks are sent from every CPU of the node, to an address that is not guarded,
    /// and waited for.
    pub(crate) fn read(&self, node: &Netns) -> Arrivals {
        let cpus = thread::available_parallelism().expect("number of CPUs").get();
        node.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a UDP socket");
            for _ in 0..HOPS {
                for cpu in 0..cpus {
                    run_on(cpu);
                    self.pass_barrier(&socket);
                }
            }
        });
        self.shared.state.lock().expect("the reader is well").arrivals.clone()
    }

    fn pass_barrier(&self, socket: &UdpSocket) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mark = NEXT.fetch_add(1, Ordering::Relaxed);
        let arrived = (0..RETRIES).any(|_| {
            // Repeated, because a full queue drops it.
            let sent = socket.send_to(&mark.to_be_bytes(), SocketAddrV4::new(SERVICE, BARRIER_PORT));
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

impl Shared {
    fn read_all(&self, socket: &PacketSocket) {
        let mut buffer = [0; 128];
        let mut state = self.state.lock().expect("no reader panicked");
        while let Ok(packet) = socket.receive(&mut buffer) {
            state.see(packet);
        }
        state.arrivals.unread += socket.take_dropped();
        self.barrier_passed.notify_all();
    }

    fn wait_for(&self, mark: u64) -> bool {
        let state = self.state.lock().expect("the reader is well");
        let is_missing = |state: &mut State| !state.barriers.remove(&mark);
        let waited = self.barrier_passed.wait_timeout_while(state, RETRY_INTERVAL, is_missing);
        !waited.expect("the reader is well").1.timed_out()
    }
}

impl State {
    /// Looks at fixed places only: what is broken counts too.
    fn see(&mut self, packet: &[u8]) {
        let Some(&source) = packet.get(12..).and_then(<[u8]>::first_chunk::<4>) else { return };
        let Some(&destination) = packet.get(16..).and_then(<[u8]>::first_chunk::<4>) else { return };
        match Ipv4Addr::from(destination) {
            METADATA => *self.arrivals.by_source.entry(source.into()).or_default() += 1,
            SERVICE => self.barriers.extend(barrier_mark(packet)),
            _ => {}
        }
    }
}

fn barrier_mark(packet: &[u8]) -> Option<u64> {
    let to_barrier = packet.get(9) == Some(&UDP) && packet.get(22..24)? == BARRIER_PORT.to_be_bytes();
    let mark = packet.get(28..)?.first_chunk()?;
    to_barrier.then_some(u64::from_be_bytes(*mark))
}

fn run_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU of this machine");
    sched_setaffinity(Pid::from_raw(0), &set).expect("sched_setaffinity");
}
