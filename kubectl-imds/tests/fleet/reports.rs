//! Denials, rules and checks of several nodes.

use serde_json::{Value, json};

use super::{Cluster, status};

fn report(denials: &Value, rules: &str) -> Value {
    json!({ "schema": 1, "pin_dir": "/sys/fs/bpf/imds", "denials": denials, "rules": rules })
}

fn denial(count: u64, last: &str) -> Value {
    json!({
        "namespace": "tools", "service_account": "web", "label": "app=web", "interface": null, "comm": null,
        "cgroup": null, "pod": "web-1", "endpoint": "imds", "address": "169.254.169.254",
        "verdict": "denied", "counts": { "from_pod": count }, "bytes": 60 * count,
        "first": "2026-11-23T15:04:05Z", "last": last,
    })
}

const RULE: &str = "[[exempt]]\nname = \"tools-web\"\nnamespace = \"tools\"\nservice_account = \"web\"\n\
                    endpoints = [\"imds\"]\n\n";

#[test]
fn denials_are_merged() {
    let cluster = Cluster::new(&["n1", "n2", "n3"]);
    let first = report(&json!([denial(2, "2026-11-23T15:04:05Z")]), RULE);
    let second = report(&json!([denial(3, "2026-11-23T16:04:05Z")]), &RULE.replace("imds", "wireserver"));
    cluster.answers("n1", &[("report -o json", &first, 0)]);
    cluster.answers("n2", &[("report -o json", &second, 0)]);
    cluster.answers("n3", &[("report -o json", &report(&json!([]), ""), 0)]);
    let (stdout, _) = cluster.run("report", 0);
    let expected = r#" SENDER             ENDPOINT  VERDICT  NODES  FROM_POD  BYTES  FIRST                 LAST
 tools/web app=web  imds      denied   2      5         300    2026-11-23T15:04:05Z  2026-11-23T16:04:05Z

1 sender on 3 nodes

rules that would exempt these senders:

# Suggested by 2 of 3 nodes.
[[exempt]]
name = "tools-web"
namespace = "tools"
service_account = "web"
endpoints = ["imds", "wireserver"]
"#;
    assert_eq!(stdout, expected);
    let (stdout, stderr) = cluster.run("report --rules", 0);
    assert!(
        stdout.starts_with("# Suggested by 2 of 3 nodes.\n[[exempt]]\n") && stderr.is_empty(),
        "{stdout}"
    );
    let json = cluster.json("report", 0);
    assert_eq!((&json["denials"][0]["nodes"], &json["nodes"]), (&json!(2), &json!(3)));
    // A node that suggests another setting contributes nothing.
    cluster.answers("n3", &[("report", &report(&json!([]), "[[exempt]]\nname = 'a'\ninterface = '*'\n"), 0)]);
    let (stdout, stderr) = cluster.run("report --rules", 3);
    assert!(stdout.contains("Suggested by 2 of 2 nodes") && !stdout.contains("interface"), "{stdout}");
    let expected = "kubectl-imds: the rules are incomplete: 1 node without an answer\n\
                    kubectl-imds: n3: the suggested rules contain an interface with wildcards\n";
    assert_eq!(stderr, expected);
}

#[test]
fn requests_are_merged() {
    let cluster = Cluster::new(&["n1", "n2", "n3"]);
    let request = |path: &str, version: u8, count: u64| {
        json!({
            "namespace": "tools", "service_account": "web", "label": "app=web", "interface": null, "comm": null,
            "cgroup": null, "netns_cookie": null, "pod": "web-1", "endpoint": "imds", "address": "169.254.169.254",
            "method": "GET", "path": path, "imds_version": version, "outcome": "refused", "count": count,
            "first": "2026-11-23T15:04:05Z", "last": "2026-11-23T16:04:05Z",
        })
    };
    let report = |requests: &[Value], rules: &str| {
        let requests = Value::from(requests);
        json!({ "schema": 1, "pin_dir": "/sys/fs/bpf/imds", "denials": [], "requests": requests, "rules": rules })
    };
    let (region, user_data) = ("/latest/meta-data/placement/region", "/latest/user-data");
    let allow = |list: &str| RULE.replace("\n\n", &format!("\nallow = [\"{list}\"]\n\n"));
    let caution = format!("# left out, because it may grant credentials or identity: GET {user_data}\n");
    let first = report(&[request(region, 2, 2)], &allow("instance"));
    let second = report(
        &[request(region, 2, 3), request(user_data, 1, 1)],
        &format!("{caution}{}", allow(&format!("GET {region}"))),
    );
    cluster.answers("n1", &[("report -o json", &first, 0)]);
    cluster.answers("n2", &[("report -o json", &second, 0)]);
    // An agent of an older version has no requests.
    cluster.answers("n3", &[("report -o json", &self::report(&json!([]), ""), 0)]);
    let (stdout, _) = cluster.run("report", 0);
    let expected = r#" SENDER             ENDPOINT  REQUEST                                 IMDS  OUTCOME  NODES  COUNT  LAST
 tools/web app=web  imds      GET /latest/meta-data/placement/region  v2    refused  2      5      2026-11-23T16:04:05Z
 tools/web app=web  imds      GET /latest/user-data                   v1    refused  1      1      2026-11-23T16:04:05Z

2 requests on 3 nodes

rules that would exempt these senders:

# left out, because it may grant credentials or identity: GET /latest/user-data
# Suggested by 2 of 3 nodes.
[[exempt]]
name = "tools-web"
namespace = "tools"
service_account = "web"
endpoints = ["imds"]
allow = ["GET /latest/meta-data/placement/region", "instance"]
"#;
    assert_eq!(stdout, expected);
    let json = cluster.json("report", 0);
    assert_eq!((&json["requests"][0]["nodes"], &json["requests"][0]["count"]), (&json!(2), &json!(5)));
    let (stdout, _) = cluster.run("report --rules", 0);
    assert!(
        stdout
            .starts_with("# left out, because it may grant credentials or identity: GET /latest/user-data\n"),
        "{stdout}"
    );
}

#[test]
fn exemption_rules_are_counted() {
    let cluster = Cluster::new(&["n1", "n2"]);
    let config = json!({ "mode": "enforce", "exempt": [{ "name": "backup", "cgroup": "/backup" }] });
    let sender = json!([{
        "rule": "backup", "interface": null, "netns_cookie": null, "cgroup": 7, "pod": null,
        "endpoint": null, "verdict": "exempt",
    }]);
    let matching = status(&json!({ "exemptions": sender }));
    cluster.answers("n1", &[("status", &matching, 0), ("config show -o json", &config, 0)]);
    cluster.answers("n2", &[("status", &status(&json!({})), 0), ("config show -o json", &config, 0)]);
    let (stdout, _) = cluster.run("rules", 0);
    let expected = " RULE    SELECTOR        ENDPOINTS  NODES  MATCHING  SENDERS
 backup  cgroup=/backup  all        2      1         1

1 rule on 2 nodes
";
    assert_eq!(stdout, expected);
}

#[test]
fn failed_checks_are_listed() {
    let cluster = Cluster::new(&["n1", "n2"]);
    let check = |outcome: &str| {
        json!({
            "hook": "from_pod", "sender": "pod", "endpoint": "imds", "address": "169.254.169.254",
            "service": null, "expected": "denied", "observed": "not denied", "outcome": outcome,
        })
    };
    let document = |outcome: &str| {
        let passed = outcome == "passed";
        json!({ "schema": 1, "mode": "enforce", "passed": passed, "checks": [check(outcome)] })
    };
    cluster.answers("n1", &[("verify -o json", &document("passed"), 0)]);
    cluster.answers("n2", &[("verify -o json", &document("failed"), 3)]);
    let (stdout, _) = cluster.run("verify", 3);
    assert!(
        stdout.contains(" n2    from_pod  pod     imds      169.254.169.254  denied    not denied\n"),
        "{stdout}"
    );
    assert!(stdout.ends_with("\n2 nodes: 1 passed, 1 failed, 0 without an answer\n"), "{stdout}");
    cluster.answers("n2", &[("verify -o json", &document("passed"), 0)]);
    assert_eq!(cluster.run("verify", 0).0, "2 nodes: 2 passed, 0 failed, 0 without an answer\n");
}

#[test]
fn top_shows_the_denials_of_an_interval() {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use imds_tests::api_server::{Exec, ExecOutput};

    let cluster = Cluster::new(&["n1"]);
    let requests = AtomicU64::new(0);
    let answer = move |_: &[String]| {
        // 100 denials from before the interval, and 20 in it.
        let count = 100 + 20 * requests.fetch_add(1, Ordering::Relaxed);
        let stdout = report(&json!([denial(count, "2026-11-23T16:04:05Z")]), "").to_string();
        ExecOutput { stdout, ..ExecOutput::default() }
    };
    cluster.server.on_exec(&super::pod("n1"), Exec::Answer(Arc::new(answer)));
    let json = cluster.json("top --once --interval 1s", 0);
    assert_eq!((&json["senders"][0]["count"], &json["nodes"]), (&json!(20), &json!(1)));
}
