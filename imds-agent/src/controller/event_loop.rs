//! Event loop of the running agent: follows the node and its configuration until a signal stops it.

mod debounce;
mod reload;
mod unloaded;

use std::{future, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use self::{
    debounce::{Debounce, wait_for},
    unloaded::Unloaded,
};
use crate::{
    config::{loader::ConfigLoader, node_pool::Labels},
    controller::{
        Reconciler,
        cluster_report::ClusterReport,
        exemption_rules,
        resolved_config::{ResolvedConfig, RunOptions},
        start_config::StartConfig,
    },
    kube::{
        NamespaceEvent, NodeLabels, PodEvent,
        cluster::{Cluster, ClusterEvent},
    },
    memory::{self, TrimSchedule},
    node::{file_watch::FileWatcher, link_event::Event},
    telemetry::{
        Telemetry,
        agent_stats::{AgentStats, Reloads},
        logging,
        metrics::RunTimeStats,
        systemd::Systemd,
    },
};

/// Netlink events to handle before other event sources have their turn.
const EVENT_BATCH: usize = 256;

/// Every so many resyncs, interfaces and routes are listed again, too. The kernel reports their changes, and reports
/// lost events.
const FULL_RESYNC_EVERY: u32 = 6;

/// The agent with its state and event sources.
pub struct Agent {
    reconciler: Reconciler,
    options: RunOptions,
    loader: ConfigLoader,
    /// Settings that the datapath enforces now.
    resolved: ResolvedConfig,
    reloads: Reloads,
    run_time_stats: RunTimeStats,
    trim_schedule: TrimSchedule,
    telemetry: Telemetry,
    systemd: Systemd,
    cluster: Cluster,
    node_labels: Option<NodeLabels>,
    cluster_report: ClusterReport,
    /// Tasks that are aborted when the agent ends.
    background: JoinSet<()>,
    timer: Interval,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Agent {
    /// Creates an agent that manages the attachments of `reconciler`. `resolved` is the effective configuration. The agent
    /// resyncs every `period`, and uses `loader` to load changed configurations.
    pub fn new(
        reconciler: Reconciler,
        options: RunOptions,
        loader: ConfigLoader,
        resolved: ResolvedConfig,
        telemetry: Telemetry,
        period: Duration,
        background: JoinSet<()>,
    ) -> anyhow::Result<Self> {
        let (pins, denied_pods) = (reconciler.datapath.pins().clone(), telemetry.denied_pods());
        let cluster_report = ClusterReport::new(pins, reconciler.netlink.clone(), Arc::clone(denied_pods));
        let mut timer = interval_at(Instant::now() + period, period);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            reconciler,
            options,
            loader,
            resolved,
            reloads: Reloads::default(),
            run_time_stats: RunTimeStats::default(),
            trim_schedule: TrimSchedule::new(),
            telemetry,
            systemd: Systemd::from_env(),
            cluster: Cluster::default(),
            node_labels: None,
            cluster_report,
            background,
            timer,
            hangup: signal(SignalKind::hangup()).context("failed to listen for SIGHUP")?,
            terminate: signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?,
        })
    }

    /// Does the initial full resync with the configuration `start`, and runs until a signal stops the agent. Attached
    /// programs stay attached after that.
    pub async fn run(
        mut self,
        start: &StartConfig,
        mut events: impl Stream<Item = Event> + Unpin,
    ) -> anyhow::Result<()> {
        self.reconciler.start(start).await?;
        if start.rejected.is_none() {
            self.loader.store_last_good();
        }
        memory::trim();
        let mut watch = self.watch();
        let mut unload_request = self.watch_unload_request();
        // An `unload` that started during the initial resync has made its request before the watch.
        if self.reconciler.datapath.pins().is_unload_requested() {
            return self.unload().run().await;
        }
        // The file may have changed after it was read and before the watch started.
        let mut reload_due = self.loader.change().map(|_| Debounce::now());
        let mut pending_change = None;
        let mut resyncs = 0_u32;
        self.telemetry.listen(&start.config.listen);
        self.run_time_stats.set(start.config.program_run_time);
        self.update_pod_watch().await;
        self.systemd.ready(&self.reconciler.state(&self.resolved));
        loop {
            self.telemetry.report_progress(self.stats());
            self.cluster_report.on_corrections(self.reconciler.corrections());
            tokio::select! {
                event = events.next() => self.on_link_events(event, &mut events).await?,
                event = self.cluster.next() => self.on_cluster_event(event).await,
                labels = changed_labels(&mut self.node_labels) => self.on_node_labels(labels).await,
                () = future::ready(()), if self.reconciler.resync_in_progress() => log_error(self.reconciler.resync_step().await),
                () = self.reconciler.progress.requested.due() => {
                    log_error(self.reconciler.run_requested_resync().await);
                    self.trim_schedule.on_large_change();
                }
                point = self.reconciler.attachment_due() => self.reconciler.attach(point).await,
                () = future::ready(()), if self.reconciler.is_resolving() => log_error(self.reconciler.resolve_next().await),
                () = self.reconciler.search_due() => log_error(self.reconciler.poll_exemptions().await),
                () = self.reconciler.broker_changed() => {
                    log_error(self.reconciler.on_broker_changed().await);
                    self.telemetry.record_requests(self.reconciler.take_requests());
                }
                () = self.reconciler.kubepods_changed() => log_error(self.reconciler.on_kubepods_changed()),
                _ = self.timer.tick() => {
                    resyncs = resyncs.wrapping_add(1);
                    let is_full = resyncs.is_multiple_of(FULL_RESYNC_EVERY);
                    log_error(self.reconciler.start_resync(is_full).await);
                    if is_full && self.trim_schedule.take(self.reconciler.is_ready()) {
                        memory::trim();
                    }
                    self.systemd.ready(&self.reconciler.state(&self.resolved));
                    if self.reconciler.datapath.pins().is_unload_requested() {
                        return self.unload().run().await;
                    }
                    // Covers changes without inotify events, as on some network file systems. A change must be seen
                    // twice: at first the file may be half written.
                    let change = self.loader.change();
                    if change.is_some() && change == pending_change {
                        self.reload().await.ok();
                    }
                    pending_change = change;
                }
                changed = changed(&mut watch) => match changed {
                    Ok(()) => reload_due = Some(Debounce::after(reload_due)),
                    Err(error) => {
                        log::error!("stopped watching the configuration file, the resync checks it: {error}");
                        watch = None;
                    }
                },
                requested = changed(&mut unload_request) => match requested {
                    Ok(()) if self.reconciler.datapath.pins().is_unload_requested() => return self.unload().run().await,
                    Ok(()) => {}
                    Err(error) => {
                        log::error!("failed to watch for `imds-agent unload`, the resync checks for it: {error}");
                        unload_request = None;
                    }
                },
                () = wait_for(reload_due) => {
                    reload_due = None;
                    self.reload().await.ok();
                }
                () = self.telemetry.sinks_changed() => {
                    let failing = self.telemetry.failing_sinks();
                    log_error(self.reconciler.datapath.record_failing_sinks(&failing));
                }
                error = self.telemetry.ended() => return Err(error),
                () = self.systemd.watchdog() => {}
                _ = self.hangup.recv() => {
                    reload_due = None;
                    // Starts again with the reload, so that the labels are read now.
                    self.node_labels = None;
                    self.reload().await.ok();
                }
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
            }
        }
        Systemd::stopping();
        // The broker ends with the agent.
        log_error(self.reconciler.datapath.clear_redirects());
        match self.reconciler.datapath.pin_failure() {
            None => log::info!("stopping; attached programs keep enforcing until `imds-agent unload`"),
            Some(failure) => log::warn!("stopping; links end because they are not pinned: {failure}"),
        }
        Ok(())
    }

    /// Closes all kernel objects, so that `imds-agent unload` can remove them.
    fn unload(self) -> Unloaded {
        let stats = self.stats();
        let Self {
            reconciler,
            background,
            telemetry,
            systemd,
            cluster_report,
            timer,
            hangup,
            terminate,
            interrupt,
            ..
        } = self;
        // Drops the map descriptors of the background tasks, too.
        drop(background);
        telemetry.close_maps();
        let pins = reconciler.datapath.pins().root().to_owned();
        // Dropping the reconciler releases the lock of the pin directory.
        drop(reconciler);
        Unloaded { pins, stats, telemetry, systemd, cluster_report, timer, hangup, terminate, interrupt }
    }

    /// Handles one netlink event, and those that have arrived in the meantime.
    async fn on_link_events(
        &mut self,
        mut event: Option<Event>,
        events: &mut (impl Stream<Item = Event> + Unpin),
    ) -> anyhow::Result<()> {
        for left in (0..EVENT_BATCH).rev() {
            let link_event = event.context("lost the connection to rtnetlink: cannot follow interfaces")?;
            log_error(self.reconciler.on_netlink_event(link_event).await);
            // An event that is read here must be handled, or it is lost.
            match (left > 0).then(|| events.next().now_or_never()).flatten() {
                Some(next) => event = next,
                None => break,
            }
        }
        log_error(self.reconciler.flush_pending_sync().await);
        Ok(())
    }

    async fn update_pod_watch(&mut self) {
        let label_keys = exemption_rules::namespace_label_keys(&self.resolved.exempt);
        self.cluster.set_api(self.resolved.cluster.as_ref(), label_keys);
        self.cluster_report.set(&self.resolved);
        let api = self.resolved.cluster.as_ref().filter(|_| self.loader.needs_node_labels());
        if self.node_labels.as_ref().map(NodeLabels::api) != api {
            self.node_labels = api.cloned().map(NodeLabels::start);
        }
        if self.cluster.node().is_none() {
            log_error(self.reconciler.clear_pods().await);
        } else if self.cluster.namespace_state().is_none() {
            log_error(self.reconciler.clear_namespaces());
        }
    }

    async fn on_cluster_event(&mut self, event: ClusterEvent) {
        match event {
            ClusterEvent::Pods(event) => {
                let is_relist = matches!(event, PodEvent::Relist(_));
                log_error(self.reconciler.on_pod_event(event).await);
                if is_relist {
                    memory::trim();
                    // The sandboxes of the pods are resolved after this.
                    self.trim_schedule.on_large_change();
                }
            }
            ClusterEvent::State(state) => {
                let node = self.cluster.node().unwrap_or_default();
                log_error(self.reconciler.on_watch_status(node, &state).await);
            }
            ClusterEvent::Namespaces(event) => {
                let is_relist = matches!(event, NamespaceEvent::Relist(_));
                log_error(self.reconciler.on_namespace_event(event, self.cluster.label_keys()).await);
                if is_relist {
                    memory::trim();
                }
            }
            ClusterEvent::NamespaceState(state) => {
                log_error(self.reconciler.on_namespace_watch_status(state).await);
            }
        }
    }

    fn stats(&self) -> AgentStats {
        AgentStats {
            reloads: self.reloads,
            corrections: self.reconciler.corrections(),
            map_updates: self.reconciler.map_updates,
            watch: self.cluster.state(),
            event_writes: self.cluster_report.event_writes(),
            namespace_watch: self.cluster.namespace_state(),
            broker: self.reconciler.broker_stats(),
            log_lines_dropped: logging::dropped(),
        }
    }

    fn watch(&self) -> Option<FileWatcher> {
        let path = self.loader.path()?;
        let failed = |error| {
            log::warn!("failed to watch {}: {error}; the resync checks it", path.display());
        };
        FileWatcher::new(path).map_err(failed).ok()
    }

    fn watch_unload_request(&self) -> Option<FileWatcher> {
        let failed = |error| {
            log::warn!("failed to watch for `imds-agent unload`, the resync checks for it: {error}");
        };
        self.reconciler.datapath.pins().watch_unload_request().map_err(failed).ok()
    }
}

async fn changed_labels(labels: &mut Option<NodeLabels>) -> Labels {
    match labels {
        Some(labels) => labels.changed().await,
        None => future::pending().await,
    }
}

async fn changed(watch: &mut Option<FileWatcher>) -> std::io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => future::pending().await,
    }
}

/// Logs an error. The next resync retries the operation at the latest.
fn log_error<T>(result: Result<T, impl Into<anyhow::Error>>) {
    if let Err(error) = result {
        log::error!("{:#}", error.into());
    }
}
