//! Agents of a cluster: which nodes have one, and requests to many of them at the same time.

mod discovery;
mod progress;

use futures_util::{StreamExt as _, stream};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

pub(crate) use self::discovery::{Selection, check_name};
use self::progress::Progress;
use crate::api::{
    Api, ApiError,
    exec::{Container, Output},
    pods::Pod,
};

/// Path of the agent's binary in its image.
const AGENT: &str = "/imds-agent";
/// Exit code of a check of the agent that found a problem. The output is complete.
const CHECK_FAILED: i32 = 3;
/// Schema version of the agent's JSON output that the plugin reads.
const SCHEMA: u64 = 1;

/// Agent on a node, which answers requests.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) node: String,
    pub(crate) pod: String,
    pub(crate) uid: String,
}

/// A node without an answer.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct NodeError {
    pub(crate) node: String,
    pub(crate) pod: Option<String>,
    pub(crate) error: String,
}

#[derive(Debug, Error)]
pub(crate) enum AskError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("{error} (exit code {code})")]
    Failed { code: i32, error: String },
    #[error("failed to read the output: {source}")]
    Malformed { source: serde_json::Error },
    #[error("the agent's output has schema {found}, this plugin reads {SCHEMA}")]
    Schema { found: u64 },
    #[error("{0}")]
    Content(String),
}

/// Agents of the selected nodes.
pub(crate) struct Fleet {
    pub(crate) api: Api,
    pub(crate) selection: Selection,
    pub(crate) namespace: String,
    /// Nodes to ask, in the order of their names.
    pub(crate) targets: Vec<Target>,
    /// Nodes that cannot be asked.
    pub(crate) errors: Vec<NodeError>,
    /// Limitations of the result, such as a missing permission.
    pub(crate) limitations: Vec<String>,
    /// All listed pods of the agent.
    pub(crate) pods: Vec<Pod>,
}

impl Fleet {
    /// Asks all nodes, at most `parallel` at a time, and passes each answer to `fold` as soon as it is complete. Returns the
    /// nodes without an answer, sorted by name.
    pub(crate) async fn ask<'f, T, A: Future<Output = Result<T, AskError>>>(
        &'f self,
        ask: impl Fn(&'f Target) -> A,
        mut fold: impl FnMut(&'f Target, T),
    ) -> Vec<NodeError> {
        let mut errors = self.errors.clone();
        let mut progress = Progress::new(self.targets.len());
        let requests = stream::iter(&self.targets).map(|target| {
            let answer = ask(target);
            async move { (target, answer.await) }
        });
        let mut answers = std::pin::pin!(requests.buffer_unordered(self.selection.parallel));
        while let Some((target, answer)) = answers.next().await {
            let is_error = answer.is_err();
            match answer {
                Ok(answer) => fold(target, answer),
                Err(error) => errors.push(NodeError {
                    node: target.node.clone(),
                    pod: Some(target.pod.clone()),
                    error: error.to_string(),
                }),
            }
            progress.advance(is_error);
        }
        errors.sort();
        errors
    }

    /// Returns the container of the agent on a node.
    pub(crate) fn container<'f>(&'f self, target: &'f Target) -> Container<'f> {
        Container { namespace: &self.namespace, pod: &target.pod, name: &self.selection.container }
    }

    /// Runs a command of the agent that prints JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        target: &Target,
        command: &[&str],
    ) -> Result<T, AskError> {
        let output = self.run(target, command).await?;
        if output.exit_code != 0 && output.exit_code != CHECK_FAILED {
            return Err(AskError::Failed { code: output.exit_code, error: output.last_error() });
        }
        serde_json::from_slice(&output.stdout).map_err(|source| AskError::Malformed { source })
    }

    /// Runs a command of the agent.
    pub(crate) async fn run(&self, target: &Target, command: &[&str]) -> Result<Output, AskError> {
        let command: Vec<_> = [AGENT].iter().chain(command).copied().collect();
        Ok(self.api.exec(self.container(target), &command).await?)
    }

    /// Returns a command of the agent with its program.
    pub(crate) fn command<'c>(arguments: &[&'c str]) -> Vec<&'c str> {
        [AGENT].iter().chain(arguments).copied().collect()
    }
}

/// Fails unless a document of the agent has the schema that the plugin reads.
pub(crate) fn check_schema(found: u64) -> Result<(), AskError> {
    if found == SCHEMA { Ok(()) } else { Err(AskError::Schema { found }) }
}
