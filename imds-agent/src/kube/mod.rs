//! Pods of this node and namespaces of the cluster, from the API server.
//!
//! [`reflector`] lists and watches them until it is dropped. The [`store`] holds the result, and matches pods with the
//! operator's rules without any I/O. A pod that is not in the index is not exempt.

mod api;
mod api_error;
mod backoff;
pub mod cluster;
mod cluster_client;
mod event_object;
mod namespace;
mod node_labels;
mod object_list;
pub mod pod;
pub mod pod_ref;
pub mod reflector;
mod resource;
pub mod store;
mod taint;
mod watch_state;

pub use self::{
    api_error::ErrorKind,
    backoff::Backoff,
    cluster_client::{ClusterClient, Condition, RequestError},
    event_object::{EventSeries, NewEvent, Regarding},
    namespace::{Namespace, NamespaceEvent, NamespaceIndex},
    node_labels::NodeLabels,
    object_list::ObjectEvent,
    pod::{Pod, PodEvent, StringMap},
    reflector::{Options, PodWatcher, Watcher},
    resource::Resource,
    store::Index,
    watch_state::{Failure, WatchState},
};
