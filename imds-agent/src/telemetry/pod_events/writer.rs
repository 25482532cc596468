//! Sends Events about denied pods to the API server.

use std::{collections::BTreeMap, future, net::IpAddr, sync::Arc};

use tokio::time::{sleep, sleep_until};

use super::{
    denied_pods::DeniedPods,
    event_queue::{DeniedRequest, PendingWrite},
};
use crate::{
    kube::{Backoff, ClusterClient, NewEvent, Regarding, RequestError},
    telemetry::denial_report::DenialSubject,
};

/// Names of the protected endpoints by address.
pub(crate) type EndpointNames = BTreeMap<IpAddr, String>;

/// Writes Events about the pods of `denied` until it is dropped.
pub(crate) async fn write_events(
    denied: Arc<DeniedPods>,
    mut writer: ClusterClient,
    endpoints: EndpointNames,
) {
    let (mut backoff, mut last_error) = (Backoff::default(), None);
    loop {
        wait_until_due(&denied).await;
        while let Some(write) = denied.take_due() {
            let error = match write_event(&mut writer, &write, &endpoints).await {
                Ok(name) => {
                    denied.on_written(&write, name);
                    backoff.reset();
                    if last_error.take().is_some() {
                        log::info!("writing Kubernetes Events succeeds again");
                    }
                    continue;
                }
                Err(error) => error,
            };
            denied.on_failed(&write, error.code);
            let text = error.to_string();
            if last_error.as_ref() != Some(&text) {
                let pod = &write.pod;
                log::warn!("failed to write a Kubernetes Event about pod {pod}: {text}");
                last_error = Some(text);
            }
            // An answer about one namespace does not concern the others.
            if matches!(error.code, None | Some(401)) {
                sleep(backoff.next_delay(error.retry_after)).await;
            }
        }
    }
}

async fn wait_until_due(denied: &DeniedPods) {
    loop {
        let due = async {
            match denied.next_due() {
                Some(due) => sleep_until(due.into()).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            () = due => return,
            () = denied.changed() => {}
        }
    }
}

/// Creates or updates an Event. Returns its name.
async fn write_event(
    writer: &mut ClusterClient,
    write: &PendingWrite,
    endpoints: &EndpointNames,
) -> Result<String, RequestError> {
    let pod = &write.pod;
    if let Some(name) = &write.name {
        writer.update_event(&pod.namespace, name, &write.series).await?;
        return Ok(name.clone());
    }
    let is_audited = write.key.1.is_audited;
    let event = NewEvent {
        regarding: Regarding::Pod {
            namespace: pod.namespace.clone(),
            name: pod.pod.clone(),
            uid: pod.uid.clone(),
        },
        is_warning: !is_audited,
        reason: if is_audited { "MetadataAccessAudited" } else { "MetadataAccessDenied" },
        action: if is_audited { "Audit" } else { "Deny" },
        note: note(write, endpoints),
        time: write.first,
        series: write.series,
    };
    writer.create_event(&event).await
}

fn note(
    PendingWrite { key: (_, request), pod, comm, .. }: &PendingWrite,
    endpoints: &EndpointNames,
) -> String {
    let DeniedRequest { hook, is_audited, is_rule_audited, address } = request;
    let name = endpoints.get(address);
    let endpoint = name.map_or_else(|| address.to_string(), |name| format!("{name} ({address})"));
    let process = comm.as_ref().map(|comm| format!(" by process {comm:?}")).unwrap_or_default();
    let verdict = if *is_audited { "Audited" } else { "Denied" };
    let consequence = if *is_rule_audited {
        "An exemption rule with audit = true allows it. The narrowest rule for the pod is"
    } else if *is_audited {
        "Mode enforce denies it unless an exemption rule matches the pod"
    } else {
        "Needs an exemption rule of the node's operator"
    };
    let mut rule = DenialSubject::of_pod(pod).pod_keys();
    rule.extend(name.map(|name| format!("endpoints = [{name:?}]")));
    let rule = rule.join(", ");
    format!(
        "{verdict} access to the metadata endpoint {endpoint} at hook {hook}{process}. {consequence}: {rule}"
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use jiff::Timestamp;

    use super::*;
    use crate::kube::{EventSeries, pod_ref::PodRef};

    #[test]
    fn note_names_the_rule() {
        let address = Ipv4Addr::new(169, 254, 169, 254).into();
        let pod = PodRef {
            namespace: "web".into(),
            pod: "api-0".into(),
            service_account: "api".into(),
            container: None,
            label: Some("app=api".into()),
            uid: "u".into(),
        };
        let mut write = PendingWrite {
            key: (
                "u".into(),
                DeniedRequest { hook: "socket", is_audited: false, is_rule_audited: false, address },
            ),
            name: None,
            pod,
            comm: Some("curl".into()),
            first: Timestamp::UNIX_EPOCH,
            series: EventSeries { count: 1, last: Timestamp::UNIX_EPOCH },
        };
        let names = EndpointNames::from([(address, "imds".to_owned())]);
        assert_eq!(
            note(&write, &names),
            "Denied access to the metadata endpoint imds (169.254.169.254) at hook socket by process \"curl\". Needs an \
             exemption rule of the node's operator: namespace = \"web\", service_account = \"api\", pod_selector = { \
             match_labels = { \"app\" = \"api\" } }, endpoints = [\"imds\"]"
        );
        write.key.1.is_audited = true;
        write.comm = None;
        assert_eq!(
            note(&write, &EndpointNames::new()),
            "Audited access to the metadata endpoint 169.254.169.254 at hook socket. Mode enforce denies it unless an \
             exemption rule matches the pod: namespace = \"web\", service_account = \"api\", pod_selector = { match_labels \
             = { \"app\" = \"api\" } }"
        );
    }
}
