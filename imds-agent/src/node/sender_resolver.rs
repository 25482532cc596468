//! Resolves exempt senders to the identities that the datapath uses: interface indices, netns cookies and cgroup IDs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use tokio::time::Instant;

use super::{
    cgroup,
    link::Link,
    netlink::Netlink,
    netns::{self, NetnsIdentity},
    process::{PROC, Process},
};

/// Depth of the search for processes below a cgroup.
const MAX_DEPTH: usize = 8;
/// Directories with named network namespaces: those of `ip netns` and most container runtimes, and those of Docker.
pub(super) const NAMED: [&str; 2] = ["/run/netns", "/run/docker/netns"];
/// Maximum number of source addresses of one exempt pod, so that one pod can't fill the map of all.
const MAX_ADDRESSES: usize = 1024;

/// Identities by which the datapath recognizes a set of pods.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct IdentitySet {
    /// Indices of the host-side interfaces.
    pub interfaces: BTreeSet<u32>,
    /// Netns cookies of the pods.
    pub cookies: BTreeSet<u64>,
    /// Inode numbers of the network namespaces in `cookies`, by cookie.
    pub namespaces: BTreeMap<u64, u64>,
    /// True if a sender is in the node's network namespace, where a cgroup identifies it.
    pub on_node: bool,
    /// IDs of the pods' cgroups v2.
    pub cgroups: BTreeSet<u64>,
    /// Addresses of the pods, with the index of the host-side interface.
    pub addresses: BTreeSet<(u32, IpAddr)>,
    /// Reasons why the identities are incomplete.
    pub errors: BTreeSet<String>,
    /// One of the network namespaces whose cookie the kernel does not report (before Linux 5.14). Only the socket hook
    /// needs the cookie.
    pub without_cookie: Option<String>,
}

/// Fingerprint of a path, which is cheap to compute and changes when the senders behind the path may have changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fingerprint {
    inodes: BTreeSet<u64>,
    pids: BTreeSet<u32>,
}

/// Open network namespace, which exists at least as long as this handle.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) file: File,
    pub(super) inode: u64,
}

/// Resolves pods on this node. Requires the node's pid namespace, `CAP_SYS_PTRACE` to open the namespaces of other
/// users' processes, and `CAP_SYS_ADMIN` to enter them.
#[derive(Debug)]
pub struct SenderResolver {
    /// Inode number of the node's network namespace.
    pub(super) node: u64,
    /// Identities of the namespaces behind links, by ifindex and namespace ID. The cookie behind a link never changes.
    /// The addresses are read again after [`SenderResolver::refresh`].
    behind: BTreeMap<(u32, i32), NetnsIdentity>,
    /// Keys of `behind` whose addresses were read since the last [`SenderResolver::refresh`].
    fresh: BTreeSet<(u32, i32)>,
}

impl SenderResolver {
    /// Creates a resolver for the node whose network namespace is that of the calling thread.
    pub fn new() -> io::Result<Self> {
        Ok(Self { node: netns::this_inode()?.into(), behind: BTreeMap::new(), fresh: BTreeSet::new() })
    }

    /// Resolves the pods behind these links.
    pub async fn from_links(&mut self, netlink: &Netlink, links: &[&Link]) -> IdentitySet {
        let mut senders = IdentitySet::default();
        let mut unknown = BTreeMap::new();
        for link in links {
            senders.interfaces.insert(link.index);
            let Some(id) = link.peer_netns else { continue };
            match self.behind.get(&(link.index, id)).filter(|_| self.fresh.contains(&(link.index, id))) {
                Some(identity) => senders.add_identity(&link.name, identity, [link.index]),
                None => drop(unknown.insert(id, *link)),
            }
        }
        if unknown.is_empty() {
            return senders;
        }
        for namespace in self.namespaces() {
            let Ok(Some(id)) = netlink.netns_id(&namespace.file).await else { continue };
            let Some(link) = unknown.remove(&id) else { continue };
            match netns::identity_of(&namespace.file) {
                Ok(identity) => {
                    senders.add_identity(&link.name, &identity, [link.index]);
                    // A pod that has only link-local addresses is still being set up.
                    if identity.addresses.iter().any(|address| !is_link_local(*address)) {
                        self.fresh.insert((link.index, id));
                    }
                    self.behind.insert((link.index, id), identity);
                }
                Err(error) => {
                    let name = &link.name;
                    self.add_last_read(&mut senders, link, id);
                    senders.fail(format!("failed to enter the network namespace behind {name}: {error}"));
                }
            }
        }
        for (id, link) in unknown {
            let name = &link.name;
            self.add_last_read(&mut senders, link, id);
            senders.fail(format!(
                "failed to find the network namespace behind {name}: it has no process and no name"
            ));
        }
        senders
    }

    /// Adds the identity that was read last behind a link. An error must not end an exemption.
    fn add_last_read(&self, senders: &mut IdentitySet, link: &Link, id: i32) {
        if let Some(identity) = self.behind.get(&(link.index, id)) {
            senders.add_identity(&link.name, identity, [link.index]);
        }
    }

    /// Lets the next search read the addresses of pods again.
    pub fn refresh(&mut self) {
        self.fresh.clear();
    }

    /// Returns the start of the oldest container process in each of these network namespaces, which are identified as in
    /// [`Link::peer_netns`]. CNI plugins also enter these namespaces, but stay in the mount namespace of process 1.
    pub async fn container_starts(
        &self,
        netlink: &Netlink,
        behind: &BTreeSet<i32>,
    ) -> BTreeMap<i32, Instant> {
        let mounts = |process: &Path| fs::metadata(process.join("ns/mnt")).ok().map(|file| file.ino());
        let node_mounts = mounts(&Path::new(PROC).join("1"));
        let directory = |file: &Path| file.ancestors().nth(2).map(Path::to_owned);
        let is_container = |file: &PathBuf| {
            let inode = directory(file).as_deref().and_then(mounts);
            inode.is_some_and(|inode| Some(inode) != node_mounts)
        };
        let files: Vec<_> = process_namespaces().filter(is_container).collect();
        let mut ids = BTreeMap::new();
        for namespace in self.namespaces_of(files.iter().cloned()) {
            let id = netlink.netns_id(&namespace.file).await.ok().flatten();
            ids.extend(id.filter(|id| behind.contains(id)).map(|id| (namespace.inode, id)));
        }
        let start = |file: &Path| {
            let pid = directory(file)?.file_name()?.to_str()?.parse().ok()?;
            let age = Process::open(pid).ok()??.age().ok()??;
            Instant::now().checked_sub(age)
        };
        let mut starts = BTreeMap::new();
        for file in files {
            let inode = fs::metadata(&file).map(|metadata| metadata.ino());
            if let Some(&id) = inode.ok().and_then(|inode| ids.get(&inode))
                && let Some(start) = start(&file)
            {
                let oldest = starts.entry(id).or_insert(start);
                *oldest = start.min(*oldest);
            }
        }
        starts
    }

    /// Drops the cached identities of all links except these.
    pub fn retain(&mut self, links: &BTreeMap<u32, Link>) {
        let exists =
            |&(index, id): &(u32, i32)| links.get(&index).is_some_and(|link| link.peer_netns == Some(id));
        self.behind.retain(|key, _| exists(key));
        self.fresh.retain(exists);
    }

    /// Resolves the network namespace at `path`. Empty if it does not exist, or is the node's own.
    pub async fn from_netns(&self, netlink: &Netlink, pods: &[&Link], path: &Path) -> IdentitySet {
        let mut senders = IdentitySet::default();
        match Namespace::open(path) {
            Ok(namespace) if namespace.inode == self.node => {
                senders.fail(format!("{} is the node's own network namespace", path.display()));
            }
            Ok(namespace) => drop(senders.add(&namespace, path.display(), netlink, pods).await),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => senders.fail(format!("failed to open {}: {error}", path.display())),
        }
        senders
    }

    /// Resolves the cgroup at `path` and those below: their IDs, and the network namespaces of their processes.
    pub async fn from_cgroup(&self, netlink: &Netlink, pods: &[&Link], path: &Path) -> IdentitySet {
        let mut senders = IdentitySet::default();
        let mut seen = BTreeSet::from([self.node]);
        for directory in directories(path) {
            // Programs can only query the IDs of v2 cgroups.
            if directory.join("cgroup.controllers").exists()
                && let Ok(metadata) = fs::metadata(&directory)
            {
                senders.cgroups.insert(metadata.ino());
            }
            let procs = directory.join("cgroup.procs");
            for pid in pids(&procs) {
                match Self::netns_of(pid, &procs) {
                    Ok(Some(namespace)) if seen.insert(namespace.inode) => {
                        senders.add(&namespace, path.display(), netlink, pods).await;
                    }
                    Ok(Some(namespace)) => senders.on_node |= namespace.inode == self.node,
                    Ok(None) => {}
                    Err(error) => {
                        senders.fail(format!("failed to read the processes in {}: {error}", path.display()));
                    }
                }
            }
        }
        senders
    }

    /// Returns the fingerprint of `path`, which changes when [`SenderResolver::from_netns`] or [`SenderResolver::from_cgroup`] may
    /// find other senders.
    pub fn fingerprint(path: &Path) -> Fingerprint {
        let directories = directories(path);
        let inode = |path: &PathBuf| fs::metadata(path).ok().map(|metadata| metadata.ino());
        Fingerprint {
            inodes: directories.iter().chain([&path.to_owned()]).filter_map(inode).collect(),
            pids: directories.iter().flat_map(|directory| pids(&directory.join("cgroup.procs"))).collect(),
        }
    }

    /// Opens the network namespace of a process that `procs` lists as a member of its cgroup. The PID may be reused
    /// concurrently: if the list contains it before and after, it belonged to the same process throughout.
    pub(super) fn netns_of(pid: u32, procs: &Path) -> io::Result<Option<Namespace>> {
        let Some(process) = Process::open(pid)? else { return Ok(None) };
        let Some(file) = process.netns()? else { return Ok(None) };
        if !pids(procs).contains(&pid) || !process.is_alive()? {
            return Ok(None);
        }
        Namespace::of(file).map(Some)
    }

    /// Opens all named or populated network namespaces except the node's own.
    fn namespaces(&self) -> Vec<Namespace> {
        self.namespaces_of(NAMED.into_iter().flat_map(entries).chain(process_namespaces()))
    }

    fn namespaces_of(&self, paths: impl Iterator<Item = PathBuf>) -> Vec<Namespace> {
        let mut seen = BTreeSet::from([self.node]);
        // A namespace that cannot be opened is reported as missing later.
        let is_new = |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| seen.insert(metadata.ino()));
        paths.filter(is_new).filter_map(|path| Namespace::open(&path).ok()).collect()
    }
}

impl Namespace {
    /// Opens the file at `path`. Does not check that it is a network namespace.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // Open without blocking: a FIFO without a writer would block the agent.
        Self::of(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
    }

    fn of(file: File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }
}

impl IdentitySet {
    /// Adds the identities of `others`.
    pub fn extend(&mut self, others: &Self) {
        self.interfaces.extend(&others.interfaces);
        self.cookies.extend(&others.cookies);
        self.namespaces.extend(&others.namespaces);
        self.on_node |= others.on_node;
        self.cgroups.extend(&others.cgroups);
        self.addresses.extend(&others.addresses);
        self.errors.extend(others.errors.iter().cloned());
        if self.without_cookie.is_none() {
            self.without_cookie.clone_from(&others.without_cookie);
        }
    }

    /// Adds the identities of `namespace`, which belongs to `what`. Returns its namespace ID, if it has one.
    pub(super) async fn add(
        &mut self,
        namespace: &Namespace,
        what: impl Display,
        netlink: &Netlink,
        pods: &[&Link],
    ) -> Option<i32> {
        let identity = match netns::identity_of(&namespace.file) {
            Ok(identity) => identity,
            Err(error) => {
                self.fail(format!("failed to enter the network namespace of {what}: {error}"));
                return None;
            }
        };
        self.add_identity(&what.to_string(), &identity, []);
        // The open file keeps the namespace and its ID from being reused. A namespace without an ID has no link: its
        // pod uses macvlan, or is not connected yet.
        let id = netlink.netns_id(&namespace.file).await.unwrap_or_else(|error| {
            self.fail(format!("failed to find the links of {what}: {:#}", anyhow::Error::from(error)));
            None
        })?;
        let links = pods.iter().filter(|link| link.peer_netns == Some(id)).map(|link| link.index);
        self.interfaces.extend(links.clone());
        self.add_identity(&what.to_string(), &identity, links);
        Some(id)
    }

    fn add_identity(&mut self, what: &str, identity: &NetnsIdentity, links: impl IntoIterator<Item = u32>) {
        if identity.addresses.len() > MAX_ADDRESSES {
            self.fail(format!(
                "{what} has {} addresses: only packets from {MAX_ADDRESSES} of them are exempt",
                identity.addresses.len()
            ));
        }
        for index in links {
            let addresses = identity.addresses.iter().take(MAX_ADDRESSES);
            self.addresses.extend(addresses.map(|&address| (index, address)));
        }
        match identity.cookie {
            Some(cookie) => {
                self.cookies.insert(cookie);
                self.namespaces.insert(cookie, identity.inode);
            }
            None => drop(self.without_cookie.get_or_insert_with(|| what.to_owned())),
        }
    }

    pub(crate) fn fail(&mut self, failure: impl Into<String>) {
        self.errors.insert(failure.into());
    }
}

/// Returns the cgroups that `path` matches in any hierarchy, and those below.
fn directories(path: &Path) -> Vec<PathBuf> {
    let hierarchies = cgroup::root().ok().flatten().into_iter().chain(cgroup::v1_roots().unwrap_or_default());
    // `join` returns an absolute `path` unchanged.
    let roots: BTreeSet<_> = hierarchies
        .map(|hierarchy| hierarchy.join(path))
        .filter(|root| root.join("cgroup.procs").exists())
        .collect();
    roots.iter().flat_map(|root| below(root)).collect()
}

/// Returns the cgroup at `root` and those below.
pub(super) fn below(root: &Path) -> Vec<PathBuf> {
    let (mut directories, mut level) = (vec![root.to_owned()], vec![root.to_owned()]);
    for _ in 0..MAX_DEPTH {
        // A cgroup that was removed in the meantime has no children.
        level = level.iter().flat_map(|path| cgroup::children(path).unwrap_or_default()).collect();
        directories.extend(level.iter().cloned());
    }
    directories
}

/// Reports whether an address is valid on one link only.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Returns the network namespace files of all processes.
pub(super) fn process_namespaces() -> impl Iterator<Item = PathBuf> {
    let processes = entries(PROC).filter(|path| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.iter().all(u8::is_ascii_digit)
    });
    processes.map(|path| path.join("ns/net"))
}

pub(super) fn entries(directory: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Returns the PIDs in a `cgroup.procs` file. Empty for a removed cgroup, and for a threaded one, whose processes
/// belong to its parent.
pub(super) fn pids(procs: &Path) -> Vec<u32> {
    let text = fs::read_to_string(procs).unwrap_or_default();
    // Processes of another pid namespace are listed as 0.
    text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()
}
