//! The command `cargo xtask fuzz`.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, cargo, describe, execute, in_parallel, print_status, root},
};

/// Fuzz the packet parser, the decoders of configurations, netlink messages, records, API responses and firewall listings, and
/// the broker's parser and rules
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    #[arg(
        help = "Name of one target: classify, config, netlink, records, kubernetes, rulesets, broker_request or broker_match"
    )]
    target: Option<String>,
    /// Duration for each target in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Run only this input file, such as one that caused a failure
    #[arg(long, requires = "target")]
    input: Option<PathBuf>,
}

const TARGETS: [&str; 8] =
    ["classify", "config", "netlink", "records", "kubernetes", "rulesets", "broker_request", "broker_match"];
/// Environment variable with the name of the target.
const TARGET: &str = "IMDS_FUZZ_TARGET";
/// Compiler flags that libFuzzer needs. A memory sanitizer would also need unstable flags.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];
/// Maximum length of an input in bytes.
const MAX_INPUT_LEN: u32 = 8192;
/// Time limit of one input in seconds. The next constant is the memory limit in MiB.
const INPUT_TIMEOUT_SECS: u32 = 10;
const MEMORY: u32 = 2048;

impl Fuzz {
    pub(crate) fn run(self) -> Result<()> {
        let targets = match self.target.as_deref() {
            Some(name) => vec![find_target(name)?],
            None => TARGETS.to_vec(),
        };
        setup::ensure(Purpose::Build)?;
        setup::ensure(Purpose::Fuzz)?;
        let directory = artifacts("fuzz")?;
        let fuzzer = build(&directory)?;
        if let Some(input) = &self.input {
            execute(Command::new(fuzzer).arg(input).env(TARGET, targets[0]))?;
            return Ok(());
        }
        let results = in_parallel(targets, |target| run(&fuzzer, &directory, target, self.seconds));
        let failures = results.iter().filter_map(|result| result.as_ref().err());
        let failures: Vec<_> = failures.map(|failure| format!("{failure:#}")).collect();
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        Ok(())
    }
}

fn find_target(name: &str) -> Result<&'static str> {
    TARGETS
        .into_iter()
        .find(|target| *target == name)
        .with_context(|| format!("unknown target {name}, expected one of {}", TARGETS.join(", ")))
}

/// Builds the fuzzer in a separate target directory, because the flags differ for all crates.
fn build(directory: &Path) -> Result<PathBuf> {
    // Naming the target keeps the flags away from build scripts and macros.
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut build = cargo("build");
    build.args(["--package", "imds-fuzz", "--features", "libfuzzer", "--profile", "fuzz", "--locked"]);
    build.args(["--target", &triple]).arg("--target-dir").arg(directory).env("RUSTFLAGS", FLAGS.join(" "));
    execute(&mut build)?;
    Ok(directory.join(triple).join("fuzz/imds-fuzz"))
}

/// Runs the fuzzer on one target. Keeps interesting inputs for the next run, and failing ones.
fn run(fuzzer: &Path, directory: &Path, target: &str, seconds: u32) -> Result<()> {
    let seeds = root().join("fuzz/seeds").join(target);
    let [corpus, failures] = ["corpus", "failures"].map(|kind| directory.join(kind).join(target));
    for directory in [&corpus, &failures] {
        fs::create_dir_all(directory).with_context(|| format!("failed to create {}", directory.display()))?;
    }
    let path = directory.join(target).with_extension("log");
    let log = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut fuzz = Command::new(fuzzer);
    fuzz.arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT_LEN}"))
        .arg(format!("-timeout={INPUT_TIMEOUT_SECS}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-artifact_prefix={}/", failures.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1"]);
    let dictionary = root().join("fuzz/dictionaries").join(target);
    if dictionary.exists() {
        fuzz.arg(format!("-dict={}", dictionary.display()));
    }
    fuzz.args([&corpus, &seeds]).env(TARGET, target).stderr(log);
    let status = fuzz.status().with_context(|| format!("failed to start {}", describe(&fuzz)))?;
    let log = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    if status.success() {
        print_status(format_args!("{target}: {}", summary(&log)));
        return Ok(());
    }
    bail!("{target} failed ({status}), see {}{}", path.display(), reproduction(target, &log))
}

/// Returns the command that repeats a failure.
fn reproduction(target: &str, log: &str) -> String {
    let reproducer = log.lines().find_map(|line| line.split_once("Test unit written to "));
    let reproduce = |(_, input)| format!("; to repeat it: cargo xtask fuzz {target} --input {input}");
    reproducer.map(reproduce).unwrap_or_default()
}

/// Returns a summary of libFuzzer's final statistics.
fn summary(log: &str) -> String {
    let coverage = log.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| *word == "cov:")?;
        words.next()
    });
    let statistic = |name: &str| {
        let line = log.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.and_then(|rest| rest.strip_prefix(':')).map_or("?", str::trim)
    };
    format!(
        "{} inputs, {} per second, {} edges covered, {} MiB",
        statistic("number_of_executed_units"),
        statistic("average_exec_per_sec"),
        coverage.unwrap_or("?"),
        statistic("peak_rss_mb"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
#8192\tpulse  cov: 2100 ft: 4000 corp: 20/9Kb exec/s: 512 rss: 60Mb
#9000\tDONE   cov: 2345 ft: 4567 corp: 21/9Kb exec/s: 500 rss: 61Mb
stat::number_of_executed_units: 9000
stat::average_exec_per_sec:     500
stat::peak_rss_mb:              61
";

    #[test]
    fn summary_is_one_line() {
        assert_eq!(summary(LOG), "9000 inputs, 500 per second, 2345 edges covered, 61 MiB");
        assert_eq!(summary(""), "? inputs, ? per second, ? edges covered, ? MiB");
    }

    #[test]
    fn failure_names_the_replay_command() {
        let log =
            "SUMMARY: libFuzzer: deadly signal\nartifact_prefix='/t/'; Test unit written to /t/crash-0a\n";
        let expected = "; to repeat it: cargo xtask fuzz config --input /t/crash-0a";
        assert_eq!(reproduction("config", log), expected);
        assert_eq!(reproduction("config", LOG), "");
    }

    #[test]
    fn every_target_has_seeds() {
        for target in TARGETS {
            assert!(root().join("fuzz/seeds").join(target).is_dir(), "{target}");
        }
        assert!(find_target("nothing").is_err());
    }
}
