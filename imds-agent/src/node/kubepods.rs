//! The kubelet's part of the cgroup hierarchies: which directory is which pod's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// How deep below the root of a hierarchy the kubelet's part can be.
const MAX_DEPTH: usize = 6;

/// The cgroup hierarchies of a machine, v2 first.
#[derive(Clone, Debug)]
pub struct Tree {
    hierarchies: Vec<Hierarchy>,
}

#[derive(Clone, Debug)]
struct Hierarchy {
    path: PathBuf,
    is_v2: bool,
    owner: u32,
    /// Where the kubelet's part starts; more than one when it was started with other settings before.
    roots: Vec<PathBuf>,
}

/// The cgroups of a pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PodCgroups {
    /// Its directories, those of v2 first.
    pub paths: Vec<PathBuf>,
    /// Ids of its cgroups v2: their inode numbers.
    pub ids: Vec<u64>,
}

impl Tree {
    /// The hierarchies that are mounted at `directory` (pure v2) or right below it (v1, hybrid).
    pub fn open(directory: &Path) -> io::Result<Self> {
        let mut hierarchies = Vec::new();
        if let Some(hierarchy) = Hierarchy::open(directory) {
            hierarchies.push(hierarchy);
        } else {
            // `cpu` may be a link to `cpu,cpuacct`.
            let mut seen = BTreeSet::new();
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                let is_new = |metadata: fs::Metadata| seen.insert((metadata.dev(), metadata.ino()));
                if fs::metadata(&path).is_ok_and(is_new) {
                    hierarchies.extend(Hierarchy::open(&path));
                }
            }
        }
        hierarchies.sort_by_key(|hierarchy| (!hierarchy.is_v2, hierarchy.path.clone()));
        let mut tree = Self { hierarchies };
        tree.find_roots();
        Ok(tree)
    }

    /// Looks anew for where the kubelet's part starts.
    pub fn find_roots(&mut self) {
        for hierarchy in &mut self.hierarchies {
            hierarchy.find_roots();
        }
    }

    /// The same, if it is not where it was.
    pub(super) fn find_roots_if_stale(&mut self) {
        let mut roots = self.hierarchies.iter().flat_map(|hierarchy| &hierarchy.roots).peekable();
        if roots.peek().is_none() || roots.any(|root| !root.exists()) {
            self.find_roots();
        }
    }

    /// The pods that have cgroups now, by the id in their names.
    pub fn pods(&mut self) -> BTreeMap<String, PodCgroups> {
        self.find_roots_if_stale();
        let mut pods: BTreeMap<String, PodCgroups> = BTreeMap::new();
        for hierarchy in &self.hierarchies {
            for (path, level) in hierarchy.kubelets() {
                let Level::Pod(uid) = level else { continue };
                let pod = pods.entry(uid).or_default();
                if hierarchy.is_v2
                    && let Ok(metadata) = fs::metadata(&path)
                {
                    pod.ids.push(metadata.ino());
                }
                pod.paths.push(path);
            }
        }
        pods
    }

    /// The directories in one of the hierarchies in which a new pod or container shows, and whether it is only the
    /// kubelet's part as a whole that could show there.
    pub(super) fn telling(&self) -> Vec<(PathBuf, bool)> {
        let Some(hierarchy) = self.hierarchies.iter().find(|hierarchy| !hierarchy.roots.is_empty()) else {
            // The kubelet has made none yet: it does so at the top, or a level below.
            let tops = self.hierarchies.iter().flat_map(|hierarchy| {
                let below = hierarchy.children(&hierarchy.path).map(|(path, _)| path);
                below.chain([hierarchy.path.clone()]).collect::<Vec<_>>()
            });
            return tops.map(|path| (path, true)).collect();
        };
        let mut telling = Vec::new();
        for root in &hierarchy.roots {
            let above = root.ancestors().skip(1).take_while(|path| path.starts_with(&hierarchy.path));
            telling.extend(above.map(|path| (path.to_owned(), true)));
        }
        for (path, level) in hierarchy.kubelets() {
            if let Level::Pod(_) = level {
                telling.extend(hierarchy.children(&path).map(|(container, _)| (container, false)));
            }
            telling.push((path, false));
        }
        telling
    }
}

/// The pod, and the container in it, to which a cgroup belongs: `path` is from the root of a hierarchy.
#[must_use]
pub fn identify(path: &Path) -> Option<(String, Option<String>)> {
    let (mut level, mut parent) = (Level::Outside, "");
    for name in path.iter().map(|name| name.to_str().unwrap_or_default()).filter(|&name| name != "/") {
        if let Level::Pod(uid) = level {
            return Some((uid, container(name)));
        }
        level = level.below(parent, name)?;
        parent = name;
    }
    if let Level::Pod(uid) = level { Some((uid, None)) } else { None }
}

/// The id in the name of a container's cgroup: `cri-containerd-<id>.scope`, `crio-<id>.scope` or `<id>`.
fn container(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".scope").unwrap_or(name);
    let id = stem.rsplit('-').next().unwrap_or(stem);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

impl Hierarchy {
    fn open(path: &Path) -> Option<Self> {
        if !path.join("cgroup.procs").exists() {
            return None;
        }
        Some(Self {
            path: path.to_owned(),
            is_v2: path.join("cgroup.controllers").exists(),
            owner: fs::metadata(path).ok()?.uid(),
            roots: Vec::new(),
        })
    }

    fn find_roots(&mut self) {
        let (mut roots, mut level) = (Vec::new(), vec![self.path.clone()]);
        for _ in 0..MAX_DEPTH {
            let mut next = Vec::new();
            for (path, name) in level.iter().flat_map(|path| self.children(path)) {
                match Level::Outside.below("", &name) {
                    Some(Level::Root) => roots.push(path),
                    _ => next.push(path),
                }
            }
            level = next;
        }
        self.roots = roots;
    }

    /// The kubelet's directories down to those of the pods. What a pod makes of its own is not looked at: it could name
    /// it after another pod.
    fn kubelets(&self) -> Vec<(PathBuf, Level)> {
        let mut found: Vec<_> = self.roots.iter().map(|root| (root.clone(), Level::Root)).collect();
        let mut at = 0;
        while let Some((path, level)) = found.get(at).cloned() {
            at += 1;
            if let Level::Pod(_) = level {
                continue;
            }
            let parent = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let below = self.children(&path);
            found.extend(below.filter_map(|(path, name)| Some((path, level.below(parent, &name)?))));
        }
        found
    }

    /// The cgroups right below `path`, but those whose owner is not the root's: whom a subtree was delegated to may call
    /// a cgroup anything.
    fn children(&self, path: &Path) -> impl Iterator<Item = (PathBuf, String)> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let name = entry.file_name().into_string().ok().filter(|_| is_directory)?;
            let is_owners = entry.metadata().is_ok_and(|metadata| metadata.uid() == self.owner);
            is_owners.then(|| (entry.path(), name))
        })
    }
}

/// What a directory is to the kubelet.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Level {
    /// Nothing, or something that contains its part.
    Outside,
    /// The top of its part.
    Root,
    /// For the pods of one quality of service.
    Qos,
    /// A pod.
    Pod(String),
}

impl Level {
    /// What `name` is in a directory of this level that is called `parent`.
    fn below(&self, parent: &str, name: &str) -> Option<Self> {
        match self {
            Self::Outside => {
                let is_slice = name.strip_suffix(".slice").is_some_and(|stem| is_last_part(stem, "kubepods"));
                Some(if name == "kubepods" || is_slice { Self::Root } else { Self::Outside })
            }
            Self::Root | Self::Qos => {
                let own = own_part(parent, name)?;
                match own.strip_prefix("pod") {
                    Some(uid) => pod_uid(uid).map(Self::Pod),
                    None if *self == Self::Root && matches!(own, "burstable" | "besteffort") => {
                        Some(Self::Qos)
                    }
                    None => None,
                }
            }
            Self::Pod(_) => None,
        }
    }
}

/// What a name says besides its parent's. The name of a systemd slice starts with its parent's and a hyphen.
fn own_part<'a>(parent: &str, name: &'a str) -> Option<&'a str> {
    match name.strip_suffix(".slice") {
        Some(stem) => stem.strip_prefix(parent.strip_suffix(".slice")?)?.strip_prefix('-'),
        None => Some(name),
    }
}

fn is_last_part(stem: &str, part: &str) -> bool {
    stem.rsplit('-').next() == Some(part)
}

/// The id of a pod as it is everywhere else: systemd has no hyphen for it.
fn pod_uid(name: &str) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (!name.is_empty() && name.bytes().all(is_plain)).then(|| name.replace('_', "-"))
}

#[cfg(test)]
mod tests;
