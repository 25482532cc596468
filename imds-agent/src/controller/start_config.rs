//! Configuration at the start of the agent. A broken file does not prevent the start.

use std::path::{Path, PathBuf};

use anyhow::anyhow;

use crate::{
    config::{Config, ConfigErrors, loader::ConfigLoader},
    controller::resolved_config::{ResolvedConfig, RunOptions},
};

/// Configuration that the agent starts with, and its source.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// Validated configuration, before it is applied to this node.
    pub config: Config,
    /// The configuration applied to this node.
    pub settings: ResolvedConfig,
    /// File that it was read from; `None` for the built-in defaults.
    pub path: Option<PathBuf>,
    /// Reason why the configured file is not used, if it is not.
    pub rejected: Option<String>,
}

impl StartConfig {
    /// Loads the configured file. If it is unusable, falls back to the last good configuration, or to the built-in
    /// defaults if none is stored.
    ///
    /// Returns an error only if this node can't enforce the configuration: a broken file must not leave the node
    /// unprotected.
    pub fn choose(loader: &mut ConfigLoader, node: &RunOptions) -> anyhow::Result<Self> {
        let result = loader.load().and_then(|config| {
            let resolved = node.resolve(&config)?;
            Ok((config, resolved))
        });
        match result {
            Ok((config, resolved)) => {
                let settings = node.settings(&config, resolved)?;
                let path = loader.path().map(Path::to_owned);
                Ok(Self { config, settings, path, rejected: None })
            }
            Err(errors) => Self::fall_back(loader, node, &errors),
        }
    }

    fn fall_back(loader: &ConfigLoader, node: &RunOptions, errors: &ConfigErrors) -> anyhow::Result<Self> {
        let path = loader.last_good_path();
        let no_last_good =
            match loader.load_last_good().map(|config| config.map(|config| usable(config, node))) {
                Ok(Some(Ok((config, settings)))) => {
                    let rejected =
                        format!("{errors}; enforcing the last good configuration, {}", path.display());
                    return Ok(Self { config, settings, path: Some(path), rejected: Some(rejected) });
                }
                Ok(Some(Err(error))) | Err(error) => {
                    format!("ignoring the last good configuration: {error:#}")
                }
                Ok(None) => format!("no last good configuration is stored at {}", path.display()),
            };
        let (config, settings) = built_in(loader, node)?;
        let mode = config.mode.name();
        let rejected = format!(
            "{errors}; {no_last_good}; enforcing the built-in defaults without exemptions in mode {mode}"
        );
        Ok(Self { config, settings, path: None, rejected: Some(rejected) })
    }
}

/// Returns the built-in defaults. The socket hook is on by default, but off on a node that does not support it.
fn built_in(loader: &ConfigLoader, node: &RunOptions) -> anyhow::Result<(Config, ResolvedConfig)> {
    let config = loader.fallback();
    let without_socket = config.clone().without_socket();
    usable(config, node).or_else(|error| {
        usable(without_socket, node).map_err(|also| anyhow!("{error:#}; without the socket hook: {also:#}"))
    })
}

fn usable(config: Config, node: &RunOptions) -> anyhow::Result<(Config, ResolvedConfig)> {
    let resolved = node.resolve(&config)?;
    let settings = node.settings(&config, resolved)?;
    Ok((config, settings))
}
