//! Reloads while the agent runs: immediate, without a gap in enforcement, and never to an invalid configuration.

mod file_events;
mod rejected_files;
mod reloaded_settings;

use aya::programs::TcAttachType;
use imds_tests::{PodLink, Status, TestEnv, hook};

const LINKS: [PodLink; 2] = [PodLink::Routed, PodLink::Bridged];
const FROM_POD: &str = "[hooks]\nsocket = false\nnode_egress = false\n";
const NODE_EGRESS: &str = "[hooks]\nsocket = false\nfrom_pod = false\n";
const TC_HOOKS: &str = "[hooks]\nsocket = false\n";

fn has_program(env: &TestEnv, interface: &str, at: TcAttachType) -> bool {
    !hook::programs_at(&env.node, interface, at).is_empty()
}

/// Waits until the file is rejected with this error, and asserts that the earlier configuration stays effective.
#[track_caller]
fn assert_rejected(env: &TestEnv, before: &Status, part: &str) -> Status {
    let status = env.status_when("the file is rejected", |status| {
        let rejected =
            status.configuration.as_ref().and_then(|configuration| configuration.rejected.as_ref());
        rejected.is_some_and(|rejected| rejected.error.contains(part))
    });
    assert_eq!(status.state, "degraded");
    assert!(status.problems.iter().any(|problem| problem.problem.contains(part)), "{:?}", status.problems);
    assert_eq!((status.generation(), &status.mode), (before.generation(), &before.mode));
    assert_eq!(status.hooks, before.hooks);
    status
}
