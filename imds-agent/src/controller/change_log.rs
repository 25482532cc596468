//! Log lines about changes of single interfaces.
//!
//! A pass over all interfaces logs one summary: on a node with 1,000 pods, a line for each interface would hide all others.
//! Other changes get a line each, but only as many as a reader can follow.

use std::{collections::BTreeMap, fmt::Write as _, mem};

use imds_ebpf_common::TcHook;
use log::Level;
use strum::{Display, IntoStaticStr};
use tokio::time::{Duration, Instant};

use super::Reconciler;
use crate::{
    datapath::{attach::attachment::Action, pin::dir::AttachPoint},
    node::link::Link,
};

/// Warnings and errors of a pass that get a line of their own.
const MAX_WARNINGS: u32 = 5;
/// Size of the token bucket: lines that may be logged at once outside of a pass.
const MAX_BURST: u32 = 20;
/// Interval at which the token bucket gets one more line.
const REFILL_INTERVAL: Duration = Duration::from_millis(500);

/// Work that covers all interfaces.
#[derive(Clone, Copy, Debug, Eq, IntoStaticStr, PartialEq)]
#[strum(const_into_str, serialize_all = "lowercase")]
pub(super) enum Pass {
    /// Initial sync: lasts until each pod that ran at the start of the agent has its program.
    #[strum(serialize = "initial sync")]
    InitialSync,
    /// Periodic resync, or one after a netlink overrun.
    Resync,
    /// Reconciliation after a reload of the configuration.
    Reload,
}

/// Kind of a change of an interface or of a program on it.
#[derive(Clone, Copy, Debug, Display, Eq, Ord, PartialEq, PartialOrd)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Change {
    #[strum(to_string = "not enforced")]
    NotEnforced,
    #[strum(to_string = "enforced again")]
    EnforcedAgain,
    Attached,
    Replaced,
    Updated,
    #[strum(to_string = "pinned again")]
    Pinned,
    #[strum(to_string = "moved to the head of the hook")]
    Moved,
    Detached,
    #[strum(to_string = "interfaces deleted")]
    Deleted,
}

/// Decides which changes get a line of their own.
#[derive(Debug)]
pub(super) struct ChangeLog {
    pass: Option<(Pass, Tally)>,
    /// Changes outside of a pass that got no line.
    flood: Tally,
    tokens: u32,
    refilled: Instant,
}

/// Changes without a line of their own.
#[derive(Debug, Default)]
struct Tally {
    warnings: u32,
    counts: BTreeMap<Change, u64>,
    first: Option<(Level, String)>,
    level: Option<Level>,
}

impl ChangeLog {
    pub(super) fn new() -> Self {
        Self { pass: None, flood: Tally::default(), tokens: MAX_BURST, refilled: Instant::now() }
    }

    /// Starts a pass, unless one is in progress.
    pub(super) fn begin(&mut self, pass: Pass) {
        self.report_flood();
        self.pass.get_or_insert_with(|| (pass, Tally::default()));
    }

    /// Ends a pass, and logs its summary. Does nothing if another pass is in progress.
    pub(super) fn end(&mut self, pass: Pass) {
        if let Some((_, tally)) = self.pass.take_if(|(current, _)| *current == pass)
            && let Some((level, line)) = tally.summary(pass.into_str())
        {
            log::log!(level, "{line}");
        }
    }

    /// Logs a change, or adds it to the tally if too many lines were logged.
    pub(super) fn log_change(&mut self, level: Level, change: Change, text: String) {
        if self.is_logged(level) {
            self.report_flood();
            log::log!(level, "{text}");
        } else {
            log::debug!("{text}");
            self.tally().add(level, change, text);
        }
    }

    /// Reports whether a change gets a line of its own.
    fn is_logged(&mut self, level: Level) -> bool {
        if level > Level::Info {
            return true;
        }
        if let Some((_, tally)) = &mut self.pass {
            let is_shown = level <= Level::Warn && tally.warnings < MAX_WARNINGS;
            tally.warnings += u32::from(is_shown);
            return is_shown;
        }
        let now = Instant::now();
        let intervals = now.duration_since(self.refilled).as_millis() / REFILL_INTERVAL.as_millis();
        let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
        if intervals > 0 {
            self.tokens = self.tokens.saturating_add(intervals).min(MAX_BURST);
            self.refilled = now;
        }
        let is_shown = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        is_shown
    }

    fn tally(&mut self) -> &mut Tally {
        match &mut self.pass {
            Some((_, tally)) => tally,
            None => &mut self.flood,
        }
    }

    fn report_flood(&mut self) {
        if let Some((level, line)) = mem::take(&mut self.flood).summary("more changes") {
            log::log!(level, "{line}");
        }
    }
}

impl Tally {
    fn add(&mut self, level: Level, change: Change, text: String) {
        *self.counts.entry(change).or_default() += 1;
        // `log::Level` orders more severe levels first, so that the minimum is the most severe one.
        self.level = Some(self.level.map_or(level, |before| before.min(level)));
        self.first.get_or_insert((level, text));
    }

    /// Returns the text of the only change, or the number of changes of each kind.
    fn summary(self, title: &str) -> Option<(Level, String)> {
        let total: u64 = self.counts.values().sum();
        if total <= 1 {
            return self.first;
        }
        let mut line = format!("{title}: ");
        for (index, (change, count)) in self.counts.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            // Writing to a string does not fail.
            let _ok = write!(line, "{comma}{count} {change}");
        }
        line += " (log level debug lists each)";
        Some((self.level?, line))
    }
}

impl Reconciler {
    /// Logs an action, and counts it if it corrects drift.
    pub(super) fn report(&mut self, link: &Link, hook: TcHook, action: Action, is_new: bool) {
        let Link { name, index, .. } = link;
        let point = AttachPoint { ifindex: *index, hook };
        let is_turn = self.attaching.turn == Some(point);
        // A hook that a route or a bridge makes necessary later is no drift.
        let is_first = is_new || !self.attaching.attached.contains(&point);
        let (hook, level) = (hook.hook().name(), self.change_log_level());
        if level == Level::Warn && !is_turn {
            match action {
                Action::Attach(_) if !is_first => self.corrections.attached += 1,
                Action::Replace(_) => self.corrections.replaced += 1,
                Action::Pin(_) => self.corrections.pinned += 1,
                Action::Reorder(_) => self.corrections.reordered += 1,
                Action::Attach(_) | Action::Detach(_) => {}
            }
        }
        let at = format!("{name} (ifindex {index})");
        let (level, change, text) = match action {
            Action::Attach(mode) => {
                let is_expected = is_first || is_turn;
                let again = if is_expected || self.progress.in_reload { "" } else { " again" };
                let level = if is_expected { Level::Info } else { level };
                (level, Change::Attached, format!("attached {hook} to {at}{again} with {}", mode.name()))
            }
            Action::Replace(mode) if self.progress.initial_sync_done => {
                let text = format!("replaced another program at {hook} of {at} with {}", mode.name());
                (Level::Warn, Change::Replaced, text)
            }
            Action::Replace(_) => (
                Level::Info,
                Change::Updated,
                format!("updated {hook} of {at}, attached by an earlier agent"),
            ),
            Action::Pin(_) => {
                (Level::Warn, Change::Pinned, format!("pinned the link of {hook} at {at} again"))
            }
            Action::Reorder(_) => {
                let text =
                    format!("moved {hook} of {at} to the head of the hook: another program was before it");
                (Level::Warn, Change::Moved, text)
            }
            Action::Detach(mode) => {
                let level = if is_turn { Level::Debug } else { level };
                (level, Change::Detached, format!("detached {hook} from {at} ({})", mode.name()))
            }
        };
        self.changes.log_change(level, change, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(log: &mut ChangeLog, level: Level, change: Change, number: usize) {
        log.log_change(level, change, format!("veth{number}"));
    }

    #[tokio::test(start_paused = true)]
    async fn pass_has_one_summary() {
        let mut log = ChangeLog::new();
        log.begin(Pass::InitialSync);
        for number in 0..100 {
            note(&mut log, Level::Info, Change::Attached, number);
        }
        for number in 0..10 {
            assert_eq!(log.is_logged(Level::Error), number < 5);
        }
        note(&mut log, Level::Error, Change::NotEnforced, 7);
        log.begin(Pass::Resync);
        log.end(Pass::Resync);
        let (pass, tally) = log.pass.take().unwrap();
        let expected = "initial sync: 1 not enforced, 100 attached (log level debug lists each)";
        assert_eq!(tally.summary(pass.into_str()), Some((Level::Error, expected.to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn single_change_is_its_own_summary() {
        let mut log = ChangeLog::new();
        log.begin(Pass::Resync);
        note(&mut log, Level::Info, Change::Attached, 4);
        let (pass, tally) = log.pass.take().unwrap();
        assert_eq!(tally.summary(pass.into_str()), Some((Level::Info, "veth4".to_owned())));
        assert_eq!(Tally::default().summary("resync"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn flood_is_bounded() {
        let mut log = ChangeLog::new();
        for number in 0..1000 {
            note(&mut log, Level::Info, Change::Deleted, number);
        }
        assert_eq!(log.flood.counts[&Change::Deleted], 980);
        tokio::time::advance(REFILL_INTERVAL * 2).await;
        assert!(log.is_logged(Level::Warn) && log.is_logged(Level::Warn) && !log.is_logged(Level::Warn));
        log.begin(Pass::Resync);
        assert!(log.flood.counts.is_empty());
        assert!(log.is_logged(Level::Debug));
    }
}
