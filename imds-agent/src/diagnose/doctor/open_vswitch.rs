//! Open vSwitch with a datapath that the hooks of interfaces do not see.

use super::doctor_report::DoctorCheck;
use crate::node::{
    netlink::{Netlink, NetlinkError},
    userspace_ovs,
};

const NAME: &str = "open_vswitch";

pub(crate) async fn datapath(netlink: &Netlink) -> Result<DoctorCheck, NetlinkError> {
    let links = netlink.links().await?;
    Ok(match userspace_ovs::find(&links) {
        Some(port) => DoctorCheck::degraded(
            NAME,
            format!("{}: {}", port.name, userspace_ovs::PROBLEM),
            userspace_ovs::REMEDY,
        ),
        None => DoctorCheck::ok(NAME, "no datapath in userspace"),
    })
}
