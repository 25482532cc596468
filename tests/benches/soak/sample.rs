//! Resource usage and counters of the agent at one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use aya::{maps::loaded_maps, programs::loaded_programs};
use imds_tests::{
    Agent, TestEnv,
    http::{DEFAULT, try_get},
    measure::Process,
    poll::try_poll,
    probe::LONG,
};

use crate::load::{Follower, Load};

/// Maps with an entry for each pod or interface.
const MAPS: [&str; 4] = ["imds_interfaces", "imds_counters", "imds_pods", "imds_exempt"];

/// Values at one moment. Counters begin with the first agent unless the field says otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    elapsed: Duration,
    /// Resident memory in KiB. The next field is its anonymous part.
    rss: u64,
    pub(crate) anonymous: u64,
    pub(crate) descriptors: u64,
    /// CPU time since the last sample, in percent of one CPU.
    cpu_percent: f64,
    pods: u64,
    /// Number of reloads since the start of this agent.
    pub(crate) reloads: u64,
    /// Number of rejected configurations since the start of this agent.
    pub(crate) rejected: u64,
    sent: u64,
    pub(crate) denied: u64,
    /// Packets and calls of any verdict.
    pub(crate) counted: u64,
    /// Number of events since the start of this agent.
    pub(crate) emitted: u64,
    /// Number of suppressed events since the start of this agent.
    pub(crate) suppressed: u64,
    pub(crate) pending: u64,
    /// Number of events that this agent's subscriber received.
    received: u64,
    /// Packets to the metadata service from pods that were never exempt.
    pub(crate) strangers: u64,
    pub(crate) failed_scrapes: u64,
}

impl Row {
    pub(crate) const TITLES: &str = " elapsed  RSS KiB anon KiB fds  CPU %   pods reloads refused         sent       denied  events  suppressed pending received arrived";
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs();
        write!(
            f,
            "{:4}:{:02}  {:8} {:8} {:3} {:6.2} {:6} {:7} {:7} {:12} {:12} {:7} {:11} {:7} {:8} {:7}",
            seconds / 60,
            seconds % 60,
            self.rss,
            self.anonymous,
            self.descriptors,
            self.cpu_percent,
            self.pods,
            self.reloads,
            self.rejected,
            self.sent,
            self.denied,
            self.emitted,
            self.suppressed,
            self.pending,
            self.received,
            self.strangers,
        )
    }
}

/// Takes samples of one agent.
pub(crate) struct Sampler<'w> {
    env: &'w TestEnv,
    process: String,
    start: Instant,
    usage: Process,
    /// CPU time in seconds at the last sample, and the time of that sample.
    before: (f64, Instant),
    objects: BTreeSet<Object>,
}

/// Id of a BPF program or map of the agent.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Object {
    Program(u32),
    Map(u32),
}

impl<'w> Sampler<'w> {
    /// Creates a sampler for an agent. `start` is the start of the first agent.
    pub(crate) fn new(env: &'w TestEnv, agent: &Agent<'_>, start: Instant) -> Self {
        let process = format!("/proc/{}", agent.pid());
        let usage = Process::new(agent.pid());
        let before = (usage.cpu(), Instant::now());
        Self { env, process, start, usage, before, objects: BTreeSet::new() }
    }

    pub(crate) fn row(&mut self, load: &Load<'_>, follower: &Follower) -> Row {
        self.objects.extend(objects(&self.process));
        let (cpu, now) = (self.usage.cpu(), Instant::now());
        let (cpu_before, then) = std::mem::replace(&mut self.before, (cpu, now));
        let (metrics, received_packets) = (Metrics::read(self.env), self.env.received_packets());
        Row {
            elapsed: self.start.elapsed(),
            rss: memory(&self.process, "VmRSS"),
            anonymous: memory(&self.process, "RssAnon"),
            descriptors: fs::read_dir(format!("{}/fd", self.process)).map_or(0, |fds| fds.count() as u64),
            cpu_percent: 100.0 * (cpu - cpu_before) / (now - then).as_secs_f64(),
            pods: load.pods(),
            reloads: metrics.get("imds_agent_config_reloads_total{result=\"succeeded\"}"),
            rejected: metrics.get("imds_agent_config_reloads_total{result=\"failed\"}"),
            sent: load.sent(),
            denied: metrics.sum(|series| {
                series.starts_with("imds_agent_packets_total") && series.contains("\"denied\"")
            }),
            counted: metrics.sum(|series| series.starts_with("imds_agent_packets_total")),
            emitted: metrics.get("imds_agent_events_total"),
            suppressed: metrics.get("imds_agent_events_suppressed_total"),
            pending: metrics.get("imds_agent_events_pending"),
            received: follower.received().0,
            strangers: received_packets.total() - load.arrivals_of_exempt(&received_packets),
            failed_scrapes: load.failed_scrapes(),
        }
    }

    /// Returns all programs and maps of the agent that any sample saw.
    pub(crate) fn objects(self) -> BTreeSet<Object> {
        self.objects
    }
}

/// Counts kernel objects for interfaces and pods: pinned links and map entries.
pub(crate) fn kernel_objects(env: &TestEnv) -> BTreeMap<String, usize> {
    let links = fs::read_dir(env.pin_dir().join("links")).map_or(0, Iterator::count);
    let entries = MAPS.map(|name| (name.to_owned(), entries(&env.pin_dir().join("maps").join(name))));
    entries.into_iter().chain([("links".to_owned(), links)]).collect()
}

/// Counts the entries of a map. Skips index 0, which sums the counters of deleted interfaces.
fn entries(pin: &Path) -> usize {
    let output =
        Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(pin).output().expect("bpftool");
    let dump: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let entries = dump.as_array().expect("a list");
    entries.iter().filter(|entry| entry["formatted"]["key"]["ifindex"] != 0).count()
}

/// Returns the given objects that still exist after a while, and the pin directory if it exists. The kernel frees
/// unused objects asynchronously.
pub(crate) fn left(env: &TestEnv, objects: &BTreeSet<Object>) -> Vec<String> {
    let gone = try_poll(LONG, || left_now(env, objects).is_empty().then_some(()));
    if gone.is_some() { Vec::new() } else { left_now(env, objects) }
}

fn left_now(env: &TestEnv, objects: &BTreeSet<Object>) -> Vec<String> {
    let programs = loaded_programs().filter_map(|info| Some(Object::Program(info.ok()?.id())));
    let maps = loaded_maps().filter_map(|info| Some(Object::Map(info.ok()?.id())));
    let left = programs.chain(maps).filter(|object| objects.contains(object));
    let pins = env.pin_dir();
    let directory = pins.exists().then(|| pins.display().to_string());
    left.map(|object| format!("{object:?}")).chain(directory).collect()
}

/// Returns the programs and maps for which the process has descriptors.
fn objects(process: &str) -> BTreeSet<Object> {
    let infos = fs::read_dir(format!("{process}/fdinfo")).into_iter().flatten().flatten();
    // The process may close a descriptor concurrently.
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    let id =
        |text: &str, key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    texts
        .filter_map(|text| {
            id(&text, "prog_id:").map(Object::Program).or(id(&text, "map_id:").map(Object::Map))
        })
        .collect()
}

/// Metrics that the agent serves. Empty if the request failed.
struct Metrics(BTreeMap<String, u64>);

impl Metrics {
    fn read(env: &TestEnv) -> Self {
        let text = try_get(env, DEFAULT, "/metrics").map(|(_, text)| text).unwrap_or_default();
        let series = text.lines().filter(|line| !line.starts_with('#'));
        let values = series.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(values.collect())
    }

    fn get(&self, series: &str) -> u64 {
        self.0.get(series).copied().unwrap_or_default()
    }

    fn sum(&self, is_wanted: impl Fn(&str) -> bool) -> u64 {
        self.0.iter().filter(|(series, _)| is_wanted(series)).map(|(_, value)| value).sum()
    }
}

fn memory(process: &str, key: &str) -> u64 {
    let status = fs::read_to_string(format!("{process}/status")).expect("read the agent's status");
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a number")
}
