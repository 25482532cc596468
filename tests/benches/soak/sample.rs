//! What the agent takes and says at one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use aya::{maps::loaded_maps, programs::loaded_programs};
use imds_tests::{
    Agent, World,
    http::{DEFAULT, try_get},
    measure::Process,
    poll::try_poll,
    probe::LONG,
};

use crate::load::{Follower, Load};

/// Maps that have an entry for each pod or interface.
const MAPS: [&str; 4] = ["imds_interfaces", "imds_counters", "imds_pods", "imds_exempt"];

/// One moment. What is counted is so from the first agent's start on, unless it says otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    elapsed: Duration,
    /// Resident memory in KiB, and what of it is no file's.
    rss: u64,
    pub(crate) anonymous: u64,
    pub(crate) descriptors: u64,
    /// Of one processor.
    cpu_percent: f64,
    pods: u64,
    /// Since this agent's start.
    pub(crate) reloads: u64,
    /// Likewise.
    pub(crate) refused: u64,
    sent: u64,
    pub(crate) denied: u64,
    /// Packets and calls of any verdict.
    pub(crate) counted: u64,
    /// Since this agent's start.
    pub(crate) told: u64,
    /// Likewise.
    pub(crate) suppressed: u64,
    pub(crate) untold: u64,
    /// What this agent's follower heard.
    heard: u64,
    /// Packets to the metadata service of pods that were never exempt.
    pub(crate) strangers: u64,
    pub(crate) failed_scrapes: u64,
}

impl Row {
    pub(crate) const TITLES: &str = " elapsed  RSS KiB anon KiB fds  CPU %   pods reloads refused         sent       denied    told  suppressed  untold   heard arrived";
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs();
        write!(
            f,
            "{:4}:{:02}  {:8} {:8} {:3} {:6.2} {:6} {:7} {:7} {:12} {:12} {:7} {:11} {:7} {:7} {:7}",
            seconds / 60,
            seconds % 60,
            self.rss,
            self.anonymous,
            self.descriptors,
            self.cpu_percent,
            self.pods,
            self.reloads,
            self.refused,
            self.sent,
            self.denied,
            self.told,
            self.suppressed,
            self.untold,
            self.heard,
            self.strangers,
        )
    }
}

/// Looks at one agent.
pub(crate) struct Sampler<'w> {
    world: &'w World,
    process: String,
    start: Instant,
    usage: Process,
    /// Seconds of CPU time, and when it was so much.
    before: (f64, Instant),
    objects: BTreeSet<Object>,
}

/// A program or map of the agent's.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Object {
    Program(u32),
    Map(u32),
}

impl<'w> Sampler<'w> {
    /// Since the `start` of the first agent.
    pub(crate) fn new(world: &'w World, agent: &Agent<'_>, start: Instant) -> Self {
        let process = format!("/proc/{}", agent.pid());
        let usage = Process::new(agent.pid());
        let before = (usage.cpu(), Instant::now());
        Self { world, process, start, usage, before, objects: BTreeSet::new() }
    }

    pub(crate) fn row(&mut self, load: &Load<'_>, follower: &Follower) -> Row {
        self.objects.extend(objects(&self.process));
        let (cpu, now) = (self.usage.cpu(), Instant::now());
        let (cpu_before, then) = std::mem::replace(&mut self.before, (cpu, now));
        let (metrics, arrivals) = (Metrics::read(self.world), self.world.arrivals());
        Row {
            elapsed: self.start.elapsed(),
            rss: memory(&self.process, "VmRSS"),
            anonymous: memory(&self.process, "RssAnon"),
            descriptors: fs::read_dir(format!("{}/fd", self.process)).map_or(0, |fds| fds.count() as u64),
            cpu_percent: 100.0 * (cpu - cpu_before) / (now - then).as_secs_f64(),
            pods: load.pods(),
            reloads: metrics.get("imds_agent_config_reloads_total{result=\"succeeded\"}"),
            refused: metrics.get("imds_agent_config_reloads_total{result=\"failed\"}"),
            sent: load.sent(),
            denied: metrics.sum(|series| {
                series.starts_with("imds_agent_packets_total") && series.contains("\"denied\"")
            }),
            counted: metrics.sum(|series| series.starts_with("imds_agent_packets_total")),
            told: metrics.get("imds_agent_events_total"),
            suppressed: metrics.get("imds_agent_events_suppressed_total"),
            untold: metrics.get("imds_agent_events_pending"),
            heard: follower.heard().0,
            strangers: arrivals.total() - load.arrivals_of_exempt(&arrivals),
            failed_scrapes: load.failed_scrapes(),
        }
    }

    /// All of the agent's that were seen.
    pub(crate) fn objects(self) -> BTreeSet<Object> {
        self.objects
    }
}

/// What is in the kernel for interfaces and pods: pinned links, and entries of maps.
pub(crate) fn held(world: &World) -> BTreeMap<String, usize> {
    let links = fs::read_dir(world.pin_dir().join("links")).map_or(0, Iterator::count);
    let entries = MAPS.map(|name| (name.to_owned(), entries(&world.pin_dir().join("maps").join(name))));
    entries.into_iter().chain([("links".to_owned(), links)]).collect()
}

/// Those of interfaces that are gone are no interface's: they are not counted.
fn entries(pin: &Path) -> usize {
    let output =
        Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(pin).output().expect("bpftool");
    let dump: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let entries = dump.as_array().expect("a list");
    entries.iter().filter(|entry| entry["formatted"]["key"]["ifindex"] != 0).count()
}

/// Which of these objects there still are after a while, and whether the pin directory is: the kernel frees what is unused when
/// it has time.
pub(crate) fn left(world: &World, objects: &BTreeSet<Object>) -> Vec<String> {
    let gone = try_poll(LONG, || left_now(world, objects).is_empty().then_some(()));
    if gone.is_some() { Vec::new() } else { left_now(world, objects) }
}

fn left_now(world: &World, objects: &BTreeSet<Object>) -> Vec<String> {
    let programs = loaded_programs().filter_map(|info| Some(Object::Program(info.ok()?.id())));
    let maps = loaded_maps().filter_map(|info| Some(Object::Map(info.ok()?.id())));
    let left = programs.chain(maps).filter(|object| objects.contains(object));
    let pins = world.pin_dir();
    let directory = pins.exists().then(|| pins.display().to_string());
    left.map(|object| format!("{object:?}")).chain(directory).collect()
}

/// Of which the process has descriptors.
fn objects(process: &str) -> BTreeSet<Object> {
    let infos = fs::read_dir(format!("{process}/fdinfo")).into_iter().flatten().flatten();
    // One may be closed meanwhile.
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    let id =
        |text: &str, key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    texts
        .filter_map(|text| {
            id(&text, "prog_id:").map(Object::Program).or(id(&text, "map_id:").map(Object::Map))
        })
        .collect()
}

/// What the agent serves; nothing where it did not.
struct Metrics(BTreeMap<String, u64>);

impl Metrics {
    fn read(world: &World) -> Self {
        let text = try_get(world, DEFAULT, "/metrics").map(|(_, text)| text).unwrap_or_default();
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
