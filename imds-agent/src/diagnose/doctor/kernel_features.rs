//! Checks of kernel features, tried with system calls where possible.

use std::{fs, io, net::UdpSocket};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_helper_supported, is_map_supported},
};
use aya_obj::generated::bpf_func_id;
use imds_ebpf_common::TcHook;
use nix::sys::utsname::uname;

use super::doctor_report::DoctorCheck;
use crate::{
    datapath::{attach::clsact, pin::dir::AttachPoint, sys::bpf},
    diagnose::preflight,
    node::{
        netlink::{Netlink, NetlinkError},
        netns::{self, Namespace, OwnNetns},
    },
};

const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Index of loopback in every network namespace.
const LOOPBACK: u32 = 1;
const AS_ROOT: &str = "run `imds-agent doctor` as root, or with the agent's capabilities";

pub(crate) fn release() -> DoctorCheck {
    const NAME: &str = "kernel";
    let release = uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_else(|_| "(unknown)".to_owned());
    match preflight::check_kernel() {
        Ok(()) => DoctorCheck::ok(NAME, release),
        Err(error) => DoctorCheck::missing(NAME, release, chain(error)),
    }
}

pub(crate) fn btf() -> DoctorCheck {
    const NAME: &str = "btf";
    if fs::exists(BTF).unwrap_or(false) {
        return DoctorCheck::ok(NAME, BTF);
    }
    let consequence =
        "bpftool may print maps without field names: use a kernel with CONFIG_DEBUG_INFO_BTF, or mount /sys";
    DoctorCheck::degraded(NAME, format!("no {BTF}"), consequence)
}

pub(crate) fn jit() -> DoctorCheck {
    const NAME: &str = "jit";
    match bpf::load_noop_program().and_then(bpf::is_compiled) {
        Ok(true) => DoctorCheck::ok(NAME, "programs are compiled"),
        Ok(false) => {
            let remedy =
                "each packet costs several times as much CPU time: run `sysctl net.core.bpf_jit_enable=1`";
            DoctorCheck::degraded(NAME, "programs are interpreted", remedy)
        }
        Err(error) => unknown(NAME, &error),
    }
}

/// Checks the attach modes: queries TCX, and tries a clsact filter in a new network namespace.
pub(crate) fn attaching() -> DoctorCheck {
    const NAME: &str = "attaching";
    let filters = try_filter();
    match (bpf::has_tcx(), filters) {
        (true, Ok(())) => DoctorCheck::ok(NAME, "TCX and clsact filters"),
        (true, Err(error)) => DoctorCheck::ok(NAME, format!("TCX; no clsact filters ({error})")),
        (false, Ok(())) => {
            let consequence = "a filter at priority 1 that is not a BPF filter runs before the agent's program; with TCX \
                               (Linux 6.6) the agent's program always runs first";
            DoctorCheck::degraded(NAME, "clsact filters; no TCX", consequence)
        }
        (false, Err(error)) => {
            let remedy =
                "use a kernel with TCX (Linux 6.6), or with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF";
            DoctorCheck::missing(NAME, format!("no TCX and no clsact filters ({error})"), remedy)
        }
    }
}

fn try_filter() -> Result<(), String> {
    let program = bpf::load_noop_program().map_err(|error| error.to_string())?;
    let attach = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| NetlinkError::new("failed to start a runtime", error))?;
        runtime.block_on(async {
            let netlink = Netlink::connect()?;
            clsact::ensure_qdisc(&netlink, LOOPBACK).await?;
            let point = AttachPoint { ifindex: LOOPBACK, hook: TcHook::FromPod };
            clsact::attach_first(&netlink, point, std::os::fd::AsFd::as_fd(&program), "doctor").await
        })
    };
    let namespace =
        Namespace::new().map_err(|error| format!("failed to create a network namespace: {error}"))?;
    let attached = namespace.run(attach).map_err(|error| error.to_string())?;
    attached.map_err(chain)
}

/// Checks `SO_NETNS_COOKIE` (Linux 5.14), with which the socket hooks identify a network namespace.
pub(crate) fn netns_cookie() -> DoctorCheck {
    const NAME: &str = "netns_cookie";
    match netns::identity() {
        Ok(Some(OwnNetns::Cookie(cookie))) => {
            DoctorCheck::ok(NAME, format!("SO_NETNS_COOKIE supported; cookie of this namespace: {cookie}"))
        }
        Ok(Some(OwnNetns::Initial)) => {
            let consequence = "the hooks socket and host_network work only in the initial network namespace, which this is; the \
                               socket hook also denies exempt pods: if there are any, set hooks.socket = false";
            DoctorCheck::degraded(NAME, "SO_NETNS_COOKIE not supported (needs Linux 5.14)", consequence)
        }
        Ok(None) => {
            let remedy = "the hooks socket, host_network and node_allow are not enforced here, from_pod and node_egress are; run \
                          the agent in the machine's initial network namespace and pid namespace, or set hooks.socket = false";
            DoctorCheck::missing(
                NAME,
                "SO_NETNS_COOKIE not supported (needs Linux 5.14), and this is not the initial network namespace",
                remedy,
            )
        }
        Err(error) => unknown(NAME, &error),
    }
}

/// Checks `bpf_get_netns_cookie` in TC programs (Linux 6.13), and names the traffic that is not denied without it.
pub(crate) fn netns_cookie_tc() -> DoctorCheck {
    const NAME: &str = "netns_cookie_tc";
    let consequence = "node_egress cannot read the network namespace of a packet's socket. A packet with a socket and without an \
                       ingress interface counts as the node's. Not denied are therefore frames that a macvlan or ipvlan pod crafts \
                       (raw and packet sockets) and packets of its open connections; the socket hook denies its connect and sendmsg \
                       calls. A packet with a socket and an ingress interface that is neither a pod's nor a bridge also counts as \
                       the node's, because it passed an earlier egress hook. Not denied is therefore a pod's packet that enters by \
                       an excluded interface, or by a veth pair inside the node's namespace. Linux 6.13 and newer deny all of these";
    cookie_in(NAME, ProgramType::SchedClassifier, consequence)
}

/// Checks `bpf_get_netns_cookie` in `cgroup_skb` programs (Linux 6.15).
pub(crate) fn netns_cookie_cgroup_skb() -> DoctorCheck {
    const NAME: &str = "netns_cookie_cgroup_skb";
    let consequence = "before Linux 6.15, host_network also denies packets of other pods, before from_pod counts them, and \
                        node.allow restricts calls but not packets";
    cookie_in(NAME, ProgramType::CgroupSkb, consequence)
}

fn cookie_in(name: &'static str, program_type: ProgramType, consequence: &str) -> DoctorCheck {
    match is_helper_supported(program_type, bpf_func_id::BPF_FUNC_get_netns_cookie) {
        Ok(true) => DoctorCheck::ok(name, "bpf_get_netns_cookie available"),
        Ok(false) => DoctorCheck::degraded(
            name,
            "bpf_get_netns_cookie not available for this program type",
            consequence,
        ),
        Err(error) => unknown(name, &preflight::errno_of(error)),
    }
}

pub(crate) fn ring_buffer() -> DoctorCheck {
    const NAME: &str = "ring_buffer";
    match is_map_supported(MapType::RingBuf) {
        Ok(true) => DoctorCheck::ok(NAME, "supported"),
        Ok(false) => DoctorCheck::missing(
            NAME,
            "not supported",
            "use Linux 5.8 or newer: the programs emit events to it",
        ),
        Err(error) => unknown(NAME, &error.io_error),
    }
}

pub(crate) fn ipv6() -> DoctorCheck {
    const NAME: &str = "ipv6";
    match UdpSocket::bind("[::]:0") {
        Ok(_) => DoctorCheck::ok(NAME, "enabled"),
        Err(error) => DoctorCheck::ok(NAME, format!("disabled: no IPv6 traffic to deny ({error})")),
    }
}

fn unknown(name: &'static str, error: &io::Error) -> DoctorCheck {
    DoctorCheck::degraded(name, format!("unknown: {error}"), AS_ROOT)
}

/// Formats an error with its causes on one line.
fn chain(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}
