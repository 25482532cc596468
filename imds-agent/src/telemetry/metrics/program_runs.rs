//! Run times of the agent's BPF programs, if the kernel measures them.

use std::os::fd::OwnedFd;

use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};
use imds_ebpf_common::{Hook, names::programs_of};

use super::format::Exposition;
use crate::datapath::pin::dir::PinDir;

/// Switch for the measurement of run times of all BPF programs (`BPF_ENABLE_STATS`, Linux 5.8).
#[derive(Debug, Default)]
pub(crate) struct RunTimeStats {
    is_desired: bool,
    /// Descriptor that keeps the measurement on. The kernel stops when the last such descriptor is closed.
    enabled: Option<OwnedFd>,
}

impl RunTimeStats {
    /// Starts or stops the measurement. A failure is logged once and has no other effect.
    pub(crate) fn set(&mut self, is_desired: bool) {
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

/// Adds the runs of all pinned programs. Leaves out programs that never ran during the measurement.
pub(crate) fn add(pins: &PinDir, to: &mut Exposition) {
    let programs =
        Hook::ALL.into_iter().flat_map(|hook| programs_of(hook).iter().map(move |&program| (hook, program)));
    let infos = programs.filter_map(|(hook, program)| {
        let info = ProgramInfo::from_pin(pins.program(program)).ok()?;
        (info.run_count() > 0).then(|| ([("hook", hook.name()), ("program", program)], info))
    });
    let runs: Vec<_> = infos.collect();
    to.counters(
        "imds_agent_program_run_time_seconds",
        "Run time of the BPF program in seconds, while the kernel measures it",
        runs.iter().map(|(labels, info)| (*labels, info.run_time().as_secs_f64())),
    );
    to.counters(
        "imds_agent_program_runs",
        "Number of runs of the BPF program, while the kernel measures them",
        runs.iter().map(|(labels, info)| (*labels, info.run_count())),
    );
}
