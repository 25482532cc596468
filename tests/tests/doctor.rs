//! `doctor` reports the machine's capabilities, names foreign programs, and changes nothing.

use std::{fs, io, os::unix::process::CommandExt as _};

use aya::programs::tc::TcAttachType;
use imds_tests::{
    AttachMode, PodLink, TestEnv,
    doctor::{all, assert_has, command, doctor_report, one, report},
    foreign_bpf::{ForeignProgram, TC_ACT_OK},
    hook::{self, run_tc},
    kubelet::{Driver, Kubelet, new_uid},
    lacks_program, output, skip_without_netns_cookie, skip_without_tcx, with_each_backend,
};
use serde_json::Value;

const NAMES: [&str; 25] = [
    "kernel",
    "btf",
    "bpffs",
    "cgroup2",
    "capabilities",
    "security_modules",
    "locked_memory",
    "jit",
    "attaching",
    "netns_cookie",
    "netns_cookie_tc",
    "netns_cookie_cgroup_skb",
    "ring_buffer",
    "ipv6",
    "pods",
    "agent",
    "tc_programs",
    "xdp_programs",
    "tc_qdiscs",
    "node_pairs",
    "open_vswitch",
    "cgroup_programs",
    "metadata_programs",
    "firewall_rules",
    "tc_redirects",
];

#[test]
fn supported_kernel_has_no_missing_check() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let output = command(&env).output();
    let found = report(&output);
    assert_eq!(output.status.code(), Some(0), "{found:#}");
    assert_eq!((found["schema"].as_u64(), found["ready"].as_bool()), (Some(1), Some(true)));
    let names: Vec<_> = found["checks"].as_array().unwrap().iter().map(|check| &check["name"]).collect();
    assert_eq!(names, NAMES);
    for check in found["checks"].as_array().unwrap() {
        assert_eq!(check["state"] == "ok", check["remedy"].is_null(), "{check:#}");
    }
    // The checks attached programs as an experiment, and removed all of them.
    assert_eq!(hook::programs(&env.node, &pod.host_ifname), []);
    assert!(!hook::has_clsact(&env.node, &pod.host_ifname) && !env.pin_dir().exists());

    let table = env.imds_agent(&["doctor"]).output();
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(NAMES.iter().all(|name| text.contains(name)) && text.contains("imds-agent run"), "{text}");
}

#[test]
fn tcx_check_matches_the_kernel() {
    let env = TestEnv::new();
    let (found, has_tcx) = (doctor_report(&env), hook::has_tcx());
    let attaching = one(&found, "attaching");
    assert_eq!(attaching["state"], if has_tcx { "ok" } else { "degraded" });
    assert_has(attaching, "observed", "clsact filters");
    assert_eq!(attaching["observed"].as_str().unwrap().starts_with("TCX"), has_tcx);
}

#[test]
fn pin_dir_outside_bpffs_is_reported() {
    let env = TestEnv::new();
    let elsewhere = env.scratch_dir().join("pins");
    let output = command(&env).pin_dir(&elsewhere).output();
    assert_eq!(output.status.code(), Some(3));
    let found = report(&output);
    assert_eq!((&found["ready"], &one(&found, "bpffs")["state"]), (&Value::Bool(false), &"missing".into()));
    assert_has(one(&found, "bpffs"), "remedy", "mount -t bpf bpf");
    assert!(!elsewhere.exists());
}

#[test]
fn unprivileged_user_is_reported() {
    let env = TestEnv::new();
    let mut command = command(&env).command();
    let drop_all = || {
        for capability in 0..64 {
            // SAFETY: the call takes integers only. It fails for capabilities that the kernel does not have.
            let _ = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        }
        io::Result::Ok(())
    };
    // SAFETY: the closure makes system calls only. The closure that was added first has entered the namespace before.
    unsafe { command.pre_exec(drop_all) };
    let output = output(command);
    let found = report(&output);
    assert_eq!(output.status.code(), Some(3), "{found:#}");
    assert_eq!(one(&found, "capabilities")["state"], "missing");
    assert_has(one(&found, "capabilities"), "remedy", "CAP_NET_ADMIN");
}

/// A node that is itself a container, as in kind.
#[test]
fn nested_pid_namespace_needs_visible_pods() {
    if lacks_program("pid namespaces", &["unshare"]) {
        return;
    }
    let env = TestEnv::new();
    let kubelet = Kubelet::new();
    let pod = env.add_pod(PodLink::Routed);
    let mut cgroup = kubelet.add_pod(&new_uid(), Driver::Systemd);
    let (doctor, container) = (command(&env).command(), cgroup.container.clone());
    let examine = |script: &str| {
        let mut nested = env.node.command("unshare");
        nested.args(["--pid", "--fork", "--mount-proc", "sh", "-c", script, "sh"]).arg(&container);
        nested.arg(doctor.get_program()).args(doctor.get_args());
        let found = report(&output(nested));
        one(&found, "pods").clone()
    };
    let visible = examine("sleep 100 & echo $! > \"$1/cgroup.procs\"; shift; \"$@\"");
    assert_eq!(visible["state"], "ok", "{visible:#}");
    // The process of another pid namespace is listed as 0.
    cgroup.start_in(&pod.netns);
    let hidden = examine("shift; \"$@\"");
    assert_eq!(hidden["state"], "degraded", "{hidden:#}");
    assert_has(&hidden, "observed", "no process of a Kubernetes pod is visible");
}

/// The check neither needs a directory beside a mount point, nor a name that an interrupted check has left.
#[test]
fn writable_bpffs_is_recognized() {
    if lacks_program("mount namespaces", &["mount", "unshare"]) {
        return;
    }
    let env = TestEnv::new();
    let mounts = env.scratch_dir().join("mounts");
    fs::create_dir(&mounts).unwrap();
    let examine = |pin_dir: &str, prepare: &str| {
        let doctor = command(&env).pin_dir(&mounts.join(pin_dir)).command();
        let mut nested = env.node.command("unshare");
        nested.args(["--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec"]);
        nested.arg(format!(
            "mount -t tmpfs tmpfs .; cd \"$PWD\"; mkdir bpf; mount -t bpf bpf bpf; {prepare}; mount -o remount,ro .; exec \"$@\""
        ));
        nested.arg("sh").arg(doctor.get_program()).args(doctor.get_args()).current_dir(&mounts);
        let found = report(&output(nested));
        one(&found, "bpffs").clone()
    };
    for (pin_dir, prepare, state) in [
        ("bpf", "true", "ok"),
        ("bpf/imds", "mkdir bpf/imds-doctor-$$", "ok"),
        ("bpf", "mount -o remount,ro bpf", "missing"),
        ("bpf/imds", "mount -o remount,ro bpf", "missing"),
    ] {
        let found = examine(pin_dir, prepare);
        assert_eq!(found["state"], state, "{pin_dir}, {prepare}: {found:#}");
    }
}

#[test]
fn running_agent_is_reported() {
    let env = TestEnv::new();
    let agent_of = |found: &Value| one(found, "agent").clone();
    assert_has(&agent_of(&doctor_report(&env)), "observed", "nothing is loaded");
    let agent = env.start_agent(if hook::has_tcx() { AttachMode::Tcx } else { AttachMode::Clsact });
    let running = agent_of(&doctor_report(&env));
    assert_eq!(running["state"], "ok");
    assert_has(&running, "observed", &agent.pid().to_string());
    agent.kill9();
    let killed = agent_of(&doctor_report(&env));
    assert_eq!(killed["state"], "degraded");
    assert_has(&killed, "observed", "programs are loaded");
}

#[test]
fn foreign_tcx_programs_are_reported() {
    if skip_without_tcx() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let attach = || {
        let hook = TcAttachType::Ingress;
        ForeignProgram::returning(TC_ACT_OK).attach_tcx_first(&env.node, pod.host_ifindex, hook)
    };
    let _second = attach();
    let id = hook::tcx(&env.node, &pod.host_ifname)[0].id;
    let expected = serde_json::json!({
        "name": "foreign", "id": id, "kind": "tcx", "at": pod.host_ifname, "hook": "ingress",
        "position": 1, "count": 1, "first": null,
    });
    let found = doctor_report(&env);
    assert_eq!(one(&found, "tc_programs")["program"], expected);
    assert_eq!(one(&found, "tc_programs")["state"], "ok");

    let _agent = env.agent().resync(3600).spawn_ready();
    let found = doctor_report(&env);
    let second = one(&found, "tc_programs");
    assert_eq!((&second["program"]["position"], &second["program"]["first"]), (&2.into(), &false.into()));
    assert_eq!(second["state"], "ok");

    let _first = attach();
    let found = doctor_report(&env);
    let states: Vec<_> = all(&found, "tc_programs")
        .iter()
        .map(|check| (&check["program"]["position"], &check["state"]))
        .map(|(place, state)| (place.as_u64().unwrap(), state.as_str().unwrap()))
        .collect();
    assert_eq!(states, [(1, "degraded"), (3, "ok")]);
    assert_has(all(&found, "tc_programs")[0], "remedy", &pod.host_ifname);
}

#[test]
fn foreign_filters_are_reported() {
    with_each_backend(|backend| {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        run_tc(&env.node, &["qdisc", "add", "dev", &pod.host_ifname, "clsact"]);
        ForeignProgram::returning(TC_ACT_OK).attach_filter(
            &env.node,
            &pod.host_ifname,
            TcAttachType::Ingress,
            7,
        );
        let filter = ["filter", "add", "dev", &pod.host_ifname, "ingress", "prio", "1", "protocol", "all"];
        run_tc(&env.node, &[&filter[..], &["u32", "match", "u32", "0", "0", "classid", "1:1"]].concat());
        let places = |found: &Value| -> Vec<_> {
            let programs = all(found, "tc_programs").into_iter().map(|check| &check["program"]);
            let place = |program: &Value| {
                let kind = program["kind"].as_str().unwrap().to_owned();
                (kind, program["position"].as_u64().unwrap(), program["first"].as_bool())
            };
            programs.map(place).collect()
        };
        let found = doctor_report(&env);
        let last = all(&found, "tc_programs").pop().unwrap();
        let name = last["program"]["name"].as_str().unwrap();
        assert!(name.starts_with("foreign"), "{last:#}");
        assert_eq!(last["program"]["id"], hook::filters(&env.node, &pod.host_ifname)[0].id);
        let kinds: Vec<_> = places(&found).into_iter().map(|(kind, _, is_first)| (kind, is_first)).collect();
        assert_eq!(kinds, [("u32".to_owned(), None), ("bpf".to_owned(), None)]);

        let _agent = env.agent().backend(backend).spawn();
        env.wait_enforced(&pod);
        let found = places(&doctor_report(&env));
        // Programs before the agent's. With filters, that is the one that blocks the first priority.
        let before: Vec<_> = found
            .iter()
            .filter(|(_, _, is_first)| *is_first == Some(true))
            .map(|(kind, ..)| &**kind)
            .collect();
        let expected: &[&str] = match backend {
            AttachMode::Tcx => &[],
            AttachMode::Clsact => &["u32"],
        };
        assert!(before.iter().all(|kind| expected.contains(kind)), "{found:?}");
        assert_eq!(before.is_empty(), expected.is_empty(), "{found:?}");
    });
}

#[test]
fn foreign_cgroup_programs_are_reported() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let other = env
        .pin_dir()
        .with_file_name(format!("{}-other", env.pin_dir().file_name().unwrap().to_str().unwrap()));
    // A second agent counts as foreign.
    let first = env.agent().hooks(&["socket"]).pin_dir(&other).once();
    assert!(first.status.success(), "{first:?}");
    let _agent = env.agent().hooks(&["socket"]).spawn_ready();
    let found = doctor_report(&env);
    let programs: Vec<_> =
        all(&found, "cgroup_programs").into_iter().map(|check| &check["program"]).collect();
    let hooks: Vec<_> = programs.iter().map(|program| program["hook"].as_str().unwrap()).collect();
    assert_eq!(hooks, ["connect4", "connect6", "sendmsg4", "sendmsg6"]);
    assert_eq!(programs[0]["name"], "imds_connect4");
    assert_eq!(programs[0]["id"], hook::pinned_program(&other.join("progs/imds_connect4")));
    assert_eq!((&programs[0]["position"], &programs[0]["count"]), (&1.into(), &2.into()));
    assert_eq!(programs[0]["at"], env.cgroup().to_str().unwrap());
    let unloaded = env.imds_agent(&["unload"]).pin_dir(&other).output();
    assert!(unloaded.status.success() && !fs::exists(&other).unwrap(), "{unloaded:?}");
}
