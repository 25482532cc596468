//! Time that clients of the metadata service take until they give up, for each answer that a denied pod can get.
//!
//! Programs come from `PATH`, libraries from the directory in `IMDS_CLIENTS`, which `cargo xtask bench clients --fetch`
//! fills. A client that is not installed is left out with a message.

mod client;
mod node;

use std::{
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use client::{Client, Run};
use imds_tests::{
    measure::{machine, table},
    skip,
};
use node::{ANSWERS, Node};

/// Time after which a client is stopped.
const LIMIT: Duration = Duration::from_mins(3);
/// Runs of each client with each answer.
const ROUNDS: usize = 3;
/// A client that has not ended after this time sleeps or waits for an answer, so that it no longer slows the next one.
const HEAD_START: Duration = Duration::from_millis(500);
/// Time within which every client reaches a service that is not blocked.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

fn main() {
    let nodes = ANSWERS.map(Node::new);
    let (open, _) = nodes.split_last().expect("the node without an agent is last");
    let mut clients = Client::all(open.scratch_dir());
    clients.retain_mut(|client| is_usable(client, open));
    assert!(!clients.is_empty(), "no client is installed");

    // One client after another in each round, so that a disturbance of the machine affects one round of a client.
    let mut started: Vec<Vec<Vec<JoinHandle<Run>>>> = Vec::new();
    started.resize_with(clients.len(), || nodes.iter().map(|_| Vec::new()).collect());
    for round in 1..=ROUNDS {
        for (client, started) in clients.iter().zip(&mut started) {
            eprintln!("round {round}: {}", client.title());
            for (node, started) in nodes.iter().zip(started) {
                started.push(start(client, node));
            }
        }
    }
    let mut rows = Vec::new();
    for (client, started) in clients.iter().zip(started) {
        let mut row = vec![client.title()];
        for (node, started) in nodes.iter().zip(started) {
            let runs: Vec<_> = started.into_iter().map(|run| run.join().expect("a run")).collect();
            check(client, node, &runs);
            row.push(cell(&runs));
        }
        rows.push(row);
    }
    nodes.iter().for_each(Node::assert_nothing_arrived);

    println!(
        "Seconds until the client returns: median of {ROUNDS} runs, and the range if it exceeds 0.5 s and 10 % of the median. A client \
         is stopped\nafter {} s. {}, {}.\n",
        LIMIT.as_secs(),
        machine(),
        node::iptables_version(),
    );
    let head: Vec<_> = ["client"].into_iter().chain(nodes.iter().map(Node::title)).collect();
    print!("{}", table(&head, &rows));
}

/// Runs a client where the service can be reached. Reports whether it is installed, and panics if it fails.
fn is_usable(client: &mut Client, open: &Node) -> bool {
    match client.load(open) {
        Ok(loaded) => {
            let run = loaded.ask(OPEN_LIMIT).join().expect("a run");
            assert!(run.is_ok(), "{} does not get its answer without an agent: {run:?}", client.title());
            true
        }
        Err(reason) => {
            skip(client.name(), &reason);
            false
        }
    }
}

fn start(client: &Client, node: &Node) -> JoinHandle<Run> {
    let run = client.start(node).unwrap_or_else(|reason| panic!("{}: {reason}", client.name())).ask(LIMIT);
    let begin = Instant::now();
    while !run.is_finished() && begin.elapsed() < HEAD_START {
        thread::sleep(Duration::from_millis(10));
    }
    run
}

/// Panics if a client reached the service in a denied pod, or did not reach it without an agent.
fn check(client: &Client, node: &Node, runs: &[Run]) {
    for run in runs {
        eprintln!("{}, {}: {run}", client.title(), node.title());
        assert_eq!(run.is_ok(), node.is_open(), "{} with {}: {run:?}", client.title(), node.title());
    }
}

fn cell(runs: &[Run]) -> String {
    let mut seconds: Vec<_> = runs.iter().map(|run| run.seconds.unwrap_or(f64::INFINITY)).collect();
    seconds.sort_by(f64::total_cmp);
    let text = |seconds: f64| {
        if seconds.is_finite() { format!("{seconds:.1}") } else { format!("over {}", LIMIT.as_secs()) }
    };
    let (first, median, last) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
    // The difference of two infinities is NaN, which compares as false.
    if last - first > (median / 10.0).max(0.5) {
        format!("{} ({} to {})", text(median), text(first), text(last))
    } else {
        text(median)
    }
}
