//! Typed access to the pinned maps.

pub mod config_record;
pub mod counters;
pub mod denial_records;
pub mod endpoint_maps;
pub mod exemption_maps;
pub mod interface_records;
pub mod node_allow_map;
pub mod pinned_maps;
pub mod pod_names;
pub(crate) mod policy;
pub mod recent_events;
pub mod redirect_maps;
pub(crate) mod request_log;
