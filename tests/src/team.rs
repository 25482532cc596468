//! Creates team devices without `teamd` or `teamnl`. A team sends nothing until it has a mode.

use std::io;

use nix::{net::if_::if_nametoindex, sys::socket::SockProtocol};

use crate::{
    Netns,
    netlink_request::{attribute, c_string, find_attribute, request},
    skip::{WHOLE_TEST, lacks_device, skip},
};

// Numbers of include/uapi/linux/genetlink.h.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
// Numbers of include/uapi/linux/if_team.h.
const TEAM_CMD_OPTIONS_SET: u8 = 1;
const TEAM_ATTR_TEAM_IFINDEX: u16 = 1;
const TEAM_ATTR_LIST_OPTION: u16 = 2;
const TEAM_ATTR_ITEM_OPTION: u16 = 1;
const TEAM_ATTR_OPTION_NAME: u16 = 1;
const TEAM_ATTR_OPTION_TYPE: u16 = 3;
const TEAM_ATTR_OPTION_DATA: u16 = 4;
/// Type of an attribute that is a string (include/net/netlink.h).
const NLA_STRING: u8 = 5;

/// Adds a team without ports in the mode `roundrobin`.
pub(crate) fn add(netns: &Netns, name: &str) -> io::Result<()> {
    netns.ip(&format!("link add {name} type team"));
    netns.run(|| set_mode(name, "roundrobin"))
}

/// Reports whether the kernel lacks team devices with the mode `roundrobin`, and prints a skip notice then.
#[must_use]
pub fn skip_without_team() -> bool {
    if lacks_device(WHOLE_TEST, "team", "type team") {
        return true;
    }
    // The kernel returns EINVAL if the module of the mode is missing (`__team_change_mode`).
    match add(&Netns::new("team"), "team0") {
        Ok(()) => false,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            skip(WHOLE_TEST, "no team mode roundrobin on this kernel");
            true
        }
        Err(error) => panic!("add a team: {error}"),
    }
}

fn set_mode(team: &str, mode: &str) -> io::Result<()> {
    let ifindex = if_nametoindex(team)?;
    let option = [
        attribute(TEAM_ATTR_OPTION_NAME, &c_string("mode")),
        attribute(TEAM_ATTR_OPTION_TYPE, &[NLA_STRING]),
        attribute(TEAM_ATTR_OPTION_DATA, &c_string(mode)),
    ];
    let item = attribute(TEAM_ATTR_ITEM_OPTION, &option.concat());
    let attributes =
        [attribute(TEAM_ATTR_TEAM_IFINDEX, &ifindex.to_ne_bytes()), attribute(TEAM_ATTR_LIST_OPTION, &item)];
    let body = [header(TEAM_CMD_OPTIONS_SET), attributes.concat()].concat();
    match request(SockProtocol::NetlinkGeneric, family("team")?, libc::NLM_F_ACK, &body) {
        // The mode is set, but no process receives the event (`nlmsg_multicast`, include/net/netlink.h).
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result.map(drop),
    }
}

/// Returns the id of a generic netlink family.
fn family(name: &str) -> io::Result<u16> {
    let body = [header(CTRL_CMD_GETFAMILY), attribute(CTRL_ATTR_FAMILY_NAME, &c_string(name))].concat();
    let answer = request(SockProtocol::NetlinkGeneric, GENL_ID_CTRL, 0, &body)?;
    let id = answer.get(header(0).len()..).and_then(|answer| find_attribute(answer, CTRL_ATTR_FAMILY_ID));
    let id = id.and_then(|id| id.first_chunk()).copied().map(u16::from_ne_bytes);
    id.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Encodes `struct genlmsghdr`: command, version and two reserved bytes.
fn header(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_of_the_controller_is_known() {
        assert_eq!(family("nlctrl").expect("every kernel has it"), GENL_ID_CTRL);
        assert!(family("no such family").is_err());
    }
}
