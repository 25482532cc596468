//! Sinks of denial records: JSON lines, syslog and OpenTelemetry logs, with real receivers and real denied packets.

mod line_sinks;
mod otlp_receiver;
mod otlp_sink;
mod record_fields;
mod sink_failures;
mod syslog_sink;

use std::{fs, path::Path};

use imds_tests::{METADATA, PacketSocket, Pod, TestEnv, packets, poll::poll_until, probe::LONG};
use serde_json::Value;

/// Returns a configuration with these sinks, each the keys of an inline table.
fn sinks(sinks: &[String]) -> String {
    let sinks: Vec<_> = sinks.iter().map(|sink| format!("{{ {sink} }}")).collect();
    format!("[events]\nsinks = [{}]\n", sinks.join(", "))
}

/// Returns the keys of a sink of this type with a path, an address or a URL.
fn sink(kind: &str, key: &str, target: impl AsRef<str>) -> String {
    format!("type = '{kind}', {key} = '{}'", target.as_ref())
}

fn file_sink(path: &Path) -> String {
    sink("file", "path", path.to_str().unwrap())
}

/// Sends packets to the metadata service, each from another port.
fn send(pod: &Pod, ports: impl IntoIterator<Item = u16>) {
    let socket = PacketSocket::frames(&pod.netns, Pod::IFNAME);
    for port in ports {
        socket.send(&packets::frame(pod, &packets::syn(pod.address, METADATA, port, 1))).unwrap();
    }
}

/// Returns the records in a file of JSON lines. A line without its end is not read.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Waits for a number of records in a file of JSON lines.
#[track_caller]
fn wait_records(path: &Path, count: usize) -> Vec<Value> {
    poll_until(LONG, "records", || Some(records(path)).filter(|records| records.len() >= count))
}

/// Returns the error of each configured sink, as `status` shows it.
fn sink_errors(env: &TestEnv) -> Vec<(String, Option<String>)> {
    let output = env.imds_agent(&["status", "-o", "json"]).output();
    assert_eq!(output.status.code(), Some(0), "a failing sink is not a problem of the node: {output:?}");
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sinks = status["sinks"].as_array().unwrap().iter();
    sinks
        .map(|sink| (sink["sink"].as_str().unwrap().into(), sink["error"].as_str().map(Into::into)))
        .collect()
}

/// Waits until `status` shows an error of the only sink that contains `part`.
#[track_caller]
fn wait_failing(env: &TestEnv, part: &str) {
    poll_until(LONG, "the sink to fail", || {
        let errors = sink_errors(env);
        errors[0].1.as_ref().is_some_and(|error| error.contains(part)).then_some(())
    });
}

#[track_caller]
fn wait_working(env: &TestEnv) {
    poll_until(LONG, "the sinks to work", || {
        sink_errors(env).iter().all(|(_, error)| error.is_none()).then_some(())
    });
}

fn sink_records(env: &TestEnv, sink: &str, result: &str) -> u64 {
    env.metric(&format!("imds_agent_sink_records_total{{sink=\"{sink}\",result=\"{result}\"}}"))
}
