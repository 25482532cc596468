//! `cargo xtask`: tasks of this workspace that need more than one cargo command.
//!
//! Each command is a clap struct with a `run` method in its own file.

mod apt;
mod arch;
mod bench;
mod book;
mod build;
mod cache;
mod clients;
mod demo;
mod deny;
mod dist;
mod e2e;
mod ebpf;
mod elf;
mod faults;
mod fuzz;
mod lint;
mod manifests;
mod requirements;
mod run;
mod setup;
mod soak;
mod supervise;
mod test;
mod unpacked_program;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::print_status;

/// Sets up, builds, runs and tests imds-agent.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Setup),
    /// Build the documentation site in target/book with `mdbook`, which must be installed
    Book,
    /// Build the agent in target/release, one binary that contains the BPF programs
    Build,
    Run(run::Run),
    Test(test::Test),
    /// Check formatting and prose, and run clippy on all crates; warnings are errors
    Lint,
    Deny(deny::Deny),
    /// Demonstrate the agent on a node, two pods and a metadata service in temporary network namespaces
    Demo,
    Dist(dist::Dist),
    Release(dist::Release),
    Image(dist::Image),
    E2e(e2e::EndToEnd),
    Ebpf(ebpf::Ebpf),
    Faults(faults::Faults),
    Fuzz(fuzz::Fuzz),
    Manifests(manifests::Manifests),
    Bench(bench::Bench),
    Soak(soak::Soak),
    Vm(vm::Vm),
    InstallCheck(vm::InstallCheck),
}

impl Command {
    fn run(self) -> Result<ExitCode> {
        match self {
            Self::Setup(setup) => setup.run(),
            Self::Book => book::run(),
            Self::Build => build::run(),
            Self::Run(run) => return run.run(),
            Self::Test(test) => test.run(),
            Self::Lint => lint::run(),
            Self::Deny(deny) => deny.run(),
            Self::Demo => demo::run(),
            Self::Dist(dist) => dist.run(),
            Self::Release(release) => release.run(),
            Self::Image(image) => image.run(),
            Self::E2e(e2e) => e2e.run(),
            Self::Ebpf(ebpf) => ebpf.run(),
            Self::Faults(faults) => faults.run(),
            Self::Fuzz(fuzz) => fuzz.run(),
            Self::Manifests(manifests) => return manifests.run(),
            Self::Bench(bench) => bench.run(),
            Self::Soak(soak) => soak.run(),
            Self::Vm(vm) => return vm.run(),
            Self::InstallCheck(check) => check.run(),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

fn main() -> ExitCode {
    Cli::parse().command.run().unwrap_or_else(|error| {
        print_status(format_args!("error: {error:#}"));
        ExitCode::FAILURE
    })
}
