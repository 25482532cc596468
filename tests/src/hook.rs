//! Programs at the TC hooks of an interface, as the kernel reports them.

use std::{io::ErrorKind, path::Path, sync::LazyLock};

use aya::{
    maps::{MapInfo, loaded_maps},
    programs::{ProgramError, ProgramInfo, SchedClassifier, loaded_programs, tc::TcAttachType},
};
use serde_json::Value;

use crate::{Netns, netns::checked};

/// Prefix of the names of the agent's programs. The kernel keeps 15 bytes of a name.
pub const OURS: &str = "imds_";

/// A program that is attached to a hook.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attached {
    /// Program id of the kernel.
    pub id: u32,
    /// Name of the program, at most 15 bytes.
    pub name: String,
}

impl Attached {
    /// Reports whether the program is one of the agent's.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.name.starts_with(OURS)
    }
}

/// Reports whether the kernel has TCX (6.6, commit e420bed02507).
#[must_use]
pub fn has_tcx() -> bool {
    static HAS_TCX: LazyLock<bool> =
        LazyLock::new(|| match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => true,
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
                false
            }
            Err(error) => panic!("query TCX: {error}"),
        });
    *HAS_TCX
}

/// Returns the TCX ingress programs in execution order. TCX runs before clsact. Returns an empty list if the kernel
/// lacks TCX.
#[must_use]
pub fn tcx(netns: &Netns, interface: &str) -> Vec<Attached> {
    tcx_at(netns, interface, TcAttachType::Ingress)
}

fn tcx_at(netns: &Netns, interface: &str, hook: TcAttachType) -> Vec<Attached> {
    if !has_tcx() {
        return Vec::new();
    }
    let (_, programs) = netns.run(|| {
        loop {
            match SchedClassifier::query_tcx(interface, hook) {
                // The list is outdated: a program was unloaded before aya opened it by its id.
                Err(ProgramError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {}
                programs => return programs.expect("query TCX"),
            }
        }
    });
    let attached = |program: &ProgramInfo| Attached {
        id: program.id(),
        name: program.name_as_str().unwrap_or_default().to_owned(),
    };
    programs.iter().map(attached).collect()
}

/// Returns the BPF filters of clsact ingress in execution order.
#[must_use]
pub fn filters(netns: &Netns, interface: &str) -> Vec<Attached> {
    filters_at(netns, interface, TcAttachType::Ingress)
}

fn filters_at(netns: &Netns, interface: &str, hook: TcAttachType) -> Vec<Attached> {
    let attached = |filter: &Value| {
        let program = filter.pointer("/options/prog")?;
        let id = program["id"].as_u64()?.try_into().expect("program ids have 32 bits");
        Some(Attached { id, name: program["name"].as_str().unwrap_or_default().to_owned() })
    };
    tc(netns, &["filter", "show", "dev", interface, direction(hook)]).iter().filter_map(attached).collect()
}

/// Returns all programs of the ingress hook in execution order.
#[must_use]
pub fn programs(netns: &Netns, interface: &str) -> Vec<Attached> {
    programs_at(netns, interface, TcAttachType::Ingress)
}

/// Returns all programs of an ingress or egress hook in execution order.
#[must_use]
pub fn programs_at(netns: &Netns, interface: &str, hook: TcAttachType) -> Vec<Attached> {
    [tcx_at(netns, interface, hook), filters_at(netns, interface, hook)].concat()
}

/// Returns the name of a hook in commands of `tc`.
pub(crate) fn direction(hook: TcAttachType) -> &'static str {
    match hook {
        TcAttachType::Egress => "egress",
        TcAttachType::Ingress | TcAttachType::Custom(_) => "ingress",
    }
}

/// Reports whether the interface has a clsact qdisc.
#[must_use]
pub fn has_clsact(netns: &Netns, interface: &str) -> bool {
    tc(netns, &["qdisc", "show", "dev", interface]).iter().any(|qdisc| qdisc["kind"] == "clsact")
}

/// Returns the kinds of the interface's qdiscs, sorted.
#[must_use]
pub fn qdisc_kinds(netns: &Netns, interface: &str) -> Vec<String> {
    let qdiscs = tc(netns, &["qdisc", "show", "dev", interface]);
    let mut kinds: Vec<_> =
        qdiscs.iter().filter_map(|qdisc| qdisc["kind"].as_str()).map(str::to_owned).collect();
    kinds.sort();
    kinds
}

/// Reports whether a program is loaded in the kernel, attached or not.
#[must_use]
pub fn program_exists(id: u32) -> bool {
    loaded_programs().flatten().any(|program| program.id() == id)
}

/// Reports whether a map exists in the kernel.
#[must_use]
pub fn map_exists(id: u32) -> bool {
    loaded_maps().flatten().any(|map| map.id() == id)
}

/// Returns the program id of a pinned program.
#[must_use]
pub fn pinned_program(pin: &Path) -> u32 {
    ProgramInfo::from_pin(pin).expect("a pinned program").id()
}

/// Returns the map id of a pinned map.
#[must_use]
pub fn pinned_map(pin: &Path) -> u32 {
    MapInfo::from_pin(pin).expect("a pinned map").id()
}

/// Runs `tc` in a network namespace.
pub fn run_tc(netns: &Netns, args: &[&str]) {
    checked(netns.command("tc").args(args), None);
}

fn tc(netns: &Netns, args: &[&str]) -> Vec<Value> {
    let output = checked(netns.command("tc").arg("-json").args(args), None);
    serde_json::from_str(&output).expect("JSON of tc")
}
