//! Configuration at the start of the agent. A broken file does not prevent the start.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use imds_ebpf_common::names::MAP_CONFIG;

use crate::{
    config::{Config, ConfigErrors, NodeProcess, loader::ConfigLoader},
    controller::resolved_config::{ResolvedConfig, RunOptions},
    datapath::{self, maps::config_record::EffectiveConfig, pin::dir::PinDir},
};

/// Configuration that the agent starts with, and its source.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// Validated configuration, before it is applied to this node.
    pub config: Config,
    /// The configuration applied to this node.
    pub resolved: ResolvedConfig,
    /// File that it was read from; `None` for the built-in defaults.
    pub path: Option<PathBuf>,
    /// Reason why the configured file is not used, if it is not.
    pub rejected: Option<String>,
}

impl StartConfig {
    /// Loads the configured file. If it is unusable, falls back to the first of these that is stored and usable: the last good
    /// configuration, the effective configuration that the maps in `pins` record, the built-in defaults.
    ///
    /// Returns an error only if this node can't enforce the configuration: a broken file must not leave the node
    /// unprotected.
    pub fn choose(loader: &mut ConfigLoader, options: &RunOptions, pins: &PinDir) -> anyhow::Result<Self> {
        let result = loader.load().and_then(|config| {
            let resolved = options.resolve(&config)?;
            Ok((config, resolved))
        });
        match result {
            Ok((config, resolved)) => {
                let resolved = options.resolve_on_node(&config, resolved)?;
                let path = loader.path().map(Path::to_owned);
                Ok(Self { config, resolved, path, rejected: None })
            }
            Err(errors) => Self::fall_back(loader, options, pins, &errors),
        }
    }

    fn fall_back(
        loader: &mut ConfigLoader,
        options: &RunOptions,
        pins: &PinDir,
        errors: &ConfigErrors,
    ) -> anyhow::Result<Self> {
        let path = loader.last_good_path();
        let no_last_good =
            match loader.load_last_good().map(|config| config.map(|config| usable(config, options))) {
                Ok(Some(Ok((config, resolved)))) => {
                    let rejected =
                        format!("{errors}; enforcing the last good configuration, {}", path.display());
                    return Ok(Self { config, resolved, path: Some(path), rejected: Some(rejected) });
                }
                Ok(Some(Err(error))) | Err(error) => {
                    format!("ignoring the last good configuration: {error:#}")
                }
                Ok(None) => format!("no last good configuration is stored at {}", path.display()),
            };
        let no_pinned = match pinned(loader, options, pins) {
            Some((record, Ok((config, resolved)))) => {
                let generation = record.generation;
                let rejected =
                    format!("{errors}; {no_last_good}; keeping the effective configuration {generation}");
                return Ok(Self { config, resolved, path: record.path, rejected: Some(rejected) });
            }
            Some((_, Err(error))) => format!("; ignoring the effective configuration: {error:#}"),
            None => String::new(),
        };
        let (config, resolved) = built_in(loader, options)?;
        let mode = config.mode.name();
        let node = config.node_allow.as_deref().map(describe_node_allow).unwrap_or_default();
        let rejected = format!(
            "{errors}; {no_last_good}{no_pinned}; enforcing the built-in defaults without exemptions in mode {mode}{node}"
        );
        Ok(Self { config, resolved, path: None, rejected: Some(rejected) })
    }
}

/// Names the processes that the allow list of the built-in defaults leaves. One that an invalid entry meant to name, such as the
/// kubelet, is denied.
fn describe_node_allow(allow: &[NodeProcess]) -> String {
    let entries: Vec<_> = allow.iter().map(ToString::to_string).collect();
    if entries.is_empty() {
        return "; node.allow has no valid entry: no process of the node may reach the endpoints, not even the kubelet".to_owned();
    }
    let entries = entries.join(", ");
    format!("; only the valid entries of node.allow may reach the endpoints from the node: {entries}")
}

/// Returns the configuration that the pinned maps record, if it is from this file.
fn pinned(
    loader: &ConfigLoader,
    options: &RunOptions,
    pins: &PinDir,
) -> Option<(EffectiveConfig, anyhow::Result<(Config, ResolvedConfig)>)> {
    let record = datapath::maps::config_record::pinned(pins)?;
    let config = loader.load_pinned(record.path.as_deref(), &record.text, &pins.map(MAP_CONFIG))?;
    Some((record, config.map_err(Into::into).and_then(|config| usable(config, options))))
}

/// Returns the built-in defaults. The socket hook is on by default, but off on a node that does not support it.
fn built_in(loader: &ConfigLoader, options: &RunOptions) -> anyhow::Result<(Config, ResolvedConfig)> {
    let config = loader.fallback();
    let without_socket = config.clone().without_socket();
    usable(config, options).or_else(|error| {
        usable(without_socket, options)
            .map_err(|also| anyhow!("{error:#}; without the socket hook: {also:#}"))
    })
}

fn usable(config: Config, options: &RunOptions) -> anyhow::Result<(Config, ResolvedConfig)> {
    let resolved = options.resolve(&config)?;
    let resolved = options.resolve_on_node(&config, resolved)?;
    Ok((config, resolved))
}
