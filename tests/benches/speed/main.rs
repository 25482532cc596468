//! Cost of access restrictions, measured side by side in one run: no restriction, programs that do nothing or drop
//! everything, the agent's hooks, and firewall rules with the same effect.
//!
//! The pod, its node and the metadata server are network namespaces of this machine. A thread in the pod sends packets.
//! It is pinned to one CPU, on which all resulting work up to the server's socket runs too, so that the measured time
//! covers all of it. The alternatives take short turns, so that other load of the machine affects all of them alike.

mod connect;
#[path = "../plot.rs"]
mod plot;
mod restriction;
mod traffic;

use imds_tests::{
    PodLink, TestEnv,
    measure::{Samples, machine, table},
    scaled,
};

use restriction::Restriction;
use traffic::{Pair, Traffic};

/// Number of turns of each alternative.
const ROUNDS: u32 = 25;

fn main() {
    let env = TestEnv::new().with_ipv6().without_counting();
    let pod = env.add_pod(PodLink::Routed);
    env.add_pod_ipv6(&pod);
    let pair = Pair::new(&env, &pod);

    let mut costs = Costs::default();
    let rounds = scaled(ROUNDS);
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        // Each round has another order. Every second round also reverses which alternative runs before which.
        let mut turns: Vec<_> = Restriction::ALL.to_vec();
        turns.rotate_left(round as usize % Restriction::ALL.len());
        if round % 2 == 0 {
            turns.reverse();
        }
        for restriction in turns {
            let _on = restriction.turn_on(&env, &pod);
            let possible = Traffic::ALL.into_iter().filter(|traffic| traffic.is_possible(restriction));
            possible.for_each(|traffic| costs.add(restriction, traffic, pair.cost(traffic)));
        }
    }
    println!("{}; medians of {rounds} rounds.\n", machine());
    for traffic in Traffic::ALL {
        println!("{}\n\n{}", traffic.title(), costs.table(traffic));
    }
    let bars = Restriction::ALL.map(|restriction| {
        (restriction.name(), costs.median(restriction, Traffic::DeniedV4), restriction.is_ours())
    });
    plot::bars(
        "benchmarks-denied",
        "Cost of a UDP packet to the metadata service, from sendto(2) to the server or the drop",
        "nanoseconds per packet (lower is better)",
        &bars,
    );
    println!("{}", connect::latency(&env, &pod));
    println!("{}", connect::waiting(&env, &pod));
}

/// Nanoseconds of a unit, by alternative and traffic, one value for each round.
#[derive(Debug, Default)]
struct Costs(Vec<(Restriction, Traffic, f64)>);

impl Costs {
    fn add(&mut self, restriction: Restriction, traffic: Traffic, cost: f64) {
        self.0.push((restriction, traffic, cost));
    }

    fn samples(&self, restriction: Restriction, traffic: Traffic) -> impl Iterator<Item = f64> {
        let is_wanted =
            move |(of, with, _): &&(Restriction, Traffic, f64)| (*of, *with) == (restriction, traffic);
        self.0.iter().filter(is_wanted).map(|(.., cost)| *cost)
    }

    fn median(&self, restriction: Restriction, traffic: Traffic) -> f64 {
        Samples::new(self.samples(restriction, traffic)).median()
    }

    /// Returns the cost as a multiple of another alternative's cost, for each round.
    fn ratio(&self, restriction: Restriction, to: Restriction, traffic: Traffic) -> Samples {
        Samples::new(
            self.samples(restriction, traffic)
                .zip(self.samples(to, traffic))
                .map(|(cost, other)| cost / other),
        )
    }

    fn table(&self, traffic: Traffic) -> String {
        let baselines = traffic.baselines();
        let mut head = vec!["restriction".to_owned(), traffic.unit().to_owned(), "25 to 75 %".to_owned()];
        head.extend(baselines.iter().map(|baseline| format!("ratio to {}", baseline.name())));
        let head: Vec<_> = head.iter().map(String::as_str).collect();
        let rows: Vec<_> = Restriction::ALL
            .into_iter()
            .filter(|&restriction| traffic.is_possible(restriction))
            .map(|restriction| {
                let cost = Samples::new(self.samples(restriction, traffic));
                let spread = format!("{:.0} to {:.0}", cost.quantile(25), cost.quantile(75));
                let mut row = vec![restriction.name().to_owned(), format!("{:.0} ns", cost.median()), spread];
                row.extend(baselines.iter().map(|&baseline| {
                    let ratio = self.ratio(restriction, baseline, traffic);
                    format!("{:.3} ({:.3} to {:.3})", ratio.median(), ratio.quantile(25), ratio.quantile(75))
                }));
                row
            })
            .collect();
        table(&head, &rows)
    }
}
