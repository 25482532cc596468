//! Reload of the configuration: its file has changed, or another pool of the file applies to the node.

use super::{Agent, log_error};
use crate::{
    config::{Config, node_pool::Labels},
    controller::resolved_config::ResolvedConfig,
    telemetry::sinks::SinkSettings,
};

impl Agent {
    /// Loads the configuration of another pool if the labels of the node demand it.
    pub(super) async fn on_node_labels(&mut self, labels: Labels) {
        if !self.loader.set_node_labels(labels) {
            return;
        }
        log::info!("loading the configuration again: the labels of the node have changed");
        if let Err(error) = self.reload().await {
            log_error(self.reload_last_good(&error).await);
        }
    }

    /// Reloads the configuration. If that fails, the previous one stays effective. Returns the error.
    pub(super) async fn reload(&mut self) -> Result<(), String> {
        self.systemd.reloading();
        let result = match self.try_reload().await {
            Ok(generation) => {
                self.reloads.succeeded += 1;
                log::info!("loaded configuration {generation}: {}", self.reconciler.summary(&self.resolved));
                Ok(())
            }
            Err(error) => {
                self.reloads.failed += 1;
                let error = format!("{error:#}");
                log::error!("failed to reload configuration, keeping the previous one: {error}");
                log_error(self.reconciler.datapath.record_rejected_config(&error));
                Err(error)
            }
        };
        self.systemd.ready(&self.reconciler.state(&self.resolved));
        result
    }

    async fn try_reload(&mut self) -> anyhow::Result<u64> {
        let config = self.loader.load()?;
        self.apply(&config).await?;
        let generation = self.reconciler.datapath.record_config(self.loader.path(), config.to_toml())?;
        self.loader.store_last_good();
        Ok(generation)
    }

    /// Applies the last good configuration for the current labels of the node, because the file is rejected with `error`.
    async fn reload_last_good(&mut self, error: &str) -> anyhow::Result<()> {
        let Some(config) = self.loader.load_last_good()? else { return Ok(()) };
        self.apply(&config).await?;
        let path = self.loader.last_good_path();
        self.reconciler.datapath.record_config(Some(&path), config.to_toml())?;
        Ok(self.reconciler.datapath.record_rejected_config(error)?)
    }

    /// Applies a configuration. If that fails, the previous one stays effective.
    async fn apply(&mut self, config: &Config) -> anyhow::Result<()> {
        let endpoints = self.options.resolve(config)?;
        let resolved = self.options.resolve_on_node(config, endpoints)?;
        if let Err(error) = self.reconciler.reconfigure(&resolved).await {
            log_error(self.reconciler.reconfigure(&self.resolved).await);
            return Err(error.into());
        }
        self.resolved = resolved;
        self.telemetry.listen(&config.listen);
        let ResolvedConfig { endpoint_set, exempt, .. } = &self.resolved;
        self.telemetry.configure_sinks(SinkSettings::new(config, endpoint_set, exempt));
        self.run_time_stats.set(config.program_run_time);
        self.update_pod_watch().await;
        Ok(())
    }
}
