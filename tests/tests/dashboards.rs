//! The dashboard and the alerts query only metrics and labels that the agent serves.

use std::collections::{BTreeMap, BTreeSet};

use imds_tests::{
    PodLink, TestEnv,
    api_server::write_kubeconfig,
    http::{DEFAULT, try_get},
    poll::poll_until,
    probe::LONG,
    promql::{PromqlNames, names_in},
};
use serde_json::Value;

const RULES: &str = include_str!("../../deploy/prometheus/rules.yaml");
const DASHBOARD: &str = include_str!("../../deploy/grafana/imds-agent.json");

/// Labels that Prometheus adds to every time series.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];
/// Labels of series of Prometheus and of kube-state-metrics, and of targets through relabeling.
const OF_TARGETS: [(&str, &[&str]); 2] = [("up", &["node"]), ("kube_node_info", &["node"])];

/// Served time series with their labels.
type Served = BTreeMap<String, BTreeSet<String>>;

fn scrape(env: &TestEnv) -> String {
    poll_until(LONG, "metrics to be served", || {
        let answer = try_get(env, DEFAULT, "/metrics").ok();
        answer.filter(|(status, _)| *status == 200).map(|(_, metrics)| metrics)
    })
}

fn served(metrics: &str) -> Served {
    let labels = |labels: &[&str]| labels.iter().map(|&label| label.to_owned()).collect();
    let mut served: Served =
        OF_TARGETS.iter().map(|(name, of_target)| ((*name).to_owned(), labels(of_target))).collect();
    for line in metrics.lines().filter(|line| line.starts_with("imds_")) {
        let (series, _value) = line.rsplit_once(' ').expect("a value");
        let name = series.split('{').next().expect("a name");
        served.entry(name.to_owned()).or_default().extend(names_in(series).labels);
    }
    served
}

/// Returns the metrics and labels of `expression` that are not served.
fn unknown(expression: &str, served: &Served) -> Vec<String> {
    let PromqlNames { metrics, labels } = names_in(expression);
    let known: BTreeSet<_> = metrics.iter().filter_map(|metric| served.get(metric)).flatten().collect();
    let metrics = metrics.iter().filter(|metric| !served.contains_key(*metric));
    let labels =
        labels.iter().filter(|label| !known.contains(label) && !OF_PROMETHEUS.contains(&label.as_str()));
    metrics.chain(labels).cloned().collect()
}

/// Returns every expression of the rules with the labels that its annotations show.
fn alerts() -> Vec<(String, BTreeSet<String>)> {
    let alerts = RULES.split("- alert: ").skip(1).map(|alert| {
        let key = |key: &str| alert.lines().find_map(|line| line.trim().strip_prefix(key));
        for required in ["severity: ", "summary: ", "description: "] {
            assert!(key(required).is_some(), "{required} is missing in {alert}");
        }
        let shown = alert.split("$labels.").skip(1);
        let label = |text: &str| {
            text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().map(str::to_owned)
        };
        (key("expr: ").expect("an expression").to_owned(), shown.filter_map(label).collect())
    });
    alerts.collect()
}

fn strings<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get(key).and_then(Value::as_str));
            object.values().for_each(|value| strings(value, key, found));
        }
        Value::Array(values) => values.iter().for_each(|value| strings(value, key, found)),
        _ => {}
    }
}

#[test]
fn dashboards_query_existing_metrics() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let neighbour = env.add_pod(PodLink::Routed);
    // No API server listens at this address.
    let kubeconfig = env.scratch_dir().join("kubeconfig");
    write_kubeconfig(&kubeconfig, "http://127.0.0.1:1");
    let rule = format!(
        "[[exempt]]\nname = 'one'\ninterface = '{}'\n\
         [[exempt]]\nname = 'two'\nnamespace_selector = {{ match_labels = {{ a = 'b' }} }}\n\
         [[events.sinks]]\ntype = 'file'\npath = '{}'\n[kubernetes]\nkubeconfig = '{}'",
        pod.host_ifname,
        env.scratch_dir().join("denials.jsonl").display(),
        kubeconfig.display()
    );
    let agent = env.agent().hooks(&["from_pod", "node_egress"]).config(&rule);
    let agent = agent.spawn_degraded("the API server has not sent the namespaces yet");
    env.assert_blocked(&neighbour);
    let mut served = poll_until(LONG, "a denial to be counted", || {
        let served = served(&scrape(&env));
        served.contains_key("imds_agent_denials_total").then_some(served)
    });
    drop(agent);
    env.unload();
    // Served only if the hook is on, which some tested kernels do not support.
    served.entry("imds_agent_cgroup_hook_attached".to_owned()).or_default().insert("hook".to_owned());

    let alerts = alerts();
    assert!(alerts.len() > 5);
    for (expression, shown) in &alerts {
        assert_eq!(unknown(expression, &served), [""; 0], "{expression}");
        let shown = shown.iter().cloned().collect::<Vec<_>>().join(",");
        for metric in names_in(expression).metrics {
            assert_eq!(unknown(&format!("sum by ({shown}) ({metric})"), &served), [""; 0], "{expression}");
        }
    }

    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let (mut expressions, mut definitions) = (Vec::new(), Vec::new());
    strings(&dashboard, "expr", &mut expressions);
    strings(&dashboard, "definition", &mut definitions);
    assert!(expressions.len() > 10 && !definitions.is_empty());
    for definition in definitions {
        let (metric, label) = definition
            .strip_prefix("label_values(")
            .and_then(|arguments| arguments.strip_suffix(')')?.split_once(", "))
            .expect("values of a label");
        assert_eq!(unknown(&format!("sum by ({label}) ({metric})"), &served), [""; 0], "{definition}");
    }
    for expression in expressions {
        assert_eq!(unknown(expression, &served), [""; 0], "{expression}");
    }

    // Proves that the check detects an unknown metric.
    assert_eq!(unknown("imds_agent_packet_total", &served), ["imds_agent_packet_total"]);
    assert_eq!(unknown(r#"imds_agent_ready{hook="x"}"#, &served), ["hook"]);
}
