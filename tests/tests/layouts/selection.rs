//! Interfaces that the configuration selects.

use imds_tests::{
    Layout, METADATA, Nic, PodLink, TestEnv, output,
    probe::{SHORT, http_get, reachable},
};

use crate::fixture::{NODE_EGRESS, TC};

/// Returns the entry of the NIC in the status.
fn uplink_status(env: &TestEnv) -> serde_json::Value {
    let output = output(env.imds_agent(&["status", "-o", "json"]).command());
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a status in JSON");
    let interfaces = status["interfaces"].as_array().expect("interfaces").clone();
    let mut found = interfaces.into_iter().filter(|interface| interface["name"] == TestEnv::UPLINK);
    found.next().expect("the NIC in the status")
}

fn attached_hooks(uplink: &serde_json::Value) -> Vec<&str> {
    let attachments = uplink["attachments"].as_array().expect("attachments");
    attachments
        .iter()
        .filter(|attachment| !attachment["attach_mode"].is_null())
        .filter_map(|attachment| attachment["hook"].as_str())
        .collect()
}

#[test]
fn excluded_nic() {
    for nic in [Nic::Veth, Nic::Macvlan] {
        let env = TestEnv::with_layout(Layout::new(nic));
        let pod = env.add_pod(PodLink::Routed);
        assert!(reachable(&pod.netns, METADATA));
        let exclude = format!("[interfaces]\nexclude = ['{}']\n", TestEnv::UPLINK);
        for (hooks, is_open) in [(NODE_EGRESS, true), (TC, false)] {
            let agent = env.agent().hooks(hooks).config(&exclude).spawn_ready();
            let uplink = uplink_status(&env);
            assert_eq!(uplink["role"], "excluded", "{uplink:#}");
            assert!(attached_hooks(&uplink).is_empty(), "{uplink:#}");
            let is_reached = if is_open {
                reachable(&pod.netns, METADATA)
            } else {
                http_get(&pod.netns, METADATA, SHORT).is_answer()
            };
            assert_eq!(is_reached, is_open, "{}", agent.log());
            assert!(reachable(&env.node, METADATA), "the node");
            drop(agent);
            env.unload();
            assert!(reachable(&pod.netns, METADATA), "after unload");
        }
    }
}

/// Including the NIC as a pod interface attaches `from_pod` to it, which blocks neither the node nor responses.
#[test]
fn included_nic() {
    for nic in [Nic::Veth, Nic::Macvlan] {
        let env = TestEnv::with_layout(Layout::new(nic));
        let pod = env.add_pod(PodLink::Routed);
        assert!(reachable(&pod.netns, METADATA));
        let include = format!("[interfaces]\ninclude = ['{}']\n", TestEnv::UPLINK);
        let agent = env.agent().hooks(TC).config(&include).spawn_ready();
        let uplink = uplink_status(&env);
        assert!(attached_hooks(&uplink).contains(&"from_pod"), "{uplink:#}");
        env.assert_blocked(&pod);
        assert!(reachable(&env.node, METADATA), "the node");
        drop(agent);
        env.unload();
        assert!(reachable(&pod.netns, METADATA), "after unload");
    }
}
