//! Code shared by the BPF programs and user space of imds-agent: the layouts of the maps, the names of the pinned
//! objects, the packet parser and the verdict.
//!
//! This crate is compiled into the BPF object and into host tests, so that tests on the host check the code that runs in
//! the kernel.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod address;
pub mod allow_list;
pub mod cgroup;
pub mod endpoint;
pub mod event;
pub mod event_log;
pub mod exemption;
pub mod filter;
pub mod flow;
pub mod link_layer;
pub mod maps;
pub mod names;
pub mod opaque;
pub mod packet;
pub mod policy;
pub mod policy_lookup;
pub mod redirect;
pub mod reply;
pub mod request;
pub mod verdict;

pub use address::Address;
pub use allow_list::{AllowedKind, AllowedProcess};
pub use cgroup::CgroupRecord;
pub use endpoint::{Endpoint, IMDS_IPV4, Service};
pub use event::Event;
pub use exemption::{ExemptionKey, ExemptionRecord, ProbeRecord, Subject, SubjectKind, apply_exemption};
pub use filter::PolicyFilter;
pub use flow::Flow;
pub use link_layer::{IpOffset, LinkLayer, is_vlan};
pub use maps::{
    AttachMode, ConfigRecord, Counter, CounterKey, InterfaceRecord, KubernetesRecord, OwnPackets, PodRecord,
    Policy, ProviderRecord, Role,
};
pub use packet::{
    NoHeader, PASSED_HASH, Packet, find_header, flow, is_unrelated_fast, is_unrelated_frame, service,
};
pub use policy::{DenyAction, DenyErrno, Hook, Mode, TcHook, TcHookSet, Verdict};
pub use policy_lookup::{InMemoryPolicy, PolicyLookup};
pub use redirect::{ListenerKey, RedirectRecord};
pub use request::RequestStart;
pub use verdict::{EndpointMatch, by_mode, classify, classify_address, classify_slow, lookup_endpoint};
