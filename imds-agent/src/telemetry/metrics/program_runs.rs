//! Run times of the agent's BPF programs, if the kernel measures them.

use std::os::fd::OwnedFd;

use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};
use imds_ebpf_common::{Hook, names::programs_of};

use super::family::Families;
use crate::datapath::pin::dir::PinDir;

/// Switch for the measurement of run times of all BPF programs (`BPF_ENABLE_STATS`, Linux 5.8).
#[derive(Debug, Default)]
pub struct RunTimeStats {
    is_desired: bool,
    /// Descriptor that keeps the measurement on. The kernel stops when the last such descriptor is closed.
    enabled: Option<OwnedFd>,
}

impl RunTimeStats {
    /// Starts or stops the measurement. A failure is logged once and has no other effect.
    pub fn set(&mut self, is_desired: bool) {
        if self.is_desired == is_desired {
            return;
        }
        self.is_desired = is_desired;
        self.enabled = None;
        if !is_desired {
            log::info!("stopped measuring run times of BPF programs (metrics.program_run_time)");
            return;
        }
        match enable_stats(Stats::RunTime) {
            Ok(descriptor) => {
                log::info!(
                    "started measuring run times of all BPF programs of this machine (metrics.program_run_time)"
                );
                self.enabled = Some(descriptor);
            }
            Err(error) => log::warn!(
                "failed to enable BPF run time statistics: {}; the agent needs CAP_SYS_ADMIN and Linux 5.8 for \
                 metrics.program_run_time",
                error.io_error
            ),
        }
    }
}

/// Run time and number of runs of one program.
#[derive(Clone, Debug)]
pub(crate) struct ProgramRuns {
    hook: &'static str,
    program: &'static str,
    seconds: f64,
    count: u64,
}

/// Reads the runs of all pinned programs. Leaves out programs that never ran during the measurement.
pub(crate) fn read(pins: &PinDir) -> Vec<ProgramRuns> {
    let runs = |(hook, program): (Hook, &'static str)| {
        let info = ProgramInfo::from_pin(pins.program(program)).ok()?;
        let (seconds, count) = (info.run_time().as_secs_f64(), info.run_count());
        (count > 0).then(|| ProgramRuns { hook: hook.name(), program, seconds, count })
    };
    programs().filter_map(runs).collect()
}

fn programs() -> impl Iterator<Item = (Hook, &'static str)> {
    Hook::ALL.into_iter().flat_map(|hook| programs_of(hook).iter().map(move |&program| (hook, program)))
}

pub(crate) fn add(runs: &[ProgramRuns], families: &mut Families) {
    let labels = |runs: &ProgramRuns| [("hook", runs.hook.to_owned()), ("program", runs.program.to_owned())];
    families.counter(
        "imds_agent_program_run_time_seconds",
        "Run time of the BPF program in seconds, while the kernel measures it",
        runs.iter().map(|of_program| (labels(of_program), of_program.seconds)),
    );
    families.counter(
        "imds_agent_program_runs",
        "Number of runs of the BPF program, while the kernel measures them",
        runs.iter().map(|of_program| (labels(of_program), of_program.count)),
    );
}
