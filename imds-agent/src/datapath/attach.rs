//! Attaches the programs to the hooks of interfaces, in each attach mode.

use std::os::fd::BorrowedFd;

use imds_ebpf_common::{AttachMode, TcHook, names::tc_program};

use super::{
    Datapath, DatapathError,
    bpf::{self, MprogHook},
    clsact, counters, endpoints,
    object::{Maps, Programs},
    obstacles::{Obstacle, ObstacleError},
    pins::AttachPoint,
    qdisc, records,
};
use crate::{
    config::Hooks,
    node::{
        links::{Kind, Link},
        netlink::Netlink,
    },
    reconcile::{Action, Attachment, Order},
};

impl Datapath {
    /// Attach mode of a desired hook of this interface.
    ///
    /// A program at the peer of a netkit pair can redirect packets of the pod past TC ingress of the host side, so that
    /// `from_pod` joins the programs at the peer: every kernel with netkit devices (6.7) has these links.
    #[must_use]
    pub fn attach_mode(&self, link: &Link, hook: TcHook) -> AttachMode {
        match (link.kind, hook) {
            (Kind::Netkit, TcHook::FromPod) if !self.refused_netkit.contains(&link.index) => {
                AttachMode::Netkit
            }
            _ => self.backend,
        }
    }

    /// Observes the attachments of the agent at a hook of an interface.
    ///
    /// Filters are looked for if the agent runs in clsact mode, if an agent recorded one, and if the caller asks for a
    /// `thorough` search.
    pub async fn observe(
        &mut self,
        link: &Link,
        edge: TcHook,
        thorough: bool,
    ) -> Result<Vec<Attachment>, DatapathError> {
        let spot = AttachPoint { ifindex: link.index, edge };
        // If the hook is off no program is loaded, so that no attached one is the current one.
        let program = self.programs.id(tc_program(edge, link.frame)).unwrap_or_default();
        let mut attachments = self.links.observe(self.claim.dir(), spot, program)?;
        let recorded = records::has_filter(&self.maps, link.index);
        if thorough || recorded || self.backend == AttachMode::Clsact {
            attachments.extend(clsact::attachment(&self.netlink, spot, program).await?);
        }
        if has_earlier_netkit_program(link, edge) {
            for attachment in attachments.iter_mut().filter(|it| it.backend != AttachMode::Netkit) {
                attachment.place = Order::Blocked;
            }
        }
        Ok(attachments)
    }

    /// Carries out one action at a hook of an interface.
    pub async fn apply(&mut self, link: &Link, edge: TcHook, action: Action) -> Result<(), DatapathError> {
        let spot = AttachPoint { ifindex: link.index, edge };
        let name = tc_program(edge, link.frame);
        match action {
            Action::Attach(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                counters::prepare(&mut self.maps, link.index, edge.hook());
                match self.attach_link(spot, mode, name) {
                    Err(error) if mode == AttachMode::Netkit && is_netkit_refusal(&error) => {
                        log::warn!(
                            "{}: attaching via TCX instead: {:#}",
                            link.name,
                            anyhow::Error::from(error)
                        );
                        self.refused_netkit.insert(link.index);
                        self.attach_link(spot, AttachMode::Tcx, name)
                    }
                    attached => attached,
                }
                .map_err(|error| with_obstacle(error, link, edge))
            }
            Action::Replace(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.replace(spot, mode, self.programs.fd(name)?)
            }
            Action::Pin(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.pin(self.claim.dir(), spot, mode)
            }
            Action::Reorder(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                // The kernel rejects a second link with the same program at one hook. A copy of the program is therefore
                // attached first in order, then the link is updated to the original.
                let hooks = Hooks::from_bits(edge.hook().bit());
                let copy = Programs::load(self.claim.dir(), hooks, &endpoints::filter(&self.maps)?)?;
                self.links
                    .reorder(self.claim.dir(), spot, mode, copy.fd(name)?)
                    .map_err(|error| with_obstacle(error, link, edge))?;
                self.links.replace(spot, mode, self.programs.fd(name)?)
            }
            Action::Detach(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.detach(self.claim.dir(), spot, mode)
            }
            Action::Attach(AttachMode::Clsact) => {
                counters::prepare(&mut self.maps, link.index, edge.hook());
                if clsact::ensure_qdisc(&self.netlink, link.index).await? {
                    if let Err(error) = records::set_owns_qdisc(&mut self.maps, link, edge) {
                        log::warn!("{}: `unload` will leave its clsact qdisc: {error}", link.name);
                    }
                } else {
                    if edge == TcHook::NodeEgress {
                        // An `ingress` qdisc would take the filter, for the wrong direction.
                        self.check_qdisc(link, edge).await?;
                    }
                    if !clsact::has_ours(&self.netlink, link.index).await? {
                        // Another program may have put its own qdisc in the place of the agent's.
                        records::disown_qdisc(&mut self.maps, link)?;
                    }
                }
                self.attach_filter(link, spot, self.programs.fd(name)?, name).await
            }
            Action::Reorder(AttachMode::Clsact) => {
                self.attach_filter(link, spot, self.programs.fd(name)?, name).await
            }
            Action::Replace(AttachMode::Clsact) => {
                Ok(clsact::replace(&self.netlink, spot, self.programs.fd(name)?, name).await?)
            }
            Action::Detach(AttachMode::Clsact) => {
                remove_filter(&self.netlink, &mut self.maps, spot).await.map(drop)
            }
            // Filters are not pinned, and mode `none` attaches nothing.
            Action::Pin(AttachMode::Clsact | AttachMode::None)
            | Action::Attach(AttachMode::None)
            | Action::Replace(AttachMode::None)
            | Action::Reorder(AttachMode::None)
            | Action::Detach(AttachMode::None) => Ok(()),
        }
    }

    fn attach_link(
        &mut self,
        spot: AttachPoint,
        mode: AttachMode,
        name: &'static str,
    ) -> Result<(), DatapathError> {
        self.links.attach(self.claim.dir(), spot, mode, self.programs.fd(name)?)
    }

    async fn attach_filter(
        &self,
        link: &Link,
        spot: AttachPoint,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), DatapathError> {
        match clsact::attach_first(&self.netlink, spot, program, name).await {
            // EOPNOTSUPP: the qdisc uses a shared filter block (`__tcf_block_find`).
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
                self.check_qdisc(link, spot.edge).await?;
                Err(error.into())
            }
            attached => Ok(attached?),
        }
    }

    /// Reports whether the interface has a qdisc that takes filters, whichever program added it.
    pub async fn has_qdisc(&self, link: &Link) -> Result<bool, DatapathError> {
        Ok(qdisc::read(&self.netlink, link.index).await?.is_some())
    }

    /// Fails if the qdisc of the interface cannot take a filter at `hook`.
    async fn check_qdisc(&self, link: &Link, hook: TcHook) -> Result<(), DatapathError> {
        match qdisc::obstacle(&self.netlink, link.index, hook).await? {
            Some(obstacle) => Err(ObstacleError { hook, interface: link.name.clone(), obstacle }.into()),
            None => Ok(()),
        }
    }
}

/// Reports whether programs at the peer of a netkit pair see packets before TC ingress does.
fn has_earlier_netkit_program(link: &Link, edge: TcHook) -> bool {
    let entries = || bpf::entries(link.index, MprogHook::NetkitPeer);
    (link.kind, edge) == (Kind::Netkit, TcHook::FromPod) && entries().is_ok_and(|list| !list.is_empty())
}

/// Reports whether a netkit link can never be attached there: the kernel lacks it (EINVAL, EOPNOTSUPP), or the device is
/// no netkit device (ENXIO) or a peer device (EACCES), as `netkit_dev_fetch` says (drivers/net/netkit.c).
fn is_netkit_refusal(error: &DatapathError) -> bool {
    matches!(error.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENXIO | libc::EACCES))
}

/// Turns the error of a full list of programs (ERANGE, `bpf_mprog_attach`) into one with the remedy.
fn with_obstacle(error: DatapathError, link: &Link, hook: TcHook) -> DatapathError {
    if error.errno() == Some(libc::ERANGE) {
        let obstacle = Obstacle::TooManyPrograms;
        return ObstacleError { hook, interface: link.name.clone(), obstacle }.into();
    }
    error
}

/// Removes the filters of the agent from a hook, and the qdisc if the agent added it and no filter is left. Returns
/// whether there was a filter.
pub(super) async fn remove_filter(
    netlink: &Netlink,
    maps: &mut Maps,
    spot: AttachPoint,
) -> Result<bool, DatapathError> {
    let detached = clsact::detach_all(netlink, spot).await?;
    if records::get(maps, spot.ifindex).is_some_and(|record| record.owns_qdisc == 1) {
        clsact::remove_unused_qdisc(netlink, spot.ifindex).await?;
    }
    Ok(detached)
}
