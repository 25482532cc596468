//! What the pod sends.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::{self, sleep},
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
/// Of the server whose answer is what it was asked.
const ECHO_PORT: u16 = 7;
/// Exchanges with it that are measured together.
const EXCHANGES: u32 = 500;
/// Of the server that reads, and says so once it has read as much as is measured together.
const DISCARD_PORT: u16 = 9;
/// What it is sent at a time: the most that there is in a packet that is cut up later.
static PIECE: [u8; 1 << 16] = [0; 1 << 16];
const PIECES: u32 = 400;

/// What is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Traffic {
    DeniedV4,
    DeniedV6,
    ConnectedV4,
    ConnectedV6,
    UnconnectedV4,
    UnconnectedV6,
    Exchange,
    Stream,
}

impl Traffic {
    pub(crate) const ALL: [Self; 8] = [
        Self::DeniedV4,
        Self::DeniedV6,
        Self::ConnectedV4,
        Self::ConnectedV6,
        Self::UnconnectedV4,
        Self::UnconnectedV6,
        Self::Exchange,
        Self::Stream,
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
            Self::Exchange => "### With anywhere else, a question and its answer by TCP",
            Self::Stream => "### To anywhere else, as much as there is by TCP",
        }
    }

    /// What is measured.
    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Exchange => "an exchange",
            Self::Stream => "64 KiB",
            _ => "a packet",
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

    /// Whether there is anything to measure: a connection takes somebody who answers.
    pub(crate) fn is_possible(self, guard: Guard) -> bool {
        guard != Guard::DropAll || !matches!(self, Self::Exchange | Self::Stream)
    }

    const fn is_denied(self) -> bool {
        matches!(self, Self::DeniedV4 | Self::DeniedV6)
    }

    fn destination(self) -> SocketAddr {
        let address: IpAddr = match self {
            Self::DeniedV4 => METADATA.into(),
            Self::DeniedV6 => METADATA_V6.into(),
            Self::ConnectedV4 | Self::UnconnectedV4 | Self::Exchange | Self::Stream => SERVICE.into(),
            Self::ConnectedV6 | Self::UnconnectedV6 => SERVICE_V6.into(),
        };
        let port = match self {
            Self::Exchange => ECHO_PORT,
            Self::Stream => DISCARD_PORT,
            _ => PORT,
        };
        (address, port).into()
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
        serve(world, ECHO_PORT, echo);
        serve(world, DISCARD_PORT, discard);
        Self { world, pod, _sink: sink }
    }

    /// Nanoseconds that a unit takes, its sending and all that it causes, in the best of a turn's batches.
    pub(crate) fn cost(&self, traffic: Traffic) -> f64 {
        self.world.in_cgroup(|| self.pod.netns.run(|| in_pod(traffic)))
    }
}

fn in_pod(traffic: Traffic) -> f64 {
    run_on(CPU);
    match traffic {
        Traffic::Exchange => by_tcp(traffic, EXCHANGES, |stream| {
            for _ in 0..EXCHANGES {
                let mut answer = PAYLOAD;
                stream.write_all(&PAYLOAD).and_then(|()| stream.read_exact(&mut answer)).expect("an answer");
            }
        }),
        Traffic::Stream => by_tcp(traffic, PIECES, |stream| {
            for _ in 0..PIECES {
                stream.write_all(&PIECE).expect("send to a server that reads");
            }
            stream.read_exact(&mut [0]).expect("that it has read all");
        }),
        _ => by_udp(traffic),
    }
}

fn by_udp(traffic: Traffic) -> f64 {
    let destination = traffic.destination();
    let any: IpAddr = if destination.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).expect("a UDP socket");
    let is_connected = matches!(traffic, Traffic::ConnectedV4 | Traffic::ConnectedV6);
    if is_connected {
        socket.connect(destination).expect("connect a UDP socket");
    }
    let send = || {
        for _ in 0..PACKETS {
            // Refused or not.
            let _ = if is_connected { socket.send(&PAYLOAD) } else { socket.send_to(&PAYLOAD, destination) };
        }
    };
    // Not measured.
    send();
    best_of_batches(PACKETS, || (), |()| send())
}

/// Measures each batch on a connection of its own, so that the place of one connection in memory weighs little. The
/// window has grown by a batch that is not measured.
fn by_tcp(traffic: Traffic, count: u32, batch: impl Fn(&mut TcpStream)) -> f64 {
    let connect = || {
        let mut stream = TcpStream::connect(traffic.destination()).expect("connect to a server");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        batch(&mut stream);
        stream
    };
    best_of_batches(count, connect, |stream| batch(stream))
}

/// Nanoseconds of one of `count`, in the best of some batches, each after a `set_up` that is not measured.
fn best_of_batches<S>(count: u32, set_up: impl Fn() -> S, batch: impl Fn(&mut S)) -> f64 {
    let batches = (0..BATCHES).map(|_| {
        let mut state = set_up();
        loop {
            let lost = lost_in_backlog();
            let start = Instant::now();
            batch(&mut state);
            let took = start.elapsed().as_secs_f64() * 1e9 / f64::from(count);
            if lost == lost_in_backlog() {
                return took;
            }
            // The machine did something else there: not all was done for all packets.
            sleep(Duration::from_millis(10));
        }
    });
    batches.fold(f64::INFINITY, f64::min)
}

/// Has a thread serve one connection after another, for as long as this process runs.
fn serve(world: &World, port: u16, serve_one: fn(TcpStream) -> io::Result<()>) {
    let listener = world.fabric.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).expect("a listener");
    thread::spawn(move || {
        // Where the client is: the time of both counts.
        run_on(CPU);
        for stream in listener.incoming() {
            // It ends when the client goes.
            let _ = stream.and_then(serve_one);
        }
    });
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut question = PAYLOAD;
    loop {
        stream.read_exact(&mut question)?;
        stream.write_all(&question)?;
    }
}

fn discard(mut stream: TcpStream) -> io::Result<()> {
    let (mut buffer, mut read) = (vec![0; PIECE.len()], 0);
    loop {
        read += match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => length,
        };
        if read == PIECE.len() * PIECES as usize {
            stream.write_all(&[0])?;
            read = 0;
        }
    }
}

/// Packets that the CPU had no time for: the second column of its line (net/core/net-procfs.c).
fn lost_in_backlog() -> String {
    let lines = fs::read_to_string("/proc/net/softnet_stat").expect("read softnet_stat");
    let line = lines.lines().nth(CPU).expect("a line for each CPU");
    line.split(' ').nth(1).expect("several columns").to_owned()
}
