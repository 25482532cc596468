//! Alternatives that are compared with each other.

use std::process::Command;

use aya::programs::tc::TcAttachType;
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
};
use imds_tests::{
    Netns, Pod, TestEnv,
    foreign_bpf::{ForeignLink, ForeignProgram},
};

const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
/// Socket hooks that the agent uses: connect(2) first.
const CALLS: [bpf_attach_type; 4] =
    [BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG];
/// Protects both addresses of the metadata service.
const CONFIG: &str = "provider = 'aws'";
/// The same restriction as AKS' rule, with connection tracking.
const NFTABLES: &str = "add table inet imds
add chain inet imds forward { type filter hook forward priority filter; }
add rule inet imds forward ip daddr 169.254.169.254 ip saddr != 10.0.0.4 udp dport 80 drop
add rule inet imds forward ip6 daddr fd00:ec2::254 ip6 saddr != fd10::4 udp dport 80 drop
add rule inet imds forward ct state invalid drop";

/// Mechanism that blocks the pod's access to the metadata service, or a baseline.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Restriction {
    Nothing,
    Conntrack,
    EmptyProgram,
    EmptySocket,
    EmptyAll,
    DropAll,
    FromPod,
    NodeEgress,
    Socket,
    AllHooks,
    AksFilter,
    AksMangle,
    Nftables,
    AwsReject,
    /// The rule exactly as AKS has it. The other variants match the protocol of the measured traffic.
    AksTcp,
}

/// An active mechanism. Dropping it turns the mechanism off.
pub(crate) struct On<'w> {
    env: &'w TestEnv,
    is_agent: bool,
    has_rules: bool,
    foreign: Vec<Foreign>,
}

/// A foreign program and its link. Closing the descriptor removes the link.
type Foreign = (ForeignProgram, ForeignLink);

impl Restriction {
    pub(crate) const ALL: [Self; 14] = [
        Self::Nothing,
        Self::Conntrack,
        Self::EmptyProgram,
        Self::EmptySocket,
        Self::EmptyAll,
        Self::DropAll,
        Self::FromPod,
        Self::NodeEgress,
        Self::Socket,
        Self::AllHooks,
        Self::AksFilter,
        Self::AksMangle,
        Self::Nftables,
        Self::AwsReject,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no restriction",
            Self::Conntrack => "no restriction, with conntrack",
            Self::EmptyProgram => "empty TCX program",
            Self::EmptySocket => "empty cgroup programs",
            Self::EmptyAll => "empty programs at the same hooks",
            Self::DropAll => "TCX program that drops every packet",
            Self::FromPod => "imds-agent, from_pod",
            Self::NodeEgress => "imds-agent, node_egress",
            Self::Socket => "imds-agent, socket",
            Self::AllHooks => "imds-agent, all three hooks",
            Self::AksFilter => "AKS rule in filter",
            Self::AksMangle => "AKS rule in mangle",
            Self::Nftables => "nftables rule",
            Self::AwsReject => "AWS rule with REJECT",
            Self::AksTcp => "AKS rule",
        }
    }

    /// Returns the agent's hooks that are enabled.
    const fn hooks(self) -> &'static [&'static str] {
        match self {
            Self::FromPod => &["from_pod"],
            Self::NodeEgress => &["node_egress"],
            Self::Socket => &["socket"],
            Self::AllHooks => &["from_pod", "node_egress", "socket"],
            _ => &[],
        }
    }

    /// Reports whether the mechanism is imds-agent.
    pub(crate) const fn is_ours(self) -> bool {
        !self.hooks().is_empty()
    }

    /// Returns the table of iptables, and the rule's match and target for packets to a protected address.
    const fn rule(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::AksFilter => Some(("filter", "! -s NODE -p udp -m udp --dport 80 -j DROP")),
            Self::AksMangle => Some(("mangle", "! -s NODE -p udp -m udp --dport 80 -j DROP")),
            Self::AksTcp => Some(("filter", "! -s NODE -p tcp -m tcp --dport 80 -j DROP")),
            Self::AwsReject => Some(("filter", "-j REJECT")),
            _ => None,
        }
    }

    pub(crate) fn turn_on<'w>(self, env: &'w TestEnv, pod: &Pod) -> On<'w> {
        let node = &env.node;
        let mut on = On { env, is_agent: false, has_rules: false, foreign: Vec::new() };
        match self {
            Self::Nothing => {}
            Self::EmptyProgram => on.foreign = vec![at_ingress(TC_ACT_UNSPEC, node, pod.host_ifindex)],
            Self::EmptySocket => on.foreign = at_calls(env, &CALLS),
            Self::EmptyAll => on.foreign = at_hooks_of_agent(env),
            Self::DropAll => on.foreign = vec![at_ingress(TC_ACT_SHOT, node, pod.host_ifindex)],
            Self::FromPod | Self::NodeEgress | Self::Socket | Self::AllHooks => {
                return On::agent(env, self.hooks(), CONFIG);
            }
            Self::Conntrack | Self::AksFilter | Self::AksMangle | Self::AksTcp | Self::AwsReject => {
                on.has_rules = true;
                self.add_rules(env);
            }
            Self::Nftables => {
                on.has_rules = true;
                nft(node, NFTABLES);
            }
        }
        on
    }

    /// Adds the rules for IPv6 too, although neither AKS nor AWS has such rules.
    fn add_rules(self, env: &TestEnv) {
        let node = &env.node;
        for (iptables, endpoint, address) in [
            ("iptables", "169.254.169.254/32", env.node_address().to_string()),
            ("ip6tables", "fd00:ec2::254/128", env.node_address_v6().to_string()),
        ] {
            // A rule of kube-proxy that makes the kernel track connections.
            run(node, iptables, "-A FORWARD -m conntrack --ctstate INVALID -j DROP");
            if let Some((table, rule)) = self.rule() {
                let rule = rule.replace("NODE", &address);
                run(node, iptables, &format!("-t {table} -I FORWARD 1 -d {endpoint} {rule}"));
            }
        }
    }
}

impl<'w> On<'w> {
    /// Starts the agent's programs with these hooks.
    pub(crate) fn agent(env: &'w TestEnv, hooks: &'static [&'static str], config: &str) -> Self {
        let started = env.agent().hooks(hooks).config(config).once();
        assert!(started.status.success(), "{started:?}");
        Self { env, is_agent: true, has_rules: false, foreign: Vec::new() }
    }
}

impl Drop for On<'_> {
    fn drop(&mut self) {
        if self.is_agent {
            self.env.unload();
        }
        if self.has_rules {
            nft(&self.env.node, "flush ruleset");
        }
    }
}

/// Attaches empty programs wherever the agent with all hooks attaches its own: also to both directions of links whose role
/// is not certain.
fn at_hooks_of_agent(env: &TestEnv) -> Vec<Foreign> {
    let status = {
        let _on = On::agent(env, Restriction::AllHooks.hooks(), CONFIG);
        env.status()
    };
    let (connect, _) = CALLS.split_at(2);
    let has_sendmsg = status.sockets.is_some_and(|sockets| sockets.sendmsg.attached);
    let mut programs = at_calls(env, if has_sendmsg { &CALLS } else { connect });
    for interface in &status.interfaces {
        for attachment in interface.attachments.iter().filter(|attachment| attachment.attach_mode.is_some()) {
            programs.push(match attachment.hook.as_str() {
                "from_pod" => at_ingress(TC_ACT_UNSPEC, &env.node, interface.ifindex),
                _ => at_egress(TC_ACT_UNSPEC, &env.node, interface.ifindex),
            });
        }
    }
    programs
}

fn at_ingress(action: i32, node: &Netns, ifindex: u32) -> Foreign {
    let foreign = ForeignProgram::returning(action);
    let link = foreign.attach_tcx_first(node, ifindex, TcAttachType::Ingress);
    (foreign, link)
}

fn at_egress(action: i32, node: &Netns, ifindex: u32) -> Foreign {
    let foreign = ForeignProgram::returning(action);
    let link = foreign.attach_tcx_first(node, ifindex, TcAttachType::Egress);
    (foreign, link)
}

/// Attaches a foreign program to each of these socket hooks.
fn at_calls(env: &TestEnv, calls: &[bpf_attach_type]) -> Vec<Foreign> {
    let attach = |&call| {
        let foreign = ForeignProgram::allowing_calls(call as u32);
        let link = foreign.attach_cgroup(env.cgroup(), call as u32);
        (foreign, link)
    };
    calls.iter().map(attach).collect()
}

fn run(node: &Netns, iptables: &str, arguments: &str) {
    succeed(node.command(iptables).args(arguments.split(' ')));
}

fn nft(node: &Netns, commands: &str) {
    succeed(node.command("nft").arg(commands));
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
