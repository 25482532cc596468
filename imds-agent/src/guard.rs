//! The agent's work: follows the node's interfaces and keeps each as it should be.

mod exempt;
mod hosts;
mod provisional;
mod rounds;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
};

use imds_ebpf_common::{AttachMode, Hook, Role, TcHook};
use log::Level;
use tokio::time::Instant;

use self::provisional::Provisional;

use crate::{
    config::{Config, Interfaces},
    datapath::{Datapath, DatapathError, pins::PinDir},
    exempt::Rules,
    kube::WatchState,
    node::{
        kubepods::Kubepods,
        links::Link,
        netlink::{Event, Netlink, NetlinkError},
        senders::Finder,
    },
    pods::Pods,
    reconcile::{Action, Order, plan},
    settings::Settings,
    state::role,
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
    uplinks: BTreeSet<u32>,
    /// What failed last, by interface, so that it is said once and not with every round.
    failures: BTreeMap<u32, String>,
    /// Why no hostNetwork pod is held, where that is so.
    no_kubepods: Option<String>,
    /// Links that are still to be looked at in this round.
    round: VecDeque<u32>,
    /// Whether every interface was looked at once: until then filters of an earlier agent may be anywhere.
    settled: bool,
    /// Whether what changes is what the operator asked for.
    is_asked: bool,
    /// Whether links have changed since exemptions were looked at.
    is_unsettled: bool,
    /// Pods' links that a filter holds for now, where that is a way to hold them.
    provisional: Option<Provisional>,
    /// The one of them whose turn it is.
    raising: Option<u32>,
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
            uplinks: BTreeSet::new(),
            failures: BTreeMap::new(),
            no_kubepods: None,
            round: VecDeque::new(),
            settled: false,
            is_asked: false,
            is_unsettled: false,
            provisional: None,
            raising: None,
            repairs: Repairs::default(),
            writes: Writes::default(),
        }
    }

    /// The same guard, by which new links of pods are held by filters until there is time for TCX.
    #[must_use]
    pub fn with_filters_first(mut self) -> Self {
        self.provisional = Some(Provisional::new());
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
        self.repairs
    }

    /// Looks at everything for the first time. `config`, which `path` was read for, came to `settings`.
    pub async fn start(
        &mut self,
        settings: &Settings,
        path: Option<&Path>,
        config: &Config,
    ) -> Result<(), DatapathError> {
        self.keeps_grants = self.datapath.was_in_force(config.to_toml())?;
        self.record_config(path, config)?;
        self.resync().await?;
        log::info!("{}", self.summary(settings));
        Ok(())
    }

    /// Puts other settings in force: what is guarded at the end stays so if it was before. Where that fails, what came of
    /// it is to be undone by the settings before.
    pub async fn reconfigure(&mut self, settings: &Settings) -> Result<(), DatapathError> {
        self.is_asked = true;
        let result = self.change_to(settings).await;
        self.is_asked = false;
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
        self.netlink = self.netlink.clone().with_endpoints(guarded.ipv4());
        self.uplinks = self.netlink.uplinks().await?;
        self.see_again().await;
        self.locate(usize::MAX).await;
        self.change_rules(exempt.clone()).await?;
        self.datapath.enforce(plan, guarded)?;
        if self.datapath.hooks() != plan.hooks {
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
        format!(
            "mode {}: {} pod and {} node interfaces guarded by {}, sockets {}, provider {}, {} endpoint{}, pins in {}",
            plan.mode.name(),
            self.wanted(TcHook::FromPod).count(),
            self.wanted(TcHook::NodeEgress).count(),
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
        let [pods, nodes] = [TcHook::FromPod, TcHook::NodeEgress].map(|edge| self.wanted(edge).count());
        let sockets = if plan.cgroup.is_some() { "too" } else { "not" };
        let mode = plan.mode.name();
        let state = format!("mode {mode}: {pods} pod and {nodes} node interfaces guarded, sockets {sockets}");
        let mut failures = self.failures();
        match failures.next() {
            Some((name, failure)) => {
                format!("{state}; {} problems, the first: {name}: {failure}", 1 + failures.count())
            }
            None => state,
        }
    }

    /// Interfaces that should be guarded at an edge.
    pub fn wanted(&self, edge: TcHook) -> impl Iterator<Item = &Link> {
        self.links
            .values()
            .filter(move |link| self.datapath.wanted(link, self.role(link), edge) != AttachMode::None)
    }

    /// What is not as it should be, by interface.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        let of_interfaces = self.failures.iter().map(|(index, failure)| {
            (self.links.get(index).map_or("a gone interface", |link| link.name.as_str()), failure.as_str())
        });
        let of_rules = self.rules.failures().iter().map(|(name, failure)| (name.as_str(), failure.as_str()));
        let of_hosts = self.no_kubepods.iter().map(|failure| ("hostNetwork pods", failure.as_str()));
        of_interfaces.chain(of_hosts).chain(of_rules)
    }

    /// Takes in one piece of news. What it means for exemptions is for [`Guard::settle`], but for what is taken from links
    /// that are gone or others' now: that is at once.
    pub async fn handle(&mut self, event: Event) -> Result<(), DatapathError> {
        if let (Some(provisional), Event::Link(_) | Event::LinkGone(_)) = (&mut self.provisional, &event) {
            provisional.hear();
        }
        match event {
            Event::Link(link) => {
                self.is_unsettled |= self.links.get(&link.index) != Some(&link);
                self.see(link).await;
            }
            Event::LinkGone(index) => {
                self.is_unsettled |= self.links.contains_key(&index);
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
        if std::mem::take(&mut self.is_unsettled) { self.restore_exemptions().await } else { Ok(()) }
    }

    async fn reclassify(&mut self) -> Result<(), NetlinkError> {
        let uplinks = self.netlink.uplinks().await?;
        if uplinks != self.uplinks {
            self.uplinks = uplinks;
            self.see_again().await;
        }
        Ok(())
    }

    async fn see_again(&mut self) {
        for link in self.links.values().cloned().collect::<Vec<_>>() {
            self.see(link).await;
        }
    }

    fn restore_sockets(&mut self) -> Result<(), DatapathError> {
        for done in self.datapath.restore_sockets()? {
            let level = self.level_of_change();
            self.repairs.attached += u64::from(level == Level::Warn);
            log::log!(level, "{done}");
        }
        Ok(())
    }

    /// How loud a change is told that only the operator or the first look at everything explain.
    fn level_of_change(&self) -> Level {
        if self.is_asked || !self.settled { Level::Info } else { Level::Warn }
    }

    fn role(&self, link: &Link) -> Role {
        role(link, &self.uplinks, &self.interfaces)
    }

    async fn see(&mut self, link: Link) {
        let is_new = self.links.insert(link.index, link.clone()).is_none();
        if is_new {
            self.pods.link_came(&link);
        }
        match self.reconcile(&link, is_new).await {
            Ok(()) => {
                if self.failures.remove(&link.index).is_some() {
                    log::info!("{}: guarded as it should be again", link.name);
                }
            }
            // The event that says so is under way.
            Err(error) if error.is_interface_gone() => log::debug!("{}: gone meanwhile", link.name),
            Err(error) => self.fail(&link, format!("{:#}", anyhow::Error::from(error))),
        }
    }

    fn fail(&mut self, link: &Link, failure: String) {
        if self.failures.get(&link.index) != Some(&failure) {
            log::error!("{} (index {}) is not guarded as it should be: {failure}", link.name, link.index);
            self.failures.insert(link.index, failure);
        }
    }

    async fn reconcile(&mut self, link: &Link, is_new: bool) -> Result<(), DatapathError> {
        let role = self.role(link);
        let mut actual = Vec::new();
        for edge in TcHook::ALL {
            actual.push((edge, self.datapath.observe(link, edge, !self.settled).await?));
        }
        // What can't be written down, as where a map is full, keeps nothing from being attached.
        let mut noted = Ok(());
        if is_new && actual.iter().all(|(_, attachments)| attachments.is_empty()) {
            // What is recorded or counted under this index was another interface's.
            noted = self.datapath.take_over(link);
        }
        // What the role asks for is attached before anything else is taken away.
        actual.sort_by_key(|(edge, _)| role.edge() != Some(*edge));
        let mut backend = AttachMode::None;
        for (edge, attachments) in actual {
            let wanted = self.choose(link, role, edge, &attachments)?;
            if role.edge() == Some(edge) {
                backend = wanted;
            }
            let actions = plan(wanted, &attachments);
            for &action in &actions {
                if let (TcHook::FromPod, Action::Attach(_), []) = (edge, action, &attachments[..]) {
                    // Nothing of ours is there: the link may be another one than was granted something.
                    noted = noted.and(self.datapath.revoke(link.index));
                }
                self.datapath.apply(link, edge, action).await?;
                self.report(link, (role, edge), action, is_new);
            }
            let is_moved = |action: &Action| matches!(action, Action::Attach(_) | Action::Reorder(_));
            if wanted == AttachMode::Clsact && actions.iter().any(is_moved) {
                self.warn_if_stuck(link, edge).await?;
            }
        }
        noted.and(self.datapath.record(link, role, backend))
    }

    fn report(&mut self, link: &Link, (role, edge): (Role, TcHook), action: Action, is_new: bool) {
        let Link { name, index, .. } = link;
        let (at, level) = (edge.hook().name(), self.level_of_change());
        if level == Level::Warn && self.raising != Some(*index) {
            match action {
                Action::Attach(_) if !is_new => self.repairs.attached += 1,
                Action::Replace(_) => self.repairs.replaced += 1,
                Action::Pin(_) => self.repairs.pinned += 1,
                Action::Reorder(_) => self.repairs.reordered += 1,
                Action::Attach(_) | Action::Detach(_) => {}
            }
        }
        match action {
            // With each pod, once it is calm.
            Action::Attach(_) | Action::Detach(_) if self.raising == Some(*index) => {
                log::debug!("{name} (index {index}): {action:?}, as it is this link's turn");
            }
            Action::Attach(backend) if is_new => {
                log::info!("guarding {name} (index {index}) at {at} by {}", backend.name());
            }
            // A change of classification or of the peer's namespace, or somebody's doing: it can't be told apart, and
            // in doubt it is said.
            Action::Attach(backend) => {
                let again = if self.is_asked { "" } else { " again," };
                log::log!(level, "guarding {name} (index {index}){again} at {at} by {}", backend.name());
            }
            Action::Replace(backend) if self.settled => {
                log::warn!(
                    "{name} (index {index}): another program was in the place of ours ({})",
                    backend.name()
                );
            }
            Action::Replace(_) => {
                log::info!("guarding {name} (index {index}) at {at}: took over from an earlier agent");
            }
            Action::Pin(_) => log::warn!("{name} (index {index}): pinned again"),
            Action::Reorder(_) => {
                log::warn!("{name} (index {index}): put before programs that had got in front");
            }
            Action::Detach(backend) if role.edge() == Some(edge) => {
                log::info!("{name} (index {index}): no longer at {at} by {}", backend.name());
            }
            Action::Detach(_) => {
                log::log!(
                    level,
                    "{name} (index {index}) is no longer guarded at {at}: its role is {}",
                    role.name()
                );
            }
        }
    }

    async fn warn_if_stuck(&mut self, link: &Link, edge: TcHook) -> Result<(), DatapathError> {
        let attachments = self.datapath.observe(link, edge, false).await?;
        if attachments.iter().any(|attachment| attachment.place == Order::Blocked) {
            let Link { name, index, .. } = link;
            log::warn!(
                "{name} (index {index}): another filter sees packets first and can let them pass; `tc filter show dev \
                 {name} ingress` or `egress` names it"
            );
        }
        Ok(())
    }

    fn forget(&mut self, index: u32) {
        self.pods.link_went(index);
        if let Some(provisional) = &mut self.provisional {
            provisional.forget(index);
        }
        if let Some(link) = self.links.remove(&index) {
            log::info!("{} (index {index}) is gone", link.name);
        }
        self.failures.remove(&index);
        if let Err(error) = self.datapath.forget(index) {
            log::error!("interface {index} is gone, but not forgotten: {:#}", anyhow::Error::from(error));
        }
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
