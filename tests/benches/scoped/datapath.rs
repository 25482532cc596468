//! Cost of denied and unrelated traffic beside the listeners of other pods.
//!
//! The agent is stopped once its listeners are open. Then the benchmark removes them from the map of the programs and adds
//! them again for each batch, so that all measurements run the same copy of the programs, and other load of the machine
//! affects them alike.

use std::{
    hint::black_box,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Instant,
};

use aya::{maps::MapData, programs::SchedClassifier};
use etherparse::PacketBuilder;
use imds_ebpf_common::{
    ExemptionKey, ExemptionRecord, RedirectRecord,
    names::{MAP_EXEMPT, MAP_REDIRECT, PROG_FROM_POD},
};
use imds_tests::{
    METADATA, Netns, SERVICE,
    measure::{Samples, run_on, table},
    program::{nanoseconds, pinned},
    scaled,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt},
    },
    unistd::Pid,
};

use crate::{
    Bar,
    node::{Node, Rules},
    priority::Priority,
};

const ROUNDS: u32 = 25;
/// Number of batches of a measurement. The fastest one counts, which other load of the machine disturbed least.
const BATCHES: usize = 20;
const RUNS: u32 = 50_000;
const CALLS: u32 = 2_000;
const CONNECTIONS: u32 = 50;
const CPU: usize = 1;
const PORT: u16 = 80;
/// Address of the node on its uplink, and port of the server there.
const NODE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 0, 4), 8080);
/// Largest cost of a measurement, as a multiple of the cost without listeners.
const MAX_RATIO: f64 = 1.01;
const TURNS: [(Rules, &str); 3] =
    [(Rules::One, "1 scoped pod"), (Rules::All, "250 scoped pods"), (Rules::Explain, "250 explained pods")];
const KINDS: [&str; 5] = [
    "`from_pod` on a packet to another address",
    "`from_pod` on a denied packet",
    "denied connect(2), TCP",
    "connect(2) to another address, UDP",
    "connection to the node and its end, TCP",
];

type Redirects = aya::maps::HashMap<MapData, ExemptionKey, RedirectRecord>;

/// Steps of a batch: without listeners, with them, and without them again, which shows the accuracy of the comparison.
const STEPS: [bool; 3] = [false, true, false];

/// Nanoseconds of a round: those of each step, for each kind.
struct Round([[f64; STEPS.len()]; KINDS.len()]);

/// Prints the costs and returns their bars.
pub(crate) fn measure(node: &Node) -> Vec<Bar> {
    let turns = TURNS.map(|(rules, name)| (name, rounds(node, rules)));
    let cells = |(name, rounds): &(&str, Vec<Round>), kind: usize| {
        let median = |of: &dyn Fn(&[f64; STEPS.len()]) -> f64| {
            Samples::new(rounds.iter().map(|Round(costs)| of(&costs[kind]))).median()
        };
        let times = [0, 1].map(|step| format!("{:.1} ns", median(&|costs| costs[step])));
        let ratios = [1, 2].map(|step| format!("{:.4}", median(&|costs| costs[step] / costs[0])));
        [KINDS[kind].to_owned(), (*name).to_owned()].into_iter().chain(times).chain(ratios).collect()
    };
    let rows: Vec<Vec<String>> = (0..KINDS.len())
        .flat_map(|kind| turns.iter().map(move |turn| (turn, kind)))
        .map(|(turn, kind)| cells(turn, kind))
        .collect();
    println!("### Denied and unrelated traffic\n\nMedians of {} rounds.\n", turns[0].1.len());
    let head = ["operation", "listeners", "without them", "with them", "ratio", "ratio without them again"];
    println!("{}", table(&head, &rows));
    let largest = |kind: usize| {
        let ratio = |rounds: &[Round]| {
            Samples::new(rounds.iter().map(|Round(costs)| costs[kind][1] / costs[kind][0])).median()
        };
        turns.iter().map(|(_, rounds)| ratio(rounds)).fold(0.0, f64::max)
    };
    let bar = |kind: usize| Bar {
        name: format!("ratio, {}", KINDS[kind]),
        measured: largest(kind),
        limit: MAX_RATIO,
        unit: "",
    };
    (0..KINDS.len()).map(bar).collect()
}

/// Measures all rounds beside the listeners of these rules.
fn rounds(node: &Node, rules: Rules) -> Vec<Round> {
    let env = &node.cluster.env;
    let agent = node.start(rules);
    let signal = |signal| kill(Pid::from_raw(agent.pid().try_into().expect("a process id")), signal);
    signal(Signal::SIGSTOP).expect("stop the agent");
    let maps = env.pin_dir().join("maps");
    let open = |name: &str| MapData::from_pin(maps.join(name)).expect("open a pinned map");
    let mut redirects: Redirects = aya::maps::Map::HashMap(open(MAP_REDIRECT)).try_into().expect("a hash");
    let exempt: aya::maps::HashMap<_, ExemptionKey, ExemptionRecord> =
        aya::maps::Map::HashMap(open(MAP_EXEMPT)).try_into().expect("a hash");
    assert_eq!(exempt.keys().count(), 0, "the programs know the rules by their listeners only");
    let listeners: Vec<_> = redirects.iter().map(|entry| entry.expect("read the map")).collect();
    assert_eq!(env.node_address(), NODE.0);
    // Denied like a pod, but without a listener, because no interface leads to it.
    let (unlinked, pod) = (&Netns::new("unlinked"), &node.pods[node.pods.len() - 1].0);
    let from_pod = pinned(&env.pin_dir().join("progs").join(PROG_FROM_POD));
    let listener = env.node.run(|| TcpListener::bind(NODE)).expect("a listener");
    let mut set_listeners = |are_active: bool| {
        for (key, record) in &listeners {
            if are_active {
                redirects.insert(key, record, 0).expect("write the map");
            } else {
                // Fails if the entry has been removed already.
                let _removed = redirects.remove(key);
            }
        }
    };
    let rounds = scaled(ROUNDS);
    let round = |number| {
        eprintln!("{rules:?}: round {number} of {rounds}");
        let mut in_netns = |netns: &Netns, count: u32, batch: &(dyn Fn() + Sync)| {
            env.in_cgroup(|| netns.run(|| best(&mut set_listeners, count, batch)))
        };
        Round([
            in_netns(&env.node, RUNS, &|| run(&from_pod, SERVICE)),
            in_netns(&env.node, RUNS, &|| run(&from_pod, METADATA)),
            in_netns(unlinked, CALLS, &denied_connects),
            in_netns(&pod.netns, CALLS, &udp_connects),
            in_netns(&pod.netns, CONNECTIONS, &|| connect_to_node(&listener)),
        ])
    };
    let rounds = (1..=rounds).map(round).collect();
    signal(Signal::SIGCONT).expect("continue the agent");
    drop(agent);
    env.unload();
    rounds
}

/// Returns the nanoseconds of each step for one of `count` operations of a batch.
fn best(set_listeners: &mut dyn FnMut(bool), count: u32, batch: &dyn Fn()) -> [f64; STEPS.len()] {
    run_on(CPU);
    Priority::RealTime.set(0);
    let mut best = STEPS.map(|_| f64::INFINITY);
    for _ in 0..BATCHES {
        for (are_active, best) in STEPS.into_iter().zip(&mut best) {
            set_listeners(are_active);
            let start = Instant::now();
            batch();
            *best = best.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(count));
        }
    }
    best
}

fn run(from_pod: &SchedClassifier, destination: Ipv4Addr) {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    // No answer goes to this source. An answer would replace the packet for all further runs.
    let builder = builder.ipv4([127, 0, 0, 7], destination.octets(), 64).udp(1, PORT);
    builder.write(&mut packet, &[0; 22]).expect("write a packet");
    black_box(nanoseconds(from_pod, &packet, RUNS));
}

fn denied_connects() {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None);
    let socket = socket.expect("a TCP socket");
    let destination = SockaddrIn::from(SocketAddrV4::new(METADATA, PORT));
    for _ in 0..CALLS {
        let result = connect(socket.as_raw_fd(), &destination);
        assert!(matches!(result, Err(Errno::EPERM | Errno::EACCES | Errno::ECONNREFUSED)), "{result:?}");
    }
}

fn udp_connects() {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a UDP socket");
    for _ in 0..CALLS {
        socket.connect((SERVICE, PORT)).expect("connect");
    }
}

fn connect_to_node(listener: &TcpListener) {
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(NODE).expect("connect");
        // Resets the connection, so that its port is free at once.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&stream, sockopt::Linger, &linger).expect("set SO_LINGER");
        drop(stream);
        drop(listener.accept());
    }
}
