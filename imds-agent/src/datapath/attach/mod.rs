//! Attaches the programs to the TC hooks of interfaces, in each attach mode.

pub mod attachment;
pub(crate) mod cgroup_backoff;
pub mod cgroup_hooks;
pub mod cgroup_link;
pub mod cgroup_order;
pub mod cgroup_programs;
pub mod clsact;
pub mod host_cgroups;
pub mod mprog;
pub mod netns_identity;
pub mod obstacle;
pub mod qdisc;
pub mod sendmsg;

use std::os::fd::{AsFd as _, BorrowedFd};

use imds_ebpf_common::{AttachMode, TcHook, names::tc_program};

use super::{
    Datapath, DatapathError,
    attach::obstacle::{Obstacle, ObstacleError},
    maps::{counters, interface_records},
    object::Maps,
    pin::dir::AttachPoint,
    sys::bpf::{self, MprogHook},
};
use crate::{
    datapath::attach::attachment::{Action, Attachment, Order},
    node::{
        link::{Link, LinkKind},
        netlink::Netlink,
    },
};

impl Datapath {
    /// Returns the attach mode of a desired hook of this interface.
    ///
    /// A program at the peer of a netkit pair can redirect packets of the pod past TC ingress of the host side. `from_pod` is
    /// therefore attached to the peer too. Every kernel with netkit devices (6.7) supports such links.
    pub fn attach_mode(&self, link: &Link, hook: TcHook) -> AttachMode {
        match (link.kind, hook) {
            (LinkKind::Netkit, TcHook::FromPod) if !self.rejected_netkit.contains(&link.index) => {
                AttachMode::Netkit
            }
            _ => self.backend,
        }
    }

    /// Returns the attachments of the agent at a hook of an interface.
    ///
    /// Searches for filters only in clsact mode, if the record of the interface has a filter, or if `full` is set.
    pub async fn observe(
        &mut self,
        link: &Link,
        hook: TcHook,
        full: bool,
    ) -> Result<Vec<Attachment>, DatapathError> {
        let point = AttachPoint { ifindex: link.index, hook };
        // No program is loaded for a hook that is off. Id 0 then makes every attached program obsolete.
        let program = self.programs.id(tc_program(hook, link.link_layer)).unwrap_or_default();
        let mut attachments = self.links.observe(&self.pin_lock.dir, point, program)?;
        let recorded = interface_records::has_filter(&self.maps, link.index);
        if full || recorded || self.backend == AttachMode::Clsact {
            attachments.extend(clsact::attachment(&self.netlink, point, program).await?);
        }
        if has_earlier_netkit_program(link, hook) {
            for attachment in attachments.iter_mut().filter(|it| it.backend != AttachMode::Netkit) {
                attachment.order = Order::Blocked;
            }
        }
        Ok(attachments)
    }

    /// Executes one reconcile action at a hook of an interface.
    pub async fn apply(&mut self, link: &Link, hook: TcHook, action: Action) -> Result<(), DatapathError> {
        let point = AttachPoint { ifindex: link.index, hook };
        let name = tc_program(hook, link.link_layer);
        if let (Action::Attach(_), Some(hardware_type)) = (action, link.unsupported_type) {
            let obstacle = Obstacle::HardwareType(hardware_type);
            return Err(ObstacleError { hook, interface: link.name.clone(), obstacle }.into());
        }
        match action {
            Action::Attach(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                counters::create(&mut self.maps, link.index, hook.hook());
                match self.attach_link(point, mode, name) {
                    Err(error) if mode == AttachMode::Netkit && is_netkit_rejection(&error) => {
                        log::warn!(
                            "{}: netkit link rejected, attaching via TCX: {:#}",
                            link.name,
                            anyhow::Error::from(error)
                        );
                        self.rejected_netkit.insert(link.index);
                        self.attach_link(point, AttachMode::Tcx, name)
                    }
                    attached => attached,
                }
                .map_err(|error| with_obstacle(error, link, hook))
            }
            Action::Replace(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.replace(point, mode, self.programs.fd(name)?)
            }
            Action::Pin(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.pin(&self.pin_lock.dir, point, mode)
            }
            Action::Reorder(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                // The kernel rejects a second link with the same program at one hook. This attaches a copy of the program
                // at the head of the hook, then updates the link to the original.
                let copy = self.programs.load_copy(name)?;
                self.links
                    .attach(&self.pin_lock.dir, point, mode, copy.as_fd())
                    .map_err(|error| with_obstacle(error, link, hook))?;
                self.links.replace(point, mode, self.programs.fd(name)?)
            }
            Action::Detach(mode @ (AttachMode::Tcx | AttachMode::Netkit)) => {
                self.links.detach(&self.pin_lock.dir, point, mode)
            }
            Action::Attach(AttachMode::Clsact) => {
                counters::create(&mut self.maps, link.index, hook.hook());
                if clsact::ensure_qdisc(&self.netlink, link.index).await? {
                    if let Err(error) = interface_records::set_owns_qdisc(&mut self.maps, link, hook) {
                        log::warn!(
                            "{}: failed to record the new clsact qdisc, `unload` will not remove it: {error}",
                            link.name
                        );
                    }
                } else {
                    if hook == TcHook::NodeEgress {
                        // An `ingress` qdisc would accept the filter and run it at ingress.
                        self.check_qdisc(link, hook).await?;
                    }
                    if !clsact::has_agent_filter(&self.netlink, link.index).await? {
                        // Another program may have replaced the agent's qdisc by its own.
                        interface_records::disown_qdisc(&mut self.maps, link)?;
                    }
                }
                self.attach_filter(link, point, self.programs.fd(name)?, name).await
            }
            Action::Reorder(AttachMode::Clsact) => {
                self.attach_filter(link, point, self.programs.fd(name)?, name).await
            }
            Action::Replace(AttachMode::Clsact) => {
                Ok(clsact::replace(&self.netlink, point, self.programs.fd(name)?, name).await?)
            }
            Action::Detach(AttachMode::Clsact) => {
                remove_filter(&self.netlink, &mut self.maps, point).await.map(drop)
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
        point: AttachPoint,
        mode: AttachMode,
        name: &'static str,
    ) -> Result<(), DatapathError> {
        self.links.attach(&self.pin_lock.dir, point, mode, self.programs.fd(name)?)
    }

    async fn attach_filter(
        &self,
        link: &Link,
        point: AttachPoint,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), DatapathError> {
        match clsact::attach_first(&self.netlink, point, program, name).await {
            // EOPNOTSUPP: the qdisc uses a shared filter block (`__tcf_block_find`).
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {
                self.check_qdisc(link, point.hook).await?;
                Err(error.into())
            }
            attached => Ok(attached?),
        }
    }

    /// Reports whether the interface has a clsact or ingress qdisc, no matter which program added it.
    pub async fn has_qdisc(&self, link: &Link) -> Result<bool, DatapathError> {
        Ok(qdisc::read(&self.netlink, link.index).await?.is_some())
    }

    /// Fails if the qdisc of the interface cannot take a filter at `hook`.
    async fn check_qdisc(&self, link: &Link, hook: TcHook) -> Result<(), DatapathError> {
        let qdisc = qdisc::read(&self.netlink, link.index).await?;
        match qdisc.and_then(|qdisc| qdisc.obstacle(hook, bpf::has_tcx())) {
            Some(obstacle) => Err(ObstacleError { hook, interface: link.name.clone(), obstacle }.into()),
            None => Ok(()),
        }
    }
}

/// Reports whether the peer of a netkit pair has programs, which run before TC ingress.
fn has_earlier_netkit_program(link: &Link, hook: TcHook) -> bool {
    let entries = || bpf::entries(link.index, MprogHook::NetkitPeer);
    (link.kind, hook) == (LinkKind::Netkit, TcHook::FromPod) && entries().is_ok_and(|list| !list.is_empty())
}

/// Reports whether attaching a netkit link to the device always fails: the kernel does not support it (EINVAL, EOPNOTSUPP),
/// the device is not a netkit device (ENXIO), or it is a peer device (EACCES). See `netkit_dev_fetch` (drivers/net/netkit.c).
fn is_netkit_rejection(error: &DatapathError) -> bool {
    matches!(error.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENXIO | libc::EACCES))
}

/// Converts the error of a full list of programs (ERANGE, `bpf_mprog_attach`) to an [`ObstacleError`] with a remedy.
fn with_obstacle(error: DatapathError, link: &Link, hook: TcHook) -> DatapathError {
    if error.errno() == Some(libc::ERANGE) {
        let obstacle = Obstacle::TooManyPrograms;
        return ObstacleError { hook, interface: link.name.clone(), obstacle }.into();
    }
    error
}

/// Removes the filters of the agent from a hook, and the qdisc if the agent added it and no filter is left. Returns
/// `true` if the hook had a filter of the agent.
pub(super) async fn remove_filter(
    netlink: &Netlink,
    maps: &mut Maps,
    point: AttachPoint,
) -> Result<bool, DatapathError> {
    let detached = clsact::detach_all(netlink, point).await?;
    if interface_records::get(maps, point.ifindex).is_some_and(|record| record.owns_qdisc == 1) {
        clsact::remove_unused_qdisc(netlink, point.ifindex).await?;
    }
    Ok(detached)
}
