//! Traffic that the pod sends.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use imds_tests::{METADATA, METADATA_V6, Pod, SERVICE, SERVICE_V6, TestEnv, measure::run_on};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};

use crate::restriction::Restriction;

/// Number of packets in one batch. A turn has several batches, so that other load of the machine disturbs few of them.
pub(crate) const PACKETS: u32 = 2_000;
pub(crate) const BATCHES: usize = 10;
/// Destination port of AKS' rule.
const PORT: u16 = 80;
/// CPU of the sender, and thereby of all work that its packets cause.
const CPU: usize = 1;
/// Payload of an IPv4 frame of 64 bytes.
const PAYLOAD: [u8; 22] = [0; 22];
/// Port of the server that echoes its input.
const ECHO_PORT: u16 = 7;
/// Number of request-response exchanges in one batch.
const EXCHANGES: u32 = 500;
/// Port of the server that discards its input and acknowledges each complete batch.
const DISCARD_PORT: u16 = 9;
/// Data of one write: the largest packet that is segmented later.
static PIECE: [u8; 1 << 16] = [0; 1 << 16];
const PIECES: u32 = 400;

/// Kind of the measured traffic, by destination and protocol.
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
            Self::DeniedV4 => "### UDP to the metadata service, IPv4",
            Self::DeniedV6 => "### UDP to the metadata service, IPv6",
            Self::ConnectedV4 => "### UDP to another address, IPv4",
            Self::ConnectedV6 => "### UDP to another address, IPv6",
            Self::UnconnectedV4 => "### UDP to another address with sendto(2) on an unconnected socket, IPv4",
            Self::UnconnectedV6 => "### UDP to another address with sendto(2) on an unconnected socket, IPv6",
            Self::Exchange => "### TCP request and response with another address",
            Self::Stream => "### TCP stream to another address",
        }
    }

    /// Returns the name of the measured unit.
    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Exchange => "time per exchange",
            Self::Stream => "time per 64 KiB",
            _ => "time per packet",
        }
    }

    /// Returns the alternatives with which others are compared.
    pub(crate) const fn baselines(self) -> &'static [Restriction] {
        if self.is_denied() {
            &[Restriction::DropAll, Restriction::AksFilter, Restriction::AksMangle]
        } else {
            &[Restriction::Nothing, Restriction::EmptyAll, Restriction::Conntrack]
        }
    }

    /// Reports whether the traffic works with this alternative. TCP connections need responses.
    pub(crate) fn is_possible(self, restriction: Restriction) -> bool {
        restriction != Restriction::DropAll || !matches!(self, Self::Exchange | Self::Stream)
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

/// Sockets of the sender and the receiver.
pub(crate) struct Pair<'w> {
    env: &'w TestEnv,
    pod: &'w Pod,
    /// The receive queue is full, so that packets are processed up to the socket and dropped there.
    _sink: UdpSocket,
}

impl<'w> Pair<'w> {
    pub(crate) fn new(env: &'w TestEnv, pod: &'w Pod) -> Self {
        let sink = env.fabric.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))).expect("a UDP socket");
        setsockopt(&sink, RcvBuf, &1).expect("set a buffer's size");
        serve(env, ECHO_PORT, echo);
        serve(env, DISCARD_PORT, discard);
        Self { env, pod, _sink: sink }
    }

    /// Returns the nanoseconds per unit, including all work that it causes, in the best batch of a turn.
    pub(crate) fn cost(&self, traffic: Traffic) -> f64 {
        self.env.in_cgroup(|| self.pod.netns.run(|| in_pod(traffic)))
    }
}

fn in_pod(traffic: Traffic) -> f64 {
    run_on(CPU);
    match traffic {
        Traffic::Exchange => by_tcp(traffic, EXCHANGES, |stream| {
            for _ in 0..EXCHANGES {
                let mut response = PAYLOAD;
                stream
                    .write_all(&PAYLOAD)
                    .and_then(|()| stream.read_exact(&mut response))
                    .expect("a response");
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
    let connected = matches!(traffic, Traffic::ConnectedV4 | Traffic::ConnectedV6);
    if connected {
        socket.connect(destination).expect("connect a UDP socket");
    }
    let send = || {
        for _ in 0..PACKETS {
            // The call fails if the socket hook denies it.
            let _ = if connected { socket.send(&PAYLOAD) } else { socket.send_to(&PAYLOAD, destination) };
        }
    };
    // The first batch is a warm-up.
    send();
    best_of_batches(PACKETS, || (), |()| send())
}

/// Measures each batch on a new connection, so that the memory layout of one connection has little influence. An
/// unmeasured batch first opens the window.
fn by_tcp(traffic: Traffic, count: u32, batch: impl Fn(&mut TcpStream)) -> f64 {
    let connect = || {
        let mut stream = TcpStream::connect(traffic.destination()).expect("connect to a server");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        batch(&mut stream);
        stream
    };
    best_of_batches(count, connect, |stream| batch(stream))
}

/// Returns the nanoseconds per operation in the best of several batches. The `set_up` before each batch is not
/// measured.
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
            // Other load of the machine made the kernel drop packets, so that the batch is incomplete.
            sleep(Duration::from_millis(10));
        }
    });
    batches.fold(f64::INFINITY, f64::min)
}

/// Starts a thread that serves one connection after another until the process ends.
fn serve(env: &TestEnv, port: u16, serve_one: fn(TcpStream) -> io::Result<()>) {
    let listener = env.fabric.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).expect("a listener");
    thread::spawn(move || {
        // The server runs on the CPU of the client, so that the time of both is measured.
        run_on(CPU);
        for stream in listener.incoming() {
            // The connection ends when the client closes it.
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

/// Returns the number of packets that the CPU's full backlog dropped: the second column of its line
/// (net/core/net-procfs.c).
fn lost_in_backlog() -> String {
    let lines = fs::read_to_string("/proc/net/softnet_stat").expect("read softnet_stat");
    let line = lines.lines().nth(CPU).expect("a line for each CPU");
    line.split(' ').nth(1).expect("several columns").to_owned()
}
