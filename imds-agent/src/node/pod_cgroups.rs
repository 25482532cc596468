//! The cgroups that a kubelet makes for pods: which is whose.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{cgroup, kubepods};

/// The kubelet's parts of the cgroup hierarchies.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Where they start, those of v2 first; more than one in a hierarchy when the kubelet had other settings before.
    tops: Vec<PathBuf>,
}

impl Tree {
    /// Looks for where they start.
    pub fn search(&mut self) {
        self.tops = cgroup::root().ok().flatten().map(|root| tops(&root)).unwrap_or_default();
        // Each process is in a cgroup of every hierarchy, so that one will do. Which of them the kubelet uses on a hybrid
        // host depends on its driver.
        let v1 = cgroup::v1_roots().unwrap_or_default();
        self.tops.extend(v1.iter().map(|root| tops(root)).find(|tops| !tops.is_empty()).unwrap_or_default());
    }

    /// Whether there is none, or one that was found is gone.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.tops.is_empty() || self.tops.iter().any(|top| !top.exists())
    }

    /// The pods that have cgroups, by the id in their names: of each one cgroup in each hierarchy, v2 first.
    #[must_use]
    pub fn pods(&self) -> BTreeMap<String, Vec<PathBuf>> {
        let mut pods: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for top in &self.tops {
            let Ok(owner) = fs::metadata(top).map(|metadata| metadata.uid()) else { continue };
            let mut unseen = vec![(top.clone(), Level::Top)];
            while let Some((path, level)) = unseen.pop() {
                let parent = name(&path).unwrap_or_default().to_owned();
                for child in owned(&path, owner) {
                    match name(&child).and_then(|name| level.below(&parent, name)) {
                        // What a pod makes of its own is not looked at: it could name it after another pod.
                        Some(Level::Pod(uid)) => pods.entry(uid).or_default().push(child),
                        Some(level) => unseen.push((child, level)),
                        None => {}
                    }
                }
            }
        }
        pods
    }
}

fn tops(root: &Path) -> Vec<PathBuf> {
    kubepods::below(root).unwrap_or_default().into_iter().collect()
}

/// The cgroups right below `path`, but those of another owner: whom a subtree was delegated to may call a cgroup anything.
fn owned(path: &Path, owner: u32) -> impl Iterator<Item = PathBuf> {
    let children = cgroup::children(path).unwrap_or_default();
    children.into_iter().filter(move |path| fs::metadata(path).is_ok_and(|metadata| metadata.uid() == owner))
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The id in the name of a container's cgroup: `cri-containerd-<id>.scope`, `crio-<id>.scope` or `<id>`.
#[must_use]
pub fn container(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".scope").unwrap_or(name);
    let id = stem.rsplit('-').next().unwrap_or(stem);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

/// What a directory is to the kubelet.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Level {
    /// The top of its part.
    Top,
    /// For the pods of one quality of service.
    Qos,
    /// A pod.
    Pod(String),
}

impl Level {
    /// What `name` is in a directory of this level that is called `parent`.
    fn below(&self, parent: &str, name: &str) -> Option<Self> {
        let own = own_part(parent, name)?;
        match (self, own.strip_prefix("pod")) {
            (Self::Top | Self::Qos, Some(uid)) => pod_uid(uid).map(Self::Pod),
            (Self::Top, None) if matches!(own, "burstable" | "besteffort") => Some(Self::Qos),
            (_, _) => None,
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

/// The id of a pod as it is everywhere else: systemd has no hyphen for it.
fn pod_uid(name: &str) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (!name.is_empty() && name.bytes().all(is_plain)).then(|| name.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";
    const SLICED: &str = "a3c1b0de_1f2e_4d3c_8b4a_5f6e7d8c9b0a";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";
    const ID: &str = "1f0e6d2c9b8a7f6e5d4c3b2a19080706f5e4d3c2b1a09f8e7d6c5b4a39281706";

    #[test]
    fn pods_of_every_driver_and_quality_of_service() {
        let root = tempfile::tempdir().unwrap();
        for path in [
            format!("kubepods/pod{UID}/{ID}"),
            format!("kubepods/burstable/pod{STATIC}"),
            format!("kubelet/kubepods/besteffort/podx/pod{ID}"),
            format!("kubepods.slice/kubepods-pod{SLICED}.slice/cri-containerd-{ID}.scope"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{STATIC}.slice"
            ),
            // None of a pod: a wrong parent's name, another level, no name.
            "kubepods.slice/kubepods-burstable.slice/kubepods-podz.slice".to_owned(),
            "kubepods/burstable/burstable/podz".to_owned(),
            "kubepods/pod".to_owned(),
            "kubepods/podz.slice".to_owned(),
            "system.slice/podz".to_owned(),
        ] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let tree = Tree { tops: tops(root.path()) };
        assert_eq!(tree.tops.len(), 4);
        let found = tree.pods();
        let counts: Vec<_> = found.iter().map(|(uid, paths)| (uid.as_str(), paths.len())).collect();
        assert_eq!(counts, [(STATIC, 2), (UID, 2), ("x", 1)]);
        assert!(!tree.is_stale());
        fs::remove_dir_all(root.path().join("kubepods")).unwrap();
        assert!(tree.is_stale() && Tree::default().is_stale());
    }

    #[test]
    fn containers_of_every_runtime() {
        for name in [
            ID.to_owned(),
            format!("cri-containerd-{ID}.scope"),
            format!("crio-{ID}.scope"),
            format!("docker-{ID}.scope"),
        ] {
            assert_eq!(container(&name).as_deref(), Some(ID), "{name}");
        }
        for name in ["", "init.scope", "crio-conmon-0", &ID[1..], &format!("{ID}0")] {
            assert_eq!(container(name), None, "{name}");
        }
    }
}
