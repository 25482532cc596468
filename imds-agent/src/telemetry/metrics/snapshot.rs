//! Snapshot of all values for one scrape, and their metric families.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::Arc,
};

use imds_ebpf_common::{AttachMode, Mode, Verdict};

use super::{
    Denied,
    format::{Exposition, Label},
};
use crate::{
    checksum::fold,
    datapath::maps::counters::{Count, Counts},
    encode::{hook_name, ip_address},
    telemetry::{
        Collected,
        agent_stats::{AgentStats, BrokerStats},
        pod_events::EventWrites,
        sinks::{SinkCounts, SinkQueue},
        status::StatusReport,
    },
    version::COMMIT,
};

/// Maximum number of namespaces with a label value of their own.
const MAX_NAMESPACES: usize = 100;

#[derive(Debug)]
pub(crate) struct Snapshot {
    pub report: StatusReport,
    /// Sums of denials by namespace.
    pub denials: Denied,
    pub stats: AgentStats,
    /// Event counters; `None` if another process collects the events.
    pub collected: Option<Collected>,
    /// Hash of the exemptions of the effective configuration; `None` if nothing is loaded.
    pub exemptions_hash: Option<u64>,
    pub sinks: Vec<Arc<SinkQueue>>,
}

impl Snapshot {
    pub(crate) fn add(&self, to: &mut Exposition) {
        self.add_agent(to);
        self.add_counts(to);
        self.add_denials(to);
        self.add_interfaces(to);
        self.add_exemptions(to);
        self.add_state(to);
        self.add_watch(to);
        self.add_event_writes(to);
        self.add_corrections(to);
        self.add_broker(to);
        self.add_events(to);
        self.add_sinks(to);
    }

    fn add_agent(&self, to: &mut Exposition) {
        let Self { report, .. } = self;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let build = [("version", report.version), ("commit", COMMIT), ("kernel", kernel.trim())];
        to.gauges("imds_agent_build_info", "Version of the agent and of the kernel; always 1", [(build, 1)]);
        let mode = |mode: Mode| ([("mode", mode.name())], u8::from(report.mode == Some(mode.name())));
        let modes = [Mode::Enforce, Mode::Audit, Mode::Off].map(mode);
        to.gauges("imds_agent_mode", "1 for the effective mode, 0 for the others", modes);
        let Some(configuration) = &report.configuration else { return };
        to.gauge(
            "imds_agent_config_generation",
            "Generation of the effective configuration",
            configuration.generation,
        );
        let help = "Hash of the effective configuration, equal on nodes with equal configurations";
        to.gauge("imds_agent_config_hash", help, fold(configuration.hash));
        to.gauge(
            "imds_agent_config_loaded_timestamp_seconds",
            "Time at which the effective configuration was loaded, in seconds since 1970",
            configuration.loaded_at.as_second().unsigned_abs(),
        );
        to.gauge(
            "imds_agent_config_last_reload_successful",
            "0 while the configuration file is rejected, at a reload or at the start, otherwise 1",
            u8::from(configuration.rejected.is_none()),
        );
    }

    /// Adds the counters of each enabled hook, also those that are 0: `increase()` misses the first packets of a time series
    /// that starts above 0.
    fn add_counts(&self, to: &mut Exposition) {
        let mut by_hook: BTreeMap<_, Counts> =
            self.report.hooks.iter().map(|&hook| (hook, Counts::default())).collect();
        by_hook.extend(self.report.by_hook.iter().map(|(&hook, &counts)| (hook, counts)));
        let of_hook = |(&hook, counts): (&&'static str, &Counts)| {
            counts.named().map(|(verdict, count)| ([("hook", hook), ("verdict", verdict)], count))
        };
        add_packets(
            to,
            ["imds_agent_packets", "imds_agent_bytes"],
            "Packets and calls to protected endpoints, by the hook that gave the verdict",
            &by_hook.iter().flat_map(of_hook).collect::<Vec<_>>(),
        );
    }

    /// Adds the denials by namespace. The namespaces with the fewest beyond [`MAX_NAMESPACES`] share an empty label.
    fn add_denials(&self, to: &mut Exposition) {
        let mut by_namespace: BTreeMap<&str, u64> = BTreeMap::new();
        for ((namespace, _), denied) in &self.denials {
            let count = by_namespace.entry(namespace).or_default();
            *count = count.saturating_add(denied.packets);
        }
        let mut most: Vec<_> = by_namespace.into_iter().collect();
        most.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let named: BTreeSet<_> =
            most.into_iter().take(MAX_NAMESPACES).map(|(namespace, _)| namespace).collect();
        let mut sums: BTreeMap<[&str; 4], Count> = BTreeMap::new();
        for ((namespace, key), denied) in &self.denials {
            let address = ip_address(key.address);
            let endpoint = self.report.endpoints.iter().find(|endpoint| endpoint.address == address);
            let endpoint = endpoint.map_or("unprotected", |endpoint| &endpoint.name);
            let verdict = if key.verdict == Verdict::Audited as u32 { "audited" } else { "denied" };
            let namespace = named.get(namespace.as_str()).copied().unwrap_or_default();
            *sums.entry([namespace, endpoint, hook_name(key.hook), verdict]).or_default() += *denied;
        }
        let samples = sums.into_iter().map(|([namespace, endpoint, hook, verdict], count)| {
            let labels =
                [("namespace", namespace), ("endpoint", endpoint), ("hook", hook), ("verdict", verdict)];
            (labels, count)
        });
        add_packets(
            to,
            ["imds_agent_denials", "imds_agent_denial_bytes"],
            "Denied and audited packets and calls by namespace of the pod; the namespace is empty if no pod is known",
            &samples.collect::<Vec<_>>(),
        );
    }

    fn add_interfaces(&self, to: &mut Exposition) {
        let Self { report, .. } = self;
        let count = |hook: &str, is_counted: &dyn Fn(Option<&str>) -> bool| {
            let of_hook = report.interfaces.iter().filter_map(|interface| interface.attachment(hook));
            of_hook.filter(|attachment| is_counted(attachment.attach_mode)).count()
        };
        let samples = report.hooks.iter().flat_map(|&hook| {
            [("enforced", true), ("unenforced", false)].map(|(state, is_enforced)| {
                let labels = [("hook", hook), ("state", state)];
                (labels, count(hook, &|mode| mode.is_some() == is_enforced))
            })
        });
        to.gauges("imds_agent_interfaces", "Interfaces that need the hook, by state", samples);
        let samples = report.hooks.iter().flat_map(|&hook| {
            [AttachMode::Tcx, AttachMode::Clsact, AttachMode::Netkit].map(|backend| {
                let labels = [("hook", hook), ("backend", backend.name())];
                (labels, count(hook, &|mode| mode == Some(backend.name())))
            })
        });
        to.gauges("imds_agent_attachments", "Attached interfaces of a hook, by attach mode", samples);
        let by_cgroup = [
            ("socket", report.sockets.as_ref().map(|sockets| sockets.attached)),
            ("local_service", report.local_service.filter(|local| local.desired).map(|local| local.attached)),
            ("host_network", report.host_network.as_ref().map(|hosts| hosts.attached)),
            ("node_allow", report.node_allow.as_ref().map(|node| node.attached)),
        ];
        to.gauges(
            "imds_agent_cgroup_hook_attached",
            "1 if all programs of a hook on cgroups are attached",
            by_cgroup
                .into_iter()
                .filter_map(|(hook, attached)| Some(([("hook", hook)], u8::from(attached?)))),
        );
    }

    fn add_exemptions(&self, to: &mut Exposition) {
        to.gauges(
            "imds_agent_exempt_subjects",
            "Interfaces, network namespaces and cgroups that an exemption covers, counted for each of its endpoints",
            by("rule", self.report.senders_by_rule()),
        );
        if let Some(hash) = self.exemptions_hash {
            let help = "Hash of the exemptions of the effective configuration";
            to.gauge("imds_agent_exemptions_hash", help, hash);
        }
    }

    fn add_state(&self, to: &mut Exposition) {
        let Self { report, .. } = self;
        to.gauge("imds_agent_endpoints", "Protected endpoints", report.endpoints.len());
        to.gauge("imds_agent_problems", "Problems that `imds-agent status` lists", report.problems.len());
        to.gauge(
            "imds_agent_ready",
            "1 if all interfaces, cgroups and hooks are enforced",
            u8::from(report.not_enforced().is_empty()),
        );
    }

    fn add_watch(&self, to: &mut Exposition) {
        let Some(watch) = &self.stats.watch else { return };
        to.gauge(
            "imds_agent_kubernetes_connected",
            "1 while the watch of this node's pods is established",
            u8::from(watch.connected),
        );
        if let Some(time) = watch.last_sync {
            to.gauge(
                "imds_agent_kubernetes_synced_timestamp_seconds",
                "Time at which the list of pods was last known to be complete, in seconds since 1970",
                time.as_second().unsigned_abs(),
            );
        }
        let states = self.report.kubernetes.iter().flat_map(|status| {
            [("known", status.pods), ("unresolved", status.unresolved), ("disputed", status.disputed)]
        });
        to.gauges(
            "imds_agent_kubernetes_pods",
            "Known pods of this node, those whose sandbox was not found, and those that claim the cgroup of another pod",
            by("state", states),
        );
        to.counter("imds_agent_kubernetes_relists", "Full lists of all pods", watch.relists);
        to.counter("imds_agent_kubernetes_events", "Received events of pods", watch.events);
        let errors = watch.errors.iter().map(|(kind, count)| (kind.into(), count));
        to.counters("imds_agent_kubernetes_errors", "Errors of the pod watch", by("kind", errors));
        self.add_namespace_watch(to);
    }

    fn add_namespace_watch(&self, to: &mut Exposition) {
        let Some(watch) = &self.stats.namespace_watch else { return };
        to.gauge(
            "imds_agent_kubernetes_namespaces_connected",
            "1 while the watch of the cluster's namespaces is established",
            u8::from(watch.connected),
        );
        let status = self.report.kubernetes.as_ref().and_then(|status| status.namespaces.as_ref());
        to.gauge(
            "imds_agent_kubernetes_namespaces",
            "Known namespaces of the cluster",
            status.map_or(0, |status| status.known),
        );
        let errors = watch.errors.iter().map(|(kind, count)| (kind.into(), count));
        let help = "Errors of the namespace watch";
        to.counters("imds_agent_kubernetes_namespace_errors", help, by("kind", errors));
    }

    fn add_corrections(&self, to: &mut Exposition) {
        let AgentStats { reloads, corrections, map_updates, .. } = &self.stats;
        let results = [("succeeded", reloads.succeeded), ("failed", reloads.failed)];
        to.counters("imds_agent_config_reloads", "Reloads of the configuration", by("result", results));
        let actions = [
            ("attached", corrections.attached),
            ("replaced", corrections.replaced),
            ("pinned", corrections.pinned),
            ("reordered", corrections.reordered),
            ("postponed", corrections.postponed),
        ];
        to.counters(
            "imds_agent_drift_corrections",
            "Corrections of changes that other programs made to attachments and pins",
            by("action", actions),
        );
        to.counters(
            "imds_agent_map_updates",
            "Map entries that the agent wrote because pods or exemptions changed",
            by("map", [("imds_exempt", map_updates.exemptions), ("imds_pods", map_updates.pods)]),
        );
        to.counter(
            "imds_agent_netlink_overruns",
            "Overruns of the netlink receive buffer, each followed by a full resync",
            corrections.overruns,
        );
    }

    fn add_broker(&self, to: &mut Exposition) {
        let BrokerStats { allowed, refused, failed, restarts } = self.stats.broker;
        to.counters(
            "imds_agent_broker_requests",
            "Requests of pods with a scoped exemption, by what the broker did with them",
            by("outcome", [("allowed", allowed), ("refused", refused), ("failed", failed)]),
        );
        to.counter("imds_agent_broker_restarts", "Restarts of the broker after it ended or hung", restarts);
    }

    fn add_event_writes(&self, to: &mut Exposition) {
        let Some(EventWrites { written, failed, dropped }) = self.stats.event_writes else { return };
        to.counters(
            "imds_agent_kubernetes_event_writes",
            "Kubernetes Events that were written, requests that failed, and denials without an Event",
            by("result", [("written", written), ("failed", failed), ("dropped", dropped)]),
        );
    }

    fn add_events(&self, to: &mut Exposition) {
        let Collected { emitted, suppressed } = self.collected.unwrap_or_default();
        to.counter("imds_agent_events", "Events of packets and calls", emitted);
        to.counter(
            "imds_agent_events_suppressed",
            "Packets and calls beyond the rate limit, which an event reports only as a number",
            suppressed,
        );
        to.gauge(
            "imds_agent_events_pending",
            "Rate-limited packets and calls that no event accounts for yet",
            self.report.pending_events,
        );
        to.counter(
            "imds_agent_log_lines_dropped",
            "Log lines that were dropped, because standard error was not read",
            self.stats.log_lines_dropped,
        );
    }

    fn add_sinks(&self, to: &mut Exposition) {
        let records = self.sinks.iter().flat_map(|sink| {
            let SinkCounts { written, dropped, failed } = sink.counts();
            [("written", written), ("dropped", dropped), ("failed", failed)]
                .map(|(result, count)| ([("sink", sink.name()), ("result", result)], count))
        });
        to.counters("imds_agent_sink_records", "Records of denied requests, by sink and result", records);
        let failing =
            self.sinks.iter().map(|sink| ([("sink", sink.name())], u8::from(sink.error().is_some())));
        to.gauges("imds_agent_sink_failing", "1 while a sink fails to write records, otherwise 0", failing);
    }
}

/// Adds counters of packets, and counters of their bytes with the same labels.
fn add_packets<const N: usize>(
    to: &mut Exposition,
    [packets, bytes]: [&str; 2],
    help: &str,
    samples: &[([Label<&str>; N], Count)],
) {
    to.counters(packets, help, samples.iter().map(|(labels, count)| (*labels, count.packets)));
    let help = "Bytes of these packets, link-layer headers included";
    to.counters(bytes, help, samples.iter().map(|(labels, count)| (*labels, count.bytes)));
}

fn by<'v, V>(
    label: &'static str,
    values: impl IntoIterator<Item = (&'v str, V)>,
) -> impl Iterator<Item = ([Label<&'v str>; 1], V)> {
    values.into_iter().map(move |(value, count)| ([(label, value)], count))
}
