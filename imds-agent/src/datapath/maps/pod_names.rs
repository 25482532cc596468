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
    datapath::{
        Datapath, DatapathError, map_error,
        object::{self, Maps, ObjectError},
        pin::dir::PinDir,
    },
    encode::{field_text, nanoseconds, nonempty_text, text_field, timestamp},
    kube::{
        Pod,
        pod_ref::{PodContainer, PodRef, PodWatchStatus},
    },
};

/// Labels that identify the application of a pod, in order of preference.
const LABELS: [&str; 5] = ["app.kubernetes.io/name", "k8s-app", "app", "component", "name"];

/// Keys of the map, each with pod uid and container name, which determine the rest of the entry.
pub(crate) type WrittenNames = BTreeMap<Subject, (String, String)>;

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
                let key = |identity: PodRef| (identity.uid, identity.container.unwrap_or_default());
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
            if !written.get(subject).is_some_and(|(uid, written)| *uid == pod.uid && written == container) {
                maps.pods.insert(subject, record(pod, container), 0).map_err(map_error(MAP_PODS))?;
                written.insert(*subject, (pod.uid.clone(), container.to_owned()));
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

    /// Records the status of the pod watch; `None` means that it is off.
    pub fn record_watch_status(
        &mut self,
        watch_status: Option<&PodWatchStatus>,
    ) -> Result<(), DatapathError> {
        let moment = |moment: Option<Timestamp>| moment.map_or(0, nanoseconds);
        let error = watch_status.and_then(|watch_status| watch_status.error.as_deref());
        let record = KubernetesRecord {
            since: moment(watch_status.map(|watch_status| watch_status.since)),
            synced_at: moment(watch_status.and_then(|watch_status| watch_status.synced_at)),
            failed_at: moment(watch_status.and_then(|watch_status| watch_status.failed_at)),
            enabled: watch_status.is_some().into(),
            connected: watch_status.is_some_and(|watch_status| watch_status.connected).into(),
            pods: watch_status.map_or(0, |watch_status| watch_status.pods),
            unresolved: watch_status.map_or(0, |watch_status| watch_status.unresolved),
            disputed: watch_status.map_or(0, |watch_status| watch_status.disputed.into()),
            node: text_field(watch_status.map_or("", |watch_status| &watch_status.node)),
            error: text_field(error.unwrap_or_default()),
        };
        let recorded = self.maps.kubernetes.set(0, record, 0);
        recorded.map_err(map_error(MAP_KUBERNETES))
    }
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
        (record.enabled == 1).then(|| Self {
            node: field_text(&record.node),
            connected: record.connected == 1,
            since: timestamp(record.since),
            synced_at: moment(record.synced_at),
            failed_at: moment(record.failed_at),
            error: moment(record.failed_at).map(|_| field_text(&record.error)),
            pods: record.pods,
            unresolved: record.unresolved,
            disputed: u32::try_from(record.disputed).unwrap_or(u32::MAX),
        })
    }
}
