//! Notifications to the service manager (`sd_notify(3)`), if one started the agent: readiness, status line, reloads and
//! watchdog.

use std::{future, time::Duration};

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::escape::escape;

/// Connection to the service manager. Does nothing if there is none.
#[derive(Debug)]
pub(crate) struct Systemd {
    is_ready: bool,
    status: String,
    watchdog: Option<Interval>,
}

impl Systemd {
    /// Connects to the service manager that `NOTIFY_SOCKET` and `WATCHDOG_USEC` name.
    pub(crate) fn from_env() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|timeout| {
            // Half of the timeout, as sd_watchdog_enabled(3) advises.
            let mut watchdog = interval((timeout / 2).max(Duration::from_millis(1)));
            watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
            watchdog
        });
        Self { is_ready: false, status: String::new(), watchdog }
    }

    /// Reports that the agent is ready, and sets the status line.
    pub(crate) fn ready(&mut self, status: &str) {
        // A newline would start another assignment of the protocol.
        let status = escape(status).into_owned();
        if !self.is_ready {
            self.is_ready = true;
            notify(&[NotifyState::Ready]);
        }
        if self.status != status {
            notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Reports a reload of the configuration, which lasts until [`Systemd::ready`].
    pub(crate) fn reloading(&mut self) {
        self.is_ready = false;
        // Units of Type=notify-reload (systemd 253) require the time.
        match NotifyState::monotonic_usec_now() {
            Ok(now) => notify(&[NotifyState::Reloading, now]),
            Err(_) => notify(&[NotifyState::Reloading]),
        }
    }

    pub(crate) fn stopping() {
        notify(&[NotifyState::Stopping]);
    }

    /// Sends a watchdog notification when the next one is due. Cancel safe.
    pub(crate) async fn watchdog(&mut self) {
        let Some(watchdog) = &mut self.watchdog else { return future::pending().await };
        watchdog.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// Sends a notification. A failure is only logged: the service manager has its own timeouts.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("failed to notify the service manager: {error}");
    }
}
