//! Floods of packets, as fast as one thread can send.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};

use crate::{
    Pod,
    packets::{self, UDP_PORT},
    probe::raw_socket,
};

/// Number of distinct packets of a SYN flood, which are sent in a loop.
const SYNS: u16 = 1024;

/// A running flood. Dropping it stops it.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Floods a closed port of `destination` with UDP datagrams from `pod`. With an echo server, late echoes would make
    /// the pod send ICMP errors.
    #[must_use]
    pub fn udp(pod: &Pod, destination: Ipv4Addr) -> Self {
        let socket = pod.netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("a UDP socket");
        Self::start(move || socket.send_to(b"flood", (destination, UDP_PORT)).is_ok())
    }

    /// Floods a closed port of `destination` with UDP datagrams from each pod in turn.
    #[must_use]
    pub fn udp_of_all(pods: &[Pod], destination: Ipv4Addr) -> Self {
        let open = |pod: &Pod| pod.netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
        let sockets: Vec<_> = pods.iter().map(|pod| open(pod).expect("a UDP socket")).collect();
        let mut next = (0..sockets.len()).cycle();
        Self::start(move || {
            let socket = &sockets[next.next().expect("an endless iterator")];
            socket.send_to(b"flood", (destination, UDP_PORT)).is_ok()
        })
    }

    /// Floods the HTTP port of `destination` with TCP SYN packets from `pod`, from many source ports.
    #[must_use]
    pub fn syn(pod: &Pod, destination: Ipv4Addr) -> Self {
        let socket = pod.netns.run(raw_socket).expect("a raw socket");
        let to = SockaddrIn::from(SocketAddrV4::new(destination, 0));
        let packets: Vec<_> = (0..SYNS)
            .map(|number| packets::syn(pod.address, destination, 10_000 + number, u32::from(number) << 16))
            .collect();
        let mut next = packets.into_iter().cycle();
        Self::start(move || {
            let packet = next.next().expect("an endless iterator");
            sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()).is_ok()
        })
    }

    /// Returns the number of packets that left the pod so far. Includes packets that were dropped later, not those that
    /// the pod's kernel refused.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops the flood and returns the number of packets that left the pod.
    pub fn stop(mut self) -> u64 {
        self.join();
        self.sent()
    }

    fn start(mut send_one: impl FnMut() -> bool + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                counter.fetch_add(u64::from(send_one()), Ordering::Relaxed);
            }
        });
        Self { stop, sent, thread: Some(thread) }
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.join();
    }
}
