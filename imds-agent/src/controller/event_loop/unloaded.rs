//! The agent after `imds-agent unload`: the process stays, but enforces nothing.
//!
//! The process does not exit, because systemd (`Restart=always`) or the kubelet would restart it, and the restarted
//! agent would enforce again. Only the operator should do that.

use std::path::PathBuf;

use tokio::{signal::unix::Signal, time::Interval};

use crate::{
    controller::cluster_report::ClusterReport,
    telemetry::{Telemetry, agent_stats::AgentStats, systemd::Systemd},
};

/// Status line for the service manager.
const STATUS: &str = "unloaded by `imds-agent unload`: nothing is enforced until a restart";

pub(crate) struct Unloaded {
    pub(crate) pins: PathBuf,
    /// Last counters of the agent. They must not go back to 0.
    pub(crate) stats: AgentStats,
    pub(crate) telemetry: Telemetry,
    pub(crate) systemd: Systemd,
    pub(crate) cluster_report: ClusterReport,
    pub(crate) timer: Interval,
    pub(crate) hangup: Signal,
    pub(crate) terminate: Signal,
    pub(crate) interrupt: Signal,
}

impl Unloaded {
    /// Serves health and metrics until a signal ends the agent.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        log::warn!(
            "released {} to `imds-agent unload`: nothing is enforced until the agent is restarted",
            self.pins.display()
        );
        self.systemd.ready(STATUS);
        loop {
            self.telemetry.report_progress(self.stats.clone());
            tokio::select! {
                // The cluster learns that nothing is enforced.
                _ = self.timer.tick() => self.cluster_report.check_now(),
                error = self.telemetry.ended() => return Err(error),
                () = self.systemd.watchdog() => {}
                _ = self.hangup.recv() => {
                    log::warn!("ignored SIGHUP after `imds-agent unload`: restart the agent to load a configuration");
                    self.systemd.reloading();
                    self.systemd.ready(STATUS);
                }
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
            }
        }
        Systemd::stopping();
        Ok(())
    }
}
