//! Scoped exemptions and explained denials: the listeners to which the socket hook redirects denied connections of pods.

use crate::endpoint::{Service, TCP};

/// Largest number of listeners: one for each pod with a scoped exemption or an explained denial, and each endpoint.
pub const MAX_LISTENERS: usize = 1024;

/// Service at an endpoint whose connections are redirected.
pub const REDIRECTED_SERVICE: Service = Service::new(TCP, HTTP_PORT);

/// Port of [`REDIRECTED_SERVICE`].
pub const HTTP_PORT: u16 = 80;

/// Listener on the loopback address of a pod's network namespace. The key contains the netns cookie and the endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RedirectRecord {
    /// Port of the listener, in host byte order; never 0.
    pub port: u32,
    /// Number of the exemption rule in the configuration, from 1: the first one that matches the pod. [`RedirectRecord::EXPLAINS`]
    /// without a rule.
    pub rule: u32,
    /// Number of the rules whose lists of allowed requests the listener merges.
    pub rules: u32,
    /// Explicit padding, always written as 0.
    pub reserved: u32,
}

impl RedirectRecord {
    /// [`RedirectRecord::rule`] of a listener that allows no request, and only explains the denial: its connections count as denied.
    pub const EXPLAINS: u32 = 0;
}

/// Address of a listener, by which getpeername(2) programs find the endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ListenerKey {
    /// Cookie of the network namespace of the listener.
    pub cookie: u64,
    /// Port of the listener, in host byte order.
    pub port: u32,
    /// IP version of the loopback address: [`ListenerKey::V4`] or [`ListenerKey::V6`].
    pub version: u32,
}

impl ListenerKey {
    /// The listener is at 127.0.0.1, which IPv6 sockets reach as `::ffff:127.0.0.1`.
    pub const V4: u32 = 4;
    /// The listener is at `::1`.
    pub const V6: u32 = 6;
}

const _: () = assert!(size_of::<RedirectRecord>() == 16);
const _: () = assert!(size_of::<ListenerKey>() == 16);
