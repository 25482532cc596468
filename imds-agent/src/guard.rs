//! The agent's work: follows the node's interfaces and keeps each as it should be.

use std::collections::{BTreeMap, BTreeSet};

use imds_ebpf_common::{Backend, Role};

use crate::{
    config::Interfaces,
    datapath::{Datapath, DatapathError},
    node::{
        links::Link,
        netlink::{Event, Netlink, NetlinkError},
    },
    reconcile::{Action, Place, plan},
    state::role,
};

/// Interfaces as they are and as they should be, and the datapath that makes the one the other.
pub struct Guard {
    datapath: Datapath,
    netlink: Netlink,
    interfaces: Interfaces,
    links: BTreeMap<u32, Link>,
    uplinks: BTreeSet<u32>,
    /// What failed last, by interface, so that it is said once and not with every round.
    failures: BTreeMap<u32, String>,
    /// Whether every interface was looked at once: until then filters of an earlier agent may be anywhere.
    settled: bool,
}

impl Guard {
    /// A guard that has not looked at any interface yet.
    #[must_use]
    pub fn new(datapath: Datapath, netlink: Netlink, interfaces: Interfaces) -> Self {
        Self {
            datapath,
            netlink,
            interfaces,
            links: BTreeMap::new(),
            uplinks: BTreeSet::new(),
            failures: BTreeMap::new(),
            settled: false,
        }
    }

    /// Interfaces that should be guarded.
    pub fn wanted(&self) -> impl Iterator<Item = &Link> {
        self.links.values().filter(|link| self.role(link) == Role::Pod)
    }

    /// What is not as it should be, by interface.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.failures.iter().map(|(index, failure)| {
            (self.links.get(index).map_or("a gone interface", |link| link.name.as_str()), failure.as_str())
        })
    }

    /// Reads everything anew and puts right what is not as it should be. What fails on one interface is in
    /// [`Guard::failures`] and does not keep the others from it.
    pub async fn resync(&mut self) -> Result<(), DatapathError> {
        // Guarding goes on without pins; what comes of it is said at the end.
        let restored = self.datapath.restore_pins();
        if let Ok(true) = restored
            && self.settled
        {
            log::warn!("restored what was missing from {}", self.datapath.pins().root().display());
        }
        self.uplinks = self.netlink.uplinks().await?;
        let links = self.netlink.links().await?;
        let present: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let known = self.links.keys().copied().chain(self.datapath.known());
        for gone in known.filter(|index| !present.contains(index)).collect::<BTreeSet<_>>() {
            self.forget(gone);
        }
        for link in links {
            self.see(link).await;
        }
        self.settled = true;
        restored?;
        self.datapath.announce_ready()
    }

    /// Takes in one piece of news.
    pub async fn handle(&mut self, event: Event) -> Result<(), DatapathError> {
        match event {
            Event::Link(link) => self.see(link).await,
            Event::LinkGone(index) => self.forget(index),
            Event::Filter(index) => {
                if let Some(link) = self.links.get(&index).cloned() {
                    self.see(link).await;
                }
            }
            Event::Route => self.reclassify().await?,
            Event::Overrun => {
                log::warn!("the kernel's events came faster than they were read: reading everything anew");
                self.resync().await?;
            }
        }
        Ok(())
    }

    async fn reclassify(&mut self) -> Result<(), NetlinkError> {
        let uplinks = self.netlink.uplinks().await?;
        if uplinks != self.uplinks {
            self.uplinks = uplinks;
            for link in self.links.values().cloned().collect::<Vec<_>>() {
                self.see(link).await;
            }
        }
        Ok(())
    }

    fn role(&self, link: &Link) -> Role {
        role(link, &self.uplinks, &self.interfaces)
    }

    async fn see(&mut self, link: Link) {
        let is_new = self.links.insert(link.index, link.clone()).is_none();
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
        let wanted = if role == Role::Pod { self.datapath.backend() } else { Backend::None };
        let actual = self.datapath.observe(link, !self.settled).await?;
        if is_new && actual.is_empty() {
            // What is recorded or counted under this index was another interface's.
            self.datapath.take_over(link)?;
        }
        let actions = plan(wanted, &actual);
        for &action in &actions {
            self.datapath.apply(link, action).await?;
            self.report(link, role, action, is_new);
        }
        self.datapath.record(link, role, wanted)?;
        if wanted == Backend::Clsact
            && actions.iter().any(|action| matches!(action, Action::Attach(_) | Action::Raise(_)))
        {
            self.warn_if_stuck(link).await?;
        }
        Ok(())
    }

    fn report(&self, link: &Link, role: Role, action: Action, is_new: bool) {
        let Link { name, index, .. } = link;
        match action {
            Action::Attach(backend) if is_new => {
                log::info!("guarding {name} (index {index}) by {}", backend.name());
            }
            // A change of classification or of the peer's namespace, or somebody's doing: it can't be told apart, and
            // in doubt it is said.
            Action::Attach(backend) => {
                log::warn!("guarding {name} (index {index}) again, by {}", backend.name());
            }
            Action::Replace(backend) if self.settled => {
                log::warn!(
                    "{name} (index {index}): another program was in the place of ours ({})",
                    backend.name()
                );
            }
            Action::Replace(_) => {
                log::info!("guarding {name} (index {index}): took over from an earlier agent");
            }
            Action::Pin(_) => log::warn!("{name} (index {index}): pinned again"),
            Action::Raise(_) => {
                log::warn!("{name} (index {index}): put before programs that had got in front");
            }
            Action::Detach(backend) if role == Role::Pod => {
                log::info!(
                    "{name} (index {index}): {} came in the place of {}",
                    self.datapath.backend().name(),
                    backend.name()
                );
            }
            Action::Detach(_) => {
                log::warn!("{name} (index {index}) is no longer guarded: its role is {}", role.name());
            }
        }
    }

    async fn warn_if_stuck(&mut self, link: &Link) -> Result<(), DatapathError> {
        let attachments = self.datapath.observe(link, false).await?;
        if attachments.iter().any(|attachment| attachment.place == Place::Stuck) {
            log::warn!(
                "{} (index {}): another filter sees packets first and can let them pass; `tc filter show dev {} ingress` \
                 names it",
                link.name,
                link.index,
                link.name
            );
        }
        Ok(())
    }

    fn forget(&mut self, index: u32) {
        if let Some(link) = self.links.remove(&index) {
            log::info!("{} (index {index}) is gone", link.name);
        }
        self.failures.remove(&index);
        if let Err(error) = self.datapath.forget(index) {
            log::error!("interface {index} is gone, but not forgotten: {:#}", anyhow::Error::from(error));
        }
    }
}
