//! Chooses the command that stops a running agent by the cgroup of its process.

use std::fs;

/// Returns the commands that stop the agent with this pid and then unload.
pub(super) fn stop_command(pid: Option<i32>, unload: &str) -> String {
    let cgroup = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok());
    from_cgroup(&cgroup.unwrap_or_default(), pid, unload)
}

fn from_cgroup(cgroup: &str, pid: Option<i32>, unload: &str) -> String {
    if cgroup.contains("kubepods") {
        return "`helm upgrade imds-agent deploy/helm/imds-agent --namespace imds-agent --reuse-values --set unload=true` or \
                `kubectl apply --kustomize deploy/kubernetes/overlays/unload`"
            .to_owned();
    }
    let mut units =
        cgroup.lines().filter_map(|line| line.rsplit('/').find(|name| name.ends_with(".service")));
    match (units.next_back(), pid) {
        // `user@UID.service` is the session of a user, not a service of the agent.
        (Some(unit), _) if !unit.starts_with("user@") => {
            let unit = unit.trim_end_matches(".service");
            format!("`systemctl stop {unit} && {unload}`")
        }
        (_, Some(pid)) => format!("`kill {pid}`, and `kill -9 {pid}` if it hangs, then `{unload}`"),
        (_, None) => format!("`systemctl stop imds-agent && {unload}`, or stop its container"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(cgroup: &str) -> String {
        from_cgroup(cgroup, Some(7), "imds-agent unload")
    }

    #[test]
    fn commands_by_cgroup() {
        assert_eq!(
            command("0::/system.slice/imds-agent.service\n"),
            "`systemctl stop imds-agent && imds-agent unload`"
        );
        let pod = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-2.scope\n";
        assert!(command(pod).contains("--set unload=true") && command(pod).contains("kubectl apply"));
        for cgroup in ["0::/\n", "0::/user.slice/user-0.slice/session-1.scope\n", ""] {
            assert_eq!(command(cgroup), "`kill 7`, and `kill -9 7` if it hangs, then `imds-agent unload`");
        }
        let session = "0::/user.slice/user-1.slice/user@1.service/app.slice/run.scope\n";
        assert!(command(session).starts_with("`kill 7`"));
        assert!(from_cgroup("", None, "imds-agent unload").contains("systemctl stop imds-agent"));
    }
}
