//! Compares the allow list of the node with the users that a firewall rule matches.

use super::{number_set::NumberSet, traffic::Traffic};
use crate::{
    config::NodeProcess,
    datapath::{
        attach::cgroup_programs::{self, ProgramState},
        object::{self, Maps},
        pin::dir::PinDir,
    },
    node::cgroup,
    telemetry::status::node_allow_entries,
};

/// Allow list of the node, whose programs are attached.
#[derive(Clone, Debug, Default)]
pub(crate) struct AllowList {
    pub(crate) entries: Vec<NodeProcess>,
    /// True if the programs also check packets, and not only calls (Linux 6.15).
    pub(crate) checks_packets: bool,
    /// Cgroup whose processes the list restricts (`run --cgroup`); `None` if it is the root.
    pub(crate) cgroup: Option<String>,
}

impl AllowList {
    /// Reads the allow list, or returns the name of one of its programs that is not attached. Returns `None` if the maps can't be
    /// read.
    pub(crate) fn read(pins: &PinDir, maps: &Maps) -> Option<Result<Self, &'static str>> {
        let id = maps.cgroup.get(&0, 0).ok()?.cgroup;
        let checks_packets = object::cgroup_has_cookie();
        let is_missing =
            |program: &ProgramState| !program.is_attached && (checks_packets || !program.is_packet_program);
        let programs = cgroup_programs::inspect(pins, cgroup_programs::NODE_ALLOW, id);
        if let Some(missing) = programs.into_iter().find(is_missing) {
            return Some(Err(missing.program));
        }
        let entries = node_allow_entries(maps).ok()?.into_iter().map(|entry| entry.parse());
        let entries = entries.collect::<Result<_, _>>().ok()?;
        let path = || match cgroup::path_of(id) {
            Ok(Some(path)) => path.display().to_string(),
            Ok(None) | Err(_) => format!("with the id {id}"),
        };
        let cgroup = (cgroup::root_id() != Some(id)).then(path);
        Some(Ok(Self { entries, checks_packets, cgroup }))
    }

    /// Describes the traffic of the node's processes that the rule denies and the list allows.
    pub(crate) fn openings(&self, traffic: &Traffic) -> Vec<String> {
        let mut openings = Vec::new();
        if let Some(cgroup) = &self.cgroup {
            openings.push(format!(
                "requests of the node's processes{} outside of the cgroup {cgroup}, to which node_allow is attached",
                traffic.owners_after("")
            ));
        }
        let entries = self.entries_of(&traffic.uids).join(" and ");
        if !entries.is_empty() {
            let owners = traffic.owners_after(" that the rule matches");
            openings.push(format!(
                "requests of the node's processes in node.allow{owners}, which imds-agent lets pass: {entries}"
            ));
        }
        if !self.checks_packets {
            openings.push(
                "packets of the node's processes from raw and ping sockets, and of connections from before node.allow was set: \
                 before Linux 6.15 it restricts only connect, sendto and sendmsg"
                    .to_owned(),
            );
        }
        openings
    }

    /// Returns the entries that can contain senders of packets that a rule for these users matches. A cgroup can contain
    /// processes of every user.
    ///
    /// A rule compares the user of the socket's creator (`f_cred->fsuid`, `net/netfilter/xt_owner.c` and `nft_meta.c`), and so does
    /// the program on packets. The programs on calls compare the real user of the caller, which is another one if a set-user-ID
    /// program calls, or if the socket is from another process.
    pub(crate) fn entries_of(&self, uids: &NumberSet) -> Vec<String> {
        let can_contain = |entry: &&NodeProcess| match entry {
            NodeProcess::Uid(uid) => !self.checks_packets || uids.contains(*uid),
            NodeProcess::Cgroup(_) => true,
        };
        self.entries.iter().filter(can_contain).map(ToString::to_string).collect()
    }

    /// Reports whether the list has an entry for each of these users. Even then, a caller is denied whose real user the list does
    /// not have.
    pub(crate) fn contains_all(&self, uids: &NumberSet) -> bool {
        let users = self.entries.iter().filter_map(|entry| match entry {
            NodeProcess::Uid(uid) => Some((*uid, *uid)),
            NodeProcess::Cgroup(_) => None,
        });
        uids.intersection(&NumberSet::new(users.collect()).complement()) == NumberSet::new(Vec::new())
    }
}
