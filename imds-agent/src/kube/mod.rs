//! Pods of this node, from the API server.
//!
//! [`watch`] lists and watches them until it is dropped. The [`index`] holds the result, and matches pods with the
//! operator's rules without any I/O. A pod that is not in the index is not exempt.

pub mod index;
pub mod pod;
pub mod watch;

mod api;
mod backoff;
mod state;
mod taint;

pub use self::{
    api::ErrorKind,
    backoff::{Attempts, Backoff},
    index::Index,
    pod::Pod,
    state::{Failure, WatchState},
    taint::{NodeTaints, TaintError},
    watch::{Options, PodEvent, PodWatcher},
};
