//! The command `cargo xtask bench`.

use std::{fs, path::Path, process::Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{
    clients, dist,
    setup::{self, Purpose},
    workspace::{cargo, describe, ensure_root, print_status, root},
};

/// Run the benchmarks of the agent and its programs; needs root, takes 45 minutes on an otherwise idle machine
///
/// The benchmarks compare the agent with empty programs, iptables and nftables.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Name of one benchmark: `test_run` for the programs alone, `speed` for packets beside other mechanisms, `churn`
    /// for new pods, `flood` for new pods beside a flood of denied packets, `scale` for up to 1,000 pods, `footprint`
    /// for an idle agent, `scoped` for scoped exemptions and explained denials. Only by name: `clients` for the time until
    /// denied clients of clouds give up, and `requests`, which is no measurement, for ten million requests to the broker's rules
    name: Option<String>,
    /// Write the results to docs/benchmarks.md, with plots, and those of `clients` to docs/client-behaviour.md
    #[arg(long)]
    document: bool,
    /// Only download the clients of `clients`
    #[arg(long, conflicts_with = "document")]
    fetch: bool,
}

const ALL: [&str; 7] = ["test_run", "speed", "churn", "flood", "scale", "footprint", "scoped"];
/// Benchmark that runs only by name, because its clients must be downloaded first.
const CLIENTS: &str = "clients";
/// Check of the broker that runs only by name, because it measures nothing.
const REQUESTS: &str = "requests";
/// Environment variable with the directory of the libraries of [`CLIENTS`].
const CLIENTS_DIR: &str = "IMDS_CLIENTS";
/// Environment variable with the directory of the plots.
const PLOTS: &str = "IMDS_BENCH_PLOTS";

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        if self.fetch {
            if self.name.as_deref() != Some(CLIENTS) {
                bail!("--fetch is for `cargo xtask bench {CLIENTS}`");
            }
            clients::fetch()?;
            return Ok(());
        }
        let names = match &self.name {
            Some(name) if ![CLIENTS, REQUESTS].contains(&name.as_str()) && !ALL.contains(&name.as_str()) => {
                bail!("unknown benchmark {name}, expected one of {}, {CLIENTS}, {REQUESTS}", ALL.join(", "))
            }
            Some(name) => vec![name.as_str()],
            None => ALL.to_vec(),
        };
        ensure_root("the benchmarks load BPF programs: run them as root")?;
        setup::ensure(Purpose::Bench)?;
        let agent = dist::shipped_agent()?;
        for name in names {
            let results = self.measure(name, &agent)?;
            print!("{results}");
            if self.document {
                write_down(name, &results)?;
            }
        }
        Ok(())
    }

    /// Runs a benchmark and returns its output.
    fn measure(&self, name: &str, agent: &Path) -> Result<String> {
        let mut bench = cargo("bench");
        bench
            .args(["--quiet", "--package", "imds-tests", "--bench", name, "--locked"])
            .env("IMDS_AGENT", agent)
            .stderr(Stdio::inherit());
        if self.document {
            bench.env(PLOTS, root().join("docs"));
        }
        if name == CLIENTS {
            bench.env(CLIENTS_DIR, clients::dir()?);
        }
        let what = describe(&bench);
        print_status(&what);
        let output = bench.output().with_context(|| format!("failed to start {what}"))?;
        let results =
            String::from_utf8(output.stdout).with_context(|| format!("the output of {what} is not UTF-8"))?;
        if !output.status.success() {
            // `flood` and `scoped` fail if a limit is exceeded, which the output names.
            print!("{results}");
            bail!("{what} failed ({})", output.status);
        }
        Ok(results)
    }
}

/// Replaces the results of a benchmark in the document.
fn write_down(name: &str, results: &str) -> Result<()> {
    let page = if name == CLIENTS { "docs/client-behaviour.md" } else { "docs/benchmarks.md" };
    let path = root().join(page);
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let text = with_results(&text, name, results)
        .with_context(|| format!("{} has no section for {name}", path.display()))?;
    fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
    print_status(format_args!("wrote the results to {}", path.display()));
    Ok(())
}

/// Returns `text` with new results between the comments of the benchmark `name`.
fn with_results(text: &str, name: &str, results: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- cargo xtask bench {name} --document -->\n"), "<!-- end -->");
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{}\n\n{end}{after}", results.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_earlier_ones() {
        let text = "a\n<!-- cargo xtask bench x --document -->\nold\n<!-- end -->\nb\n";
        let expected = "a\n<!-- cargo xtask bench x --document -->\n\nnew\n\n<!-- end -->\nb\n";
        assert_eq!(with_results(text, "x", "new\n").unwrap(), expected);
        assert_eq!(with_results(expected, "x", "new").unwrap(), expected);
        assert_eq!(with_results(text, "y", "new"), None);
    }
}
