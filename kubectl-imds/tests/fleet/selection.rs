//! Which nodes are asked.

use imds_tests::api_server::{agent_pod, node};
use serde_json::json;

use super::{Cluster, pod};

#[test]
fn nodes_are_selected_by_name_and_label() {
    let cluster = Cluster::new(&["n1", "n2", "n3"]);
    cluster.server.set_list("/api/v1/nodes", vec![node("n1", "a"), node("n2", "b"), node("n3", "b")]);
    let asked = |options: &str, code| {
        let report = cluster.json(&format!("status {options}"), code);
        let nodes = report["nodes"].as_array().unwrap().iter();
        nodes.map(|node| node["node"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(asked("", 0), ["n1", "n2", "n3"]);
    assert_eq!(asked("--node n2 --node n1", 0), ["n1", "n2"]);
    assert_eq!(asked("--node-selector pool=b", 0), ["n2", "n3"]);
    assert_eq!(asked("--node-selector pool=b --node n3", 0), ["n3"]);
    assert_eq!(asked("--node n3 --node other", 3), ["n3"]);
    let (_, stderr) = cluster.run("status --node-selector pool=c", 1);
    assert!(stderr.contains("no node matches"), "{stderr}");
}

#[test]
fn large_lists_have_pages() {
    let cluster = Cluster::new(&[]);
    let names: Vec<_> = (0..1101).map(|number| format!("n{number:04}")).collect();
    let pods = names.iter().map(|name| {
        let mut pod = agent_pod(&pod(name), name);
        pod["status"]["phase"] = json!("Pending");
        pod
    });
    cluster.server.set_agent_pods(pods.collect());
    let report = cluster.json("status", 3);
    assert_eq!(report["errors"].as_array().unwrap().len(), 1101);
    let lists = cluster.server.requests().into_iter();
    let lists: Vec<_> = lists.filter(|target| target.contains("/pods?")).collect();
    assert_eq!(lists.len(), 3, "{lists:?}");
    assert!(lists.iter().all(|target| target.contains("limit=500")), "{lists:?}");
}

#[test]
fn namespace_of_the_context_comes_second() {
    let cluster = Cluster::new(&["n1"]);
    cluster.server.set_agent_pods(Vec::new());
    cluster.server.set_list("/api/v1/namespaces/default/pods", Vec::new());
    let (_, stderr) = cluster.run("status", 1);
    assert!(stderr.contains("in namespace imds-agent and default"), "{stderr}");
    let mut pod = agent_pod("other", "n1");
    pod["status"]["phase"] = json!("Failed");
    cluster.server.set_list("/api/v1/namespaces/default/pods", vec![pod.clone()]);
    let (stdout, _) = cluster.run("status", 3);
    assert!(stdout.contains("n1: pod other is failed"), "{stdout}");
    cluster.server.set_list("/api/v1/namespaces/kube-system/pods", vec![pod]);
    cluster.run("-n kube-system status", 3);
    let (_, stderr) = cluster.run("-n kube-system -l app=x status", 1);
    assert!(stderr.contains("no pod matches \"app=x\" in namespace kube-system"), "{stderr}");
}
