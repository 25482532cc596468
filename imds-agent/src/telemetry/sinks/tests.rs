use std::{fs, os::unix::fs::PermissionsExt as _, rc::Rc};

use imds_ebpf_common::{Event, Hook};
use jiff::Timestamp;
use serde_json::json;

use super::*;
use crate::{
    causes::with_causes,
    config::LogFile,
    kube::pod_ref::PodRef,
    telemetry::http_request::{RequestOutcome, tests::refused},
};

fn settings() -> SinkSettings {
    let config = Config::parse("[kubernetes]\nnode_name = 'node-0'", "f".as_ref()).unwrap();
    let (mut endpoints, exempt) = config.resolve(&crate::config::provider::Dmi::default()).unwrap();
    endpoints.endpoints.truncate(1);
    let settings = SinkSettings::new(&config, &endpoints, &exempt);
    SinkSettings { rules: vec!["agents".to_owned()], ..settings }
}

fn pod(name: &str) -> PodRef {
    PodRef {
        namespace: "default".to_owned(),
        pod: name.to_owned(),
        service_account: "robot".to_owned(),
        container: None,
        label: Some("app=web".to_owned()),
        uid: "u-1".to_owned(),
    }
}

fn packet(pod: Option<PodRef>) -> Denial {
    let event = Event {
        suppressed: 41,
        bytes: 3108,
        source: std::net::Ipv4Addr::new(10, 244, 0, 7).to_ipv6_mapped().octets(),
        destination: std::net::Ipv4Addr::new(169, 254, 169, 254).to_ipv6_mapped().octets(),
        ifindex: 4,
        source_port: 40_312,
        destination_port: 80,
        hook: Hook::FromPod as u8,
        verdict: Verdict::Denied as u8,
        protocol: 6,
        ..Event::default()
    };
    let (interface, time) = ("veth1".to_owned(), Timestamp::UNIX_EPOCH);
    Denial { event, time, interface, pod, unit: Rc::default(), rule: None }
}

pub(super) fn record(pod_name: &str) -> Arc<SinkRecord> {
    Arc::new(SinkRecord::new(&packet(Some(pod(pod_name))), &settings()))
}

#[test]
fn packet_as_line_and_sentence() {
    let record = record("web");
    let line = String::from_utf8(record.line()).unwrap();
    assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&line).unwrap(),
        json!({
            "schema": 1, "time": "1970-01-01T00:00:00Z", "node": "node-0", "verdict": "denied", "hook": "from_pod",
            "protocol": "tcp",
            "src_endpoint": { "ip": "10.244.0.7", "port": 40312, "interface_name": "veth1" },
            "dst_endpoint": { "name": "imds", "ip": "169.254.169.254", "port": 80 },
            "pod": { "namespace": "default", "name": "web", "uid": "u-1", "service_account": "robot", "container": null,
                     "label": "app=web" },
            "actor": { "process": null, "cgroup": null },
            "rule": null, "count": 42, "bytes": 3108, "http": null
        })
    );
    assert_eq!(
        record.to_string(),
        "denied tcp 10.244.0.7:40312 -> 169.254.169.254:80 (imds) at from_pod, pod default/web, 42 times"
    );
}

#[test]
fn call_has_process_cgroup_and_rule() {
    let mut denial = packet(None);
    denial.event = Event {
        pid: 7,
        hook: Hook::Socket as u8,
        verdict: Verdict::Audited as u8,
        source: [0; 16],
        source_port: 0,
        suppressed: 0,
        ..denial.event
    };
    denial.event.comm[..4].copy_from_slice(b"a\nb]");
    denial.interface.clear();
    denial.unit = Rc::from(&b"system.slice/a\xff.service"[..]);
    denial.rule = Some(1);
    let record = SinkRecord::new(&denial, &settings());
    let line = String::from_utf8(record.line()).unwrap();
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        value["actor"],
        json!({ "process": { "pid": 7, "name": r"a\nb]" }, "cgroup": r"system.slice/a\xff.service" })
    );
    assert_eq!((&value["rule"], &value["count"]), (&"agents".into(), &1.into()));
    assert_eq!(value["src_endpoint"], json!({ "ip": null, "port": null, "interface_name": null }));
    assert_eq!(record.to_string(), r"audited tcp 169.254.169.254:80 (imds) at socket, process a\nb] (pid 7)");
}

#[test]
fn request_has_first_line_and_outcome() {
    let mut event = refused("/latest/a\"]\n");
    let record = SinkRecord::of_request(&event, Some(&pod("web")), &settings());
    let line = String::from_utf8(record.line()).unwrap();
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        value["http"],
        json!({
            "method": "GET", "path": r#"/latest/a"]\n"#, "imds_version": 1, "outcome": "refused", "status": 403,
            "reason": "no rule allows it", "other_rules": 1,
        })
    );
    assert_eq!((&value["verdict"], &value["hook"]), (&"denied".into(), &"broker".into()));
    assert_eq!((&value["rule"], &value["count"]), (&"region".into(), &4.into()));
    assert_eq!(value["dst_endpoint"], json!({ "name": "imds", "ip": "169.254.169.254", "port": 80 }));
    assert_eq!(
        record.to_string(),
        r#"refused GET /latest/a"]\n (IMDSv1, status 403, no rule allows it) -> 169.254.169.254:80 (imds) at broker, pod default/web, 4 times"#
    );
    let message = syslog::message(&record, "h", 1);
    assert!(message.starts_with("<84>1 ") && message.contains(" request [request@32473 "), "{message}");
    assert!(
        message.contains(
            r#" http_method="GET" http_path="/latest/a\"\]\\n" imds_version="1" outcome="refused" "#
        ),
        "{message}"
    );
    event.outcome = RequestOutcome::Allowed;
    let record = SinkRecord::of_request(&event, None, &settings());
    assert!(syslog::message(&record, "h", 1).starts_with("<86>1 "));
    let log = otlp::log_record(&record);
    assert_eq!((&log["severityNumber"], &log["eventName"]), (&9.into(), &"imds_agent.request".into()));
    let path = json!({ "key": "url.path", "value": { "stringValue": r#"/latest/a"]\n"# } });
    assert!(log["attributes"].as_array().unwrap().contains(&path), "{log}");
}

#[test]
fn verdicts_select_requests() {
    let mut settings = settings();
    for (verdicts, expected) in [
        (vec![Verdict::Denied], [true, false, false]),
        (vec![Verdict::Allowed], [false, true, true]),
        (vec![Verdict::Audited, Verdict::Exempt], [false; 3]),
    ] {
        settings.events.verdicts = verdicts;
        let outcomes = [RequestOutcome::Refused, RequestOutcome::Allowed, RequestOutcome::Failed];
        assert_eq!(outcomes.map(|outcome| settings.includes(outcome.verdict() as u8)), expected);
    }
}

#[test]
fn full_queue_drops_new_records() {
    let queue = SinkQueue::new("test".to_owned(), Arc::default());
    let record = record("web");
    let room = sink_queue::MAX_RECORDS;
    for _ in 0..room + 3 {
        queue.push(&record);
    }
    assert_eq!(queue.counts(), SinkCounts { dropped: 3, ..SinkCounts::default() });
    assert_eq!(queue.next_batch(Duration::ZERO).unwrap().len(), sink_queue::MAX_BATCH);
    queue.push(&record);
    assert_eq!(queue.counts().dropped, 3);
    queue.close();
    // A closed queue does not wait for a full batch.
    let left = std::iter::from_fn(|| queue.next_batch(Duration::from_mins(1))).map(|batch| batch.len());
    assert_eq!(left.sum::<usize>(), room + 1 - sink_queue::MAX_BATCH);
    assert!(!queue.pause(Duration::from_mins(1)));
    queue.end(2);
    assert!(queue.wait_end(Instant::now()) && queue.counts().dropped == 5);
}

#[test]
fn state_changes_are_recorded() {
    let queue = SinkQueue::new("test".to_owned(), Arc::default());
    let failed = io_failed("write to", &"x")(std::io::Error::from_raw_os_error(libc::ENOSPC));
    queue.record_result(&Sent::until(2, failed), Duration::from_millis(1));
    assert_eq!(queue.error().unwrap(), "failed to write to x: No space left on device (os error 28)");
    queue.record_result(&Sent::all(3), Duration::from_millis(2));
    assert_eq!((queue.error(), queue.counts().written), (None, 5));
    assert_eq!(queue.take_cpu_time(), Duration::from_millis(3));
    assert_eq!(queue.take_cpu_time(), Duration::ZERO);
}

#[test]
fn silent_receiver_loses_records() {
    const RECORDS: usize = 3 * sink_queue::MAX_RECORDS;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let receiver = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let mut settings = settings();
    settings.events.sinks = vec![Sink::Syslog(crate::config::SyslogAddress::Unix(path))];
    let states = SinkStates::default();
    let sinks = Sinks::start(settings, states.clone());
    let denial = packet(Some(pod("web")));
    let start = Instant::now();
    for _ in 0..RECORDS {
        sinks.push(&denial);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let [queue] = &states.queues()[..] else { panic!("one sink") };
    let start = Instant::now();
    drop(sinks);
    assert!(start.elapsed() < FLUSH_TIMEOUT * 3, "{:?}", start.elapsed());
    // The thread ends once its last write has failed.
    assert!(queue.wait_end(Instant::now() + Duration::from_secs(10)));
    let SinkCounts { written, dropped, failed } = queue.counts();
    assert!(dropped >= RECORDS as u64 / 2 && failed == 0, "{dropped} dropped");
    assert_eq!(written + dropped, RECORDS as u64);
    assert!(queue.take_cpu_time() > Duration::ZERO && queue.error().is_some());
    drop(receiver);
}

#[test]
fn log_file_is_rotated_and_reopened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/denials.jsonl");
    let record = record("web");
    let line = record.line();
    let max_size = line.len() as u64 * 3;
    let mut sink = LogFileSink::new(LogFile { path: path.clone(), max_size, keep: 2 });
    let at = |suffix: &str| path.with_extension(format!("jsonl{suffix}"));
    let lines = |suffix: &str| fs::read(at(suffix)).map_or(0, |text| text.len() / line.len());
    for _ in 0..4 {
        let sent = sink.send(&[Arc::clone(&record), Arc::clone(&record)]);
        assert_eq!((sent.done, sent.failure.is_none()), (2, true));
    }
    assert_eq!([lines(""), lines(".1"), lines(".2"), lines(".3")], [2, 3, 3, 0]);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(sink.send(&[Arc::clone(&record), Arc::clone(&record)]).failure.is_none());
    assert_eq!([lines(""), lines(".1"), lines(".2"), lines(".3")], [1, 3, 3, 0]);

    // Another program rotates the file, or removes the directory.
    fs::rename(&path, directory.path().join("moved")).unwrap();
    assert!(sink.send(&[Arc::clone(&record)]).failure.is_none());
    assert_eq!(lines(""), 1);
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    assert!(sink.send(&[Arc::clone(&record)]).failure.is_none());
    assert_eq!(lines(""), 1);
    // A truncated file is not rotated too early.
    fs::write(&path, "").unwrap();
    assert!(sink.send(&vec![Arc::clone(&record); 3]).failure.is_none());
    assert_eq!([lines(""), lines(".1")], [3, 0]);
}

#[test]
fn log_file_follows_no_symlink() {
    let directory = tempfile::tempdir().unwrap();
    let (path, target) = (directory.path().join("log"), directory.path().join("target"));
    let mut sink = LogFileSink::new(LogFile { path: path.clone(), max_size: 1 << 20, keep: 1 });
    std::os::unix::fs::symlink(&target, &path).unwrap();
    let sent = sink.send(&[record("web")]);
    assert!(
        matches!(&sent.failure, Some(Failure::Retry { error, .. }) if with_causes(error).contains("open"))
    );
    assert!(sent.done == 0 && !target.exists());
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(sink.send(&[record("web")]).failure.is_some());
    fs::remove_file(&path).unwrap();
    assert_eq!(sink.send(&[record("web")]).done, 1);
}

#[test]
fn log_file_is_not_shared_with_other_users() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("target");
    fs::write(&target, "").unwrap();
    let open_directory = directory.path().join("open");
    fs::create_dir(&open_directory).unwrap();
    let path = open_directory.join("log");
    let mut sink = LogFileSink::new(LogFile { path: path.clone(), max_size: 1 << 20, keep: 1 });
    let mut error = || match sink.send(&[record("web")]).failure {
        Some(Failure::Retry { error, .. }) => with_causes(&error),
        other => panic!("{other:?}"),
    };
    fs::hard_link(&target, &path).unwrap();
    assert_eq!(error(), format!("{} has other names (hard links)", path.display()));
    assert_eq!(fs::read(&target).unwrap(), b"");
    fs::remove_file(&path).unwrap();
    let set_mode = |mode| fs::set_permissions(&open_directory, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o777);
    assert_eq!(error(), format!("{} can be changed by other users", open_directory.display()));
    if nix::unistd::geteuid().is_root() {
        let chown = |path: &std::path::Path, user| std::os::unix::fs::chown(path, Some(user), None).unwrap();
        for mode in [0o750, 0o1777] {
            set_mode(mode);
            chown(&open_directory, 65_534);
            assert_eq!(error(), format!("{} belongs to another user", open_directory.display()));
            chown(&open_directory, 0);
        }
        fs::write(&path, "").unwrap();
        chown(&path, 65_534);
        assert_eq!(error(), format!("{} belongs to another user", path.display()));
        fs::remove_file(&path).unwrap();
        set_mode(0o775);
    } else {
        set_mode(0o755);
    }
    assert_eq!(sink.send(&[record("web")]).done, 1);
}
