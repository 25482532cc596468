use std::os::unix::fs::{chown, symlink};

use super::*;

const UID: &str = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";
const OTHER: &str = "00000000-0000-4000-8000-000000000000";
const STATIC: &str = "0123456789abcdef0123456789abcdef";
const ID: &str = "1111111111111111111111111111111111111111111111111111111111111111";

/// Directories that look like a hierarchy.
fn hierarchy(at: &Path, is_v2: bool, cgroups: &[&str]) {
    for cgroup in [""].iter().chain(cgroups) {
        let path = at.join(cgroup);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("cgroup.procs"), "").unwrap();
        if is_v2 {
            fs::write(path.join("cgroup.controllers"), "").unwrap();
        }
    }
}

fn pods(at: &Path) -> BTreeMap<String, PodCgroups> {
    Tree::open(at).unwrap().pods()
}

#[test]
fn a_cgroup_is_told_by_its_path() {
    let uid = UID.replace('-', "_");
    let systemd = format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice");
    let guaranteed = format!("/kubepods.slice/kubepods-pod{uid}.slice");
    let nested = format!(
        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{uid}.slice"
    );
    let plain = format!("/kubepods/burstable/pod{UID}");
    for path in [
        &systemd,
        &guaranteed,
        &nested,
        &plain,
        &format!("/kubelet/kubepods/pod{UID}"),
        &plain[1..].to_owned(),
    ] {
        assert_eq!(identify(Path::new(path)), Some((UID.to_owned(), None)), "{path}");
    }
    for container in ["cri-containerd-X.scope", "crio-X.scope", "docker-X.scope", "X", "X/init/deeper"] {
        let container = container.replace('X', ID);
        let path = format!("{systemd}/{container}");
        assert_eq!(identify(Path::new(&path)), Some((UID.to_owned(), Some(ID.to_owned()))), "{path}");
    }
    assert_eq!(identify(Path::new(&format!("{plain}/x"))), Some((UID.to_owned(), None)));
    let of_static = format!("/kubepods/pod{STATIC}/{ID}");
    assert_eq!(identify(Path::new(&of_static)), Some((STATIC.to_owned(), Some(ID.to_owned()))));
    for none in [
        "/",
        "/kubepods",
        "/kubepods.slice/kubepods-burstable.slice",
        "/system.slice/kubelet.service",
        "/kubepods/burstable/pod",
        "/kubepods/burstable/burstable/podx",
        "/kubepods.slice/besteffort-podx.slice",
        "/notkubepods/podx",
    ] {
        assert_eq!(identify(Path::new(none)), None, "{none}");
    }
    let impostor = format!("{plain}/{ID}/kubepods/pod{OTHER}");
    assert_eq!(identify(Path::new(&impostor)).unwrap().0, UID);
}

#[test]
fn pods_of_each_driver_and_version() {
    let uid = UID.replace('-', "_");
    let systemd = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice");
    let cgroupfs = format!("kubepods/besteffort/pod{UID}");
    let kind = format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{uid}.slice");
    for cgroup in [&systemd, &cgroupfs, &kind, &format!("a/b/c/{cgroupfs}")] {
        let v2 = tempfile::tempdir().unwrap();
        hierarchy(v2.path(), true, &[cgroup, "system.slice/x.service"]);
        let path = v2.path().join(cgroup);
        let expected = PodCgroups { ids: vec![fs::metadata(&path).unwrap().ino()], paths: vec![path] };
        assert_eq!(pods(v2.path()), BTreeMap::from([(UID.to_owned(), expected)]));

        let v1 = tempfile::tempdir().unwrap();
        hierarchy(&v1.path().join("cpu,cpuacct"), false, &[cgroup]);
        hierarchy(&v1.path().join("pids"), false, &[cgroup]);
        symlink("cpu,cpuacct", v1.path().join("cpu")).unwrap();
        assert_eq!((pods(v1.path())[UID].paths.len(), pods(v1.path())[UID].ids.len()), (2, 0));

        hierarchy(&v1.path().join("unified"), true, &[cgroup]);
        let hybrid = &pods(v1.path())[UID];
        assert_eq!((hybrid.paths.len(), hybrid.ids.len()), (3, 1));
        assert!(hybrid.paths[0].starts_with(v1.path().join("unified")));
    }
}

#[test]
fn pods_come_and_go_and_so_does_the_kubelets_part() {
    let root = tempfile::tempdir().unwrap();
    hierarchy(root.path(), true, &["system.slice"]);
    let mut tree = Tree::open(root.path()).unwrap();
    assert!(tree.pods().is_empty());
    for part in ["kubepods", "kubelet/kubepods"] {
        hierarchy(
            root.path(),
            true,
            &[&format!("{part}/pod{UID}"), &format!("{part}/burstable/pod{STATIC}")],
        );
        assert_eq!(tree.pods().keys().collect::<Vec<_>>(), [STATIC, UID]);
        fs::remove_dir_all(root.path().join(part).join(format!("pod{UID}"))).unwrap();
        assert_eq!(tree.pods().keys().collect::<Vec<_>>(), [STATIC]);
        fs::remove_dir_all(root.path().join(part)).unwrap();
        assert!(tree.pods().is_empty());
    }
}

#[test]
fn nobody_can_pose_as_a_pod() {
    let root = tempfile::tempdir().unwrap();
    let in_pod = format!("kubepods/pod{UID}/{ID}/kubepods/pod{OTHER}");
    let right_in_pod = format!("kubepods/pod{UID}/pod{OTHER}");
    let delegated = "user.slice/user-1000.slice/user@1000.service";
    let by_user = format!("{delegated}/kubepods/pod{OTHER}");
    hierarchy(root.path(), true, &[&in_pod, &right_in_pod, &by_user]);
    assert!(pods(root.path()).contains_key(OTHER), "found while the user is the same");
    chown(root.path().join(delegated), Some(1000), None).unwrap();
    assert_eq!(pods(root.path()).keys().collect::<Vec<_>>(), [UID]);
}
