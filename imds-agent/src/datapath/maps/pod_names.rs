//! Pod metadata of interfaces, network namespaces and cgroups, in a pinned map. Processes that read events and counters use it
//! to name the pods. The programs do not read it.

use std::collections::BTreeMap;

use aya::maps::{HashMap, Map, MapData, MapError};
use imds_ebpf_common::{
    KubernetesRecord, PodRecord, Subject,
    names::{MAP_KUBERNETES, MAP_PODS},
};
use jiff::Timestamp;

use crate::{
    checksum::fnv1a,
    datapath::{
        Datapath, DatapathError, map_error,
        object::{self, Maps, ObjectError},
        pin::dir::PinDir,
    },
    encode::{field_text, nanoseconds, nonempty_text, text_field, timestamp},
    kube::{
        Pod,
        pod_ref::{NamespaceWatchStatus, PodContainer, PodRef, PodWatchStatus},
    },
};

/// Labels that identify the application of a pod, in order of preference.
const LABELS: [&str; 5] = ["app.kubernetes.io/name", "k8s-app", "app", "component", "name"];

/// Bits of [`KubernetesRecord::enabled`] and [`KubernetesRecord::connected`]: the watches of pods and of namespaces. The upper
/// half of [`KubernetesRecord::disputed`] is the number of known namespaces, and the second line of the error belongs to their
/// watch. The programs do not use the record, so that it needs no other layout.
const OF_PODS: u32 = 1;
const OF_NAMESPACES: u32 = 2;

/// Keys of the map, each with the [`fingerprint`] of the entry. The names themselves would take several times the memory.
pub(crate) type WrittenNames = BTreeMap<Subject, u64>;

/// Returns a hash of pod UID and container name, which determine the rest of an entry.
fn fingerprint(uid: &str, container: &str) -> u64 {
    fnv1a(&format!("{uid}/{container}"))
}

/// Reads the pod metadata of all subjects.
pub fn read(maps: &Maps) -> Result<BTreeMap<Subject, PodRef>, MapError> {
    let entries = object::present(maps.pods.iter());
    entries.map(|entry| entry.map(|(subject, record)| (subject, PodRef::from_record(&record)))).collect()
}

/// Map of pod metadata, for lookups of single subjects.
#[derive(Debug)]
pub struct Names(HashMap<MapData, Subject, PodRecord>);

impl Names {
    /// Opens the pinned map of pod metadata.
    pub fn open(pins: &PinDir) -> Result<Self, ObjectError> {
        object::open_map(pins, MAP_PODS, Map::HashMap).map(Self)
    }

    /// Returns the pod metadata of `subject`, or `None` if it is unknown.
    pub fn get(&self, subject: Subject) -> Option<PodRef> {
        self.0.get(&subject, 0).ok().as_ref().map(PodRef::from_record)
    }
}

impl Datapath {
    /// Replaces the pod names in the map. Returns the number of map updates.
    pub fn sync_pod_names(
        &mut self,
        names: &BTreeMap<Subject, PodContainer<'_>>,
    ) -> Result<usize, DatapathError> {
        let Self { maps, written_names, .. } = self;
        let written = match written_names {
            Some(written) => written,
            none => {
                let key = |identity: PodRef| {
                    fingerprint(&identity.uid, identity.container.as_deref().unwrap_or_default())
                };
                let before = read(maps).map_err(map_error(MAP_PODS))?.into_iter();
                none.insert(before.map(|(subject, identity)| (subject, key(identity))).collect())
            }
        };
        let mut writes = 0;
        let gone: Vec<_> = written.keys().filter(|subject| !names.contains_key(subject)).copied().collect();
        for subject in gone {
            object::removed(maps.pods.remove(&subject)).map_err(map_error(MAP_PODS))?;
            written.remove(&subject);
            writes += 1;
        }
        for (subject, PodContainer { pod, container }) in names {
            let container = container.unwrap_or_default();
            let fingerprint = fingerprint(&pod.uid, container);
            if written.get(subject) != Some(&fingerprint) {
                maps.pods.insert(subject, record(pod, container), 0).map_err(map_error(MAP_PODS))?;
                written.insert(*subject, fingerprint);
                writes += 1;
            }
        }
        Ok(writes)
    }

    /// Removes the metadata of one subject.
    pub(in crate::datapath) fn remove_pod_name(&mut self, subject: Subject) -> Result<(), DatapathError> {
        object::removed(self.maps.pods.remove(&subject)).map_err(map_error(MAP_PODS))?;
        if let Some(written) = &mut self.written_names {
            written.remove(&subject);
        }
        Ok(())
    }

    /// Records the status of the watches; `None` means that they are off.
    pub fn record_watch_status(
        &mut self,
        watch_status: Option<&PodWatchStatus>,
    ) -> Result<(), DatapathError> {
        let recorded = self.maps.kubernetes.set(0, watch_record(watch_status), 0);
        recorded.map_err(map_error(MAP_KUBERNETES))
    }
}

fn watch_record(watch_status: Option<&PodWatchStatus>) -> KubernetesRecord {
    let moment = |moment: Option<Timestamp>| moment.map_or(0, nanoseconds);
    let namespaces = watch_status.and_then(|watch_status| watch_status.namespaces.as_ref());
    let disputed = u64::from(watch_status.map_or(0, |watch_status| watch_status.disputed));
    let known = u64::from(namespaces.map_or(0, |namespaces| namespaces.known));
    let errors = [
        watch_status.and_then(|watch_status| watch_status.error.as_deref()),
        namespaces.and_then(|namespaces| namespaces.error.as_deref()),
    ];
    let [error, namespace_error] = errors.map(|error| error.unwrap_or_default().replace('\n', " "));
    KubernetesRecord {
        since: moment(watch_status.map(|watch_status| watch_status.since)),
        synced_at: moment(watch_status.and_then(|watch_status| watch_status.synced_at)),
        failed_at: moment(watch_status.and_then(|watch_status| watch_status.failed_at)),
        enabled: bits(watch_status.is_some(), namespaces.is_some()),
        connected: bits(
            watch_status.is_some_and(|watch_status| watch_status.connected),
            namespaces.is_some_and(|namespaces| namespaces.connected),
        ),
        pods: watch_status.map_or(0, |watch_status| watch_status.pods),
        unresolved: watch_status.map_or(0, |watch_status| watch_status.unresolved),
        disputed: (known << u32::BITS) | disputed,
        node: text_field(watch_status.map_or("", |watch_status| &watch_status.node)),
        error: text_field(format!("{error}\n{namespace_error}").trim_end()),
    }
}

fn bits(of_pods: bool, of_namespaces: bool) -> u32 {
    u32::from(of_pods) * OF_PODS + u32::from(of_namespaces) * OF_NAMESPACES
}

fn record(pod: &Pod, container: &str) -> PodRecord {
    let label = LABELS.iter().find_map(|&key| Some(format!("{key}={}", pod.labels.get(key)?)));
    PodRecord {
        namespace: text_field(&pod.namespace),
        name: text_field(&pod.name),
        service_account: text_field(&pod.service_account),
        container: text_field(container),
        label: text_field(&label.unwrap_or_default()),
        uid: text_field(&pod.uid),
    }
}

impl PodRef {
    /// Converts the value of the map.
    pub fn from_record(record: &PodRecord) -> Self {
        Self {
            namespace: field_text(&record.namespace),
            pod: field_text(&record.name),
            service_account: field_text(&record.service_account),
            container: nonempty_text(&record.container),
            label: nonempty_text(&record.label),
            uid: field_text(&record.uid),
        }
    }
}

/// Reads the status of the pod watch. Returns `None` if it is off.
pub fn read_watch_status(maps: &Maps) -> Result<Option<PodWatchStatus>, MapError> {
    Ok(PodWatchStatus::from_record(&maps.kubernetes.get(&0, 0)?))
}

impl PodWatchStatus {
    /// Converts the value of the map. Returns `None` if the pod watch is off.
    pub fn from_record(record: &KubernetesRecord) -> Option<Self> {
        let moment = |nanoseconds| (nanoseconds != 0).then(|| timestamp(nanoseconds));
        let mut errors = record.error.splitn(2, |&byte| byte == b'\n');
        let error = errors.next().unwrap_or_default();
        let number = |number| u32::try_from(number).unwrap_or(u32::MAX);
        (record.enabled & OF_PODS != 0).then(|| Self {
            node: field_text(&record.node),
            connected: record.connected & OF_PODS != 0,
            since: timestamp(record.since),
            synced_at: moment(record.synced_at),
            failed_at: moment(record.failed_at),
            error: moment(record.failed_at).map(|_| field_text(error)),
            pods: record.pods,
            unresolved: record.unresolved,
            disputed: number(record.disputed & u64::from(u32::MAX)),
            namespaces: (record.enabled & OF_NAMESPACES != 0).then(|| NamespaceWatchStatus {
                connected: record.connected & OF_NAMESPACES != 0,
                known: number(record.disputed >> u32::BITS),
                error: errors.next().and_then(nonempty_text),
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watch_status_survives_the_record() {
        let status = PodWatchStatus {
            node: "node-0".to_owned(),
            connected: true,
            since: timestamp(5),
            synced_at: None,
            failed_at: None,
            error: None,
            pods: 7,
            unresolved: 1,
            disputed: u32::MAX,
            namespaces: None,
        };
        let failed =
            PodWatchStatus { failed_at: Some(timestamp(6)), error: Some("a b".to_owned()), ..status.clone() };
        let of_namespaces = |connected, error: Option<&str>| {
            Some(NamespaceWatchStatus { connected, known: 9, error: error.map(str::to_owned) })
        };
        for namespaces in [
            None,
            of_namespaces(true, None),
            of_namespaces(false, Some("c d")),
            of_namespaces(true, Some("c")),
        ] {
            for (pods, connected) in [(&status, true), (&status, false), (&failed, true), (&failed, false)] {
                let expected = PodWatchStatus { connected, namespaces: namespaces.clone(), ..pods.clone() };
                assert_eq!(PodWatchStatus::from_record(&watch_record(Some(&expected))), Some(expected));
            }
        }
        assert_eq!(PodWatchStatus::from_record(&watch_record(None)), None);
    }
}
