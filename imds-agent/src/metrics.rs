//! What is in force as metrics, in the text form of `OpenMetrics` 1.0, which Prometheus reads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
};

use imds_ebpf_common::{
    Address, AttachMode, Hook, Mode, Verdict,
    ledger::{DenialKey, DenialRecord},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::{
    agent::Reloads,
    collector::Collected,
    datapath::counters::{Count, Counts},
    endpoints::{plain, unpadded},
    escape::escape,
    guard::{Repairs, Writes},
    kube::WatchState,
    status::Report,
    version::COMMIT,
};

/// What the text form is called in HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Most namespaces that are told apart.
const MOST_NAMESPACES: usize = 100;

/// What a running agent has done so far.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// Configurations loaded again.
    pub reloads: Reloads,
    /// What was put right.
    pub repairs: Repairs,
    /// Maps written for who is exempt and who is who.
    pub writes: Writes,
    /// How the watch of pods goes, where there is one.
    pub watch: Option<WatchState>,
    /// What the programs told, where this agent is who takes it.
    pub collected: Option<Collected>,
    /// Lines of the log that were dropped, because standard error was not read.
    pub log_lines_dropped: u64,
}

/// What pods of one namespace were denied or audited of one endpoint at one hook, summed up.
pub type Denied = BTreeMap<(String, DenialTo), Count>;

/// Endpoint, hook and verdict of denials.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct DenialTo {
    address: Address,
    hook: u32,
    verdict: u32,
}

/// Sums up what was denied.
pub fn sum<E>(denials: impl Iterator<Item = Result<(DenialKey, DenialRecord), E>>) -> Result<Denied, E> {
    let mut denied = Denied::new();
    for denial in denials {
        let (DenialKey { address, hook, verdict, .. }, record) = denial?;
        let key = (unpadded(&record.namespace), DenialTo { address, hook, verdict });
        *denied.entry(key).or_default() += Count { packets: record.count, bytes: record.bytes };
    }
    Ok(denied)
}

/// All metrics of one moment, as text.
pub fn encode(report: Report, denials: Denied, done: Done) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot { report, denials, done }));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshot {
    report: Report,
    denials: Denied,
    done: Done,
}

/// One time series: its labels and its value.
type Sample<const N: usize> = ([(&'static str, String); N], u64);

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Encoder(encoder);
        self.encode_agent(&mut to)?;
        self.encode_counts(&mut to)?;
        self.encode_denials(&mut to)?;
        self.encode_coverage(&mut to)?;
        self.encode_watch(&mut to)?;
        self.encode_done(&mut to)
    }
}

impl Snapshot {
    fn encode_agent(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let Self { report, .. } = self;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let build = [
            ("version", report.version.to_owned()),
            ("commit", COMMIT.to_owned()),
            ("kernel", kernel.trim().to_owned()),
        ];
        to.gauge("imds_agent_build_info", "Version of the agent and of the kernel; always 1", [(build, 1)])?;
        let is_in = |mode: Mode| u64::from(report.mode == Some(mode.name()));
        let modes = [Mode::Enforce, Mode::Audit, Mode::Off];
        to.gauge(
            "imds_mode",
            "1 for the mode in force",
            modes.map(|mode| ([("mode", mode.name().to_owned())], is_in(mode))),
        )?;
        let Some(configuration) = &report.configuration else { return Ok(()) };
        to.gauge(
            "imds_config_generation",
            "Number of the configuration in force",
            [([], configuration.generation)],
        )?;
        to.gauge(
            "imds_config_loaded_timestamp_seconds",
            "When it came into force, in seconds since 1970",
            [([], configuration.loaded_at.as_second().unsigned_abs())],
        )?;
        to.gauge(
            "imds_config_refused",
            "1 while the configuration file is rejected, at a reload or at the start, and another configuration is in force",
            [([], u64::from(configuration.refused.is_some()))],
        )
    }

    fn encode_counts(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let samples = |unit: fn(Count) -> u64| -> Vec<Sample<2>> {
            let of_hook = |(hook, counts): (&&'static str, &Counts)| {
                counts.named().map(|(verdict, count)| {
                    ([("hook", (*hook).to_owned()), ("verdict", verdict.to_owned())], unit(count))
                })
            };
            self.report.by_hook.iter().flat_map(of_hook).collect()
        };
        to.counter(
            "imds_packets",
            "Packets, or calls at the socket hook, from pods to guarded endpoints",
            samples(|count| count.packets),
        )?;
        to.counter(
            "imds_bytes",
            "Bytes of these packets, link-layer headers included",
            samples(|count| count.bytes),
        )
    }

    /// Of whom there are more than [`MOST_NAMESPACES`], the rest goes by no name.
    fn encode_denials(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let mut by_namespace: BTreeMap<String, u64> = BTreeMap::new();
        for ((namespace, _), denied) in &self.denials {
            let count = by_namespace.entry(namespace.clone()).or_default();
            *count = count.saturating_add(denied.packets);
        }
        let mut most: Vec<_> = by_namespace.into_iter().collect();
        most.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let named: BTreeSet<_> =
            most.into_iter().take(MOST_NAMESPACES).map(|(namespace, _)| namespace).collect();
        let mut sums: BTreeMap<[String; 4], Count> = BTreeMap::new();
        for ((namespace, key), denied) in &self.denials {
            let address = plain(key.address);
            let named_endpoint = self.report.endpoints.iter().find(|endpoint| endpoint.address == address);
            let hook =
                Hook::ALL.into_iter().find(|&hook| hook as u32 == key.hook).map_or("unknown", Hook::name);
            let verdict = if key.verdict == Verdict::Audit as u32 { "audited" } else { "denied" };
            let namespace = Some(namespace.clone()).filter(|namespace| named.contains(namespace));
            let endpoint =
                named_endpoint.map_or_else(|| "unguarded".to_owned(), |endpoint| endpoint.name.clone());
            let labels = [namespace.unwrap_or_default(), endpoint, hook.to_owned(), verdict.to_owned()];
            *sums.entry(labels).or_default() += *denied;
        }
        let samples = |unit: fn(Count) -> u64| -> Vec<Sample<4>> {
            let of = |(labels, &count): (&[String; 4], &Count)| {
                let [namespace, endpoint, hook, verdict] = labels.clone();
                let labels =
                    [("namespace", namespace), ("endpoint", endpoint), ("hook", hook), ("verdict", verdict)];
                (labels, unit(count))
            };
            sums.iter().map(of).collect()
        };
        to.counter(
            "imds_denials",
            "Packets and calls that were denied or audited, by namespace of the pod; without one where no pod is known",
            samples(|count| count.packets),
        )?;
        to.counter(
            "imds_denial_bytes",
            "Bytes of these packets, link-layer headers included",
            samples(|count| count.bytes),
        )
    }

    fn encode_watch(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let Some(watch) = &self.done.watch else { return Ok(()) };
        to.gauge(
            "imds_kubernetes_connected",
            "1 while the API server tells of this node's pods",
            [([], u64::from(watch.connected))],
        )?;
        let synced = watch.last_sync.map(|time| ([], time.as_second().unsigned_abs()));
        to.gauge(
            "imds_kubernetes_synced_timestamp_seconds",
            "When what is known of pods was last known to be all there is, in seconds since 1970",
            synced,
        )?;
        let pods = self.report.kubernetes.iter().flat_map(|lookup| {
            [("known", lookup.pods), ("without_sandbox", lookup.awaited), ("disputed", lookup.disputed)]
                .map(|(state, count)| ([("state", state.to_owned())], count.into()))
        });
        to.gauge("imds_kubernetes_pods", "Pods of this node that are known", pods)?;
        to.counter("imds_kubernetes_relists", "Times at which all pods were read", [([], watch.relists)])?;
        to.counter("imds_kubernetes_events", "Changes to pods that were told", [([], watch.events)])?;
        let errors = watch.errors.iter().map(|(kind, &count)| ([("kind", kind.name().to_owned())], count));
        to.counter("imds_kubernetes_errors", "Failures to hear of pods", errors)
    }

    fn encode_coverage(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let Self { report, .. } = self;
        let count = |hook: &str, is_so: &dyn Fn(Option<&str>) -> bool| {
            let of_hook = report.interfaces.iter().filter_map(|interface| interface.attachment(hook));
            of_hook.filter(|attachment| is_so(attachment.attach_mode)).count() as u64
        };
        let samples = report.hooks.iter().flat_map(|&hook| {
            [("guarded", true), ("unguarded", false)].map(|(state, is)| {
                let labels = [("hook", hook.to_owned()), ("state", state.to_owned())];
                (labels, count(hook, &|guard| guard.is_some() == is))
            })
        });
        to.gauge("imds_interfaces", "Interfaces that are to be guarded at a hook", samples)?;
        let samples = report.hooks.iter().flat_map(|&hook| {
            [AttachMode::Tcx, AttachMode::Clsact, AttachMode::Netkit].map(|backend| {
                let labels = [("hook", hook.to_owned()), ("backend", backend.name().to_owned())];
                (labels, count(hook, &|guard| guard == Some(backend.name())))
            })
        });
        to.gauge("imds_attached_interfaces", "Interfaces that are guarded at a hook, by how", samples)?;
        let by_cgroup = [
            ("socket", report.sockets.as_ref().map(|sockets| sockets.attached)),
            ("local_service", report.local_service.filter(|local| local.desired).map(|local| local.attached)),
            ("host_network", report.host_network.as_ref().map(|hosts| hosts.attached)),
        ];
        let samples = by_cgroup.into_iter().filter_map(|(hook, attached)| {
            attached.map(|attached| ([("hook", hook.to_owned())], u64::from(attached)))
        });
        to.gauge(
            "imds_cgroup_hook_attached",
            "1 where all programs of a hook on cgroups are attached",
            samples,
        )?;
        to.gauge(
            "imds_exempt_senders",
            "Interfaces, network namespaces and cgroups that a rule exempts; each of its endpoints counts",
            report
                .senders_by_rule()
                .into_iter()
                .map(|(rule, senders)| ([("rule", rule.to_owned())], senders as u64)),
        )?;
        to.gauge("imds_endpoints", "Guarded endpoints", [([], report.endpoints.len() as u64)])?;
        to.gauge(
            "imds_problems",
            "Things that `imds-agent status` lists as problems",
            [([], report.problems.len() as u64)],
        )?;
        to.gauge(
            "imds_ready",
            "1 where all that is to be guarded is",
            [([], u64::from(report.uncovered().is_empty()))],
        )
    }

    fn encode_done(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let Done { reloads, repairs, writes, collected, log_lines_dropped, .. } = self.done;
        let results = [("succeeded", reloads.succeeded), ("failed", reloads.failed)];
        to.counter(
            "imds_config_reloads",
            "Configurations that were loaded again",
            results.map(|(result, count)| ([("result", result.to_owned())], count)),
        )?;
        let kinds = [
            ("attached", repairs.attached),
            ("replaced", repairs.replaced),
            ("pinned", repairs.pinned),
            ("reordered", repairs.reordered),
            ("postponed", repairs.postponed),
        ];
        to.counter(
            "imds_repairs",
            "What somebody else had changed and was put right: attached again, put in the place of another program, \
             pinned again, put before other programs",
            kinds.map(|(kind, count)| ([("kind", kind.to_owned())], count)),
        )?;
        to.counter(
            "imds_map_writes",
            "Entries of maps that were written because pods or rules changed",
            [("imds_exempt", writes.exemptions), ("imds_pods", writes.pods)]
                .map(|(map, count)| ([("map", map.to_owned())], count)),
        )?;
        let Collected { told, suppressed } = collected.unwrap_or_default();
        to.counter("imds_events", "Packets and calls of which the programs told", [([], told)])?;
        to.counter(
            "imds_events_suppressed",
            "Packets and calls of which they told by their number alone, as there were too many",
            [([], suppressed)],
        )?;
        to.gauge(
            "imds_events_untold",
            "Packets and calls of which nothing was told so far: their number comes with the next of the same sender",
            [([], self.report.untold)],
        )?;
        to.counter(
            "imds_netlink_overruns",
            "Times at which the kernel's events came faster than they were read, and everything was read anew",
            [([], repairs.overruns)],
        )?;
        to.counter(
            "imds_agent_log_lines_dropped",
            "Lines of the log that were dropped, because standard error was not read",
            [([], log_lines_dropped)],
        )
    }
}

/// A label's value, escaped twice: for the reader, and for the text form, as the encoder writes values as they are.
fn label_value(text: &str) -> String {
    escape(text).replace('\\', r"\\").replace('"', "\\\"")
}

struct Encoder<'e>(DescriptorEncoder<'e>);

impl Encoder<'_> {
    fn counter<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<N>>,
    ) -> fmt::Result {
        self.family(name, help, samples, MetricType::Counter, ConstCounter::new)
    }

    fn gauge<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<N>>,
    ) -> fmt::Result {
        self.family(name, help, samples, MetricType::Gauge, ConstGauge::new)
    }

    fn family<const N: usize, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<N>>,
        kind: MetricType,
        metric: fn(u64) -> M,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in samples {
            let metric = metric(value);
            if labels.is_empty() {
                return metric.encode(family);
            }
            let labels = labels.map(|(name, value)| (name, label_value(&value)));
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
