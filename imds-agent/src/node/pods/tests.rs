use std::io::Write as _;

use imds_ebpf_common::Frame;

use super::*;

const UID: &str = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";

/// A procfs and a cgroup v2 hierarchy made of ordinary files.
struct Fake {
    root: tempfile::TempDir,
}

impl Fake {
    fn new() -> Self {
        let fake = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir_all(fake.proc()).unwrap();
        fs::create_dir_all(fake.cgroup("")).unwrap();
        for file in ["cgroup.procs", "cgroup.controllers"] {
            fs::write(fake.cgroup(file), "").unwrap();
        }
        for netns in ["node", "pod", "other"] {
            fs::write(fake.netns(netns), "").unwrap();
        }
        fake
    }

    fn proc(&self) -> PathBuf {
        self.root.path().join("proc")
    }

    fn cgroup(&self, name: &str) -> PathBuf {
        self.root.path().join("cgroup").join(name)
    }

    fn netns(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn inode(&self, netns: &str) -> u64 {
        fs::metadata(self.netns(netns)).unwrap().ino()
    }

    fn process(&self, pid: u32, state: &str, started: u64, netns: &str) {
        let directory = self.proc().join(pid.to_string());
        fs::create_dir_all(directory.join("ns")).unwrap();
        let zeros = "0 ".repeat(18);
        fs::write(directory.join("stat"), format!("{pid} (x) {state} {zeros}{started} 0\n")).unwrap();
        fs::hard_link(self.netns(netns), directory.join("ns/net")).unwrap();
    }

    fn container(&self, name: &str, pids: &[u32]) -> PathBuf {
        let path = self.cgroup(&format!("kubepods/burstable/pod{UID}/{name}"));
        fs::create_dir_all(&path).unwrap();
        let lines: Vec<_> = pids.iter().map(ToString::to_string).collect();
        fs::write(path.join("cgroup.procs"), lines.join("\n")).unwrap();
        path
    }

    fn find(&self, host_network: bool) -> Option<Result<Found, ResolveError>> {
        let wanted = [Wanted { cgroup_uid: UID.to_owned(), host_network }];
        let resolver = Resolver::for_node(&self.proc(), &self.cgroup(""), self.inode("node"));
        resolver.unwrap().find(&wanted).pop().map(|(_, found)| found)
    }

    /// The namespace that a pod is found to be in.
    fn netns_of(&self, host_network: bool) -> Option<u64> {
        self.find(host_network)
            .map(|found| found.unwrap().netns.map_or(self.inode("node"), |(_, inode)| inode))
    }
}

#[test]
fn a_pod_is_in_the_namespace_of_its_oldest_process() {
    let fake = Fake::new();
    assert!(fake.find(false).is_none());
    let pod = fake.container("", &[]);
    assert!(fake.find(false).is_none());
    fake.container("c0/nested", &[12, 11]);
    assert!(fake.find(false).is_none(), "no such process");
    fake.process(11, "S", 500, "other");
    fake.process(12, "S", 400, "pod");
    assert_eq!(fake.netns_of(false), Some(fake.inode("pod")));
    let found = fake.find(false).unwrap().unwrap();
    assert_eq!(found.cgroup_ids, [fs::metadata(pod).unwrap().ino()]);
}

#[test]
fn what_is_not_yet_where_it_will_be_is_not_found() {
    let fake = Fake::new();
    fake.container("c0", &[11]);
    fake.process(11, "S", 400, "node");
    assert!(fake.find(false).is_none(), "the runtime's own, or not in its namespace yet");
    assert_eq!(fake.netns_of(true), Some(fake.inode("node")));
    fake.container("c1", &[12]);
    fake.process(12, "S", 500, "pod");
    assert_eq!(fake.netns_of(false), Some(fake.inode("pod")));
}

#[test]
fn what_has_ended_does_not_count() {
    let fake = Fake::new();
    fake.container("c0", &[11, 12, 13]);
    fake.process(11, "Z", 300, "other");
    fake.process(12, "S", 400, "other");
    fs::remove_file(fake.proc().join("12/ns/net")).unwrap();
    fake.process(13, "S", 500, "pod");
    assert_eq!(fake.netns_of(false), Some(fake.inode("pod")));
}

#[test]
fn what_is_not_seen_is_said() {
    let fake = Fake::new();
    fake.container("c0", &[0]);
    assert!(matches!(fake.find(false), Some(Err(ResolveError::Hidden { .. }))));
    fake.container("c1", &[11]);
    fs::create_dir_all(fake.proc().join("11/stat")).unwrap();
    assert!(matches!(fake.find(false), Some(Err(ResolveError::Processes { .. }))));
}

#[test]
fn a_process_that_left_the_cgroup_says_nothing_of_it() {
    let fake = Fake::new();
    let container = fake.container("c0", &[11]);
    fake.process(11, "S", 400, "other");
    let read = pids(&container.join("cgroup.procs"));
    assert_eq!(members(&fake.cgroup("kubepods")).keys().copied().collect::<Vec<_>>(), read);
    // The process goes between the two looks at the file: who reads the pipe in its place sees the end of it only once
    // there is another file.
    let procs = container.join("cgroup.procs");
    fs::remove_file(&procs).unwrap();
    nix::unistd::mkfifo(&procs, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let writer = std::thread::spawn(move || {
        let mut pipe = File::options().write(true).open(&procs).unwrap();
        pipe.write_all(b"11\n").unwrap();
        fs::remove_file(&procs).unwrap();
        fs::write(&procs, "").unwrap();
    });
    assert!(fake.find(false).is_none());
    writer.join().unwrap();
}

#[test]
fn only_pairs_lead_into_a_namespace() {
    let link = |index, kind, peer_netns| Link {
        index,
        name: format!("l{index}"),
        kind,
        frame: Frame::Ethernet,
        peer_netns,
    };
    let links = [
        link(1, Kind::Veth, Some(7)),
        link(2, Kind::Veth, Some(8)),
        link(3, Kind::Netkit, Some(7)),
        link(4, Kind::Other, Some(7)),
        link(5, Kind::Veth, None),
    ];
    assert_eq!(leading_to(7, &links), [1, 3]);
    assert!(leading_to(9, &links).is_empty());
}
