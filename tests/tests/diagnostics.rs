//! Messages of the BPF programs in the agent's log.

use aya::maps::{Map, MapData, MapError, PerCpuHashMap, PerCpuValues};
use imds_ebpf_common::{Counter, CounterKey, Hook, Verdict, names::MAP_COUNTERS};
use imds_tests::{
    METADATA, PodLink, TestEnv,
    probe::{LONG, SHORT, http_get, reachable},
};

#[test]
fn uncounted_pod_is_denied_and_logged() {
    let env = TestEnv::new();
    let agent = env.agent().spawn_ready();
    let mut empty = fill(&env);
    let pod = env.add_pod(PodLink::Routed);
    env.wait_enforced(&pod);
    env.assert_nothing_arrives(|| assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer()));
    agent.wait_for_log("failed to count a request, a map is full: hook from_pod", LONG);
    empty();
    drop(agent);
    env.unload();
    assert!(reachable(&pod.netns, METADATA));
}

/// Fills the map of counters. Calling the returned function removes the added entries.
fn fill(env: &TestEnv) -> impl FnMut() {
    let pin = env.pin_dir().join("maps").join(MAP_COUNTERS);
    let map = MapData::from_pin(pin).expect("a pinned map");
    let mut counters: PerCpuHashMap<MapData, CounterKey, Counter> =
        Map::PerCpuHashMap(map).try_into().expect("the counters");
    let cpus = aya::util::nr_cpus().expect("the number of CPUs");
    let key = |index: u32| CounterKey::new(u32::MAX - index, Hook::FromPod, Verdict::Denied);
    let mut count = 0;
    loop {
        let zero = PerCpuValues::try_from(vec![Counter::default(); cpus]).expect("as many as there are CPUs");
        match counters.insert(key(count), zero, 0) {
            Ok(()) => count += 1,
            Err(MapError::SyscallError(error)) => match error.io_error.raw_os_error() {
                Some(libc::E2BIG) => break,
                // The kernel frees entries asynchronously.
                Some(libc::ENOMEM) => {}
                _ => panic!("{error}"),
            },
            Err(error) => panic!("{error}"),
        }
    }
    move || {
        for index in 0..count {
            counters.remove(&key(index)).expect("an inserted entry");
        }
    }
}
