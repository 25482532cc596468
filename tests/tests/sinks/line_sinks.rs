//! JSON lines in files and on standard output.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    process::Stdio,
    sync::mpsc,
    thread,
};

use imds_tests::{PodLink, TestEnv, poll::poll_until, probe::LONG};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{file_sink, records, send, sink_records, sinks, wait_failing, wait_records, wait_working};

#[test]
fn standard_output_has_only_records() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let mut command = env.agent().config(&sinks(&["type = 'stdout'".to_owned()])).command();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (sender, received) = mpsc::channel();
    let reader = thread::spawn(move || {
        lines.map_while(Result::ok).for_each(|line| sender.send(line).unwrap());
    });
    env.wait_enforced(&pod);
    send(&pod, [40_000, 40_001]);
    for port in [40_000, 40_001] {
        let line = poll_until(LONG, "a line", || received.try_recv().ok());
        let record: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(record["src_endpoint"]["port"], port, "{line}");
    }
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    reader.join().unwrap();
    assert_eq!(received.iter().count(), 0);
    env.unload();
}

#[test]
fn unread_standard_output_delays_nothing() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let path = env.scratch_dir().join("denials.jsonl");
    let config = sinks(&["type = 'stdout'".to_owned(), file_sink(&path)]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    // The pipe is full, and no process reads it.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    writer.write_all(&[b'\n'; 4096]).unwrap();
    let mut command = env.agent().config(&config).command();
    let mut child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null()).spawn().unwrap();
    drop(command);
    env.wait_enforced(&pod);
    send(&pod, [40_000]);
    wait_records(&path, 1);
    wait_failing(&env, "standard output is not read");
    drop(reader);
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    env.unload();
}

#[test]
fn file_survives_rotation_and_removal() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let directory = env.scratch_dir().join("logs");
    let path = directory.join("denials.jsonl");
    let start = || env.agent().config(&sinks(&[file_sink(&path)])).spawn_ready();
    let agent = start();
    send(&pod, [40_000]);
    wait_records(&path, 1);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o750);

    // logrotate without a signal.
    fs::rename(&path, directory.join("denials.jsonl-1")).unwrap();
    send(&pod, [40_001]);
    assert_eq!(wait_records(&path, 1)[0]["src_endpoint"]["port"], 40_001);
    fs::remove_dir_all(&directory).unwrap();
    send(&pod, [40_002]);
    assert_eq!(wait_records(&path, 1)[0]["src_endpoint"]["port"], 40_002);

    // The last record is written before the agent ends.
    send(&pod, [40_003]);
    poll_until(LONG, "the event to be collected", || {
        (env.metric("imds_agent_events_total") >= 4).then_some(())
    });
    assert!(agent.terminate().success());
    assert_eq!(records(&path).len(), 2);
    // Events of the time without an agent are recorded by the next one.
    send(&pod, [40_004]);
    let agent = start();
    assert_eq!(wait_records(&path, 3)[2]["src_endpoint"]["port"], 40_004);
    drop(agent);
    env.unload();
}

#[test]
fn full_disk_loses_no_record() {
    let env = TestEnv::new();
    // The programs emit ten events of a pod in a second.
    let pods = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let disk = env.scratch_dir().join("disk");
    fs::create_dir(&disk).unwrap();
    let (source, kind) = (Some("tmpfs"), Some("tmpfs"));
    mount(source, &disk, kind, MsFlags::empty(), Some("size=64k")).unwrap();
    let path = disk.join("denials.jsonl");
    let filler = vec![b'x'; 16 * 4096];
    let written = fs::write(disk.join("filler"), &filler[..15 * 4096]);
    let agent = env.agent().config(&sinks(&[file_sink(&path)])).spawn_ready();
    written.unwrap();
    // One page is left: a few records.
    for (port, pod) in (40_000..40_012).zip(pods.iter().cycle()) {
        send(pod, [port]);
        poll_until(LONG, "the event to be collected", || {
            (env.metric("imds_agent_events_total") > u64::from(port - 40_000)).then_some(())
        });
    }
    wait_failing(&env, "No space left on device");
    assert_eq!(env.metric(&format!("imds_agent_sink_failing{{sink=\"file:{}\"}}", path.display())), 1);
    assert_eq!(env.metric("imds_agent_ready"), 1);
    let before = records(&path).len();
    assert!(before < 12 && fs::read(&path).unwrap().ends_with(b"\n"), "{before} records");
    agent.wait_for_log("failed to write records, retrying", LONG);

    fs::remove_file(disk.join("filler")).unwrap();
    let ports: Vec<_> = wait_records(&path, 12)
        .iter()
        .map(|record| record["src_endpoint"]["port"].as_u64().unwrap())
        .collect();
    assert_eq!(ports, (40_000..40_012).collect::<Vec<_>>());
    wait_working(&env);
    assert_eq!(sink_records(&env, &format!("file:{}", path.display()), "written"), 12);
    agent.wait_for_log("writing records again", LONG);
    drop(agent);
    umount2(&disk, MntFlags::MNT_DETACH).unwrap();
    env.unload();
}
