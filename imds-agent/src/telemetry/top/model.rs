//! Model of the view, independent of the terminal.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    datapath::maps::counters::Counts,
    escape::escape,
    telemetry::status::{self, StatusReport},
};

const EVENTS: usize = 200;

/// State of the view, updated at each refresh.
#[derive(Debug, Default)]
pub(crate) struct Model {
    /// Lines above the table: mode, provider, hooks and agent.
    pub header: Vec<String>,
    /// First problem of the status, and the number of further ones.
    pub problem: Option<(String, usize)>,
    pub rows: Vec<Row>,
    /// Latest events, the newest at the end.
    pub events: VecDeque<String>,
    pub sort: SortOrder,
    /// Number of rows above the first visible one.
    pub offset: usize,
    pub is_paused: bool,
    pub shows_keys: bool,
    /// Counts at the previous refresh, by interface index and name.
    pub(crate) before: BTreeMap<(u32, String), Counts>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Row {
    pub name: String,
    /// Interface index; 0 for a hook.
    pub index: u32,
    /// Role of the interface; empty for a hook.
    pub role: String,
    pub pod: Option<String>,
    pub counts: Counts,
    /// Denied packets or calls per second.
    pub denied: f64,
    pub audited: f64,
    pub exempt: f64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum SortOrder {
    /// Denials per second, then the total of denials.
    #[default]
    Rate,
    /// Total of denied packets and calls.
    Total,
    /// Names, interfaces before hooks.
    Name,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Command {
    Sort,
    Pause,
    Keys,
    /// Scrolls down by this number of rows, or up if it is negative.
    Scroll(isize),
    First,
    Last,
}

impl SortOrder {
    /// Returns the name of the order in the status line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Rate => "denied/s",
            Self::Total => "denied",
            Self::Name => "name",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Total,
            Self::Total => Self::Name,
            Self::Name => Self::Rate,
        }
    }
}

impl Model {
    /// Updates the model with a status. `elapsed` is the time since the previous one; `None` for the first, which has no rates.
    pub(crate) fn take(&mut self, report: &StatusReport, elapsed: Option<Duration>) {
        self.header = header(report);
        self.problem = report.problems.split_first().map(|(first, others)| {
            let of = first.interface.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
            (escape(&format!("{of}{}", first.problem)).into_owned(), others.len())
        });
        let mut rows: Vec<_> =
            report.interfaces.iter().filter(|interface| !interface.attachments.is_empty()).map(row).collect();
        let hook = |name: &str, counts: Counts| Row { name: name.to_owned(), counts, ..Row::default() };
        rows.extend(report.sockets.as_ref().map(|sockets| hook("(sockets)", sockets.counts)));
        rows.extend(report.host_network.as_ref().map(|hosts| hook("(host_network)", hosts.counts)));
        rows.extend(report.node_allow.as_ref().map(|node| hook("(node_allow)", node.counts)));
        let before = std::mem::take(&mut self.before);
        for row in &mut rows {
            let key = (row.index, row.name.clone());
            if let Some(elapsed) = elapsed {
                // A new row has counted everything since the previous status.
                row.set_rates(before.get(&key).copied().unwrap_or_default(), elapsed);
            }
            self.before.insert(key, row.counts);
        }
        self.rows = rows;
        self.order();
    }

    pub(crate) fn add_events(&mut self, events: impl IntoIterator<Item = String>) {
        self.events.extend(events);
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    pub(crate) fn apply(&mut self, command: Command) {
        match command {
            Command::Sort => {
                self.sort = self.sort.next();
                self.order();
            }
            Command::Pause => self.is_paused = !self.is_paused,
            Command::Keys => self.shows_keys = !self.shows_keys,
            Command::Scroll(by) => self.offset = self.offset.saturating_add_signed(by).min(self.last()),
            Command::First => self.offset = 0,
            Command::Last => self.offset = self.last(),
        }
    }

    fn last(&self) -> usize {
        self.rows.len().saturating_sub(1)
    }

    fn order(&mut self) {
        // Compare in thousandths, so that equal displayed rates sort as equal.
        #[expect(clippy::cast_possible_truncation, reason = "rates are far below")]
        let rate = |row: &Row| Reverse((row.denied * 1000.0) as i64);
        let total = |row: &Row| Reverse(row.counts.denied.packets);
        let name = |row: &Row| (row.index == 0, row.name.clone());
        match self.sort {
            SortOrder::Rate => self.rows.sort_by_key(|row| (rate(row), total(row), name(row))),
            SortOrder::Total => self.rows.sort_by_key(|row| (total(row), name(row))),
            SortOrder::Name => self.rows.sort_by_key(name),
        }
        self.offset = self.offset.min(self.last());
    }
}

impl Row {
    fn set_rates(&mut self, before: Counts, elapsed: Duration) {
        let rate = |now: u64, before: u64| {
            // Counters that decreased were reset, so that everything counted is new.
            let more = if now >= before { now - before } else { now };
            #[expect(clippy::cast_precision_loss, reason = "the view shows one decimal")]
            let more = more as f64;
            more / elapsed.as_secs_f64().max(0.001)
        };
        self.denied = rate(self.counts.denied.packets, before.denied.packets);
        self.audited = rate(self.counts.audited.packets, before.audited.packets);
        self.exempt = rate(self.counts.exempt.packets, before.exempt.packets);
    }
}

fn row(interface: &status::Interface) -> Row {
    Row {
        name: interface.name.clone(),
        index: interface.ifindex,
        role: interface.role.to_owned(),
        pod: interface.pod.as_ref().map(ToString::to_string),
        counts: interface.counts,
        ..Row::default()
    }
}

fn header(report: &StatusReport) -> Vec<String> {
    let hooked = || report.interfaces.iter().filter(|interface| !interface.attachments.is_empty());
    let (desired, attached) =
        (hooked().count(), hooked().filter(|interface| interface.is_attached()).count());
    let agent = match (report.agent.running, report.agent.pid) {
        (true, Some(pid)) => format!("running, pid {pid}"),
        (true, None) => "running".to_owned(),
        (false, _) => "not running".to_owned(),
    };
    let provider = report.provider.as_ref().map_or("unknown", |provider| &provider.effective);
    let endpoints = report.endpoints.len();
    let watch_status = report.kubernetes.as_ref().map(|watch_status| {
        let word = if watch_status.connected { "connected" } else { "not connected" };
        format!("   node {}, {word}, {} pods", watch_status.node, watch_status.pods)
    });
    vec![
        format!(
            "mode {}   on_deny {}   provider {provider}, {endpoints} endpoint{}   hooks {}",
            report.mode.unwrap_or("unknown"),
            report.on_deny.unwrap_or("unknown"),
            if endpoints == 1 { "" } else { "s" },
            report.hooks.join(" ")
        ),
        format!(
            "agent {agent}   interfaces {attached} of {desired} attached{}",
            watch_status.unwrap_or_default()
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::maps::counters::Count;

    fn counts(denied: u64) -> Counts {
        Counts { denied: Count { packets: denied, bytes: 0 }, ..Counts::default() }
    }

    fn named(name: &str, index: u32, denied: u64, rate: f64) -> Row {
        Row { name: name.to_owned(), index, counts: counts(denied), denied: rate, ..Row::default() }
    }

    fn names(model: &Model) -> Vec<&str> {
        model.rows.iter().map(|row| row.name.as_str()).collect()
    }

    #[test]
    fn rates_survive_counter_resets() {
        let two = Duration::from_secs(2);
        let rate = |now: u64, before: u64| {
            let mut row = named("a", 1, now, 0.0);
            row.set_rates(counts(before), two);
            row.denied
        };
        for (now, before, expected) in [(10, 4, 3.0), (4, 4, 0.0), (4, 10, 2.0), (6, 0, 3.0)] {
            assert!((rate(now, before) - expected).abs() < 1e-9, "{now} after {before}");
        }
        let mut row = named("a", 1, 1, 0.0);
        row.set_rates(counts(0), Duration::ZERO);
        assert!(row.denied.is_finite());
    }

    #[test]
    fn rows_are_sorted_by_the_chosen_column() {
        let rows = vec![
            named("a", 1, 9, 0.0),
            named("c", 3, 5, 1.0),
            named("b", 2, 5, 2.0),
            named("(sockets)", 0, 7, 0.0),
        ];
        let mut model = Model { rows, ..Model::default() };
        model.order();
        assert_eq!(names(&model), ["b", "c", "a", "(sockets)"]);
        model.apply(Command::Sort);
        assert_eq!(names(&model), ["a", "(sockets)", "b", "c"]);
        model.apply(Command::Sort);
        assert_eq!(names(&model), ["a", "b", "c", "(sockets)"]);
        model.apply(Command::Sort);
        assert_eq!(model.sort, SortOrder::Rate);
    }

    #[test]
    fn scrolling_ends_at_both_ends() {
        let mut model = Model { rows: vec![Row::default(); 5], ..Model::default() };
        for (command, offset) in [
            (Command::Scroll(-3), 0),
            (Command::Scroll(2), 2),
            (Command::Scroll(100), 4),
            (Command::First, 0),
            (Command::Last, 4),
        ] {
            model.apply(command);
            assert_eq!(model.offset, offset, "{command:?}");
        }
        model.rows.clear();
        model.order();
        assert_eq!(model.offset, 0);
        model.apply(Command::Last);
        assert_eq!(model.offset, 0);
    }

    #[test]
    fn number_of_events_is_bounded() {
        let mut model = Model::default();
        model.add_events((0..EVENTS + 5).map(|number| number.to_string()));
        assert_eq!((model.events.len(), model.events[0].as_str()), (EVENTS, "5"));
    }
}
