//! Five thousand nodes: time and memory of the plugin. The limits are for a release build, which `KUBECTL_IMDS` names; the API
//! server of the test takes most of the time.

use std::{
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use imds_tests::api_server::{Exec, ExecOutput, agent_pod, node};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};

use super::{Cluster, pod, status};

const NODES: usize = 5000;
/// Time in which a node answers: a kubelet starts a process in a container in about 100 ms.
const LATENCY: Duration = Duration::from_millis(250);
const MAX_TIME: Duration = Duration::from_mins(1);
/// In KiB.
const MAX_RESIDENT: i64 = 200 << 10;

/// Output of a node with 60 interfaces, as long as that of a real one.
fn long_status() -> Value {
    let counts = json!({ "packets": 0, "bytes": 0 });
    let interface = |number: usize| {
        json!({
            "ifindex": number, "name": format!("veth{number:08x}"), "role": "pod",
            "pod": {
                "namespace": "tools", "pod": format!("web-{number}"), "service_account": "web",
                "container": null, "label": "app=web", "uid": "01234567-89ab-cdef-0123-456789abcdef",
            },
            "attachments": [{ "hook": "from_pod", "attach_mode": "tcx", "order": "first", "pending": false }],
            "denied": counts, "audited": counts, "allowed": counts, "exempt": counts,
        })
    };
    status(&json!({ "interfaces": (0..60).map(interface).collect::<Vec<_>>() }))
}

#[test]
#[ignore = "takes minutes, and needs a release build of the plugin"]
fn five_thousand_nodes() {
    let cluster = Cluster::new(&[]);
    let names: Vec<_> = (0..NODES).map(|number| format!("node-{number:04}")).collect();
    cluster.server.set_list("/api/v1/nodes", names.iter().map(|name| node(name, "a")).collect());
    cluster.server.set_agent_pods(names.iter().map(|name| agent_pod(&pod(name), name)).collect());
    let text = format!("{:#}", long_status());
    println!("{} bytes per node", text.len());
    let exec = Exec::Answer(Arc::new(move |_| {
        thread::sleep(LATENCY);
        ExecOutput { stdout: text.clone(), ..ExecOutput::default() }
    }));
    for name in &names {
        cluster.server.on_exec(&pod(name), exec.clone());
    }
    for arguments in ["status", "status -o json", "compare"] {
        let start = Instant::now();
        let mut command = cluster.command(arguments);
        if let Some(binary) = std::env::var_os("KUBECTL_IMDS") {
            let mut other = Command::new(binary);
            other
                .args(command.get_args())
                .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command = other;
        }
        let output = command.stderr(Stdio::inherit()).output().unwrap();
        let elapsed = start.elapsed();
        // The largest of all children so far.
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
        let resident = usage.max_rss();
        println!(
            "{arguments}: {:.1} s, {} MiB, {} s of processor time so far",
            elapsed.as_secs_f64(),
            resident >> 10,
            usage.user_time().tv_sec() + usage.system_time().tv_sec()
        );
        assert!(output.status.success(), "{arguments}");
        assert!(elapsed < MAX_TIME && resident < MAX_RESIDENT, "{elapsed:?}, {resident} KiB");
    }
}
