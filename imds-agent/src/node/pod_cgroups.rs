//! Cgroups that the kubelet creates for pods, and the pods to which they belong.

use std::{
    fs, iter,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{cgroup, kubepods, sandbox};

/// Names of the kubelet's cgroups for the classes of quality of service other than Guaranteed.
const QOS: [&str; 2] = ["burstable", "besteffort"];
/// Length of the UID of a static pod, which is a hash in hexadecimal digits. Other UIDs also have hyphens.
const MIN_UID_LEN: usize = 32;

/// Cgroups of the kubelet (`kubepods`) in all hierarchies.
#[derive(Clone, Debug, Default)]
pub struct KubepodsCgroups {
    /// Cgroups of the kubelet in each hierarchy, v2 first. A hierarchy has several if the kubelet had other settings
    /// before.
    hierarchies: Vec<Hierarchy>,
}

/// Cgroups of the kubelet in one hierarchy.
#[derive(Clone, Debug)]
struct Hierarchy {
    /// Owner of the hierarchy's root cgroup. On each node that the agent can protect, this is the user root.
    owner: u32,
    roots: Vec<PathBuf>,
}

impl KubepodsCgroups {
    /// Searches the kubelet's cgroups again.
    pub fn rescan(&mut self) {
        let v2 = cgroup::root().ok().flatten();
        // Each process is in a cgroup of every v1 hierarchy, so one of them suffices. The hierarchy that the kubelet
        // uses on a hybrid host depends on its driver.
        let v1 = cgroup::v1_roots().unwrap_or_default();
        let v1 = v1.iter().filter_map(|root| Hierarchy::rescan(root)).find(|found| !found.roots.is_empty());
        self.hierarchies = v2.and_then(|root| Hierarchy::rescan(&root)).into_iter().chain(v1).collect();
    }

    /// Reports whether a new search is due: no cgroup of the kubelet was found, or one was removed since.
    pub fn is_stale(&self) -> bool {
        let mut roots = self.hierarchies.iter().flat_map(|hierarchy| &hierarchy.roots).peekable();
        roots.peek().is_none() || roots.any(|root| !root.exists())
    }

    /// Returns the cgroups of the pod with this UID in their names: one in each hierarchy, v2 first. Ignores cgroups
    /// that a pod created below its own, because it could name them after another pod.
    pub fn of_pod(&self, uid: &str) -> Vec<PathBuf> {
        self.hierarchies.iter().flat_map(|hierarchy| hierarchy.of_pod(uid)).collect()
    }

    /// Returns the populated cgroups that have this UID in their names, if one hierarchy has more than one. Only one of
    /// them can be the pod's. A container that may create cgroups can have created the others.
    pub fn ambiguous(&self, uid: &str) -> Option<Vec<PathBuf>> {
        self.hierarchies.iter().find_map(|hierarchy| {
            let mut cgroups = hierarchy.of_pod(uid);
            if cgroups.len() > 1 {
                cgroups.retain(|cgroup| sandbox::is_populated(std::slice::from_ref(cgroup)));
            }
            (cgroups.len() > 1).then_some(cgroups)
        })
    }
}

impl Hierarchy {
    /// Searches below `root`, and returns only cgroups whose ancestors all belong to the owner of the root. A user with
    /// a delegated cgroup may give any name to the cgroups below it.
    fn rescan(root: &Path) -> Option<Self> {
        let owner = fs::metadata(root).ok()?.uid();
        let is_owned = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.uid() == owner);
        let is_kubelets = |cgroup: &PathBuf| {
            cgroup.ancestors().take_while(|ancestor| ancestor.starts_with(root)).all(is_owned)
        };
        let roots = kubepods::below(root).unwrap_or_default().into_iter().filter(is_kubelets).collect();
        Some(Self { owner, roots })
    }

    fn of_pod(&self, uid: &str) -> Vec<PathBuf> {
        // The UID is untrusted input from the API server, and becomes part of a path.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if uid.is_empty() || !uid.bytes().all(is_plain) {
            return Vec::new();
        }
        let mut cgroups = Vec::new();
        for root in &self.roots {
            let of_qos = QOS.into_iter().filter_map(|qos| child(root, qos, self.owner));
            let parents = iter::once(root.clone()).chain(of_qos);
            cgroups.extend(parents.filter_map(|parent| child(&parent, &format!("pod{uid}"), self.owner)));
        }
        cgroups
    }
}

/// Returns the child cgroup of `parent` with the name that the kubelet gives it, unless it has another owner, because
/// the owner of a delegated subtree may choose any names. The name of a systemd slice starts with that of its parent,
/// and its own part contains no hyphens.
fn child(parent: &Path, name: &str, owner: u32) -> Option<PathBuf> {
    let path = match parent.file_name()?.to_str()?.strip_suffix(".slice") {
        Some(stem) => parent.join(format!("{stem}-{}.slice", name.replace('-', "_"))),
        None => parent.join(name),
    };
    fs::metadata(&path).is_ok_and(|found| found.is_dir() && found.uid() == owner).then_some(path)
}

/// Reports whether a process of any pod is visible in the pid namespace of the caller.
pub fn are_processes_visible() -> bool {
    let mut cgroups = KubepodsCgroups::default();
    cgroups.rescan();
    cgroups.hierarchies.iter().any(|hierarchy| sandbox::is_populated(&hierarchy.roots))
}

/// Reports whether the name is that of a pod's cgroup: `pod<uid>`, or `kubepods-burstable-pod<uid>.slice`.
pub fn is_pod(name: &str) -> bool {
    let last = name.strip_suffix(".slice").map_or(Some(name), |stem| stem.rsplit('-').next());
    let uid = last.and_then(|last| last.strip_prefix("pod"));
    let is_plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'_';
    uid.is_some_and(|uid| uid.len() >= MIN_UID_LEN && uid.bytes().all(is_plain))
}

/// Returns the container ID in the name of a container's cgroup: `cri-containerd-<id>.scope`, `crio-<id>.scope` or
/// `<id>`.
pub fn container(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".scope").unwrap_or(name);
    let id = stem.rsplit('-').next().unwrap_or(stem);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";
    const SLICED: &str = "a3c1b0de_1f2e_4d3c_8b4a_5f6e7d8c9b0a";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";
    const ID: &str = "1f0e6d2c9b8a7f6e5d4c3b2a19080706f5e4d3c2b1a09f8e7d6c5b4a39281706";

    #[test]
    fn pods_of_every_driver_and_qos_class() {
        let root = tempfile::tempdir().unwrap();
        for path in [
            format!("kubepods/pod{UID}/{ID}"),
            format!("kubepods/burstable/pod{STATIC}"),
            format!("kubelet/kubepods/besteffort/podx/pod{ID}"),
            format!("kubepods.slice/kubepods-pod{SLICED}.slice/cri-containerd-{ID}.scope"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{STATIC}.slice"
            ),
            // Not pods: name of a wrong parent, wrong level, no UID.
            "kubepods.slice/kubepods-burstable.slice/kubepods-podz.slice".to_owned(),
            "kubepods/burstable/burstable/podz".to_owned(),
            "kubepods/pod".to_owned(),
            "kubepods/podz.slice".to_owned(),
            "system.slice/podz".to_owned(),
        ] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let tree = KubepodsCgroups { hierarchies: vec![Hierarchy::rescan(root.path()).unwrap()] };
        assert_eq!(tree.hierarchies[0].roots.len(), 4);
        let counts = [UID, STATIC, "x", "z", ID, "", "x/../podx"].map(|uid| tree.of_pod(uid).len());
        assert_eq!(counts, [2, 2, 1, 0, 0, 0, 0]);
        assert!(!tree.is_stale());
        fs::remove_dir_all(root.path().join("kubepods")).unwrap();
        assert!(tree.is_stale() && KubepodsCgroups::default().is_stale());
    }

    #[test]
    fn delegated_cgroups_are_ignored() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: only root can give a directory to another user");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let own = |path: &str| std::os::unix::fs::chown(root.path().join(path), Some(1000), None).unwrap();
        for path in ["user.slice/user@1000.service/kubepods/podx", "kubepods/podx", "kubepods/burstable/podx"]
        {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let count = || Hierarchy::rescan(root.path()).unwrap().of_pod("x").len();
        assert_eq!(count(), 3);
        // A cgroup of root below a delegated one is ignored like the delegated one.
        own("user.slice/user@1000.service");
        assert_eq!(count(), 2);
        own("kubepods/burstable/podx");
        assert_eq!(count(), 1);
        own("kubepods");
        assert_eq!(count(), 0);
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
