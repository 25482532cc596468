//! Maps that are full, which must not open access.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::{self, NonNull},
};

use aya::{
    Pod as Plain,
    maps::{HashMap, Map, MapData, PerCpuHashMap, PerCpuValues},
};
use imds_ebpf_common::{
    Counter, CounterKey, Endpoint, Event, ExemptionRecord, Hook, InterfaceRecord, PodRecord, Verdict,
};
use imds_tests::{
    AttachMode, METADATA, Pod, PodLink, flood::Flood, hook, poll::poll_until, probe::LONG, scaled,
};
use nix::{
    sys::signal::Signal,
    unistd::{SysconfVar, sysconf},
};

use super::{Case, signal};

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn full_counter_maps() {
    let case = Case::new(AttachMode::Clsact);
    let mut counters: PerCpuHashMap<MapData, CounterKey, Counter> =
        Map::PerCpuHashMap(open(&case, "imds_counters")).try_into().unwrap();
    let cpus = aya::util::nr_cpus().unwrap();
    let value = || PerCpuValues::try_from(vec![Counter::default(); cpus]).unwrap();
    let mut added = 0_u32;
    while counters
        .insert(CounterKey::new(1_000_000 + added, Hook::FromPod, Verdict::Denied), value(), 0)
        .is_ok()
    {
        added += 1;
    }
    println!("{added} counters");
    assert!(added > 100, "{added}");
    // A pod without a counter is denied as well, from its first packet.
    let agent = case.agent().spawn();
    let late = case.under_flood(|| add_enforced_pod(&case));
    drop(agent);
    case.env.unload();
    case.env.assert_open(&late);
}

fn open(case: &Case, name: &str) -> MapData {
    MapData::from_pin(case.env.pin_dir().join("maps").join(name)).unwrap()
}

/// Adds a pod and asserts that it is enforced.
fn add_enforced_pod(case: &Case) -> Pod {
    let late = case.env.add_pod(PodLink::Routed);
    case.env.wait_enforced(&late);
    case.env.assert_blocked(&late);
    late
}

/// Fills a map with unrelated entries.
fn fill<const KEY: usize, const VALUE: usize>(case: &Case, name: &str) -> u32
where
    [u8; KEY]: Plain,
    [u8; VALUE]: Plain,
{
    let mut map: HashMap<MapData, [u8; KEY], [u8; VALUE]> =
        Map::HashMap(open(case, name)).try_into().unwrap();
    let mut added = 0_u32;
    let key = |number: u32| {
        let mut key = [0; KEY];
        key[..4].copy_from_slice(&(1_000_000 + number).to_ne_bytes());
        key
    };
    while map.insert(key(added), [0; VALUE], 0).is_ok() {
        added += 1;
    }
    println!("{name}: {added} entries");
    assert!(added > 100, "{name}: {added}");
    added
}

/// Name of a map, and the function that fills it.
type Filled = (&'static str, fn(&Case, &str) -> u32);

const FILLED: [Filled; 5] = [
    ("imds_interfaces", fill::<4, { size_of::<InterfaceRecord>() }>),
    ("imds_exempt", fill::<32, { size_of::<ExemptionRecord>() }>),
    ("imds_endpoints", fill::<16, { size_of::<Endpoint>() }>),
    ("imds_pods", fill::<16, { size_of::<PodRecord>() }>),
    ("imds_denials", fill::<32, 1088>),
];

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn full_user_space_maps() {
    for (name, fill) in FILLED {
        let case = Case::new(AttachMode::Clsact);
        // The agent removes unrelated entries at its start, and tolerates those that appear while it runs.
        fill(&case, name);
        case.under_flood(|| {
            let agent = case.agent().resync(3600).spawn_ready();
            fill(&case, name);
            let late = add_enforced_pod(&case);
            // Only the map of interfaces gets a new entry.
            let error = "failed to read or write map";
            if name == "imds_interfaces" {
                agent.wait_for_log(error, LONG);
            }
            let is_said = agent.log().contains(error);
            assert_eq!(is_said, name == "imds_interfaces", "{name}: {}", agent.log());
            agent.kill9();
            let agent = case.agent().spawn_ready();
            case.env.assert_blocked(&late);
            agent.kill9();
        });
        case.assert_well();
    }
}

/// An exemption that does not fit is reported, and does not prevent the enforcement of other pods.
#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn more_exemptions_than_fit() {
    const PODS: u32 = 66;
    const ENDPOINTS: u32 = 250;
    let case = Case::new(AttachMode::Clsact);
    let crowd: Vec<_> = (0..PODS).map(|_| case.env.add_pod(PodLink::Routed)).collect();
    let names = (0..ENDPOINTS).map(|number| format!("'e{number}'")).collect::<Vec<_>>().join(", ");
    let endpoints = (0..ENDPOINTS)
        .map(|number| format!("[[endpoint]]\nname = 'e{number}'\naddress = '203.0.113.{number}'\n"));
    let rule = format!("[[exempt]]\nname = 'all'\ninterface = 'veth*'\nendpoints = [{names}]\n");
    let config = endpoints.chain([rule]).collect::<String>();
    case.under_flood(|| {
        for _ in 0..scaled(2) {
            // The log, because the status takes long with this number of exemptions.
            let agent = case.agent().config(&config).spawn();
            agent.wait_for_log("failed to read or write map imds_exempt", LONG * 6);
            println!("{} of {} exemptions", case.env.status().exemptions.len(), PODS * ENDPOINTS);
            let late = case.env.add_pod(PodLink::Routed);
            poll_until(LONG * 6, "a new pod to be enforced", || {
                let programs = hook::programs(&case.env.node, &late.host_ifname);
                programs.first().is_some_and(hook::Attached::is_ours).then_some(())
            });
            case.env.assert_blocked(&late);
            agent.kill9();
        }
    });
    // A pod that no rule selects any more is denied again.
    case.agent().spawn_ready().kill9();
    case.env.assert_blocked(&crowd[0]);
    drop(crowd);
    case.assert_well();
}

/// Write and read positions of a ring buffer, which are in the two pages before its data (kernel/bpf/ringbuf.c).
struct Ring {
    pages: [NonNull<u64>; 2],
    room: u64,
}

impl Ring {
    fn new(case: &Case) -> Self {
        let map = open(case, "imds_events");
        let page = usize::try_from(sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap()).unwrap();
        let pages = [0, page].map(|offset| {
            let (fd, offset) = (map.fd().as_fd().as_raw_fd(), offset.try_into().unwrap());
            // SAFETY: creates a new mapping of one page at an address that the kernel chooses.
            let mapped =
                unsafe { libc::mmap(ptr::null_mut(), page, libc::PROT_READ, libc::MAP_SHARED, fd, offset) };
            assert_ne!(mapped, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            NonNull::new(mapped.cast()).unwrap()
        });
        Self { pages, room: map.info().unwrap().max_entries().into() }
    }

    fn is_full(&self) -> bool {
        // SAFETY: the pages stay mapped for the lifetime of the process and begin with the two positions.
        let [read, written] = self.pages.map(|page| unsafe { page.read_volatile() });
        // Each event has a header of 8 bytes.
        written - read + (size_of::<Event>() as u64 + 8) > self.room
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn unread_events() {
    let case = Case::with_sockets(AttachMode::Clsact);
    let crowd: Vec<_> = (0..scaled(60).max(20)).map(|_| case.env.add_pod(PodLink::Routed)).collect();
    let agent = case.agent().resync(1).spawn_ready();
    case.under_flood(|| {
        signal(agent.pid(), Signal::SIGSTOP);
        let ring = Ring::new(&case);
        let flood = Flood::udp_of_all(&crowd, METADATA);
        poll_until(LONG * 12, "a full ring buffer", || ring.is_full().then_some(()));
        let denied = case.env.status().total.denied.packets;
        let sent = flood.sent();
        case.env.status_when("packets to be counted with a full ring buffer", |status| {
            status.total.denied.packets > denied && flood.sent() > sent
        });
        signal(agent.pid(), Signal::SIGCONT);
        poll_until(LONG, "an agent that reads", || (!ring.is_full()).then_some(()));
        add_enforced_pod(&case);
    });
    println!("{} events emitted afterwards", case.metric("imds_agent_events_total "));
    drop(agent);
    drop(crowd);
    case.assert_well();
}
