//! The configuration that an agent starts with, which a broken file does not prevent.

use std::path::{Path, PathBuf};

use anyhow::anyhow;

use crate::{
    config::{Config, ConfigErrors},
    config_loader::ConfigLoader,
    settings::{Node, Settings},
};

/// The configuration that an agent starts with.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// The configuration.
    pub config: Config,
    /// The configuration applied to this node.
    pub settings: Settings,
    /// File that it was read from; `None` for the built-in defaults.
    pub path: Option<PathBuf>,
    /// Reason why it is not that of the configured file, if it is not.
    pub rejected: Option<String>,
}

impl StartConfig {
    /// Loads the configured file. If it can't be used, falls back to the last good configuration, and without one to the
    /// built-in defaults.
    ///
    /// Fails only if this node can't enforce the configuration: a broken file must not leave the node open.
    pub fn choose(loader: &mut ConfigLoader, node: &Node) -> anyhow::Result<Self> {
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

    fn fall_back(loader: &ConfigLoader, node: &Node, errors: &ConfigErrors) -> anyhow::Result<Self> {
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

/// Returns the built-in defaults. The socket hook is on by default, and off on a node that can't have it.
fn built_in(loader: &ConfigLoader, node: &Node) -> anyhow::Result<(Config, Settings)> {
    let config = loader.fallback();
    let without_socket = config.clone().without_socket();
    usable(config, node).or_else(|error| {
        usable(without_socket, node).map_err(|also| anyhow!("{error:#}; without the socket hook: {also:#}"))
    })
}

fn usable(config: Config, node: &Node) -> anyhow::Result<(Config, Settings)> {
    let resolved = node.resolve(&config)?;
    let settings = node.settings(&config, resolved)?;
    Ok((config, settings))
}
