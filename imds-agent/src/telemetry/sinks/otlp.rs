//! Sink that sends OpenTelemetry logs: OTLP/HTTP with JSON, over the HTTP client of the pod watch.

use std::{fs, path::Path, sync::Arc, time::Duration};

use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt as _, Limited};
use kube_client::{Client, Config as ClientConfig, client::Body};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use super::{
    SinkSettings,
    sink_error::{Failure, Sent, SinkError},
    sink_record::SinkRecord,
};
use crate::{config::Otlp, encode::nanoseconds, version::VERSION};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest delay that a receiver can request.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// Longest response in bytes.
const MAX_RESPONSE: usize = 64 << 10;
/// Longest part of an error response in the log, in characters.
const MAX_MESSAGE: usize = 200;
const AGENT_NAME: &str = concat!("imds-agent/", env!("CARGO_PKG_VERSION"));
/// Severities `INFO` and `WARN` of the data model.
const INFO: u8 = 9;
const WARN: u8 = 13;

pub(super) struct OtlpSink {
    config: Otlp,
    /// Attributes of the node.
    resource: Value,
    connection: Option<(Runtime, Client)>,
}

/// Result of a request that the receiver answered with success.
#[derive(Debug, Default, Eq, PartialEq)]
struct Accepted {
    rejected: usize,
    message: String,
}

impl OtlpSink {
    /// Time to wait for a full batch.
    pub(super) const LINGER: Duration = Duration::from_secs(1);

    pub(super) fn new(config: Otlp, settings: &SinkSettings) -> Self {
        let mut attributes = vec![
            text_attribute("service.name", "imds-agent"),
            text_attribute("service.version", VERSION),
            text_attribute("host.name", &settings.hostname),
        ];
        if settings.watches_pods {
            attributes.push(text_attribute("k8s.node.name", &settings.node));
        }
        Self { config, resource: json!({ "attributes": attributes }), connection: None }
    }

    pub(super) fn send(&mut self, batch: &[Arc<SinkRecord>]) -> Sent {
        match self.post(batch) {
            Ok(Accepted { rejected: 0, .. }) => Sent::all(batch.len()),
            Ok(Accepted { rejected, message }) => {
                let count = rejected.min(batch.len());
                let error = SinkError::PartialSuccess { count, message };
                Sent { done: batch.len(), failed: count, failure: Some(Failure::Rejected(error)) }
            }
            Err(Failure::Rejected(error)) => {
                Sent { done: batch.len(), failed: batch.len(), failure: Some(Failure::Rejected(error)) }
            }
            Err(failure @ Failure::Retry { .. }) => Sent { failure: Some(failure), ..Sent::default() },
        }
    }

    fn post(&mut self, batch: &[Arc<SinkRecord>]) -> Result<Accepted, Failure> {
        let request = self.request(batch).map_err(retry)?;
        let (runtime, client) = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(connect(&self.config).map_err(retry)?),
        };
        let exchange = async {
            let response = client.send(request).await.map_err(|error| SinkError::Request(error.into()))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_RESPONSE).collect().await.map_err(SinkError::Request)?;
            Ok((head.status, head.headers, body.to_bytes()))
        };
        let exchange = async { timeout(REQUEST_TIMEOUT, exchange).await };
        let (status, headers, body) =
            runtime.block_on(exchange).unwrap_or(Err(SinkError::Timeout(REQUEST_TIMEOUT))).map_err(retry)?;
        outcome(status, &headers, &self.without_path(&body))
    }

    fn request(&self, batch: &[Arc<SinkRecord>]) -> Result<Request<Body>, SinkError> {
        let Otlp { url, headers, header_files, .. } = &self.config;
        // The client adds scheme and host.
        let target = url.path_and_query().map_or("/", |target| target.as_str());
        let mut request = Request::new(Body::from(self.body(batch).to_string().into_bytes()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = target.parse::<Uri>().map_err(|error| SinkError::Request(error.into()))?;
        let own = request.headers_mut();
        own.extend(headers.iter().cloned());
        own.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        own.insert(ACCEPT, HeaderValue::from_static("application/json"));
        own.insert(USER_AGENT, HeaderValue::from_static(AGENT_NAME));
        for (name, path) in header_files {
            // Read for each request, because credentials are rotated.
            own.insert(name, read_header(path)?);
        }
        Ok(request)
    }

    /// Returns a response without the path of the URL, which may be secret. Receivers name it in errors.
    fn without_path(&self, body: &[u8]) -> String {
        let body = String::from_utf8_lossy(body);
        match self.config.url.path() {
            "" | "/" => body.into_owned(),
            path => body.replace(path, "PATH"),
        }
    }

    fn body(&self, batch: &[Arc<SinkRecord>]) -> Value {
        let records: Vec<_> = batch.iter().map(|record| log_record(record)).collect();
        let scope = json!({ "name": "imds-agent", "version": VERSION });
        json!({ "resourceLogs": [{
            "resource": self.resource,
            "scopeLogs": [{ "scope": scope, "logRecords": records }],
        }] })
    }
}

fn connect(config: &Otlp) -> Result<(Runtime, Client), SinkError> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(SinkError::Runtime)?;
    let mut server = http::uri::Parts::default();
    server.scheme = config.url.scheme().cloned();
    server.authority = config.url.authority().cloned();
    server.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    let server = Uri::from_parts(server).map_err(|error| SinkError::Request(error.into()))?;
    let mut client = ClientConfig::new(server);
    client.connect_timeout = Some(CONNECT_TIMEOUT);
    // The sink retries with its own backoff.
    client.default_retry = false;
    if config.url.scheme_str() == Some("http") {
        // No certificate is verified. Avoid loading the system's, which a minimal image does not have.
        client.root_cert = Some(Vec::new());
    }
    // The client reads this file again after changes.
    client.root_cert_file.clone_from(&config.ca_file);
    // The client starts a task on the runtime.
    let client = runtime.block_on(async { Client::try_from(client) });
    Ok((runtime, client.map_err(|error| SinkError::Client(Box::new(error)))?))
}

fn read_header(path: &Path) -> Result<HeaderValue, SinkError> {
    let text = fs::read_to_string(path).map_err(super::io_failed("read", &path.display()))?;
    let mut value =
        HeaderValue::try_from(text.trim()).map_err(|_| SinkError::InvalidHeader(path.to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Converts a response, as the specification of OTLP/HTTP requires.
fn outcome(status: StatusCode, headers: &HeaderMap, body: &str) -> Result<Accepted, Failure> {
    if status.is_success() {
        return Ok(accepted(body));
    }
    let error = SinkError::Status { status, message: excerpt(body) };
    let is_temporary = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    );
    if !is_temporary {
        return Err(Failure::Rejected(error));
    }
    let after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let after = after.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    Err(Failure::Retry { error, after })
}

/// Reads `partialSuccess` of a response. JSON has 64-bit numbers as strings.
fn accepted(body: &str) -> Accepted {
    let response: Value = serde_json::from_str(body).unwrap_or_default();
    let Some(partial) = response.get("partialSuccess") else { return Accepted::default() };
    let rejected = partial
        .get("rejectedLogRecords")
        .and_then(|count| count.as_u64().or_else(|| count.as_str()?.parse().ok()));
    Accepted {
        rejected: rejected.and_then(|count| count.try_into().ok()).unwrap_or_default(),
        message: excerpt(partial.get("errorMessage").and_then(Value::as_str).unwrap_or_default()),
    }
}

fn excerpt(text: &str) -> String {
    text.trim().chars().take(MAX_MESSAGE).collect()
}

fn retry(error: SinkError) -> Failure {
    Failure::Retry { error, after: None }
}

/// Returns the log record of a denial or a request. Names of attributes are those of the semantic conventions, if these have one.
pub(super) fn log_record(record: &SinkRecord) -> Value {
    let (number, text) = if record.is_denied() { (WARN, "WARN") } else { (INFO, "INFO") };
    let event = if record.http.is_some() { "imds_agent.request" } else { "imds_agent.denial" };
    let time = nanoseconds(record.time).to_string();
    json!({
        "timeUnixNano": time,
        "observedTimeUnixNano": time,
        "severityNumber": number,
        "severityText": text,
        "eventName": event,
        "body": { "stringValue": record.to_string() },
        "attributes": attributes(record),
    })
}

fn attributes(record: &SinkRecord) -> Vec<Value> {
    let SinkRecord { src_endpoint: source, dst_endpoint: destination, pod, actor, .. } = record;
    let (process, http) = (actor.process.as_ref(), record.http.as_ref());
    let address = source.ip.map(|ip| ip.to_string());
    let texts = [
        ("imds_agent.node", Some(record.node.as_str())),
        ("imds_agent.verdict", Some(record.verdict)),
        ("imds_agent.hook", Some(record.hook)),
        ("imds_agent.endpoint", destination.name.as_deref()),
        ("imds_agent.rule", record.rule.as_deref()),
        ("network.transport", record.protocol.as_deref()),
        ("network.interface.name", source.interface_name.as_deref()),
        ("source.address", address.as_deref()),
        ("k8s.namespace.name", pod.as_ref().map(|pod| pod.namespace.as_str())),
        ("k8s.pod.name", pod.as_ref().map(|pod| pod.name.as_str())),
        ("k8s.pod.uid", pod.as_ref().map(|pod| pod.uid.as_str())),
        ("k8s.container.name", pod.as_ref().and_then(|pod| pod.container.as_deref())),
        ("imds_agent.service_account", pod.as_ref().map(|pod| pod.service_account.as_str())),
        ("imds_agent.label", pod.as_ref().and_then(|pod| pod.label.as_deref())),
        ("process.linux.cgroup", actor.cgroup.as_deref()),
        ("thread.name", process.and_then(|process| process.name.as_deref())),
        ("http.request.method", http.map(|http| http.method.as_str())),
        ("url.path", http.map(|http| http.path.as_str())),
        ("imds_agent.outcome", http.map(|http| http.outcome)),
        ("imds_agent.reason", http.and_then(|http| http.reason.as_deref())),
    ];
    let numbers = [
        ("imds_agent.schema", Some(record.schema.into())),
        ("imds_agent.count", Some(record.count)),
        ("imds_agent.bytes", Some(record.bytes)),
        ("source.port", source.port.map(u64::from)),
        ("destination.port", destination.port.map(u64::from)),
        ("process.pid", process.map(|process| process.pid.into())),
        ("http.response.status_code", http.and_then(|http| http.status).map(u64::from)),
        ("imds_agent.imds_version", http.and_then(|http| http.imds_version).map(u64::from)),
        ("imds_agent.other_rules", http.map(|http| http.other_rules.into())),
    ];
    let mut attributes = vec![text_attribute("destination.address", &destination.ip.to_string())];
    attributes.extend(texts.into_iter().filter_map(|(key, value)| Some(text_attribute(key, value?))));
    attributes.extend(
        numbers.into_iter().filter_map(|(key, value)| {
            Some(json!({ "key": key, "value": { "intValue": value?.to_string() } }))
        }),
    );
    attributes
}

fn text_attribute(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

#[cfg(test)]
mod tests {
    use super::{super::tests::record, *};

    #[test]
    fn log_record_has_semantic_conventions() {
        let log = log_record(&record("web"));
        assert_eq!((&log["severityNumber"], &log["timeUnixNano"]), (&13.into(), &"0".into()));
        let attributes = log["attributes"].as_array().unwrap();
        let value = |key: &str| attributes.iter().find(|one| one["key"] == key).map(|one| &one["value"]);
        for (key, text) in
            [("k8s.pod.name", "web"), ("source.address", "10.244.0.7"), ("imds_agent.endpoint", "imds")]
        {
            assert_eq!(value(key), Some(&json!({ "stringValue": text })), "{key}");
        }
        assert_eq!(value("imds_agent.count"), Some(&json!({ "intValue": "42" })));
        assert_eq!((value("process.pid"), value("imds_agent.rule")), (None, None));
    }

    #[test]
    fn responses_of_receivers() {
        let outcome = |status: u16, retry_after: Option<&'static str>, body: &str| {
            let headers = retry_after.map(|value| (RETRY_AFTER, HeaderValue::from_static(value)));
            outcome(StatusCode::from_u16(status).unwrap(), &headers.into_iter().collect(), body)
        };
        for (body, rejected) in [
            ("", 0),
            ("{}", 0),
            ("not JSON", 0),
            (r#"{"partialSuccess":{}}"#, 0),
            (r#"{"partialSuccess":{"rejectedLogRecords":"3","errorMessage":"too old"}}"#, 3),
            (r#"{"partialSuccess":{"rejectedLogRecords":2}}"#, 2),
        ] {
            assert_eq!(outcome(200, None, body).unwrap().rejected, rejected, "{body}");
        }
        for status in [429, 502, 503, 504] {
            let Err(Failure::Retry { after, .. }) = outcome(status, Some("7"), "") else {
                panic!("{status}")
            };
            assert_eq!(after, Some(Duration::from_secs(7)));
        }
        let Err(Failure::Retry { after, .. }) = outcome(429, Some("999999999"), "") else { panic!() };
        assert_eq!(after, Some(MAX_RETRY_AFTER));
        for status in [301, 400, 401, 404, 413, 500] {
            let Err(Failure::Rejected(error)) = outcome(status, None, "no\nsuch path") else {
                panic!("{status}")
            };
            assert!(error.to_string().contains("no\nsuch path"), "{error}");
        }
    }
}
