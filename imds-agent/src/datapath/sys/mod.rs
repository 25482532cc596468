//! System calls and kernel settings.

pub mod bpf;
pub(crate) mod rcu;
