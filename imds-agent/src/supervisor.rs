//! What the service manager is told, where one started the agent and wants to know (`sd_notify(3)`): that the node is
//! guarded, how, and that the agent is at work.

use std::{future, time::Duration};

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::escape::escape;

/// The service manager. Without one, nothing is told to anybody.
#[derive(Debug)]
pub struct Supervisor {
    is_ready: bool,
    status: String,
    watchdog: Option<Interval>,
}

impl Supervisor {
    /// The one that `NOTIFY_SOCKET` and `WATCHDOG_USEC` name.
    #[must_use]
    pub fn from_env() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|patience| {
            // Half of what it waits, as sd_watchdog_enabled(3) advises.
            let mut watchdog = interval((patience / 2).max(Duration::from_millis(1)));
            watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
            watchdog
        });
        Self { is_ready: false, status: String::new(), watchdog }
    }

    /// What can be guarded is guarded, and it is as `status` says.
    pub fn ready(&mut self, status: &str) {
        // A newline would start another assignment of the protocol.
        let status = escape(status).into_owned();
        if !self.is_ready {
            self.is_ready = true;
            tell(&[NotifyState::Ready]);
        }
        if self.status != status {
            tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// The configuration is being loaded again, until [`Supervisor::ready`].
    pub fn reloading(&mut self) {
        self.is_ready = false;
        // Asked for where the unit is of Type=notify-reload (systemd 253).
        match NotifyState::monotonic_usec_now() {
            Ok(now) => tell(&[NotifyState::Reloading, now]),
            Err(_) => tell(&[NotifyState::Reloading]),
        }
    }

    /// The agent ends.
    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping]);
    }

    /// Says that the agent is at work, each time that this is due. Nothing is lost where it is dropped and called again.
    pub async fn watch(&mut self) {
        let Some(watchdog) = &mut self.watchdog else { return future::pending().await };
        watchdog.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

/// That nobody hears it is no reason to stop: who waits for it has a limit.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("can't tell the service manager: {error}");
    }
}
