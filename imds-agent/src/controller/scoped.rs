//! Listeners of scoped exemptions and of explained denials, which are open in the network namespaces of pods while the broker serves them.
//!
//! A listener is in the map only while the broker serves it. The agent keeps no copy of its descriptor, so that it ends with the
//! broker. A listener keeps its network namespace alive, so that it is closed once no process and no name refers to the namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use imds_broker::protocol::{Outcome, Request, ToBroker};
use imds_ebpf_common::{
    ExemptionKey,
    redirect::{HTTP_PORT, MAX_LISTENERS},
};
use tokio::time::Instant;

use super::{
    broker::{Broker, channel},
    explained::ExplainedPods,
    scoped_rules::{DesiredListener, DesiredListeners},
};
use crate::{
    datapath::maps::redirect_maps::RedirectKey,
    node::{
        namespace_paths::{inode_at, paths_of},
        netns,
    },
    telemetry::{agent_stats::BrokerStats, http_request::RequestEvent},
};

/// Interval at which the agent checks that the network namespaces of listeners are in use.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Delay before the agent tries again to open a listener.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Delay for a pod without IPv6, which most likely never gets it.
const IPV6_RETRY_DELAY: Duration = Duration::from_secs(30);
/// Delay for a listener that only explains denials, if the namespace has probably ended or the pod uses all ports.
const EXPLAINED_RETRY_DELAY: Duration = Duration::from_secs(10);

/// Listeners, and the broker that serves them.
pub(super) struct ScopedState {
    /// `None` without a supervisor, as with `run --once`.
    pub(super) broker: Option<Broker>,
    /// Listeners that should be open: `of_rules`, and those of `explained`.
    pub(super) desired: DesiredListeners,
    pub(super) of_rules: DesiredListeners,
    pub(super) explained: ExplainedPods,
    /// Exemptions of network namespaces.
    pub(super) exempt: BTreeSet<ExemptionKey>,
    /// Listeners that the broker has or was asked to serve, by the number in its messages.
    pub(super) open: BTreeMap<u32, OpenListener>,
    /// Listeners to which the programs redirect.
    pub(super) active: BTreeMap<RedirectKey, u32>,
    last_id: u32,
    /// Listeners that could not be opened: time of the next attempt, and the error unless it is harmless.
    pub(super) failed: BTreeMap<RedirectKey, (Instant, Option<String>)>,
    pub(super) checked: Instant,
    /// Process id of the broker, and its cgroup if that is one of a hostNetwork pod.
    pub(super) cgroup: Option<(u32, Option<u64>)>,
    stats: BrokerStats,
    /// Requests that telemetry has not taken yet.
    pub(super) requests: Vec<RequestEvent>,
}

/// Listener that the broker has, or was asked to serve.
pub(super) struct OpenListener {
    pub(super) redirect: RedirectKey,
    pub(super) port: u16,
    /// A file by which the network namespace was found.
    reference: PathBuf,
    pub(super) desired: DesiredListener,
}

impl ScopedState {
    pub(super) fn new() -> Self {
        Self {
            broker: None,
            desired: DesiredListeners::new(),
            of_rules: DesiredListeners::new(),
            explained: ExplainedPods::default(),
            exempt: BTreeSet::new(),
            open: BTreeMap::new(),
            active: BTreeMap::new(),
            last_id: 0,
            failed: BTreeMap::new(),
            checked: Instant::now(),
            cgroup: None,
            stats: BrokerStats::default(),
            requests: Vec::new(),
        }
    }

    /// Returns the reasons why rules with `allow` are not applied completely, or why denials are not explained, by the number of the
    /// rule.
    pub(super) fn errors(&self) -> BTreeMap<u32, String> {
        let mut errors = BTreeMap::new();
        for (number, (redirect, listener)) in self.desired.iter().enumerate() {
            let error = if let Some(error) = self.broker.as_ref().and_then(|broker| broker.error.as_ref()) {
                if listener.explains() { error.clone() } else { format!("{error}: the pods are denied") }
            } else if number >= MAX_LISTENERS {
                format!("more than {MAX_LISTENERS} listeners are needed: some pods are denied")
            } else if let Some((_, Some(error))) = self.failed.get(redirect) {
                error.clone()
            } else {
                continue;
            };
            errors.entry(listener.rule).or_insert(error);
        }
        errors
    }

    pub(super) fn stats(&self) -> BrokerStats {
        BrokerStats { restarts: self.broker.as_ref().map_or(0, |broker| broker.restarts), ..self.stats }
    }

    /// Reports whether the broker has to reach endpoints: a rule allows requests.
    pub(super) fn needs_endpoints(&self) -> bool {
        !self.of_rules.is_empty()
    }

    /// Returns the number of the newest listener for each key.
    pub(super) fn newest(&self) -> BTreeMap<RedirectKey, u32> {
        self.open.iter().map(|(&id, open)| (open.redirect, id)).collect()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.broker.as_ref().is_some_and(Broker::is_ready)
    }

    pub(super) fn send(&mut self, message: ToBroker, listener: Option<OwnedFd>) {
        if let Some(broker) = &mut self.broker {
            broker.send(message, listener);
        }
    }

    /// Opens a listener in the network namespace at `path`, and asks the broker to serve it.
    fn listen(&mut self, redirect: RedirectKey, desired: &DesiredListener, path: &Path) -> io::Result<()> {
        let (cookie, endpoint) = redirect;
        let id = self.last_id.wrapping_add(1);
        let message = ToBroker::Listen {
            id,
            endpoint: SocketAddr::new(endpoint, HTTP_PORT),
            provider: desired.provider.to_owned(),
            allow: desired.allow.iter().cloned().collect(),
        };
        if !channel::fits(&message) {
            return Err(io::Error::other("the lists of allowed requests are too long together"));
        }
        // The namespace may have ended since its path was found.
        let Some((listener, port)) = netns::listen_in(&File::open(path)?, cookie, endpoint)? else {
            return Ok(());
        };
        self.last_id = id;
        self.send(message, Some(listener));
        let open = OpenListener { redirect, port, reference: path.to_owned(), desired: desired.clone() };
        self.open.insert(id, open);
        Ok(())
    }

    /// Opens the listeners that are missing.
    pub(super) fn open_missing(&mut self) {
        let now = Instant::now();
        let newest = self.newest();
        let is_open = |redirect: &RedirectKey, desired: &DesiredListener| {
            let open = newest.get(redirect).and_then(|id| self.open.get(id));
            open.is_some_and(|open| open.desired.serves(desired))
        };
        let may_open = |redirect: &RedirectKey| self.failed.get(redirect).is_none_or(|(at, _)| *at <= now);
        let missing: Vec<_> = self
            .desired
            .iter()
            .take(MAX_LISTENERS)
            .filter(|(redirect, desired)| may_open(redirect) && !is_open(redirect, desired))
            .map(|(redirect, desired)| (*redirect, desired.clone()))
            .collect();
        if missing.is_empty() {
            return;
        }
        let paths = paths_of(&missing.iter().map(|(_, desired)| desired.inode).collect());
        for (redirect, desired) in missing {
            // A namespace without a process or name is about to end.
            let Some(path) = paths.get(&desired.inode) else {
                let delay = if desired.explains() { EXPLAINED_RETRY_DELAY } else { RETRY_DELAY };
                self.failed.insert(redirect, (now + delay, None));
                continue;
            };
            match self.listen(redirect, &desired, path) {
                Ok(()) => drop(self.failed.remove(&redirect)),
                Err(error) => drop(self.failed.insert(redirect, failure(redirect, &desired, &error))),
            }
        }
    }

    /// Returns the listeners whose network namespace has neither a process nor a name any more.
    pub(super) fn ended(&mut self) -> Vec<u32> {
        let has_moved = |open: &OpenListener| inode_at(&open.reference) != Some(open.desired.inode);
        let moved: BTreeSet<_> =
            self.open.values().filter(|open| has_moved(open)).map(|open| open.desired.inode).collect();
        if moved.is_empty() {
            return Vec::new();
        }
        let paths = paths_of(&moved);
        let mut ended = Vec::new();
        for (&id, open) in &mut self.open {
            match paths.get(&open.desired.inode) {
                Some(path) => open.reference.clone_from(path),
                None if moved.contains(&open.desired.inode) => ended.push(id),
                None => {}
            }
        }
        ended
    }

    /// Counts a request, and those that the broker did not report before it.
    pub(super) fn count_request(&mut self, Request { outcome, suppressed, .. }: &Request) {
        let requests = suppressed.saturating_add(1);
        let counter = match outcome {
            Outcome::Allowed => &mut self.stats.allowed,
            Outcome::Refused => &mut self.stats.refused,
            Outcome::Failed => &mut self.stats.failed,
        };
        *counter = counter.saturating_add(requests);
    }
}

impl DesiredListener {
    /// Reports whether a listener for `self` allows nothing that one for `other` does not allow.
    pub(super) fn is_within(&self, other: &Self) -> bool {
        (self.inode, self.provider) == (other.inode, other.provider) && self.allow.is_subset(&other.allow)
    }

    /// Reports whether a listener for `self` can stay as it is for `other`.
    pub(super) fn serves(&self, other: &Self) -> bool {
        (self.inode, self.provider, &self.allow) == (other.inode, other.provider, &other.allow)
    }
}

/// Returns the time of the next attempt to open a listener, and the error unless it is harmless.
pub(super) fn failure(
    (_, endpoint): RedirectKey,
    desired: &DesiredListener,
    error: &io::Error,
) -> (Instant, Option<String>) {
    // Without IPv6, a pod cannot send to the endpoint either.
    let has_no_ipv6 = matches!(endpoint, IpAddr::V6(_))
        && matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT));
    if has_no_ipv6 {
        return (Instant::now() + IPV6_RETRY_DELAY, None);
    }
    let text = format!("failed to listen in the network namespace of a pod, which is denied: {error}");
    if desired.explains() {
        // A denied pod can use all its ports, and must not degrade the node by that.
        log::debug!("{text}");
        return (Instant::now() + EXPLAINED_RETRY_DELAY, None);
    }
    (Instant::now() + RETRY_DELAY, Some(text))
}
