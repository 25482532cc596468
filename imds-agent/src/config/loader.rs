//! Loads the configuration at the start and when its file changes.

use std::path::{Path, PathBuf};

use crate::config::{
    self, Config, ConfigErrors, Environment, Listen, NodeIdentity,
    last_good::{LastGoodError, LastGoodStore},
    node_pool::{Labels, pool_of},
};

/// Loads the configuration from a file, or the defaults if no file is named.
#[derive(Clone, Debug)]
pub struct ConfigLoader {
    path: Option<PathBuf>,
    /// Addresses of the metrics server that replace those of the file, unless empty.
    listen: Vec<Listen>,
    store: LastGoodStore,
    /// Content of the file at the last read.
    last_read: Content,
    node: NodeIdentity,
    /// True if the labels of the node are from the command line, so that the API server is not asked.
    has_static_labels: bool,
    /// True if the labels of the node decide between pools of the last loaded file.
    needs_node_labels: bool,
}

/// Content of the file. `None` if it cannot be read or no file is named.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Content(Option<String>);

impl ConfigLoader {
    /// Creates a loader of the file at `path`. `listen` replaces the addresses of the metrics server unless it is
    /// empty.
    pub fn new(path: Option<PathBuf>, listen: Vec<Listen>, store: LastGoodStore) -> Self {
        let (last_read, node) = (Content::default(), NodeIdentity::default());
        let (has_static_labels, needs_node_labels) = (false, false);
        Self { path, listen, store, last_read, node, has_static_labels, needs_node_labels }
    }

    /// Sets the labels of the node from the command line, and the effective configuration of an earlier agent. Both choose the
    /// node's pool.
    #[must_use]
    pub fn with_node(self, labels: Option<Labels>, effective: Option<String>) -> Self {
        let has_static_labels = labels.is_some();
        let node = NodeIdentity { name: String::new(), labels, effective };
        Self { node, has_static_labels, ..self }
    }

    /// Reports whether the API server must be asked for the labels of the node: they decide between pools of the last loaded file.
    pub fn needs_node_labels(&self) -> bool {
        self.needs_node_labels && !self.has_static_labels
    }

    /// Sets the labels of the node. Returns whether they differ from the known ones.
    pub fn set_node_labels(&mut self, labels: Labels) -> bool {
        self.node.labels.replace(labels) != self.node.labels
    }

    /// Reads and validates the file.
    pub fn load(&mut self) -> Result<Config, ConfigErrors> {
        let config = match &self.path {
            Some(path) => {
                let read = config::read(path);
                self.last_read = Content(read.as_ref().ok().cloned());
                let config = Config::parse(&read?, path)?;
                self.for_node(config)
            }
            None => Config::default(),
        };
        Ok(self.with_listen(config))
    }

    /// Returns the path of the configuration file, if one is named.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns the current content of the file if it differs from the last read.
    pub(crate) fn change(&self) -> Option<Content> {
        let now = Content(config::read(self.path.as_ref()?).ok());
        (now != self.last_read).then_some(now)
    }

    /// Stores the content of the last read as the last good configuration.
    pub(crate) fn store_last_good(&self) {
        let (Some(path), Content(Some(text))) = (&self.path, &self.last_read) else { return };
        if let Err(error) = absolute(path).and_then(|path| self.store.write(&path, text)) {
            log::warn!(
                "failed to store the last good configuration, a start with a broken file would use the built-in \
                 defaults (set --state-dir to a writable directory): {error}"
            );
        }
    }

    /// Returns the path of the last good configuration.
    pub(crate) fn last_good_path(&self) -> PathBuf {
        self.store.path()
    }

    /// Reads and validates the stored last good configuration of the file, if one exists.
    pub(crate) fn load_last_good(&mut self) -> anyhow::Result<Option<Config>> {
        let Some(path) = &self.path else { return Ok(None) };
        let Some(text) = self.store.read(&absolute(path)?)? else { return Ok(None) };
        let config = Config::parse(&text, &self.store.path())?;
        let config = self.for_node(config);
        Ok(Some(self.with_listen(config)))
    }

    /// Validates the text that the pinned map at `map` records, if `from` is the file or its last good configuration. The
    /// built-in defaults that replaced a broken file are from no file.
    pub(crate) fn load_pinned(
        &self,
        from: Option<&Path>,
        text: &str,
        map: &Path,
    ) -> Option<Result<Config, ConfigErrors>> {
        let from = from?;
        if self.path.as_deref() != Some(from) && self.store.path() != from {
            return None;
        }
        Some(Config::parse(text, map).map(|config| self.with_listen(config)))
    }

    /// Returns the built-in defaults, plus those keys of the broken file that cannot weaken them: see
    /// [`Config::fallback`].
    pub(crate) fn fallback(&self) -> Config {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let Content(text) = &self.last_read;
        self.with_listen(Config::fallback(text.as_deref().unwrap_or_default(), path))
    }

    /// Returns the configuration of this node's pool.
    fn for_node(&mut self, config: Config) -> Config {
        self.needs_node_labels = config.needs_node_labels();
        let name = config.kubernetes.node_name(&Environment::read());
        let chosen = config.for_node(&NodeIdentity { name, ..self.node.clone() });
        self.log_pool(&chosen);
        self.node.effective = Some(chosen.to_toml().to_owned());
        chosen
    }

    /// Logs the pool of the node if it is another one than before.
    fn log_pool(&self, chosen: &Config) {
        let before = self.node.effective.as_deref().and_then(pool_of);
        match chosen.pool() {
            Some(pool) if before != Some(pool) => log::info!("node pool {pool} applies to this node"),
            None if before.is_some() => log::info!("no node pool applies to this node"),
            _ => {}
        }
    }

    fn with_listen(&self, mut config: Config) -> Config {
        if !self.listen.is_empty() {
            config.listen.clone_from(&self.listen);
        }
        config
    }
}

fn absolute(path: &Path) -> Result<PathBuf, LastGoodError> {
    let failed = |cause| LastGoodError::Io { verb: "resolve", path: path.to_owned(), cause };
    std::path::absolute(path).map_err(failed)
}
