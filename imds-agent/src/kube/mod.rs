//! The pods of this node, as the API server tells of them.
//!
//! [`watch`] follows them and never ends; what it hears goes into the [`index`], which says without any I/O whom the
//! operator's rules mean. What neither has heard of is not exempt.

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
    watch::{Options, PodEvent, Watch},
};
