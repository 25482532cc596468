//! What the BPF programs and user space of imds-agent share: the layout of the maps, the names of everything
//! that is pinned, and every decision that can be made without I/O.
//!
//! The same code is compiled into the BPF object and into host tests, so that a packet gets the same verdict from
//! both.
#![no_std]

pub mod endpoint;
pub mod maps;
pub mod names;
pub mod packet;
pub mod verdict;

pub use endpoint::IMDS_IPV4;
pub use maps::{Backend, Counter, CounterKey, InterfaceRecord, Policy, Role};
pub use packet::{Frame, Packet};
pub use verdict::{Edge, Hook, Mode, Verdict, judge, judge_ipv4, judge_ipv6};
