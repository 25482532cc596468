//! New pods while the agent runs: the time until `from_pod` is attached, and the time to create their links.

mod latency;
mod link_churn;

use std::time::Duration;

use imds_tests::{
    Netns, TestEnv,
    measure::{machine, table},
};
use latency::latencies;
use link_churn::{Churn, MadeLink, NAMESPACES};

const HOOKS: &[&str] = &["from_pod", "node_egress", "socket"];
/// Number of links in each run.
const LINKS: u32 = 300;
/// Time between two links at 10 pods a second, and at 50.
const CALM: Duration = Duration::from_millis(100);
const BURST: Duration = Duration::from_millis(20);

fn main() {
    let env = TestEnv::new();
    let namespaces: Vec<_> = (0..NAMESPACES).map(|_| Netns::new("churn")).collect();
    let make = |interval| Churn::new(&env.node, &namespaces).run(LINKS, interval);
    let mut rows = Vec::new();
    for (name, interval) in [("10 pods/s", CALM), ("50 pods/s", BURST)] {
        let without = make(interval);
        let agent = env.agent().hooks(HOOKS).spawn_ready();
        let with = make(interval);
        let latencies = latencies(&agent, &with);
        drop(agent);
        env.unload();
        let again = make(interval);
        let baseline = f64::midpoint(mean(&without), mean(&again));
        rows.push(vec![
            name.to_owned(),
            format!("{:.1} ms", latencies.median()),
            format!("{:.1} ms", latencies.quantile(99)),
            format!("{} of {LINKS}", latencies.len()),
            format!("{baseline:.2} ms"),
            format!("{:.2} ms", mean(&with)),
            format!("{:.2}", mean(&with) / baseline),
        ]);
    }
    println!("{}; {LINKS} veth pairs for each rate, {NAMESPACES} at a time.\n", machine());
    print!("{}", table(&HEAD, &rows));
}

const HEAD: [&str; 7] = [
    "rate",
    "link event to from_pod attached, p50",
    "p99",
    "attached before deletion",
    "making a link, no agent",
    "with the agent",
    "ratio",
];

fn mean(made: &[MadeLink]) -> f64 {
    made.iter().map(|link| link.took).sum::<f64>() / f64::from(LINKS)
}
