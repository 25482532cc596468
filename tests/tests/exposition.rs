//! Metrics in the formats that clients request, checked by Prometheus' `promtool`, and alerts as Prometheus evaluates
//! them.

use std::{
    fs, io,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use imds_tests::{
    Agent, METADATA, PodLink, TestEnv, WHOLE_TEST,
    http::{DEFAULT, Response, try_get, try_get_as},
    known_here,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip,
};

/// The `Accept` header of Prometheus 2.
const PROMETHEUS: &str = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// Returns promtool: the program that `PROMTOOL` names, otherwise the one in PATH.
fn promtool() -> Command {
    Command::new(std::env::var_os("PROMTOOL").unwrap_or_else(|| "promtool".into()))
}

/// Runs promtool with an input. Returns `None` and prints a skip notice if it is not installed.
fn run_promtool(arguments: &[&str], directory: &Path, input: &str) -> Option<Output> {
    let mut command = promtool();
    command.args(arguments).current_dir(directory);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            skip(WHOLE_TEST, "there is no promtool on this machine (package prometheus)");
            return None;
        }
        child => child.unwrap(),
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}

#[track_caller]
fn assert_clean(output: &Output) {
    assert!(output.status.success(), "{output:?}");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(!messages.contains("error") && !messages.contains("no help text"), "{messages}");
}

fn scrape(env: &TestEnv, accept: &str) -> Response {
    poll_until(LONG, "metrics to be served", || {
        try_get_as(env, DEFAULT, "/metrics", accept).ok().filter(|response| response.status == 200)
    })
}

/// Removes the values, which differ between scrapes, and the program runs, which appear while any process of the
/// machine makes the kernel collect them.
fn series(metrics: &str) -> Vec<&str> {
    let samples =
        metrics.lines().filter(|line| !line.starts_with('#') && !line.starts_with("imds_agent_program_run"));
    samples.filter_map(|line| line.rsplit_once(' ')).map(|(series, _)| series).collect()
}

#[test]
fn accept_header_selects_format() {
    let env = TestEnv::new();
    let _agent = env.agent().spawn_ready();
    let plain = scrape(&env, "text/plain;version=0.0.4");
    assert!(plain.has_header("content-type: text/plain; version=0.0.4; charset=utf-8"), "{}", plain.head);
    assert!(plain.has_header("vary: accept"), "{}", plain.head);
    assert!(plain.body.contains("# TYPE imds_agent_packets_total counter\n"), "{}", plain.body);
    assert!(!plain.body.contains("# EOF"), "{}", plain.body);
    let open = scrape(&env, PROMETHEUS);
    let expected = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(open.has_header(expected), "{}", open.head);
    assert!(open.body.contains("# TYPE imds_agent_packets counter\n"), "{}", open.body);
    assert!(open.body.ends_with("# EOF\n"), "{}", open.body);
    assert_eq!(series(&plain.body), series(&open.body));
    // A client without an `Accept` header gets the text format, which every client supports.
    let by_default = try_get(&env, DEFAULT, "/metrics").unwrap().1;
    assert_eq!(series(&by_default), series(&plain.body));
    assert!(!by_default.contains("# EOF"), "{by_default}");
}

#[test]
fn promtool_reads_both_formats() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let _agent = env.agent().hooks(&known_here(&["from_pod", "node_egress", "socket"])).spawn_ready();
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    let text = scrape(&env, "text/plain").body;
    let Some(output) = run_promtool(&["check", "metrics"], env.scratch_dir(), &text) else { return };
    assert_clean(&output);
    assert!(output.stderr.is_empty(), "{output:?}");
    // `check metrics` reads only the text format. The importer reads OpenMetrics, with a timestamp in each sample.
    let open = scrape(&env, PROMETHEUS).body;
    let timed: String = open
        .lines()
        .map(|line| if line.starts_with('#') { format!("{line}\n") } else { format!("{line} 1700000000\n") })
        .collect();
    let (file, blocks) = (env.scratch_dir().join("open"), env.scratch_dir().join("blocks"));
    fs::write(&file, timed).unwrap();
    let arguments =
        ["tsdb", "create-blocks-from", "openmetrics", file.to_str().unwrap(), blocks.to_str().unwrap()];
    assert_clean(&run_promtool(&arguments, env.scratch_dir(), "").unwrap());
}

#[test]
fn alerts_fire_on_their_conditions() {
    let directory = tempfile_dir();
    let files = [
        ("rules.yaml", include_str!("../../deploy/prometheus/rules.yaml")),
        ("rules.test.yaml", include_str!("../../deploy/prometheus/rules.test.yaml")),
    ];
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
    if let Some(output) = run_promtool(&["check", "rules", "rules.yaml"], &directory, "") {
        assert_clean(&output);
        let output = run_promtool(&["test", "rules", "rules.test.yaml"], &directory, "").unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    fs::remove_dir_all(directory).unwrap();
    // Each alert needs at least one case in which it fires, and one in which it does not.
    let [(_, rules), (_, cases)] = files;
    for alert in rules.split("- alert: ").skip(1).map(|alert| alert.lines().next().unwrap()) {
        let query = format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}");
        let results: Vec<_> =
            cases.split(&query).skip(1).map(|case| case.lines().nth(2).unwrap().trim()).collect();
        for expected in ["exp_samples:", "exp_samples: []"] {
            assert!(results.contains(&expected), "{alert}: {expected}");
        }
    }
}

fn tempfile_dir() -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("imds-rules-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

#[track_caller]
fn value(metrics: &str, series: &str) -> f64 {
    let found = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {series} in:\n{metrics}"))
}

#[test]
fn process_metrics_are_served() {
    let env = TestEnv::new();
    let agent = env.agent().spawn_ready();
    let metrics = scrape(&env, "").body;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
    };
    let (virtual_size, resident) = (kib("VmSize:"), kib("VmRSS:"));
    let near = |value: f64, expected: f64| value > expected * 0.5 && value < expected * 2.0;
    assert!(near(value(&metrics, "process_virtual_memory_bytes"), virtual_size), "{metrics}");
    assert!(near(value(&metrics, "process_resident_memory_bytes"), resident), "{metrics}");
    assert!(value(&metrics, "process_cpu_seconds_total") >= 0.0, "{metrics}");
    let open = value(&metrics, "process_open_fds");
    assert!(open > 5.0 && open < value(&metrics, "process_max_fds"), "{metrics}");
    let started = fs::metadata(format!("/proc/{}", agent.pid())).unwrap().modified().unwrap();
    let started = started.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((value(&metrics, "process_start_time_seconds") - started).abs() < 60.0, "{metrics}");
}

#[test]
fn run_times_are_collected_on_request() {
    const RUNS: &str = r#"imds_agent_program_runs_total{hook="from_pod",program="imds_from_pod"}"#;
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let agent = env.agent().config("[metrics]\nprogram_run_time = true\n").spawn_ready();
    assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    let metrics = poll_until(LONG, "runs to be counted", || {
        let metrics = scrape(&env, "").body;
        metrics.contains(RUNS).then_some(metrics)
    });
    assert!(value(&metrics, RUNS) >= 1.0, "{metrics}");
    assert!(value(&metrics, &RUNS.replace("runs_total", "run_time_seconds_total")) > 0.0, "{metrics}");
    // Another process can make the kernel collect them, too.
    poll_until(LONG, "the agent to enable the collection", || enables_collection(&agent).then_some(()));
    drop(agent);
    let agent = env.agent().spawn_ready();
    assert!(!enables_collection(&agent), "collection must be off by default");
}

/// Reports whether the agent keeps the kernel collecting run times. Other processes may do so concurrently.
fn enables_collection(agent: &Agent<'_>) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().flatten();
    let mut targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
    targets.any(|target| target == Path::new("anon_inode:bpf-stats"))
}

#[test]
fn config_hash_is_that_of_the_status() {
    let env = TestEnv::new();
    let hash = |env: &TestEnv| {
        let text = env.status().configuration.unwrap().hash;
        assert_eq!(text.len(), 16, "{text}");
        u64::from_str_radix(&text, 16).unwrap()
    };
    let agent = env.agent().config("mode = 'audit'\n").spawn_ready();
    let audited = hash(&env);
    let folded = format!("imds_agent_config_hash {}", (audited >> 48) ^ (audited & 0xffff_ffff_ffff));
    let metrics = scrape(&env, "").body;
    assert!(metrics.lines().any(|line| line == folded), "no {folded} in:\n{metrics}");
    drop(agent);
    // A restart with the same configuration increases the generation.
    let agent = env.agent().config("mode = 'audit'\n").spawn_ready();
    assert_eq!(hash(&env), audited);
    drop(agent);
    let _agent = env.agent().config("mode = 'enforce'\n").spawn_ready();
    assert_ne!(hash(&env), audited);
}

#[test]
fn exemption_change_changes_the_hash() {
    let env = TestEnv::new();
    let file = env.scratch_dir().join("imds.toml");
    let write = |exemptions: &str| {
        fs::write(&file, format!("{exemptions}[hooks]\nsocket = false\nnode_egress = false\n")).unwrap();
    };
    write("");
    let _agent = env.imds_agent(&["run"]).config_file(file.to_str().unwrap()).spawn_ready();
    let hash = || value(&scrape(&env, "").body, "imds_agent_exemptions_hash");
    let before = hash();
    write("[[exempt]]\nname = 'one'\ninterface = 'none*'\n");
    poll_until(LONG, "the hash to change", || ((hash() - before).abs() > 0.5).then_some(()));
    write("");
    poll_until(LONG, "the hash to be the first one again", || ((hash() - before).abs() < 0.5).then_some(()));
}
