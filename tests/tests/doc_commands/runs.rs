//! The documented commands that a test runs, with the state of the node and their exit codes.

/// State of a node in which the documents show a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum State {
    /// The agent enforces, with an exempt pod and after denials.
    Enforcing,
    /// The agent runs in audit mode, after requests.
    Auditing,
    /// The agent was killed, so that its programs enforce without it.
    Stopped,
    /// Nothing of the agent is loaded after the first command.
    Unloaded,
    /// The agent was killed in clsact mode, and its binary is lost.
    LostBinary,
}

/// A documented command with the result that it must have.
pub(crate) struct Run {
    pub(crate) state: State,
    /// Text as in the document, with placeholders.
    pub(crate) text: &'static str,
    pub(crate) exit: i32,
    /// Parts that the standard output must contain.
    pub(crate) prints: &'static [&'static str],
}

const fn run(state: State, text: &'static str, exit: i32, prints: &'static [&'static str]) -> Run {
    Run { state, text, exit, prints }
}

/// Commands in the order in which they run.
pub(crate) const RUNS: &[Run] = &[
    run(State::Enforcing, "imds-agent --version", 0, &["imds-agent 0"]),
    run(State::Enforcing, "imds-agent status", 0, &["state      enforcing", "rule agents"]),
    run(State::Enforcing, "imds-agent status -o json", 0, &["\"schema\""]),
    run(State::Enforcing, "imds-agent status --pin-dir DIR", 0, &["state      enforcing"]),
    run(State::Enforcing, "imds-agent verify", 0, &[" 0 failed"]),
    run(State::Enforcing, "imds-agent verify -o json", 0, &["\"passed\": true"]),
    run(State::Enforcing, "imds-agent doctor", 0, &["CHECK"]),
    run(State::Enforcing, "imds-agent doctor -o json", 0, &["\"ready\": true"]),
    run(State::Enforcing, "imds-agent events | head -1", 0, &["from_pod"]),
    run(State::Enforcing, "imds-agent report", 0, &["shop/default", "denied"]),
    run(State::Enforcing, "imds-agent config show", 0, &["mode = \"enforce\""]),
    run(State::Enforcing, "imds-agent config check FILE", 0, &["ok\n"]),
    run(State::Enforcing, "imds-agent completions bash", 0, &["complete -F"]),
    run(State::Enforcing, "imds-agent man", 0, &[".TH imds-agent"]),
    run(State::Enforcing, "bpftool prog show | grep imds_", 0, &["imds_from_pod"]),
    run(State::Enforcing, "bpftool map show", 0, &["name imds_counters", "name imds_ratelimit"]),
    run(State::Enforcing, "bpftool map dump pinned MAP", 0, &["\"mode\": \"enforce\""]),
    run(State::Enforcing, "bpftool net show dev IFACE", 0, &["tc:"]),
    run(State::Enforcing, "bpftool cgroup show /sys/fs/cgroup", 0, &["imds_connect4"]),
    run(State::Enforcing, "bpftool cgroup attach CGROUP HOOK PROG multi", 0, &[]),
    run(State::Enforcing, "ip -d link show INTERFACE", 0, &["link/ether"]),
    run(State::Enforcing, "tc qdisc show dev INTERFACE", 0, &["qdisc"]),
    run(State::Enforcing, "tc qdisc show dev VETH", 0, &["qdisc"]),
    run(State::Enforcing, "findmnt /sys/fs/bpf", 0, &["bpf"]),
    run(State::Enforcing, "findmnt -t cgroup2", 0, &["cgroup2"]),
    run(State::Enforcing, "findmnt -t bpf", 0, &["/sys/fs/bpf"]),
    run(State::Enforcing, "mount -t bpf bpf /sys/fs/bpf", 0, &[]),
    run(State::Enforcing, "mount -t cgroup2", 0, &["cgroup2"]),
    run(State::Enforcing, "stat -f DIR", 0, &["bpf"]),
    run(State::Enforcing, "ulimit -l", 0, &[]),
    run(State::Enforcing, "uname -r", 0, &["."]),
    run(State::Enforcing, "ls /sys/fs/bpf/imds", 0, &["maps", "progs", "links"]),
    run(State::Enforcing, "nsenter --net=/proc/PID/ns/net ss -K dst 169.254.169.254", 0, &[]),
    run(
        State::Enforcing,
        "iptables -t filter -I FORWARD 1 ! -s NODE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP",
        0,
        &[],
    ),
    run(State::Enforcing, "iptables -F", 0, &[]),
    run(State::Enforcing, "nft --json --handle list ruleset", 0, &["169.254.169.254"]),
    run(State::Auditing, "imds-agent report", 0, &["audited"]),
    run(State::Auditing, "imds-agent report --rules", 0, &["[[exempt]]", "service_account = \"web\""]),
    run(State::Auditing, "imds-agent report --rules >> imds.toml", 0, &[]),
    run(State::Auditing, "imds-agent config check imds.toml", 0, &["rule tools-web"]),
    run(State::Stopped, "imds-agent status", 3, &["state      degraded"]),
    run(State::Stopped, "imds-agent report", 0, &["tools/web"]),
    run(State::Stopped, "imds-agent verify", 3, &[" failed"]),
    run(State::Stopped, "imds-agent config show", 0, &["mode = \"audit\""]),
    run(State::Stopped, "imds-agent doctor", 0, &["CHECK"]),
    run(State::Stopped, "imds-agent unload --stopped", 0, &["removed"]),
    run(State::Unloaded, "imds-agent unload", 0, &[]),
    run(State::Unloaded, "imds-agent status", 3, &["state      unloaded"]),
    run(State::Unloaded, "imds-agent doctor", 0, &["CHECK"]),
    run(State::Unloaded, "ls /sys/fs/bpf", 0, &[]),
    run(State::LostBinary, "tc filter show dev IFACE ingress", 0, &["imds_from_pod"]),
    run(State::LostBinary, "rm -r /sys/fs/bpf/imds", 0, &[]),
    run(State::LostBinary, "tc filter del dev IFACE ingress prio PRIO handle HANDLE bpf", 0, &[]),
];

/// Complete commands of imds-agent that are only parsed here, with the reason.
pub(crate) const ONLY_PARSED: [(&str, &str); 9] = [
    ("imds-agent COMMAND --help", "the parser prints it"),
    ("imds-agent man DIR", "`cargo xtask dist` runs it for the package"),
    ("imds-agent run --config /etc/imds-agent/imds.toml", "every state starts the agent with it"),
    ("imds-agent run --config FILE", "every state starts the agent with it"),
    ("imds-agent run --tc-backend clsact", "the test of a lost binary starts the agent with it"),
    ("imds-agent events -o json", "runs until it is stopped; the tests of `events` run it"),
    ("imds-agent run --once", "the tests of `restart` run it"),
    ("imds-agent top", "needs a terminal, which the test `top` has"),
    ("imds-agent run --clsact-delay", "a mention of the option"),
];
