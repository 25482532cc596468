//! The tests on other kernels: each a virtual machine, with nothing in it but the agent, the tests and what they start.

mod archive;
mod build;
mod console;
mod document;
mod host;
mod initramfs;
mod kernels;
mod machine;
mod modules;
mod plan;
mod records;
mod report;
mod tools;

use std::{
    env, fs,
    num::NonZero,
    path::Path,
    process::ExitCode,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cache,
    setup::{self, Purpose},
    workspace::{artifacts, say},
};
use build::Payload;
use console::Guest;
use kernels::{Kernel, Line};
use machine::{End, Machine};
use plan::Plan;
use report::Row;
use tools::Tools;

/// Run the tests of the agent on other kernels: Debian's, in virtual machines
///
/// The kernels, and QEMU where it is not installed, are downloaded once, from the mirror that apt uses.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Vm {
    /// One of the kernels, or this machine's own; repeat it for more. Without, all of Debian's
    #[arg(long = "kernel", value_enum, value_name = "VERSION")]
    lines: Vec<Line>,
    /// Run a selection, less of the longest tests, and each with one way of attaching
    #[arg(long)]
    quick: bool,
    /// How to show the results
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
    /// Only download what it takes, where it is not there yet
    #[arg(long, conflicts_with_all = ["quick", "output", "filter"])]
    fetch: bool,
    /// Write docs/kernels.md, of what the newest runs told that left nothing out of a test executable; none is started
    #[arg(long, conflicts_with_all = ["lines", "quick", "output", "fetch", "refresh", "filter"])]
    document: bool,
    /// Look for newer versions of the kernels than those that were downloaded
    #[arg(long)]
    refresh: bool,
    /// How many times less of the longest tests is done than where nothing is emulated [default: 4, or 20 with --quick]
    #[arg(long, value_name = "TIMES")]
    divisor: Option<NonZero<u32>>,
    /// After how many minutes a machine is stopped
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    timeout: u64,
    /// What QEMU runs the machines with: tcg works everywhere, kvm is much faster where it works
    #[arg(long, value_name = "ACCELERATOR", default_value = "tcg")]
    accel: String,
    /// Names of tests, in whole or in part, or of test executables
    #[arg(last = true)]
    filter: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Output {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

impl Vm {
    pub(crate) fn run(mut self) -> Result<ExitCode> {
        if env::consts::ARCH != "x86_64" {
            bail!("the machines are x86_64 ones, and so must this one be that compiles for them");
        }
        if self.document {
            return document::write(&artifacts("vm")?);
        }
        if self.lines.is_empty() {
            self.lines = Line::DEBIANS.to_vec();
        }
        self.lines.sort_unstable();
        self.lines.dedup();
        setup::ensure(Purpose::Vm)?;

        let cache = cache::dir()?;
        let tools = Tools::get(&cache)?;
        let get = |&line| match line {
            Line::This => Ok(None),
            line => Kernel::get(line, &cache, self.refresh).map(Some),
        };
        let kernels: Vec<_> = self.lines.iter().map(get).collect();
        if self.fetch {
            kernels.into_iter().collect::<Result<Vec<_>>>()?;
            return Ok(ExitCode::SUCCESS);
        }
        let plan = Plan::new(Payload::build(&self.filter)?, &self.filter, self.quick, self.divisor)?;
        let rows = self.run_all(kernels, &plan, &tools)?;
        match self.output {
            Output::Table => print!("{}", report::table(&rows)),
            Output::Json => println!("{:#}", report::json(&rows)),
        }
        let is_good = rows.iter().all(|row| row.complaints.is_empty());
        Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Runs as many machines at a time as there are processors: each has one.
    fn run_all(&self, kernels: Vec<Result<Option<Kernel>>>, plan: &Plan, tools: &Tools) -> Result<Vec<Row>> {
        let results = artifacts("vm")?;
        // Taken from its end: the newest kernels skip the least, and so take longest.
        let queue = Mutex::new(kernels.into_iter().zip(&self.lines).collect::<Vec<_>>());
        let rows = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
                scope.spawn(|| {
                    loop {
                        let next = queue.lock().expect("no thread panicked").pop();
                        let Some((kernel, &line)) = next else { return };
                        let row = kernel
                            .and_then(|kernel| self.run_one(line, kernel.as_ref(), plan, tools, &results))
                            .unwrap_or_else(|error| Row::failed(line, format!("{error:#}")));
                        rows.lock().expect("no thread panicked").push(row);
                    }
                });
            }
        });
        let mut rows = rows.into_inner().expect("no thread panicked");
        rows.sort_unstable_by_key(|row| row.line);
        Ok(rows)
    }

    /// Runs what is planned in a machine with `kernel`, or on this one.
    fn run_one(
        &self,
        line: Line,
        kernel: Option<&Kernel>,
        plan: &Plan,
        tools: &Tools,
        results: &Path,
    ) -> Result<Row> {
        let log = records::new_console(results, line);
        let start = Instant::now();
        let mut count = 0;
        let ended = |name: &str| {
            count += 1;
            say(format_args!("kernel {line}: {name} ended, {count} of {}", plan.tests.len()));
        };
        let end = if let Some(kernel) = kernel {
            let initramfs = results.join(format!("kernel-{line}.cpio"));
            self.emulate(kernel, plan, tools, &log, &initramfs, ended)?
        } else {
            say(format_args!("this machine's kernel starts; its console is {}", log.display()));
            host::run(plan, &log, ended)?;
            End::ByItself
        };
        let console = fs::read(&log).with_context(|| format!("could not read {}", log.display()))?;
        let guest = Guest::from_console(&String::from_utf8_lossy(&console));
        if guest.result.is_none() {
            host::append(&log, &format!("\n@machine {end}"))?;
        } else if plan.is_whole {
            records::forget_before(results, line, &log)?;
        }
        let row = Row::new(line, guest, plan.names(), end, start.elapsed());
        say(format_args!("kernel {line}: {row}"));
        Ok(row)
    }

    fn emulate(
        &self,
        kernel: &Kernel,
        plan: &Plan,
        tools: &Tools,
        log: &Path,
        initramfs: &Path,
        mut ended: impl FnMut(&str),
    ) -> Result<End> {
        let line = kernel.line;
        let archive = initramfs::archive(tools, kernel, plan)?;
        fs::write(initramfs, archive).with_context(|| format!("could not write {}", initramfs.display()))?;
        say(format_args!("kernel {line} ({}) starts; its console is {}", kernel.release, log.display()));
        let machine = Machine {
            kernel: &kernel.vmlinuz,
            initramfs,
            accel: &self.accel,
            log,
            timeout: Duration::from_mins(self.timeout),
        };
        machine.run(tools, |console| {
            if console.starts_with("@kernel ") {
                say(format_args!("kernel {line} has started"));
            } else if let Some(rest) = console.strip_prefix("@end ") {
                ended(rest.split(' ').next().unwrap_or_default());
            }
        })
    }
}
