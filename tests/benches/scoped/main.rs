//! Cost of scoped exemptions and explained denials: latency of allowed requests, cost of all other traffic, and memory. Fails if
//! one of them exceeds its limit.

mod datapath;
mod endpoint;
mod latency;
mod memory;
mod node;
mod priority;

use std::process::ExitCode;

use imds_tests::measure::{machine, table};

fn main() -> ExitCode {
    println!("{}.\n", machine());
    let bars = [latency::measure(), node::measure()].concat();
    let rows: Vec<_> = bars.iter().map(Bar::row).collect();
    println!("### Limits\n\n{}", table(&["quantity", "measured", "limit", "result"], &rows).trim_end());
    if bars.iter().all(Bar::is_met) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A measured quantity and its limit.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) measured: f64,
    pub(crate) limit: f64,
    pub(crate) unit: &'static str,
}

impl Bar {
    fn is_met(&self) -> bool {
        self.measured <= self.limit
    }

    fn row(&self) -> Vec<String> {
        let value = |value: f64| format!("{value:.2} {}", self.unit);
        let result = if self.is_met() { "pass" } else { "fail" };
        vec![self.name.clone(), value(self.measured), value(self.limit), result.to_owned()]
    }
}
