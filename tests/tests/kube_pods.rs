//! From a pod's id to its namespace, its links and its cgroups, on real ones.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
    process::Command,
    time::Duration,
};

use imds_agent::node::{
    kubepods_events::KubepodsEvents,
    netlink::Netlink,
    netns,
    pods::{ResolveError, ResolvedPod, Resolver, Wanted},
};
use imds_tests::{Netns, Pod, PodLink, World, kubepods::Kubepods, skip_without_netns_cookie};
use tokio::{runtime, time::timeout};

const LONG: Duration = Duration::from_secs(20);
const UID: &str = "a3c1b0de-1f2e-4d3c-8b4a-5f6e7d8c9b0a";
const OTHER: &str = "00000000-0000-4000-8000-000000000000";

/// What a resolver on this node finds out about pods.
fn resolve(
    world: &World,
    kubepods: &Kubepods,
    wanted: &[(&str, bool)],
) -> Vec<Result<ResolvedPod, ResolveError>> {
    let wanted: Vec<_> = wanted
        .iter()
        .map(|&(uid, host_network)| Wanted { cgroup_uid: uid.to_owned(), host_network })
        .collect();
    world.node.run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut resolver = Resolver::new(Path::new("/proc"), kubepods.root()).unwrap();
            resolver.resolve(&Netlink::connect().unwrap(), &wanted).await.unwrap()
        })
    })
}

fn resolve_one(world: &World, kubepods: &Kubepods, uid: &str, host_network: bool) -> Option<ResolvedPod> {
    resolve(world, kubepods, &[(uid, host_network)]).pop().map(Result::unwrap)
}

fn inode(netns: &Netns) -> u64 {
    fs::metadata(netns.path()).unwrap().ino()
}

/// The cookie as a socket in there has it.
fn cookie(netns: &Netns) -> Option<u64> {
    let socket = netns.run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
    let mut cookie = 0_u64;
    let mut length = 8;
    // SAFETY: the buffer is as long as the length says, and both outlive the call; 71 is SO_NETNS_COOKIE.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, 71, (&raw mut cookie).cast(), &raw mut length)
    };
    (result == 0).then_some(cookie)
}

fn expected(pod: &Pod, uid: &str, cgroup: &Path) -> ResolvedPod {
    ResolvedPod {
        uid: uid.to_owned(),
        netns_inode: inode(&pod.netns),
        netns_cookie: cookie(&pod.netns),
        ifindexes: vec![pod.host_ifindex],
        cgroup_ids: vec![fs::metadata(cgroup).unwrap().ino()],
        host_network: false,
    }
}

#[test]
fn pods_are_found_by_their_ids_and_only_they() {
    let (world, kubepods) = (World::new(), Kubepods::new());
    let pods = [PodLink::Routed, PodLink::Bridged, PodLink::Routed].map(|link| world.add_pod(link));
    let mut first = kubepods.add_pod(UID);
    let mut second = kubepods.add_pod_by_systemd(OTHER);
    assert!(resolve_one(&world, &kubepods, UID, false).is_none(), "no process yet");
    first.start_in(&pods[0].netns);
    second.start_in(&pods[1].netns);

    let both = resolve(&world, &kubepods, &[(UID, false), (OTHER, false), ("unknown", false)]);
    let both: Vec<_> = both.into_iter().map(Result::unwrap).collect();
    assert_eq!(both, [expected(&pods[1], OTHER, &second.path), expected(&pods[0], UID, &first.path)]);
    assert!(both.iter().all(|pod| pod.netns_cookie != cookie(&pods[2].netns) || pod.netns_cookie.is_none()));

    first.stop();
    assert!(resolve_one(&world, &kubepods, UID, false).is_none(), "no process any more");
}

#[test]
fn a_kubelet_that_moves_is_followed() {
    let (world, kubepods) = (World::new(), Kubepods::new());
    let pod = world.add_pod(PodLink::Routed);
    let mut before = kubepods.add_pod(OTHER);
    before.start_in(&pod.netns);
    world.node.run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut resolver = Resolver::new(Path::new("/proc"), kubepods.root()).unwrap();
            let netlink = Netlink::connect().unwrap();
            let wanted = [OTHER, UID].map(|uid| Wanted { cgroup_uid: uid.to_owned(), host_network: false });
            assert_eq!(resolver.resolve(&netlink, &wanted).await.unwrap().len(), 1);
            let mut after = kubepods.add_pod_by_systemd(UID);
            after.start_in(&pod.netns);
            assert_eq!(resolver.resolve(&netlink, &wanted).await.unwrap().len(), 2);
        });
    });
}

#[test]
fn a_pod_in_the_nodes_namespace_is_found_by_its_cgroup() {
    let (world, kubepods) = (World::new(), Kubepods::new());
    let mut cgroup = kubepods.add_pod(UID);
    cgroup.start_in(&world.node);
    assert!(resolve_one(&world, &kubepods, UID, false).is_none(), "a sandbox in the making");
    let pod = resolve_one(&world, &kubepods, UID, true).unwrap();
    assert!(pod.host_network && pod.ifindexes.is_empty() && pod.netns_cookie.is_none());
    assert_eq!(
        (pod.netns_inode, pod.cgroup_ids),
        (inode(&world.node), vec![fs::metadata(&cgroup.path).unwrap().ino()])
    );
}

#[test]
fn a_process_that_went_into_another_pod_exempts_nobody() {
    let (world, kubepods) = (World::new(), Kubepods::new());
    let pods = [PodLink::Routed, PodLink::Routed].map(|link| world.add_pod(link));
    let mut cgroup = kubepods.add_pod(UID);
    let sandbox = cgroup.start_in(&pods[0].netns);
    let started = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap().parse::<u64>().unwrap()
    };
    // Ticks are coarse: the next process must be seen to be younger.
    imds_tests::poll::poll_until(LONG, "a younger process", || {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let is_younger = started(child.id()) > started(sandbox);
        child.kill().unwrap();
        child.wait().unwrap();
        is_younger.then_some(())
    });
    cgroup.start_in(&pods[1].netns);
    let pod = resolve_one(&world, &kubepods, UID, false).unwrap();
    assert_eq!(pod, expected(&pods[0], UID, &cgroup.path));
}

#[test]
fn a_namespace_without_a_link_has_none() {
    let (world, kubepods) = (World::new(), Kubepods::new());
    let _pod = world.add_pod(PodLink::Routed);
    let alone = Netns::new("alone");
    let mut cgroup = kubepods.add_pod(UID);
    cgroup.start_in(&alone);
    let pod = resolve_one(&world, &kubepods, UID, false).unwrap();
    assert_eq!((pod.netns_inode, pod.ifindexes), (inode(&alone), vec![]));
}

#[test]
fn asking_for_a_cookie_leaves_the_thread_where_it_is() {
    if skip_without_netns_cookie() {
        return;
    }
    let there = Netns::new("there");
    let before = netns::this_inode().unwrap();
    let file = File::open(there.path()).unwrap();
    assert_eq!(netns::cookie_of(&file).unwrap(), cookie(&there));
    assert_eq!(netns::this_inode().unwrap(), before);
    let not_a_namespace = File::open("/dev/null").unwrap();
    assert!(netns::cookie_of(&not_a_namespace).is_err());
}

#[tokio::test(flavor = "current_thread")]
async fn the_first_process_of_a_sandbox_is_told() {
    let (kubepods, netns) = (Kubepods::new(), Netns::new("sandbox"));
    let mut events = KubepodsEvents::new(kubepods.root()).unwrap();
    let mut told = async |what: &str| timeout(LONG, events.changed()).await.expect(what).unwrap();
    told("the first look").await;
    let mut cgroup = kubepods.add_pod(UID);
    told("new cgroups").await;
    cgroup.start_in(&netns);
    told("a process").await;
    drop(cgroup);
    told("a pod that is gone").await;
    let mut again = kubepods.add_pod_by_systemd(UID);
    told("another driver's").await;
    again.start_in(&netns);
    told("its process").await;
}
