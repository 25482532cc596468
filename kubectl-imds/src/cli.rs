//! Command line: arguments, help texts and exit codes.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;

use crate::{
    api::{Access, Api},
    commands::{
        compare, events,
        node_status::Via,
        output::{Format, write_stderr},
        report, rollout, rules, status, top, verify,
    },
    fleet::{Fleet, Selection, check_name},
};

/// Asks the imds-agent of every node of a cluster.
///
/// The plugin runs commands of the agent in its pods (`kubectl exec`), on many nodes at the same time.
///
/// Exit codes: 0 success; 1 failure; 2 invalid command line; 3 a node is degraded, differs, failed a check or gave no answer;
/// 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "kubectl-imds", bin_name = "kubectl imds", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    nodes: NodeArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Cluster")]
struct ClusterArgs {
    /// Kubeconfig file. Default: `KUBECONFIG`, then ~/.kube/config, then the service account of the pod
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// Namespace of the agent. Default: imds-agent, and if it has no agent, the namespace of the context
    #[arg(short, long, global = true, value_name = "NAMESPACE", value_parser = check_name)]
    namespace: Option<String>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Nodes")]
struct NodeArgs {
    /// Label selector of the agent's pods
    #[arg(
        short = 'l',
        long,
        global = true,
        value_name = "SELECTOR",
        default_value = "app.kubernetes.io/name=imds-agent"
    )]
    selector: String,
    /// Only this node. Repeat the option for several nodes
    #[arg(long = "node", global = true, value_name = "NODE")]
    nodes: Vec<String>,
    /// Only nodes that match this label selector
    #[arg(long, global = true, value_name = "SELECTOR")]
    node_selector: Option<String>,
    /// Container of the agent
    #[arg(short, long, global = true, value_name = "NAME", default_value = "imds-agent")]
    container: String,
    /// Largest number of nodes that are asked at the same time
    #[arg(long, global = true, value_name = "NUMBER", default_value_t = 64, value_parser = parse_parallel)]
    parallel: usize,
    /// Limit of the request to one node (90s, 2m)
    #[arg(long, global = true, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    request_timeout: Duration,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the state of each node, and all problems
    Status(StatusArgs),
    /// Show nodes that differ from the others in version, configuration or enforcement
    Compare(StatusArgs),
    /// List denied senders of all nodes (in audit mode: senders that enforcement would deny), and the rules that would exempt
    /// them
    Report(ReportArgs),
    /// List the exemption rules of all nodes, and how many senders each of them matches
    Rules(OutputArgs),
    /// Send test packets on each node, to check that pods are denied, and that exempt pods and the node are not
    Verify(OutputArgs),
    /// Stream requests to protected endpoints of all nodes. Prints unread recent events first
    Events(EventsArgs),
    /// Show the senders with the most denials in an interval, over all nodes
    Top(TopArgs),
    /// Show the rollout of a version or configuration
    #[command(subcommand)]
    Rollout(RolloutCommand),
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// Wait until all agents are of the newest revision of their `DaemonSet`, are ready, and have one configuration
    Status(RolloutArgs),
}

#[derive(Args, Debug)]
struct StatusArgs {
    #[command(flatten)]
    via: ViaArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args, Debug)]
struct ReportArgs {
    /// Print only the rules that would exempt all denied senders, without duplicates, in the syntax of the configuration file
    #[arg(long, conflicts_with = "output")]
    rules: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args, Debug)]
struct EventsArgs {
    /// Follow the events, also of pods that are replaced. This is the default
    #[arg(short, long, conflicts_with = "no_follow")]
    follow: bool,
    /// Print the recorded events and exit
    #[arg(long)]
    no_follow: bool,
    /// Print the recorded events of the last DURATION first (90s, 10m, 1h30m), instead of the unread ones. Each node records its
    /// last 1,024 events
    #[arg(long, value_name = "DURATION", value_parser = parse_since)]
    since: Option<String>,
    /// Output format. In JSON, each line is one object
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args, Debug)]
struct TopArgs {
    /// Length of the interval (10s, 1m)
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    interval: Duration,
    /// Largest number of senders to show
    #[arg(long, value_name = "NUMBER", default_value_t = 20)]
    limit: usize,
    /// Show one interval and exit
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args, Debug)]
struct RolloutArgs {
    /// Limit of the wait (90s, 10m)
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    via: ViaArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args, Clone, Copy, Debug)]
struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args, Clone, Copy, Debug)]
struct ViaArgs {
    /// Way to the agents
    #[arg(long, value_name = "WAY", value_enum, default_value_t)]
    via: Via,
    /// Port of the agent's metrics, for `--via metrics`
    #[arg(long, value_name = "PORT", default_value_t = 9254)]
    metrics_port: u16,
}

fn parse_parallel(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=1024).contains(number));
    number.ok_or_else(|| format!("{text:?} is not a number from 1 to 1024"))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<SignedDuration>().ok().filter(SignedDuration::is_positive);
    let duration = duration.and_then(|duration| Duration::try_from(duration).ok());
    duration.ok_or_else(|| format!("{text:?} is not a duration like 90s, 10m or 1h30m"))
}

/// Checks a duration that the agent parses again.
fn parse_since(text: &str) -> Result<String, String> {
    parse_duration(text).map(|_| text.to_owned())
}

/// Exit code after Ctrl-C: 128 and the number of SIGINT, as in a shell.
const EXIT_INTERRUPTED: u8 = 130;

/// Runs a command and returns its exit code.
pub fn main(cli: Cli) -> ExitCode {
    raise_file_limit();
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            write_stderr(&format!("failed to start the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        tokio::select! {
            outcome = Box::pin(run(cli)) => outcome.unwrap_or_else(|error| {
                write_stderr(&format!("{error:#}"));
                ExitCode::FAILURE
            }),
            _ = tokio::signal::ctrl_c() => {
                write_stderr("interrupted");
                ExitCode::from(EXIT_INTERRUPTED)
            }
        }
    });
    // A name lookup in a thread must not delay the end.
    runtime.shutdown_background();
    code
}

/// Allows one connection to each node of a large cluster.
fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // With the lower limit, the plugin reports each connection that fails.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

async fn run(Cli { cluster, nodes, command }: Cli) -> anyhow::Result<ExitCode> {
    let access = Access { kubeconfig: cluster.kubeconfig, context: cluster.context };
    let api = Api::new(&access, nodes.request_timeout).await?;
    let selection = Selection {
        namespace: cluster.namespace,
        selector: nodes.selector,
        nodes: nodes.nodes.into_iter().collect(),
        node_selector: nodes.node_selector,
        container: nodes.container,
        parallel: nodes.parallel,
    };
    let fleet = Fleet::discover(api, selection).await.context("failed to find the agents")?;
    match command {
        Command::Status(StatusArgs { via, output }) => {
            status::status(&fleet, via.via, via.metrics_port, output.output).await
        }
        Command::Compare(StatusArgs { via, output }) => {
            compare::compare(&fleet, via.via, via.metrics_port, output.output).await
        }
        Command::Report(ReportArgs { rules: true, .. }) => report::rules(&fleet).await,
        Command::Report(ReportArgs { output, .. }) => report::report(&fleet, output.output).await,
        Command::Rules(output) => rules::rules(&fleet, output.output).await,
        Command::Verify(output) => verify::verify(&fleet, output.output).await,
        Command::Events(EventsArgs { no_follow, since, output, .. }) => {
            let options = events::EventOptions { format: output, since, follow: !no_follow };
            events::events(&fleet, &options).await
        }
        Command::Top(TopArgs { interval, limit, once, output }) => {
            top::top(&fleet, &top::TopOptions { format: output.output, interval, limit, once }).await
        }
        Command::Rollout(RolloutCommand::Status(RolloutArgs { timeout, via, output })) => {
            rollout::status(fleet, via.via, via.metrics_port, timeout, output.output).await
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_follow_or_precede_the_subcommand() {
        for words in [
            "kubectl-imds -n kube-system status -o json --node a --node b",
            "kubectl-imds status --via metrics --metrics-port 9000 -n kube-system --request-timeout 2m",
        ] {
            let cli = Cli::try_parse_from(words.split(' ')).unwrap();
            assert_eq!(cli.cluster.namespace.as_deref(), Some("kube-system"));
        }
        for words in [
            "kubectl-imds status -n ../x",
            "kubectl-imds status --parallel 0",
            "kubectl-imds status --request-timeout 0s",
        ] {
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
