//! Kubernetes Events about denied pods.
//!
//! The telemetry thread records denials in a [`DeniedPods`], which aggregates them. The [`writer`] takes from it what the
//! rate limits allow, and sends it to the API server from another thread.

mod denied_pods;
mod event_queue;
mod writer;

pub(crate) use self::{
    denied_pods::{DeniedPods, EventWrites},
    writer::{EndpointNames, write_events},
};
