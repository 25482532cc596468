//! Faults, while pods send throughout: nothing of it arrives. They take minutes and so are ignored: `cargo xtask faults` runs
//! them. Those that take no longer than others are in `restore.rs`, `pins.rs`, `restart.rs` and `kube_watch.rs`.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use aya::maps::{Map, MapData, PerCpuHashMap, PerCpuValues};
use imds_ebpf_common::{Counter, CounterKey, Hook, Verdict};
use imds_tests::{
    Backend, METADATA, Pod, PodLink, World, effort,
    flood::Flood,
    http::{DEFAULT, try_get},
    poll::poll_until,
    probe::LONG,
    skip_without_tcx,
};
use nix::{
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
const HOOKS: &[&str] = &["pod_edge", "node_edge"];

/// A world whose pods were denied by an agent that is gone now, as they were not before.
fn guarded(backend: Backend) -> (World, [Pod; 2]) {
    let world = World::new();
    let pods = LINKS.map(|link| world.add_pod(link));
    for pod in &pods {
        world.assert_open(pod);
    }
    world.agent().backend(backend).hooks(HOOKS).spawn_ready().kill9();
    (world, pods)
}

/// Does something while both pods send, of which nothing arrives.
#[track_caller]
fn under_flood<T>(world: &World, pods: &[Pod; 2], work: impl FnOnce() -> T) -> T {
    world.assert_nothing_arrives(|| {
        let floods = [Flood::udp(&pods[0], METADATA), Flood::syn(&pods[1], METADATA)];
        let result = work();
        let sent: u64 = floods.into_iter().map(Flood::stop).sum();
        assert!(sent > 1000, "{sent} packets are no flood");
        result
    })
}

/// After a fault, an agent guards all, and takes it off again.
#[track_caller]
fn assert_well(world: &World, pods: &[Pod; 2], backend: Backend) {
    let agent = world.agent().backend(backend).hooks(HOOKS).spawn_ready();
    for pod in pods {
        world.assert_blocked(pod);
    }
    drop(agent);
    world.unload();
    for pod in pods {
        world.assert_open(pod);
    }
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// Numbers that follow from a seed (splitmix64), which `IMDS_SEED` repeats.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let fresh = || RandomState::new().build_hasher().finish();
        let seed =
            std::env::var("IMDS_SEED").map_or_else(|_| fresh(), |seed| seed.parse().expect("a number"));
        println!("IMDS_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// A configuration that denies the same, with other settings and up to 200 endpoints besides.
fn configuration(random: &mut Random) -> String {
    let answer = ["drop", "reject"][usize::from(random.below(2) == 1)];
    let node_edge = random.below(2) == 1;
    let endpoints = (0..random.below(200))
        .map(|number| format!("[[endpoint]]\nname = 'e{number}'\naddress = '203.0.113.{number}'\n"));
    format!(
        "answer = '{answer}'\n[hooks]\nsocket = false\nnode_edge = {node_edge}\n{}",
        endpoints.collect::<String>()
    )
}

fn killed_at_any_moment(backend: Backend) {
    let (world, pods) = guarded(backend);
    let path = world.scratch_dir().join("imds.toml");
    let mut random = Random::new();
    let replace = |text: &str| {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &path).unwrap();
    };
    under_flood(&world, &pods, || {
        for round in 0..effort(200) {
            replace(&configuration(&mut random));
            let agent = world
                .agent()
                .backend(backend)
                .config_file(path.to_str().unwrap())
                .args(&["--resync", "1"])
                .spawn();
            // Anywhere from before it is there to its work being done, with a reload or without one on the way.
            sleep(Duration::from_millis(random.below(200)));
            if round % 2 == 1 {
                replace(&configuration(&mut random));
                sleep(Duration::from_millis(random.below(60)));
            }
            agent.kill9();
        }
    });
    assert_well(&world, &pods, backend);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_at_any_moment_of_start_and_reload_with_tcx() {
    if !skip_without_tcx() {
        killed_at_any_moment(Backend::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn killed_at_any_moment_of_start_and_reload_with_clsact() {
    killed_at_any_moment(Backend::Clsact);
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.0.kill().and_then(|()| self.0.wait());
    }
}

fn start(mut command: Command, log: &Path) -> Process {
    let log = File::options().write(true).create(true).truncate(false).open(log).unwrap();
    Process(command.stdin(Stdio::null()).stderr(log).spawn().unwrap())
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn out_of_descriptors() {
    let (world, pods) = guarded(Backend::Clsact);
    let log = world.scratch_dir().join("log");
    let more: Vec<_> = (0..effort(60)).map(|_| world.add_pod(PodLink::Routed)).collect();
    under_flood(&world, &pods, || {
        for limit in [10, 16, 24, 32, 48, 64] {
            let mut command = world.agent().hooks(HOOKS).command();
            // SAFETY: between fork and exec it makes one system call, and allocates nothing.
            unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)) };
            let mut agent = start(command, &log);
            // It ends with a word, or works as well as it can and says what it can't.
            poll_until(LONG, "an end or a status", || {
                let ended = agent.0.try_wait().unwrap().is_some();
                let is_known = world.try_status().is_ok_and(|status| status.agent.ready);
                (ended || is_known).then_some(())
            });
            let text = fs::read_to_string(&log).unwrap();
            let is_whole = world.try_status().is_ok_and(|status| status.is_ready());
            assert!(is_whole || text.contains("os error 24"), "limit {limit}: {text}");
            fs::write(&log, "").unwrap();
        }
    });
    drop(more);
    assert_well(&world, &pods, Backend::Clsact);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_burst_of_link_events_that_overruns_the_queue() {
    let (world, pods) = guarded(Backend::Clsact);
    let agent = world.agent().hooks(HOOKS).args(&["--resync", "3600"]).spawn_ready();
    let overruns = || {
        let (_, metrics) = try_get(&world, DEFAULT, "/metrics").unwrap();
        let line = metrics.lines().find_map(|line| line.strip_prefix("imds_netlink_overruns_total "));
        line.and_then(|value| value.parse::<f64>().ok()).unwrap()
    };
    assert!(overruns() < 1.0);
    let late = under_flood(&world, &pods, || {
        // It can't listen while so many come that the kernel has to drop some, that of a new pod among them.
        signal(agent.pid(), Signal::SIGSTOP);
        world.node.ip("link add burst0 type veth peer name burst1");
        let flips = "link set burst0 up\nlink set burst0 down\n".repeat(2000);
        world.node.ip(&flips);
        let late = world.add_pod(PodLink::Routed);
        signal(agent.pid(), Signal::SIGCONT);
        world.wait_guarded(&late);
        late
    });
    assert!(overruns() >= 1.0, "{}", agent.log());
    world.assert_blocked(&late);
    drop(agent);
    assert_well(&world, &pods, Backend::Clsact);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn maps_that_are_full() {
    let (world, pods) = guarded(Backend::Clsact);
    let pin = world.pin_dir().join("maps/imds_counters");
    let mut counters: PerCpuHashMap<MapData, CounterKey, Counter> =
        Map::PerCpuHashMap(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    let cpus = aya::util::nr_cpus().unwrap();
    let value = || PerCpuValues::try_from(vec![Counter::default(); cpus]).unwrap();
    let mut added = 0_u32;
    while counters
        .insert(CounterKey::new(1_000_000 + added, Hook::PodEdge, Verdict::Deny), value(), 0)
        .is_ok()
    {
        added += 1;
    }
    assert!(added > 100, "{added}");
    // A pod that has no counter: it is denied all the same, also from its first packet on.
    let agent = world.agent().hooks(HOOKS).spawn();
    let late = under_flood(&world, &pods, || {
        let late = world.add_pod(PodLink::Routed);
        world.wait_guarded(&late);
        late
    });
    world.assert_blocked(&late);
    drop(agent);
    world.unload();
    world.assert_open(&late);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_full_disk_under_the_log() {
    let (world, pods) = guarded(Backend::Clsact);
    let path = world.scratch_dir().join("imds.toml");
    fs::write(&path, "[hooks]\nsocket = false").unwrap();
    let command = world.agent().config_file(path.to_str().unwrap()).command();
    let mut agent = start(command, Path::new("/dev/full"));
    under_flood(&world, &pods, || {
        world.status_when("an agent", |status| status.agent.ready);
        // Which it would like to complain of.
        fs::write(&path, "nonsense = 1").unwrap();
        world.status_when("the refusal", |status| {
            status.configuration.as_ref().is_some_and(|configuration| configuration.refused.is_some())
        });
        let late = world.add_pod(PodLink::Routed);
        world.wait_guarded(&late);
    });
    assert!(agent.0.try_wait().unwrap().is_none());
    drop(agent);
    assert_well(&world, &pods, Backend::Clsact);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn interfaces_that_are_renamed_moved_and_deleted_while_they_are_attached() {
    let (world, pods) = guarded(Backend::Clsact);
    let agent = world.agent().hooks(HOOKS).args(&["--resync", "1"]).spawn_ready();
    let mut random = Random::new();
    under_flood(&world, &pods, || {
        for round in 0..effort(200) {
            let pod = world.add_pod(LINKS[usize::from(round % 2 == 0)]);
            sleep(Duration::from_millis(random.below(10)));
            let name = &pod.host_ifname;
            match random.below(3) {
                0 => world.node.ip(&format!(
                    "link set {name} down\nlink set {name} name r{round}\nlink set r{round} up"
                )),
                1 => world.node.ip(&format!("link set {name} master {}", World::BRIDGE)),
                _ => world.node.ip(&format!("link del {name}")),
            }
        }
    });
    let last = world.add_pod(PodLink::Routed);
    world.wait_guarded(&last);
    world.assert_blocked(&last);
    drop(agent);
    assert_well(&world, &pods, Backend::Clsact);
}
