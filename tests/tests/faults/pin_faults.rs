//! The pin directory: removed, unmounted, and filled with foreign objects.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::Duration,
};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, Pod, PodLink, Status, TestEnv,
    foreign_bpf::{ForeignProgram, TC_ACT_OK, replace_pin},
    hook,
    http::{DEFAULT, try_get},
    output,
    poll::poll_until,
    probe::LONG,
    scaled, skip_without_tcx,
    status::Problem,
};
use serde_json::Value;

use super::{Case, Process, Random, wrapped};

const DIRECTORIES: [&str; 3] = ["maps", "progs", "links"];

fn checked(command: Command) {
    let text = format!("{command:?}");
    let done = output(command);
    assert!(done.status.success(), "{text}: {}", String::from_utf8_lossy(&done.stderr));
}

fn wait_until_all_is_back(case: &Case) {
    poll_until(LONG * 2, "everything to be repaired", || {
        let status = case.env.try_status().ok()?;
        (status.is_ready() && status.state == "enforcing").then_some(())
    });
}

fn pins(case: &Case) -> Vec<PathBuf> {
    let list = |directory| fs::read_dir(case.env.pin_dir().join(directory)).into_iter().flatten().flatten();
    DIRECTORIES.into_iter().flat_map(list).map(|pin| pin.path()).collect()
}

fn pins_that_are_removed(backend: AttachMode) {
    let case = Case::with_sockets(backend);
    let agent = case.agent().resync(1).spawn_ready();
    let mut random = Random::new();
    let removals = scaled(40);
    case.under_flood(|| {
        for _ in 0..removals {
            let root = case.env.pin_dir();
            // Ignores errors: the agent may create or remove a pin concurrently.
            let _gone = match random.below(3) {
                0 => fs::remove_dir_all(root),
                1 => fs::remove_dir_all(root.join(random.of(&DIRECTORIES))),
                _ => pins(&case).first().map_or(Ok(()), fs::remove_file),
            };
            sleep(Duration::from_millis(random.below(300)));
        }
        wait_until_all_is_back(&case);
    });
    println!(
        "{removals} removals, {} repairs of pins",
        case.metric("imds_agent_drift_corrections_total{action=\"pinned\"}")
    );
    drop(agent);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn removed_pins_are_restored_tcx() {
    if !skip_without_tcx() {
        pins_that_are_removed(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn removed_pins_are_restored_clsact() {
    pins_that_are_removed(AttachMode::Clsact);
}

/// Verifies docs/troubleshooting.md: a clsact filter needs no pin, a link does.
#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn pins_removed_without_agent() {
    let case = Case::with_sockets(AttachMode::Clsact);
    let empty = || fs::remove_dir_all(case.env.pin_dir()).unwrap();
    case.under_flood(|| {
        for _ in 0..scaled(5) {
            empty();
            assert_eq!(case.env.status().state, "unloaded");
            case.agent().spawn_ready().kill9();
        }
    });
    if hook::has_tcx() {
        case.env.agent().backend(AttachMode::Tcx).hooks(case.hooks).spawn_ready().kill9();
        empty();
        for pod in &case.pods {
            case.env.assert_open(pod);
        }
        assert_eq!(case.env.status().state, "unloaded");
    }
    case.assert_well();
}

/// Starts an agent in its own mount namespace with its own bpffs.
fn start_apart(case: &Case, may_mount: bool, log: &Path) -> Process {
    let more = if may_mount { ",+sys_admin" } else { "" };
    let bounding = format!("--bounding-set=-all,+bpf,+net_admin,+perfmon{more}");
    // Replaces the machine's bpffs, which would be visible again after the unmount.
    let mount = "umount -l /sys/fs/bpf && mount -t bpf bpf /sys/fs/bpf";
    let script = format!("{mount} && exec setpriv {bounding} --inh-caps=-all \"$@\"");
    let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let mut command = wrapped(case, &wrapper, &case.agent().resync(1));
    command.env("RUST_LOG", "info");
    Process::start(command, log)
}

/// Runs a command in the namespaces of that agent.
fn beside(case: &Case, agent: &Process, command: &[&str]) -> Command {
    let mut beside = case.env.node.command("nsenter");
    beside.arg(format!("--mount=/proc/{}/ns/mnt", agent.0.id())).args(command);
    beside
}

/// Waits until the agent in the other mount namespace reports no problem except that namespace.
fn wait_until_well_apart(case: &Case, agent: &Process) {
    let status = case.env.imds_agent(&["status", "-o", "json"]).command();
    let mut words = vec![status.get_program().to_str().unwrap()];
    words.extend(status.get_args().map(|word| word.to_str().unwrap()));
    poll_until(LONG * 3, "a status without problems", || {
        let status = output(beside(case, agent, &words));
        let status: Status = serde_json::from_slice(&status.stdout).ok()?;
        let is_private = |problem: &Problem| problem.problem.contains("only in the mount namespace");
        let is_known = status.problems.len() == 1 && status.problems.iter().all(is_private);
        let is_well = status.agent.ready && status.mode.as_deref() == Some("enforce");
        (is_known && is_well && status.all_pods_enforced()).then_some(())
    });
}

fn is_enforced(case: &Case, pod: &Pod) -> bool {
    hook::programs(&case.env.node, &pod.host_ifname).first().is_some_and(hook::Attached::is_ours)
}

/// Returns the ids of the links on the environment's cgroup.
fn links_of_sockets(case: &Case) -> Vec<String> {
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["-j", "link", "list"]);
    let links: Vec<Value> = serde_json::from_slice(&output(bpftool).stdout).unwrap();
    let cgroup = fs::metadata(case.env.cgroup()).unwrap().ino();
    let of_it = links.iter().filter(|link| link["cgroup_id"] == cgroup);
    of_it.map(|link| link["id"].to_string()).collect()
}

fn detach_sockets(case: &Case) {
    let links = links_of_sockets(case);
    assert_eq!(links.is_empty(), !case.has_sockets());
    for id in &links {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["link", "detach", "id", id]);
        checked(bpftool);
    }
    poll_until(LONG, "the socket hook to be attached again", || {
        (links_of_sockets(case).len() == links.len()).then_some(())
    });
}

fn bpffs_that_is_unmounted(backend: AttachMode, may_mount: bool) {
    let case = Case::with_sockets(backend);
    // Removes the pins in the machine's bpffs, which the agent does not use.
    case.env.unload();
    let log = case.env.scratch_dir().join("log");
    let agent = start_apart(&case, may_mount, &log);
    wait_until_well_apart(&case, &agent);
    let said = |pattern: &str| fs::read_to_string(&log).unwrap().contains(pattern);
    let late = case.under_flood(|| {
        checked(beside(&case, &agent, &["umount", "-l", "/sys/fs/bpf"]));
        if !may_mount {
            poll_until(LONG, "a log message about the mount", || {
                said("mount -t bpf bpf /sys/fs/bpf").then_some(())
            });
            let readiness = try_get(&case.env, DEFAULT, "/readyz").unwrap();
            assert_eq!(readiness.0, 503, "{readiness:?}");
            detach_sockets(&case);
        }
        // Enforcement continues with or without pins.
        let late = case.env.add_pod(PodLink::Routed);
        poll_until(LONG, "a new pod to be enforced", || is_enforced(&case, &late).then_some(()));
        case.env.assert_blocked(&late);
        if !may_mount {
            checked(beside(&case, &agent, &["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"]));
        }
        wait_until_well_apart(&case, &agent);
        assert!(case.pods.iter().all(|pod| is_enforced(&case, pod)));
        late
    });
    if may_mount {
        poll_until(LONG, "a log message about the new bpffs", || said("mounted a bpffs").then_some(()));
    } else {
        assert!(!said("mounted a bpffs"));
    }
    // Ending the agent removes its mount namespace with all pins.
    drop(agent);
    drop(late);
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn unmounted_bpffs_is_mounted_again() {
    bpffs_that_is_unmounted(AttachMode::Clsact, true);
    if !skip_without_tcx() {
        bpffs_that_is_unmounted(AttachMode::Tcx, true);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn unmounted_bpffs_without_mount_right() {
    bpffs_that_is_unmounted(AttachMode::Clsact, false);
    if !skip_without_tcx() {
        bpffs_that_is_unmounted(AttachMode::Tcx, false);
    }
}

/// Objects of another node's agent that resemble this agent's, and some that do not.
struct Others {
    paths: Vec<PathBuf>,
    env: TestEnv,
    _pod: Pod,
}

impl Others {
    fn new(case: &Case) -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let agent = env.agent().backend(case.backend).hooks(case.hooks).config("mode = 'off'");
        assert!(agent.once().status.success());
        let root = env.pin_dir();
        let entries = DIRECTORIES.into_iter().flat_map(|name| fs::read_dir(root.join(name)).unwrap());
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        let map = root.join("maps/other");
        let mut create = Command::new("bpftool");
        create.args(["map", "create"]).arg(&map);
        create.args(["type", "hash", "key", "4", "value", "8", "entries", "7", "name", "other"]);
        checked(create);
        paths.push(map);
        Self { paths, env, _pod: pod }
    }

    /// Drops the maps that cannot be distinguished from this agent's.
    fn unlike(mut self) -> Self {
        self.paths.retain(|path| !path.parent().unwrap().ends_with("maps") || path.ends_with("other"));
        self
    }

    /// Replaces a pin by a random other object.
    fn replace(&self, pin: &Path, random: &mut Random) {
        let other = random.of(&self.paths);
        match random.below(8) {
            0 => {
                fs::remove_file(pin).unwrap();
                fs::create_dir_all(pin.join("in/it")).unwrap();
            }
            1 => {
                fs::remove_file(pin).unwrap();
                symlink(other, pin).unwrap();
            }
            _ => replace_pin(other, pin),
        }
    }
}

fn pins_that_are_replaced_while_the_agent_runs(backend: AttachMode) {
    let case = Case::with_sockets(backend);
    let others = Others::new(&case);
    let agent = case.agent().resync(1).spawn_ready();
    let mut random = Random::new();
    let mut replaced = 0;
    case.under_flood(|| {
        for _ in 0..scaled(5) {
            for pin in pins(&case) {
                others.replace(&pin, &mut random);
                replaced += 1;
            }
            wait_until_all_is_back(&case);
        }
    });
    println!("{replaced} pins replaced");
    drop(agent);
    case.assert_well();
    drop(others.env);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn replaced_pins_are_restored_tcx() {
    if !skip_without_tcx() {
        pins_that_are_replaced_while_the_agent_runs(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn replaced_pins_are_restored_clsact() {
    pins_that_are_replaced_while_the_agent_runs(AttachMode::Clsact);
}

/// Reports whether the pin is a link of this TC hook. Without a pin, a link ends when no agent holds it.
fn is_of(hook: &str, pin: &Path) -> bool {
    pin.file_name().unwrap().to_str().unwrap().starts_with(hook)
}

fn pins_that_are_replaced_between_agents(backend: AttachMode) {
    let case = Case::with_sockets(backend);
    let others = Others::new(&case).unlike();
    let mut random = Random::new();
    let (mut replaced, mut new_maps) = (0, 0);
    case.under_flood(|| {
        for round in 0..scaled(8) {
            // The other TC hook keeps denying traffic.
            let spared = ["from_pod_", "node_egress_"][usize::from(round % 2 == 0)];
            for pin in pins(&case) {
                if random.is_true() && !is_of(spared, &pin) {
                    others.replace(&pin, &mut random);
                    replaced += 1;
                }
            }
            let agent = case.agent().spawn_ready();
            new_maps += u32::from(agent.log().contains("starting with new maps and counters"));
            wait_until_all_is_back(&case);
            agent.kill9();
        }
    });
    println!("{replaced} pins replaced, new maps {new_maps} times");
    case.assert_well();
    drop(others.env);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn pins_replaced_between_agents_tcx() {
    if !skip_without_tcx() {
        pins_that_are_replaced_between_agents(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn pins_replaced_between_agents_clsact() {
    pins_that_are_replaced_between_agents(AttachMode::Clsact);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn foreign_link_at_pin_path_is_kept() {
    if skip_without_tcx() {
        return;
    }
    let case = Case::new(AttachMode::Tcx);
    let pod = &case.pods[0];
    let theirs = ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(
        &case.env.node,
        pod.host_ifindex,
        TcAttachType::Ingress,
    );
    let program = hook::tcx(&case.env.node, &pod.host_ifname)[0].id;
    case.under_flood(|| {
        let pin = case.env.pin_dir().join(format!("links/from_pod_{}", pod.host_ifindex));
        theirs.pin_over(&pin);
        case.agent().spawn_ready().kill9();
    });
    let programs = hook::tcx(&case.env.node, &pod.host_ifname);
    assert!(programs[0].is_ours() && programs[1].id == program, "{programs:?}");
    drop(theirs);
    case.assert_well();
}
