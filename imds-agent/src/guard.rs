//! The agent's work: follows the node's interfaces and keeps each as it should be.

mod attach_queue;
mod cgroup_changes;
mod change_log;
mod exempt;
mod hosts;
mod links;
mod local_service;
mod other_agents;
mod rounds;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    time::Duration,
};

use imds_ebpf_common::{AttachMode, Hook, Role, TcHook};
use tokio::time::Instant;

use self::{
    attach_queue::AttachQueue,
    change_log::{ChangeLog, Pass},
    other_agents::OtherAgents,
};

use crate::{
    config::{Config, Interfaces},
    datapath::{
        Datapath, DatapathError,
        pins::{AttachPoint, PinDir},
    },
    exempt::Rules,
    kube::WatchState,
    node::{
        kubepods::Kubepods,
        links::Link,
        netlink::{Event, Netlink},
        senders::Finder,
    },
    pods::Pods,
    reconcile::repair_backoff::RepairBackoff,
    settings::Settings,
    start_config::StartConfig,
    state::Uplinks,
};

/// How often what somebody else had changed was put right since the agent started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Repairs {
    /// Attached again.
    pub attached: u64,
    /// Put in the place of another program.
    pub replaced: u64,
    /// Pinned again, links and what is in the pin directory.
    pub pinned: u64,
    /// Put before programs that had got in front.
    pub reordered: u64,
    /// Repairs that were postponed, as another program undid them again and again.
    pub postponed: u64,
    /// Times at which the kernel's events came faster than they were read.
    pub overruns: u64,
}

/// How often maps were written for who is exempt and who is who, since the agent started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Writes {
    /// That of exemptions.
    pub exemptions: u64,
    /// That of pods.
    pub pods: u64,
}

/// Interfaces as they are and as they should be, and the datapath that makes the one the other.
#[expect(clippy::struct_excessive_bools, reason = "each is of something else")]
pub struct Guard {
    datapath: Datapath,
    netlink: Netlink,
    interfaces: Interfaces,
    /// The cgroups of Kubernetes pods, in strict mode.
    kubepods: Option<Kubepods>,
    /// Who is exempt.
    rules: Rules,
    /// Whom rules can mean.
    finder: Finder,
    pods: Pods,
    /// The node's name in the cluster, and how the watch of its pods goes, where there is one.
    watched: Option<(String, WatchState)>,
    /// When it was last looked for who is exempt and of whom there is no news.
    last_search: Instant,
    /// Whether what an earlier agent granted to pods of Kubernetes is what the rules say, as far as they were known then.
    keeps_grants: bool,
    links: BTreeMap<u32, Link>,
    /// Interfaces that routes to protected endpoints name.
    routed: BTreeSet<u32>,
    uplinks: Uplinks,
    /// What failed last, by interface, so that it is said once and not with every round.
    failures: BTreeMap<u32, String>,
    /// Why no hostNetwork pod is held, where that is so.
    no_kubepods: Option<String>,
    /// Links that are still to be looked at in this round.
    round: VecDeque<u32>,
    /// True once every interface was reconciled: until then, filters of an earlier agent may be anywhere.
    initial_sync_done: bool,
    /// True while a reload of the configuration causes the changes.
    in_reload: bool,
    /// Links have changed since exemptions were computed.
    exemptions_dirty: bool,
    /// Attachments that wait for their turn.
    queue: AttachQueue,
    /// Hooks that could not be reconciled the last time.
    failed: BTreeSet<AttachPoint>,
    /// Repairs that another program undoes again and again.
    backoff: RepairBackoff,
    other_agents: OtherAgents,
    /// Attachment whose turn it is.
    turn: Option<AttachPoint>,
    /// Attachments to pods that were there at the start and wait for their turn.
    initial: BTreeSet<AttachPoint>,
    /// `status` knows that the initial sync is done.
    is_ready: bool,
    /// Time that a new link of a pod waits for its CNI plugins before it gets a qdisc.
    clsact_delay: Duration,
    changes: ChangeLog,
    repairs: Repairs,
    writes: Writes,
}

impl Guard {
    /// A guard that has not looked at any interface yet.
    #[must_use]
    pub fn new(
        datapath: Datapath,
        netlink: Netlink,
        Settings { interfaces, exempt, kubepods, cluster, .. }: &Settings,
        finder: Finder,
    ) -> Self {
        Self {
            datapath,
            netlink,
            interfaces: interfaces.clone(),
            kubepods: kubepods.clone().map(Kubepods::new),
            rules: Rules::new(exempt.clone()),
            finder,
            pods: Pods::new(cluster.is_some()),
            watched: None,
            last_search: Instant::now(),
            keeps_grants: false,
            links: BTreeMap::new(),
            routed: BTreeSet::new(),
            uplinks: Uplinks::default(),
            failures: BTreeMap::new(),
            no_kubepods: None,
            round: VecDeque::new(),
            initial_sync_done: false,
            in_reload: false,
            exemptions_dirty: false,
            queue: AttachQueue::new(),
            failed: BTreeSet::new(),
            backoff: RepairBackoff::default(),
            other_agents: OtherAgents::default(),
            turn: None,
            initial: BTreeSet::new(),
            is_ready: false,
            clsact_delay: Duration::ZERO,
            changes: ChangeLog::new(),
            repairs: Repairs::default(),
            writes: Writes::default(),
        }
    }

    /// Sets the time that a new link of a pod waits for its CNI plugins before it gets a clsact qdisc.
    #[must_use]
    pub fn with_clsact_delay(mut self, delay: Duration) -> Self {
        self.clsact_delay = delay;
        self
    }

    /// How often maps were written for who is exempt and who is who.
    #[must_use]
    pub fn writes(&self) -> Writes {
        self.writes
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> &PinDir {
        self.datapath.pins()
    }

    /// How often what somebody else had changed was put right.
    #[must_use]
    pub fn repairs(&self) -> Repairs {
        Repairs { postponed: self.backoff.suppressed(), ..self.repairs }
    }

    /// Records the configuration, and does the first full resync.
    pub async fn start(&mut self, start: &StartConfig) -> Result<(), DatapathError> {
        let StartConfig { config, settings, path, rejected } = start;
        self.keeps_grants = self.datapath.was_in_force(config.to_toml())?;
        self.record_config(path.as_deref(), config)?;
        // Before the agent is ready, so that `status` never shows the fallback without its reason.
        if let Some(error) = rejected {
            self.record_refusal(error)?;
        }
        self.changes.begin(Pass::InitialSync);
        self.resync().await?;
        log::info!("{}", self.summary(settings));
        Ok(())
    }

    /// Puts other settings in force: what is guarded at the end stays so if it was before. Where that fails, what came of
    /// it is to be undone by the settings before.
    pub async fn reconfigure(&mut self, settings: &Settings) -> Result<(), DatapathError> {
        self.in_reload = true;
        self.changes.begin(Pass::Reload);
        let result = self.change_to(settings).await;
        self.changes.end(Pass::Reload);
        self.in_reload = false;
        result
    }

    async fn change_to(&mut self, settings: &Settings) -> Result<(), DatapathError> {
        let Settings { plan, guarded, interfaces, exempt, kubepods, .. } = settings;
        // Rules have numbers, which may be others now.
        self.keeps_grants &= self.rules.are(exempt);
        // What is new guards before anything is told of it, and what is to go does until then.
        let before = self.datapath.hooks();
        self.datapath.prepare(plan)?;
        // What could not be attached before is no reason against what is new.
        unless(before.has(Hook::Socket), self.restore_sockets())?;
        if let (None, Some(root)) = (&self.kubepods, kubepods) {
            self.kubepods = Some(Kubepods::new(root.clone()));
        }
        unless(before.has(Hook::HostNetwork), self.search_kubepods())?;
        self.interfaces = interfaces.clone();
        self.netlink = self.netlink.clone().with_endpoints(guarded.addresses());
        self.routed = self.netlink.uplinks().await?;
        self.uplinks = Uplinks::new(self.routed.clone(), self.links.values());
        self.see_again().await;
        self.locate(usize::MAX).await;
        self.change_rules(exempt.clone()).await?;
        self.datapath.enforce(plan, guarded)?;
        if !self.datapath.matches(plan) {
            self.datapath.release(plan)?;
            self.restore_sockets()?;
            if kubepods.is_none() {
                self.kubepods = None;
            }
            self.restore_hosts(true)?;
            self.see_again().await;
        }
        self.restore_exemptions().await
    }

    /// Records a configuration that is in force from now on, for `status` and `config show`. Returns its number.
    pub fn record_config(&mut self, path: Option<&Path>, config: &Config) -> Result<u64, DatapathError> {
        self.datapath.record_config(path, config.to_toml())
    }

    /// Records why a configuration is not in force.
    pub fn record_refusal(&mut self, error: &str) -> Result<(), DatapathError> {
        self.datapath.record_refusal(error)
    }

    /// What is guarded how, in a line.
    #[must_use]
    pub fn summary(&self, Settings { plan, guarded, .. }: &Settings) -> String {
        let [pods, nodes] = self.count_interfaces();
        format!(
            "mode {}: {} pod and {} node interfaces guarded by {}, sockets {}, provider {}, {} endpoint{}, pins in {}",
            plan.mode.name(),
            pods,
            nodes,
            plan.backend.name(),
            if plan.cgroup.is_some() { "too" } else { "not" },
            guarded.provider(),
            guarded.endpoints().len(),
            if guarded.endpoints().len() == 1 { "" } else { "s" },
            self.datapath.pins().root().display(),
        )
    }

    /// The same on a line as short as a service manager shows it, and what is not as it should be.
    #[must_use]
    pub fn state(&self, Settings { plan, .. }: &Settings) -> String {
        let [pods, nodes] = self.count_interfaces();
        let sockets = if plan.cgroup.is_some() { "too" } else { "not" };
        let mode = plan.mode.name();
        let state = format!("mode {mode}: {pods} pod and {nodes} node interfaces guarded, sockets {sockets}");
        let others = self.other_agents().map(|agent| ("node".to_owned(), agent.to_string()));
        let failures = self.failures().map(|(name, failure)| (name.to_owned(), failure.to_owned()));
        let mut failures = others.chain(failures);
        match failures.next() {
            Some((name, failure)) => {
                format!("{state}; {} problems, the first: {name}: {failure}", 1 + failures.count())
            }
            None => state,
        }
    }

    /// Numbers of the interfaces of pods and of the node that should have a program.
    fn count_interfaces(&self) -> [usize; 2] {
        let [mut pods, mut nodes] = [0; 2];
        for link in self.links.values() {
            let assignment = self.assign(link);
            let is_desired =
                |hook| self.datapath.desired_mode(link, assignment.hooks, hook) != AttachMode::None;
            if TcHook::ALL.into_iter().any(is_desired) {
                *if assignment.role == Role::Pod { &mut pods } else { &mut nodes } += 1;
            }
        }
        [pods, nodes]
    }

    /// What is not as it should be, by interface.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        let of_interfaces = self.failures.iter().map(|(index, failure)| {
            (self.links.get(index).map_or("a gone interface", |link| link.name.as_str()), failure.as_str())
        });
        let of_rules = self.rules.failures().iter().map(|(name, failure)| (name.as_str(), failure.as_str()));
        let of_hosts = self.no_kubepods.iter().map(|failure| ("hostNetwork pods", failure.as_str()));
        let of_cgroups = self.datapath.cgroup_failures().map(|failure| ("cgroup", failure));
        of_interfaces.chain(of_cgroups).chain(of_hosts).chain(of_rules)
    }

    /// Takes in one piece of news. What it means for exemptions is for [`Guard::settle`], but for what is taken from links
    /// that are gone or others' now: that is at once.
    pub async fn handle(&mut self, event: Event) -> Result<(), DatapathError> {
        if let Event::Link(_) | Event::LinkGone(_) = &event {
            self.queue.on_link_event();
        }
        match event {
            Event::Link(link) => {
                let is_changed = self.links.get(&link.index) != Some(&link);
                self.exemptions_dirty |= is_changed;
                self.see(link).await;
                if is_changed {
                    self.update_uplinks().await;
                }
            }
            Event::LinkGone(index) => {
                self.exemptions_dirty |= self.links.contains_key(&index);
                self.forget(index);
            }
            Event::Filter(index) => {
                if let Some(link) = self.links.get(&index).cloned() {
                    self.see(link).await;
                }
            }
            Event::Route(destination) if !self.netlink.may_be_way_out(destination) => {}
            Event::Route(_) | Event::Rule => self.reclassify().await?,
            Event::Overrun => {
                self.repairs.overruns += 1;
                self.pods.forget_sandboxes();
                log::warn!("the kernel's events came faster than they were read: reading everything anew");
                self.resync().await?;
            }
        }
        Ok(())
    }

    /// Grants what the links that are there now are to have, where news was taken in since it was done last: once for all
    /// news that came together, as it takes the longer the more pods there are.
    pub async fn settle(&mut self) -> Result<(), DatapathError> {
        let followed = self.follow_enforcement();
        if std::mem::take(&mut self.exemptions_dirty) {
            self.restore_exemptions().await?;
        }
        followed
    }

    async fn see_again(&mut self) {
        for link in self.links.values().cloned().collect::<Vec<_>>() {
            self.see(link).await;
        }
    }

    fn restore_sockets(&mut self) -> Result<(), DatapathError> {
        let changes = self.datapath.restore_sockets()?;
        self.report_cgroups(changes);
        Ok(())
    }
}

/// Fails with `result`, unless `is_old` news: that is only said.
fn unless(is_old: bool, result: Result<(), DatapathError>) -> Result<(), DatapathError> {
    match result {
        Err(error) if is_old => {
            log::error!("{:#}", anyhow::Error::from(error));
            Ok(())
        }
        other => other,
    }
}
