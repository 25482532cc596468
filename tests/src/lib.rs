//! A node, its pods and a metadata service, built from network namespaces.
//!
//! [`TestEnv`] is the topology, [`Agent`] is imds-agent on its node, [`probe`] and [`flood`] are actions of pods.
//! Environments share no state: they run in parallel in one process and in several, and touch no interface of the
//! machine itself. Dropping an environment removes it, also during a panic. A new process removes the remains of killed
//! ones.
//!
//! The functions of this test harness panic on failure.
#![expect(clippy::missing_panics_doc, reason = "every function here panics where a test would")]
#![expect(clippy::must_use_candidate, reason = "a probe is often sent for its packets alone")]

pub mod api_server;
pub mod certificate;
pub mod cgroup;
pub mod cni;
pub mod daemon_set;
pub mod doctor;
pub mod executable;
pub mod flood;
pub mod foreign_bpf;
pub mod hook;
pub mod http;
pub mod kubelet;
pub mod measure;
pub mod netns;
pub mod packets;
pub mod poll;
pub mod probe;
pub mod program;
pub mod program_policy;
pub mod promql;
pub mod routing;
pub mod seccomp;
pub mod stability;
pub mod status;

mod agent;
mod asserts;
mod config_file;
mod documents;
mod env;
mod layout;
mod machine;
mod netkit;
mod netlink_request;
mod open_connection;
mod packet_socket;
mod pins;
mod pod;
mod received_packets;
mod scale;
mod services;
mod skip;
mod source;
mod stop_flag;
mod team;
mod test_cluster;
mod tun;
mod tx_ring;
mod vectors;

pub use agent::{Agent, AgentCommand, AttachMode, output};
pub use asserts::with_each_backend;
pub use cgroup::{Cgroup, MemoryLimit};
pub use cni::{CniNetwork, CniPod};
pub use config_file::ConfigFile;
pub use env::{DNS_ALLOWED, METADATA, METADATA_V6, SERVICE, SERVICE_V6, TestEnv};
pub use layout::{Layout, Nic};
pub use machine::{DEBIAN_ROOT, Machine};
pub use netkit::{NetkitMode, add_pair, skip_without_netkit};
pub use netns::Netns;
pub use open_connection::OpenConnection;
pub use packet_socket::PacketSocket;
pub use pod::{Pod, PodLink};
pub use received_packets::ReceivedPackets;
pub use scale::{SCALE, scaled};
pub use services::{DNS_PORT, Services};
pub use skip::{
    SKIPPED, WHOLE_TEST, known_here, lacks_device, lacks_netns_cookie, lacks_program, lacks_tc_netns_cookie,
    skip, skip_unless_disposable, skip_without_netns_cookie, skip_without_tcx,
};
pub use source::Source;
pub use status::{Problem, Status};
pub use stop_flag::StopFlag;
pub use team::skip_without_team;
pub use test_cluster::TestCluster;
pub use tun::{TunMode, open_tun, set_hardware_type};
pub use tx_ring::TxRing;
pub use vectors::AttackVectors;
