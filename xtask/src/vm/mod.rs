//! The command `cargo xtask vm`: tests on other kernels in virtual machines that contain only the agent, the tests and
//! their programs.

mod archive;
mod console;
mod host;
mod initramfs;
mod install_check;
mod kernels;
mod modules;
mod payload;
mod plan;
mod qemu_machine;
mod selinux_policy;
mod tools;
mod vm_report;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

pub(crate) use install_check::InstallCheck;

use crate::{
    arch::Arch,
    cache,
    setup::{self, Purpose},
    workspace::{artifacts, in_parallel, print_status},
};
use console::Guest;
use kernels::{Kernel, Line};
use payload::Payload;
use plan::Plan;
use qemu_machine::{Machine, MachineEnd};
use tools::Tools;
use vm_report::Row;

/// Run the tests on other kernels: Debian's, in virtual machines
///
/// The kernels, and QEMU if it is not installed, are downloaded once from apt's mirror.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of the command line")]
pub(crate) struct Vm {
    /// Kernel to test, `this` for this machine's own; may be repeated [default: all of Debian's]
    #[arg(long = "kernel", value_enum, value_name = "VERSION")]
    lines: Vec<Line>,
    /// Architecture of the machines [default: this machine's]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Run a selection of tests, or the named executables, with fewer repetitions and one attach mode, as a debug build
    #[arg(long)]
    quick: bool,
    /// Output format
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Output,
    /// Only download the missing kernels and tools
    #[arg(long, conflicts_with_all = ["quick", "output", "filter"])]
    fetch: bool,
    /// Look for newer versions of the downloaded kernels
    #[arg(long)]
    refresh: bool,
    /// Percentage of the repetitions in the longest tests [default: 25, or 5 with --quick]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    scale: Option<u32>,
    /// Time limit of a machine in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    timeout: u64,
    /// QEMU accelerator: tcg works everywhere, kvm is much faster if it works
    #[arg(long, value_name = "ACCELERATOR", default_value = "tcg")]
    accel: String,
    /// Additional parameters of the kernel command line, such as `lockdown=confidentiality`
    #[arg(long, value_name = "PARAMETERS", default_value = "")]
    boot: String,
    /// Confine the agent by the AppArmor profile of deploy/apparmor
    #[arg(long)]
    apparmor: bool,
    /// Boot with SELinux, and let the tests load Debian's policy and the module of deploy/selinux
    #[arg(long, conflicts_with = "apparmor")]
    selinux: bool,
    /// Parts of test names, or names of test executables
    #[arg(last = true)]
    filter: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Output {
    /// Aligned columns.
    #[default]
    Table,
    /// One JSON document.
    Json,
}

impl Vm {
    pub(crate) fn run(mut self) -> Result<ExitCode> {
        let arch = self.arch.map_or_else(Arch::host, Ok)?;
        if arch.is_foreign() && self.lines.contains(&Line::This) {
            bail!("this machine's kernel does not run programs for {}", arch.debian());
        }
        if self.lines.is_empty() {
            self.lines = Line::DEBIANS.to_vec();
        }
        self.lines.sort_unstable();
        self.lines.dedup();
        setup::ensure(Purpose::Vm)?;

        let cache = cache::dir()?;
        let tools = Tools::get(arch, &cache)?;
        let get = |&line| match line {
            Line::This => Ok(None),
            line => Kernel::get(line, arch, &cache, self.refresh).map(Some),
        };
        let kernels: Vec<_> = self.lines.iter().map(get).collect();
        if self.fetch {
            kernels.into_iter().collect::<Result<Vec<_>>>()?;
            return Ok(ExitCode::SUCCESS);
        }
        let payload = match (self.quick, self.filter.is_empty()) {
            (true, true) => Payload::of_debug_build(arch, &plan::quick_executables())?,
            (true, false) => Payload::of_debug_build(arch, &self.filter)?,
            (false, _) => Payload::build(arch, &self.filter)?,
        };
        let mut plan = Plan::new(payload, &tools, &self.filter, self.quick, self.scale)?;
        plan.is_confined = self.apparmor;
        if self.selinux {
            plan.selinux_policies = selinux_policy::build(&tools, &cache, &artifacts("vm")?.join("selinux"))?;
            self.boot = format!("{} {}", selinux_policy::BOOT, self.boot);
        }
        let rows = self.run_all(kernels, &plan, &tools)?;
        match self.output {
            Output::Table => print!("{}", vm_report::table(&rows)),
            Output::Json => println!("{:#}", vm_report::json(&rows)),
        }
        let is_good = rows.iter().all(|row| row.complaints.is_empty());
        Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Runs as many machines concurrently as there are CPUs. Each machine has one.
    fn run_all(&self, kernels: Vec<Result<Option<Kernel>>>, plan: &Plan, tools: &Tools) -> Result<Vec<Row>> {
        let results = artifacts("vm")?.join(tools.arch.debian());
        fs::create_dir_all(&results).with_context(|| format!("failed to create {}", results.display()))?;
        // The newest kernels first: they skip the fewest tests and take longest.
        let kernels = kernels.into_iter().zip(&self.lines).rev().collect();
        let mut rows = in_parallel(kernels, |(kernel, &line)| {
            kernel
                .and_then(|kernel| self.run_one(line, kernel.as_ref(), plan, tools, &results))
                .unwrap_or_else(|error| Row::failed(line, format!("{error:#}")))
        });
        rows.sort_unstable_by_key(|row| row.line);
        Ok(rows)
    }

    /// Runs the plan in a machine with `kernel`, or on this machine if it is `None`.
    fn run_one(
        &self,
        line: Line,
        kernel: Option<&Kernel>,
        plan: &Plan,
        tools: &Tools,
        results: &Path,
    ) -> Result<Row> {
        let log = results.join(format!("kernel-{line}.log"));
        let start = Instant::now();
        let mut count = 0;
        let ended = |name: &str| {
            count += 1;
            print_status(format_args!("kernel {line}: {name} ended, {count} of {}", plan.tests.len()));
        };
        let end = if let Some(kernel) = kernel {
            let initramfs = results.join(format!("kernel-{line}.cpio"));
            self.emulate(kernel, plan, tools, &log, &initramfs, ended)?
        } else {
            print_status(format_args!("this machine's kernel starts; its console is {}", log.display()));
            host::run(plan, &log, ended)?;
            MachineEnd::ByItself
        };
        let console = fs::read(&log).with_context(|| format!("failed to read {}", log.display()))?;
        let guest = Guest::from_console(&String::from_utf8_lossy(&console));
        let row = Row::new(line, guest, plan.names(), end, start.elapsed());
        print_status(format_args!("kernel {line}: {row}"));
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
    ) -> Result<MachineEnd> {
        let line = kernel.line;
        let archive = initramfs::archive(tools, kernel, plan)?;
        fs::write(initramfs, archive).with_context(|| format!("failed to write {}", initramfs.display()))?;
        print_status(format_args!(
            "kernel {line} ({}) starts; its console is {}",
            kernel.release,
            log.display()
        ));
        let machine = Machine {
            kernel: &kernel.vmlinuz,
            initramfs,
            accel: &self.accel,
            boot: &self.boot,
            log,
            timeout: Duration::from_mins(self.timeout),
        };
        machine.run(tools, |console| {
            if console.starts_with("@kernel ") {
                print_status(format_args!("kernel {line} has started"));
            } else if let Some(rest) = console.strip_prefix("@end ") {
                ended(rest.split(' ').next().unwrap_or_default());
            }
        })
    }
}
