//! The agent after `imds-agent unload`: it runs on without enforcing anything.
//!
//! The process does not exit, because systemd (`Restart=always`) or the kubelet would start it again, into enforcement. A restart by the
//! operator does so.

use std::path::PathBuf;

use tokio::{signal::unix::Signal, time::Interval};

use crate::{metrics::Done, supervisor::Supervisor, telemetry::Telemetry};

/// Status line for the service manager.
const STATUS: &str = "unloaded by `imds-agent unload`: nothing is enforced until a restart";

pub(super) struct Unloaded {
    pub(super) pins: PathBuf,
    /// Counters of the agent, which do not go back.
    pub(super) done: Done,
    pub(super) telemetry: Telemetry,
    pub(super) supervisor: Supervisor,
    pub(super) timer: Interval,
    pub(super) hangup: Signal,
    pub(super) terminate: Signal,
    pub(super) interrupt: Signal,
}

impl Unloaded {
    /// Serves health and metrics until a signal ends the agent.
    pub(super) async fn run(mut self) -> anyhow::Result<()> {
        log::warn!(
            "released {} to `imds-agent unload`: nothing is enforced until the agent is restarted",
            self.pins.display()
        );
        self.supervisor.ready(STATUS);
        loop {
            self.telemetry.report_progress(self.done.clone());
            tokio::select! {
                _ = self.timer.tick() => {}
                error = self.telemetry.ended() => return Err(error),
                () = self.supervisor.watch() => {}
                _ = self.hangup.recv() => {
                    log::warn!("no configuration is loaded after `imds-agent unload`: restart the agent");
                    self.supervisor.reloading();
                    self.supervisor.ready(STATUS);
                }
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
            }
        }
        self.supervisor.stopping();
        Ok(())
    }
}
