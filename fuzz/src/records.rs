//! Decoders of the ring buffer and of pinned maps: any content can be printed as one line and as JSON, and proposed
//! rules are valid TOML with exemptions only.

use std::{collections::BTreeSet, mem, path::Path, ptr, slice};

use aya::Pod;
use imds_agent::{
    config::{Config, endpoint_set::Endpoint as ProtectedEndpoint},
    datapath::maps::config_record::EffectiveConfig,
    kube::pod_ref::{PodRef, PodWatchStatus},
    telemetry::{
        denial_report::DenialReport,
        event_record::{self, EventRecord},
    },
};
use imds_ebpf_common::{
    Address, ConfigRecord, Endpoint, Event, KubernetesRecord,
    event_log::{DenialKey, DenialRecord},
};
use jiff::Timestamp;

/// Interfaces for which the report proposes rules.
const PODS: [&str; 2] = ["veth0", "veth1"];

pub(crate) fn run(bytes: &[u8]) {
    let pod = PodRef::from_record(&filled(bytes));
    assert!(is_one_line(&pod.to_string()), "{pod:?}");
    if let Some(event) = event_record::decode(bytes) {
        show(&event, pod);
    }
    let _configuration = EffectiveConfig::from_record(&filled::<ConfigRecord>(bytes));
    let _lookup = PodWatchStatus::from_record(&filled::<KubernetesRecord>(bytes));
    let endpoint =
        ProtectedEndpoint::from_entry(Address::from_ipv6(filled(bytes)), &filled::<Endpoint>(bytes));
    report(bytes, &endpoint);
}

fn show(event: &Event, pod: PodRef) {
    let interface = |index: u32| (!index.is_multiple_of(3)).then(|| format!("veth{index}"));
    for pod in [None, Some(pod)] {
        let record = EventRecord::new(event, Timestamp::UNIX_EPOCH, interface, pod);
        assert!(is_one_line(&record.to_string()), "{record:?}");
        let json = serde_json::to_string(&record).expect("JSON");
        assert!(is_one_line(&json), "{json}");
    }
    assert!(event_record::senders(event).count() <= 3);
}

fn report(bytes: &[u8], endpoint: &ProtectedEndpoint) {
    let mut denials: Vec<(DenialKey, DenialRecord)> = bytes
        .chunks(size_of::<DenialKey>() + size_of::<DenialRecord>())
        .map(|bytes| (filled(bytes), filled(bytes.get(size_of::<DenialKey>()..).unwrap_or_default())))
        .collect();
    if let Some((first, _)) = denials.first_mut() {
        first.address = Address::from_ipv6(filled(bytes));
    }
    let pods = BTreeSet::from(PODS.map(str::to_owned));
    let report = DenialReport::new("/sys/fs/bpf/imds".into(), &denials, slice::from_ref(endpoint), &pods);
    let _json = serde_json::to_string(&report).expect("JSON");
    assert!(report.table().lines().all(is_one_line), "{}", report.table());
    let rules: toml::Table = report.rules.parse().unwrap_or_else(|error| panic!("{error}\n{}", report.rules));
    assert!(rules.keys().all(|key| key == "exempt"), "{rules:?}");
    // A denial with an impossible pod name gets a rule that the parser rejects.
    let _config = Config::parse(&report.rules, Path::new("rules"));
}

/// Reports whether the text has no control characters, which a terminal would interpret.
fn is_one_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// Returns a map value with these bytes, padded with zeros.
fn filled<T: Pod>(bytes: &[u8]) -> T {
    // SAFETY: zeros are a valid value of a `Pod` type.
    let mut value: T = unsafe { mem::zeroed() };
    let length = bytes.len().min(size_of::<T>());
    // SAFETY: any bytes are a valid value of a `Pod` type, and `length` is at most the size of the value.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), length) };
    value
}
