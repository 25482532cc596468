//! Memory of the agent and its broker with a listener for each pod, compared with an agent without rules.

use std::{thread, time::Duration};

use imds_tests::{
    executable::broker_of,
    measure::{Process, Samples, table},
    scaled,
};

use crate::{
    Bar,
    node::{Node, Rules},
};

/// Largest memory in MiB: of the agent beyond that of one without rules, and of the broker.
const MAX_AGENT: f64 = 2.0;
const MAX_BROKER: f64 = 8.0;
const STARTS: u32 = 3;
/// Time in which the agent frees the memory of its start.
const SETTLE: Duration = Duration::from_secs(10);
const TURNS: [(Rules, &str); 3] =
    [(Rules::None, "no rule"), (Rules::All, "scoped"), (Rules::Explain, "explained")];

/// MiB of each process.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    agent: Usage,
    broker: Usage,
}

#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// Proportional set size: private pages, and a part of the pages that other processes share.
    pss: f64,
    private_dirty: f64,
}

/// Prints the memory and returns its bars.
pub(crate) fn measure(node: &Node) -> Vec<Bar> {
    let mut samples = TURNS.map(|_| Vec::new());
    for start in 1..=scaled(STARTS) {
        for ((rules, name), samples) in TURNS.into_iter().zip(&mut samples) {
            eprintln!("memory: start {start} with {name}");
            samples.push(start_with(node, rules));
        }
    }
    let pods = node.pods.len();
    let median = |turn: usize, of: fn(&Memory) -> f64| Samples::new(samples[turn].iter().map(of)).median();
    let quantities: [fn(&Memory) -> f64; 4] = [
        |memory| memory.agent.private_dirty,
        |memory| memory.agent.pss,
        |memory| memory.broker.private_dirty,
        |memory| memory.broker.pss,
    ];
    let row = |turn: usize| {
        let cells = quantities.map(|of| format!("{:.2} MiB", median(turn, of)));
        [format!("{pods} pods, {}", TURNS[turn].1)].into_iter().chain(cells).collect()
    };
    let rows: Vec<Vec<String>> = (0..TURNS.len()).map(row).collect();
    println!("### Memory\n\nAfter one request of each pod; medians of {} starts.\n", samples[0].len());
    println!(
        "{}",
        table(&["pods", "agent, private dirty", "agent, PSS", "broker, private dirty", "broker, PSS"], &rows)
    );
    let bars = |turn: usize| {
        let name = TURNS[turn].1;
        let more = |of: fn(&Memory) -> f64| median(turn, of) - median(0, of);
        [
            (format!("more memory of the agent, {pods} {name} pods"), more(quantities[0]), MAX_AGENT),
            (format!("memory of the broker, {pods} {name} pods"), median(turn, quantities[3]), MAX_BROKER),
        ]
        .map(|(name, measured, limit)| Bar { name, measured, limit, unit: "MiB" })
    };
    [1, 2].map(bars).concat()
}

/// Returns the memory of an agent that starts with these rules.
fn start_with(node: &Node, rules: Rules) -> Memory {
    let env = &node.cluster.env;
    let agent = node.start(rules);
    node.send_requests();
    thread::sleep(SETTLE);
    let broker = broker_of(agent.pid());
    assert_eq!(broker.is_some(), rules != Rules::None, "a broker runs only if it is needed");
    let memory = Memory { agent: usage(agent.pid()), broker: broker.map(usage).unwrap_or_default() };
    drop(agent);
    env.unload();
    memory
}

fn usage(pid: u32) -> Usage {
    let process = Process::new(pid);
    Usage { pss: process.rollup("Pss"), private_dirty: process.rollup("Private_Dirty") }
}
