//! Clocks that jump or differ between agent and kernel.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aya::maps::{HashMap, Map, MapData};
use imds_ebpf_common::{
    Address,
    event_log::{DenialKey, DenialRecord},
};
use imds_tests::{
    Agent, AttachMode, PodLink,
    http::{DEFAULT, try_get},
    poll::poll_until,
    probe::LONG,
    skip_unless_disposable,
};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use serde_json::Value;

use super::{Case, Process, wrapped};

const YEAR: Duration = Duration::from_hours(365 * 24);

/// Asserts that the agent works regardless of the time: it enforces new pods, responds, and keeps counting and
/// reporting.
#[track_caller]
fn assert_works(case: &Case) {
    let late = case.env.add_pod(PodLink::Routed);
    case.env.wait_enforced(&late);
    let before = case.env.status().total.denied.packets;
    let events = case.metric("imds_agent_events_total ");
    case.env.status_when("the counters to go on", |status| status.total.denied.packets > before);
    poll_until(LONG, "events to go on", || (case.metric("imds_agent_events_total ") > events).then_some(()));
    let health = try_get(&case.env, DEFAULT, "/healthz").unwrap();
    assert_eq!(health.0, 200, "{health:?}");
    assert_reports(case);
}

/// Asserts that the report lists denials with ordered timestamps.
#[track_caller]
fn assert_reports(case: &Case) {
    let table = case.env.imds_agent(&["report"]).output();
    assert!(table.status.success(), "{table:?}");
    let report = case.env.imds_agent(&["report", "-o", "json"]).output();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let denials = report["denials"].as_array().unwrap();
    assert!(!denials.is_empty());
    for denial in denials {
        // RFC 3339 in UTC sorts like the times themselves.
        assert!(denial["first"].as_str() <= denial["last"].as_str(), "{denial}");
    }
}

#[track_caller]
fn assert_calm(agent: &Agent<'_>) {
    let log = agent.log();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}

/// The BPF programs use the kernel's clock. The agent's clock can differ, in a time namespace or after a machine was
/// migrated to another kernel.
#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn clocks_a_year_ahead_of_the_pins() {
    let case = Case::new(AttachMode::Clsact);
    let log = case.env.scratch_dir().join("log");
    case.under_flood(|| {
        let agent = case.agent().resync(1).spawn_ready();
        assert_works(&case);
        agent.kill9();

        let ahead = YEAR.as_secs().to_string();
        let unshare =
            ["unshare", "--time", "--monotonic", &ahead, "--boottime", &ahead, "--fork", "--kill-child"];
        let mut agent = Process::start(wrapped(&case, &unshare, &case.agent().resync(1)), &log);
        poll_until(LONG * 3, "an agent that is ahead", || {
            assert!(!agent.has_ended(), "{}", std::fs::read_to_string(&log).unwrap());
            case.env.try_status().is_ok_and(|status| status.is_ready()).then_some(())
        });
        assert_works(&case);
        drop(agent);

        let agent = case.agent().resync(1).spawn_ready();
        assert_works(&case);
        assert_calm(&agent);
    });
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn denial_records_with_impossible_times() {
    let case = Case::new(AttachMode::Clsact);
    let agent = case.agent().resync(1).spawn_ready();
    case.under_flood(|| assert_works(&case));
    agent.kill9();
    let pin = case.env.pin_dir().join("maps/imds_denials");
    let mut denials: HashMap<MapData, DenialKey, DenialRecord> =
        Map::HashMap(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    let (_, record) = denials.iter().next().unwrap().unwrap();
    let ahead = SystemTime::now() + YEAR;
    let ahead = u64::try_from(ahead.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap();
    for (sender, first, last) in [(1, ahead, ahead), (2, 0, 0), (3, u64::MAX, u64::MAX), (4, 0, u64::MAX)] {
        let key = DenialKey { address: Address::ANY, sender, hook: 1, verdict: 1 };
        denials.insert(key, DenialRecord { first, last, ..record }, 0).unwrap();
    }
    let agent = case.agent().resync(1).spawn_ready();
    case.under_flood(|| assert_works(&case));
    assert_calm(&agent);
    drop(agent);
    case.assert_well();
}

/// Sets the machine's clock forward or back by `by` seconds.
fn jump(by: i64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let then = i64::try_from(now.as_secs()).unwrap() + by;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(then, 0)).expect("set the clock");
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn wall_clock_jumps_a_year_and_back() {
    if skip_unless_disposable("sets the machine's clock") {
        return;
    }
    let case = Case::new(AttachMode::Clsact);
    let agent = case.agent().resync(1).spawn_ready();
    let year = i64::try_from(YEAR.as_secs()).unwrap();
    case.under_flood(|| {
        for by in [year, -year, -year, year] {
            jump(by);
            assert_works(&case);
        }
    });
    assert_calm(&agent);
    drop(agent);
    case.assert_well();
}
