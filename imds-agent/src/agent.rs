//! Event loop of the running agent: follows the node and its configuration until a signal stops it.

mod due;
mod unloaded;

use std::{future, time::Duration};

use anyhow::Context as _;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use self::{
    due::{Due, wait_for},
    unloaded::Unloaded,
};
use crate::{
    cluster::{Cluster, News},
    config_loader::ConfigLoader,
    guard::Guard,
    kube::PodEvent,
    logging,
    metrics::{Done, RunTimeStats},
    node::netlink::Event,
    settings::{Node, Settings},
    start_config::StartConfig,
    supervisor::Supervisor,
    telemetry::Telemetry,
    watch::Watch,
};

/// Netlink events to handle before other event sources have their turn.
const AT_ONCE: usize = 256;

/// Every so many resyncs, interfaces and routes are listed again, too. The kernel reports their changes, and reports
/// lost events.
const THOROUGH: u32 = 6;

/// Numbers of configuration reloads since the agent started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reloads {
    /// Reloads whose configuration became effective.
    pub succeeded: u64,
    /// Reloads whose configuration was rejected.
    pub failed: u64,
}

/// The agent with its state and event sources.
pub struct Agent {
    guard: Guard,
    node: Node,
    loader: ConfigLoader,
    /// Settings that the datapath enforces now.
    settings: Settings,
    reloads: Reloads,
    run_time_stats: RunTimeStats,
    telemetry: Telemetry,
    supervisor: Supervisor,
    cluster: Cluster,
    /// Tasks that are aborted when the agent ends.
    background: JoinSet<()>,
    timer: Interval,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Agent {
    /// Creates an agent that manages the attachments of `guard`. `settings` are the effective ones. The agent resyncs
    /// every `period`, and uses `loader` to load changed configurations.
    pub fn new(
        guard: Guard,
        node: Node,
        loader: ConfigLoader,
        settings: Settings,
        telemetry: Telemetry,
        period: Duration,
    ) -> anyhow::Result<Self> {
        let mut timer = interval_at(Instant::now() + period, period);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            guard,
            node,
            loader,
            settings,
            reloads: Reloads::default(),
            run_time_stats: RunTimeStats::default(),
            telemetry,
            supervisor: Supervisor::from_env(),
            cluster: Cluster::default(),
            background: JoinSet::new(),
            timer,
            hangup: signal(SignalKind::hangup()).context("failed to listen for SIGHUP")?,
            terminate: signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?,
        })
    }

    /// Adds tasks that are aborted when the agent ends.
    #[must_use]
    pub fn with_background(mut self, background: JoinSet<()>) -> Self {
        self.background = background;
        self
    }

    /// Returns the numbers of configuration reloads.
    #[must_use]
    pub fn reloads(&self) -> Reloads {
        self.reloads
    }

    /// Does the initial full resync with the configuration `start`, and runs until a signal stops the agent. Attached
    /// programs stay attached after that.
    pub async fn run(
        mut self,
        start: &StartConfig,
        mut events: impl Stream<Item = Event> + Unpin,
    ) -> anyhow::Result<()> {
        self.guard.start(start).await?;
        if start.rejected.is_none() {
            self.loader.store_last_good();
        }
        give_back();
        let mut watch = self.watch();
        let mut unload_request = self.watch_unload_request();
        // The file may have changed after it was read and before the watch started.
        let mut due = self.loader.change().map(|_| Due::now());
        let mut half_seen = None;
        let mut rounds = 0_u32;
        self.telemetry.listen(&start.config.listen);
        self.run_time_stats.set(start.config.program_run_time);
        self.follow_cluster().await;
        self.supervisor.ready(&self.guard.state(&self.settings));
        loop {
            self.telemetry.report_progress(self.done());
            tokio::select! {
                event = events.next() => self.take_in(event, &mut events).await?,
                news = self.cluster.next() => self.hear(news).await,
                () = future::ready(()), if self.guard.is_looking() => report(self.guard.go_on().await),
                point = self.guard.attachment_due() => self.guard.attach(point).await,
                () = future::ready(()), if self.guard.is_locating() => report(self.guard.locate_next().await),
                () = self.guard.search_due() => report(self.guard.search_exempt().await),
                () = self.guard.kubepods_changed() => report(self.guard.follow_kubepods()),
                _ = self.timer.tick() => {
                    rounds = rounds.wrapping_add(1);
                    let is_thorough = rounds.is_multiple_of(THOROUGH);
                    report(self.guard.begin(is_thorough).await);
                    if is_thorough {
                        give_back();
                    }
                    self.supervisor.ready(&self.guard.state(&self.settings));
                    if self.guard.pins().is_unload_requested() {
                        return self.unload().run().await;
                    }
                    // Covers changes without inotify events, as on some network file systems. A change must be seen
                    // twice: at first the file may be half written.
                    let change = self.loader.change();
                    if change.is_some() && change == half_seen {
                        self.reload().await;
                    }
                    half_seen = change;
                }
                changed = changed(&mut watch) => match changed {
                    Ok(()) => due = Some(Due::after(due)),
                    Err(error) => {
                        log::error!("stopped watching the configuration file, the resync checks it: {error}");
                        watch = None;
                    }
                },
                requested = changed(&mut unload_request) => match requested {
                    Ok(()) if self.guard.pins().is_unload_requested() => return self.unload().run().await,
                    Ok(()) => {}
                    Err(error) => {
                        log::error!("failed to watch for `imds-agent unload`, the resync checks for it: {error}");
                        unload_request = None;
                    }
                },
                () = wait_for(due) => {
                    due = None;
                    self.reload().await;
                }
                error = self.telemetry.ended() => return Err(error),
                () = self.supervisor.watch() => {}
                _ = self.hangup.recv() => {
                    due = None;
                    self.reload().await;
                }
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
            }
        }
        self.supervisor.stopping();
        log::info!("stopping; attached programs keep enforcing until `imds-agent unload`");
        Ok(())
    }

    /// Closes all kernel objects, so that `imds-agent unload` can remove them.
    fn unload(self) -> Unloaded {
        let done = self.done();
        let Self { guard, background, telemetry, supervisor, timer, hangup, terminate, interrupt, .. } = self;
        // Drops the map descriptors of the background tasks, too.
        drop(background);
        telemetry.close_maps();
        let pins = guard.pins().root().to_owned();
        // Dropping the guard releases the lock of the pin directory.
        drop(guard);
        Unloaded { pins, done, telemetry, supervisor, timer, hangup, terminate, interrupt }
    }

    /// Handles one netlink event, and those that have arrived in the meantime.
    async fn take_in(
        &mut self,
        mut event: Option<Event>,
        events: &mut (impl Stream<Item = Event> + Unpin),
    ) -> anyhow::Result<()> {
        for left in (0..AT_ONCE).rev() {
            let news = event.context("lost the connection to rtnetlink: cannot follow interfaces")?;
            report(self.guard.handle(news).await);
            // An event that is read here must be handled, or it is lost.
            match (left > 0).then(|| events.next().now_or_never()).flatten() {
                Some(next) => event = next,
                None => break,
            }
        }
        report(self.guard.settle().await);
        Ok(())
    }

    async fn follow_cluster(&mut self) {
        self.cluster.follow(self.settings.cluster.as_ref());
        if self.cluster.node().is_none() {
            report(self.guard.forget_cluster().await);
        }
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::Pods(event) => {
                let is_relist = matches!(event, PodEvent::Relist(_));
                report(self.guard.hear_of_pods(event).await);
                if is_relist {
                    give_back();
                }
            }
            News::State(state) => {
                let node = self.cluster.node().unwrap_or_default();
                report(self.guard.hear_of_watch(node, &state).await);
            }
        }
    }

    fn done(&self) -> Done {
        Done {
            reloads: self.reloads,
            repairs: self.guard.repairs(),
            writes: self.guard.writes(),
            watch: self.cluster.state(),
            log_lines_dropped: logging::dropped(),
        }
    }

    fn watch(&self) -> Option<Watch> {
        let path = self.loader.path()?;
        let failed = |error| {
            log::warn!("failed to watch {}: {error}; the resync checks it", path.display());
        };
        Watch::new(path).map_err(failed).ok()
    }

    fn watch_unload_request(&self) -> Option<Watch> {
        let failed = |error| {
            log::warn!("failed to watch for `imds-agent unload`, the resync checks for it: {error}");
        };
        self.guard.pins().watch_unload_request().map_err(failed).ok()
    }

    /// Reloads the configuration. If that fails, the previous one stays effective.
    async fn reload(&mut self) {
        self.supervisor.reloading();
        match self.try_reload().await {
            Ok(generation) => {
                self.reloads.succeeded += 1;
                log::info!("loaded configuration {generation}: {}", self.guard.summary(&self.settings));
            }
            Err(error) => {
                self.reloads.failed += 1;
                let error = format!("{error:#}");
                log::error!("failed to reload configuration, keeping the previous one: {error}");
                report(self.guard.record_refusal(&error));
            }
        }
        self.supervisor.ready(&self.guard.state(&self.settings));
    }

    async fn try_reload(&mut self) -> anyhow::Result<u64> {
        let config = self.loader.load()?;
        let resolved = self.node.resolve(&config)?;
        let settings = self.node.settings(&config, resolved)?;
        if let Err(error) = self.guard.reconfigure(&settings).await {
            report(self.guard.reconfigure(&self.settings).await);
            return Err(error.into());
        }
        self.settings = settings;
        self.telemetry.listen(&config.listen);
        self.run_time_stats.set(config.program_run_time);
        self.follow_cluster().await;
        let generation = self.guard.record_config(self.loader.path(), &config)?;
        self.loader.store_last_good();
        Ok(generation)
    }
}

async fn changed(watch: &mut Option<Watch>) -> std::io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => future::pending().await,
    }
}

/// Returns free heap memory to the kernel. Loading the programs and listing all pods take several times what the agent
/// needs later.
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Logs an error. The next resync retries the operation at the latest.
fn report<T>(result: Result<T, impl Into<anyhow::Error>>) {
    if let Err(error) = result {
        log::error!("{:#}", error.into());
    }
}
