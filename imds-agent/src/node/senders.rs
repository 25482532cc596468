//! From what an operator knows a pod by to what the datapath does: indices of links, cookies of network namespaces, and
//! ids of cgroups.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    cgroup,
    links::Link,
    netlink::Netlink,
    netns::{self, NetnsIdentity},
    process::{PROC, Process},
};

/// How deep below a cgroup processes are looked for.
const MAX_DEPTH: usize = 8;
/// Where network namespaces have names: by `ip netns` and the container runtimes, and by Docker.
const NAMED: [&str; 2] = ["/run/netns", "/run/docker/netns"];
/// Maximum number of source addresses of one exempt pod, so that one pod can't fill the map of all.
const MAX_ADDRESSES: usize = 1024;

/// What the datapath knows some pods by.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Senders {
    /// Indices of the node's ends of their links.
    pub interfaces: BTreeSet<u32>,
    /// Cookies of their network namespaces.
    pub cookies: BTreeSet<u64>,
    /// Ids of their cgroups v2.
    pub cgroups: BTreeSet<u64>,
    /// Addresses of the pods, by the index of the host-side interface.
    pub addresses: BTreeMap<u32, BTreeSet<IpAddr>>,
    /// Why some of this is not known.
    pub failures: BTreeSet<String>,
    /// One of them whose network namespace has no cookie to tell, as before Linux 5.14: only sockets are judged by it.
    pub without_cookie: Option<String>,
}

/// What is cheap to ask of a path by which pods are known.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Trace {
    inodes: BTreeSet<u64>,
    pids: BTreeSet<u32>,
}

/// A network namespace, which is there for as long as this is.
#[derive(Debug)]
pub(super) struct Namespace {
    file: File,
    pub(super) inode: u64,
}

/// Finds pods on this node. It takes the node's pid namespace, `CAP_SYS_PTRACE` to open the namespaces of processes of
/// other users, and `CAP_SYS_ADMIN` to enter them.
#[derive(Debug)]
pub struct Finder {
    /// Inode number of the node's network namespace.
    pub(super) node: u64,
    /// Identities of the namespaces behind links, by index and the namespace's id. The cookie of a link never changes; its
    /// addresses are read again after [`Finder::refresh`].
    behind: BTreeMap<(u32, i32), NetnsIdentity>,
}

impl Finder {
    /// A finder for the node whose network namespace is the calling thread's.
    pub fn new() -> io::Result<Self> {
        Ok(Self { node: netns::this_inode()?.into(), behind: BTreeMap::new() })
    }

    /// Those whose links these are.
    pub async fn behind(&mut self, netlink: &Netlink, links: &[&Link]) -> Senders {
        let mut senders = Senders::default();
        let mut unknown = BTreeMap::new();
        for link in links {
            senders.interfaces.insert(link.index);
            let Some(id) = link.peer_netns else { continue };
            match self.behind.get(&(link.index, id)) {
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
                    // A pod that has none but link-local addresses is still being set up.
                    if identity.addresses.iter().any(|address| !is_link_local(*address)) {
                        self.behind.insert((link.index, id), identity);
                    }
                }
                Err(error) => {
                    senders.fail(format!("can't enter the network namespace behind {}: {error}", link.name));
                }
            }
        }
        for link in unknown.into_values() {
            let name = &link.name;
            senders.fail(format!(
                "can't find the network namespace behind {name}: no process and no name leads there"
            ));
        }
        senders
    }

    /// Reads the addresses of pods again at the next search.
    pub fn refresh(&mut self) {
        self.behind.clear();
    }

    /// Ids of the network namespaces in which containers run, as [`Link::peer_netns`] has them. CNI plugins enter them too,
    /// but stay in the mount namespace of the first process.
    pub async fn inhabited(&self, netlink: &Netlink) -> BTreeSet<i32> {
        let mut ids = BTreeSet::new();
        let mounts = |process: &Path| fs::metadata(process.join("ns/mnt")).ok().map(|file| file.ino());
        let of_node = mounts(&Path::new(PROC).join("1"));
        let is_container = |file: &PathBuf| {
            let process = file.parent().and_then(Path::parent);
            process.and_then(mounts).is_some_and(|inode| Some(inode) != of_node)
        };
        for namespace in self.namespaces_of(process_namespaces().filter(is_container)) {
            ids.extend(netlink.netns_id(&namespace.file).await.ok().flatten());
        }
        ids
    }

    /// Forgets all links but these.
    pub fn keep(&mut self, links: &BTreeMap<u32, Link>) {
        self.behind
            .retain(|(index, id), _| links.get(index).is_some_and(|link| link.peer_netns == Some(*id)));
    }

    /// Those in the network namespace at `path`; nobody where there is none, or the node's own.
    pub async fn in_netns(&self, netlink: &Netlink, pods: &[&Link], path: &Path) -> Senders {
        let mut senders = Senders::default();
        match Namespace::open(path) {
            Ok(namespace) if namespace.inode == self.node => {
                senders.fail(format!("{} is the node's own network namespace", path.display()));
            }
            Ok(namespace) => drop(senders.add(&namespace, path.display(), netlink, pods).await),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => senders.fail(format!("can't open {}: {error}", path.display())),
        }
        senders
    }

    /// Those that have processes in the cgroup at `path` or below, and these cgroups.
    pub async fn in_cgroup(&self, netlink: &Netlink, pods: &[&Link], path: &Path) -> Senders {
        let mut senders = Senders::default();
        let mut seen = BTreeSet::from([self.node]);
        for directory in directories(path) {
            // Only those of v2 have ids that the programs can ask for.
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
                    Ok(_) => {}
                    Err(error) => {
                        senders.fail(format!("can't look at the processes in {}: {error}", path.display()));
                    }
                }
            }
        }
        senders
    }

    /// What changes with what [`Finder::in_netns`] and [`Finder::in_cgroup`] find at `path`.
    #[must_use]
    pub fn trace(path: &Path) -> Trace {
        let directories = directories(path);
        let inode = |path: &PathBuf| fs::metadata(path).ok().map(|metadata| metadata.ino());
        Trace {
            inodes: directories.iter().chain([&path.to_owned()]).filter_map(inode).collect(),
            pids: directories.iter().flat_map(|directory| pids(&directory.join("cgroup.procs"))).collect(),
        }
    }

    /// The network namespace of a process of which `procs` says that it is in that cgroup. Its number may become
    /// another's: if it is there before and after, it was all the time.
    pub(super) fn netns_of(pid: u32, procs: &Path) -> io::Result<Option<Namespace>> {
        let Some(process) = Process::open(pid)? else { return Ok(None) };
        let Some(file) = process.netns()? else { return Ok(None) };
        if !pids(procs).contains(&pid) || !process.is_alive()? {
            return Ok(None);
        }
        Namespace::of(file).map(Some)
    }

    /// All but the node's own that a name or a process leads to.
    fn namespaces(&self) -> Vec<Namespace> {
        self.namespaces_of(NAMED.into_iter().flat_map(entries).chain(process_namespaces()))
    }

    fn namespaces_of(&self, paths: impl Iterator<Item = PathBuf>) -> Vec<Namespace> {
        let mut seen = BTreeSet::from([self.node]);
        // What can't be opened is missing in the end, which is said there.
        let is_new = |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| seen.insert(metadata.ino()));
        paths.filter(is_new).filter_map(|path| Namespace::open(&path).ok()).collect()
    }
}

impl Namespace {
    /// Opens the file at `path`, which may be none of a namespace.
    fn open(path: &Path) -> io::Result<Self> {
        // Without blocking: a pipe that nobody writes to would hold the agent.
        Self::of(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
    }

    fn of(file: File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }
}

impl Senders {
    /// Takes in those of `others`.
    pub fn extend(&mut self, others: &Self) {
        self.interfaces.extend(&others.interfaces);
        self.cookies.extend(&others.cookies);
        self.cgroups.extend(&others.cgroups);
        for (index, addresses) in &others.addresses {
            self.addresses.entry(*index).or_default().extend(addresses);
        }
        self.failures.extend(others.failures.iter().cloned());
        if self.without_cookie.is_none() {
            self.without_cookie.clone_from(&others.without_cookie);
        }
    }

    /// Adds what is in `namespace`, which is that of `what`. Returns its id, where it has one.
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
                self.fail(format!("can't enter the network namespace of {what}: {error}"));
                return None;
            }
        };
        self.add_identity(&what.to_string(), &identity, []);
        // As long as the file is open the namespace is there, and its id no other's. Where it has none no link leads
        // there: it is reached by macvlan, or not yet at all.
        let id = netlink.netns_id(&namespace.file).await.unwrap_or_else(|error| {
            self.fail(format!("can't find the links of {what}: {:#}", anyhow::Error::from(error)));
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
            self.addresses.entry(index).or_default().extend(addresses);
        }
        match identity.cookie {
            Some(cookie) => drop(self.cookies.insert(cookie)),
            None => drop(self.without_cookie.get_or_insert_with(|| what.to_owned())),
        }
    }

    pub(crate) fn fail(&mut self, failure: impl Into<String>) {
        self.failures.insert(failure.into());
    }
}

/// The cgroups that `path` means, and those below them.
fn directories(path: &Path) -> Vec<PathBuf> {
    let roots = cgroup::root().ok().flatten().into_iter().chain(cgroup::v1_roots().unwrap_or_default());
    // Of an absolute path joining leaves that.
    let tops: BTreeSet<_> =
        roots.map(|root| root.join(path)).filter(|top| top.join("cgroup.procs").exists()).collect();
    tops.iter().flat_map(|top| below(top)).collect()
}

/// The cgroup at `top` and those below it.
pub(super) fn below(top: &Path) -> Vec<PathBuf> {
    let (mut directories, mut level) = (vec![top.to_owned()], vec![top.to_owned()]);
    for _ in 0..MAX_DEPTH {
        // What is gone meanwhile has none.
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

/// Files of the network namespaces of all processes.
fn process_namespaces() -> impl Iterator<Item = PathBuf> {
    let processes = entries(PROC).filter(|path| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.iter().all(u8::is_ascii_digit)
    });
    processes.map(|path| path.join("ns/net"))
}

fn entries(directory: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// None of a cgroup that is gone, or that is a threaded one: its processes are its parent's.
pub(super) fn pids(procs: &Path) -> Vec<u32> {
    let text = fs::read_to_string(procs).unwrap_or_default();
    // Those of another pid namespace are 0.
    text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()
}
