//! `[[node_pool]]`: settings of a part of the cluster's nodes.

use std::{collections::BTreeMap, path::Path};

use imds_ebpf_common::Mode;
use serde::{Deserialize, de::IgnoredAny};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config,
    file::File,
    names,
    selector::{NODE_SELECTOR, Selector, SelectorTable},
    source::Diagnostics,
};
use crate::checksum::fnv1a;

/// Largest number of pools. Each is read together with the whole file.
const MAX_POOLS: usize = 32;
/// Longest name of a pool in characters.
const MAX_NAME: usize = 63;
/// First line of an effective configuration that was chosen from pools, before the pool's name.
const HEADER: &str = "# node_pool ";
/// Stands for the name if no pool matches the node. No pool can have this name.
const NO_POOL: &str = "(none)";

/// Keys that a pool can set instead of the rest of the file.
pub(super) const OVERRIDES: [&str; 5] = ["mode", "on_deny", "on_deny_errno", "provider", "hooks"];

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// Pool of nodes with a configuration of their own. The first pool that matches a node decides.
#[derive(Clone, Debug)]
pub struct NodePool {
    name: String,
    /// Selector of the nodes by their labels; `None` for nodes with any labels.
    selector: Option<Selector>,
    /// Percentage of the selected nodes.
    percent: u8,
    /// Configuration of the nodes of the pool.
    config: Config,
}

/// Node for which a configuration is chosen.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeIdentity {
    /// Name of the node in the cluster.
    pub name: String,
    /// Labels of the node; `None` while they are unknown.
    pub labels: Option<Labels>,
    /// Effective configuration of an earlier agent on this node, as TOML. It decides while the labels are unknown.
    pub effective: Option<String>,
}

/// Match of a pool with a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Match {
    Yes,
    No,
    /// The labels of the node decide, and are unknown.
    Unknown,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NodePoolTable {
    name: Spanned<String>,
    node_selector: Option<Spanned<SelectorTable>>,
    percent: Option<Spanned<u8>>,
    // The values are read together with the rest of the file.
    #[serde(rename = "mode")]
    _mode: Option<IgnoredAny>,
    #[serde(rename = "on_deny")]
    _on_deny: Option<IgnoredAny>,
    #[serde(rename = "on_deny_errno")]
    _on_deny_errno: Option<IgnoredAny>,
    #[serde(rename = "provider")]
    _provider: Option<IgnoredAny>,
    #[serde(rename = "hooks")]
    _hooks: Option<IgnoredAny>,
}

impl NodePool {
    /// Parses the pools of `file`, and records their errors. Each pool is checked together with the rest of the file.
    pub(super) fn parse(file: &File, diagnostics: &mut Diagnostics<'_>) -> Vec<Self> {
        if let Some(table) = file.node_pool.get(MAX_POOLS) {
            let message = format!("node_pool: more than {MAX_POOLS} pools");
            diagnostics.error(table.name.span(), message);
            return Vec::new();
        }
        let mut pools = Vec::<Self>::new();
        for (index, table) in file.node_pool.iter().enumerate() {
            let name = diagnostics.plain_name(&table.name, "node_pool.name", MAX_NAME);
            if pools.iter().any(|pool| Some(&pool.name) == name.as_ref()) {
                let message = format!("node_pool.name: {:?} is the name of two pools", table.name.get_ref());
                diagnostics.error(table.name.span(), message);
            }
            let selector =
                table.node_selector.as_ref().map(|table| Selector::parse(table, NODE_SELECTOR, diagnostics));
            let percent = table.percent.as_ref().map_or(100, |percent| *percent.get_ref());
            if let Some(span) =
                table.percent.as_ref().filter(|_| !(1..=100).contains(&percent)).map(Spanned::span)
            {
                diagnostics.error(span, format!("node_pool.percent: {percent} is not 1 to 100"));
            }
            let Some(file) = File::read_pool(index, diagnostics) else { continue };
            let mut config = Config::check(&file, diagnostics);
            if let (Some(name), selector) = (name, selector) {
                config.text.insert_str(0, &format!("{HEADER}{name}\n"));
                // `Some(None)` stands for an invalid selector, whose error makes the file unusable.
                pools.push(Self { name, selector: selector.flatten(), percent, config });
            }
        }
        pools
    }

    fn matches(&self, node: &NodeIdentity) -> Match {
        // The names of both, so that two pools choose their nodes independently.
        if fnv1a(&format!("{}/{}", self.name, node.name)) % 100 >= self.percent.into() {
            return Match::No;
        }
        let Some(selector) = &self.selector else { return Match::Yes };
        let Some(labels) = &node.labels else { return Match::Unknown };
        let is_selected = selector.matches(|key| labels.get(key).map(String::as_str));
        if is_selected { Match::Yes } else { Match::No }
    }
}

impl Config {
    /// Reports whether the labels of the node decide between configurations.
    pub fn needs_node_labels(&self) -> bool {
        self.pools.iter().any(|pool| pool.selector.is_some())
    }

    /// Returns the names of all pools, with the configuration of the pool's nodes.
    pub fn node_pools(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.pools.iter().map(|pool| (pool.name.as_str(), &pool.config))
    }

    /// Returns the configuration for a node: that of the first pool that matches, or the one without a pool.
    ///
    /// While labels are unknown, several of them may be the right one. The one that was effective before stays effective then. Without
    /// it, the result has the strictest mode and all hooks of them, so that a missing answer of the API server weakens nothing.
    #[must_use]
    pub fn for_node(mut self, node: &NodeIdentity) -> Self {
        if self.pools.is_empty() {
            return self;
        }
        let mut candidates = Vec::new();
        let mut decided = None;
        for pool in std::mem::take(&mut self.pools) {
            match pool.matches(node) {
                Match::No => {}
                Match::Unknown => candidates.push(pool.config),
                Match::Yes => {
                    decided = Some(pool.config);
                    break;
                }
            }
        }
        self.text.insert_str(0, &format!("{HEADER}{NO_POOL}\n"));
        let last = decided.unwrap_or(self);
        let before = node.effective.as_deref().and_then(marker_of);
        if candidates.is_empty() || before.is_some() && marker_of(&last.text) == before {
            return last;
        }
        let kept = candidates.iter().position(|config| before.is_some() && marker_of(&config.text) == before);
        match kept {
            Some(kept) => candidates.swap_remove(kept),
            None => last.strengthened(&candidates),
        }
    }

    /// Returns the configuration with the strictest mode and all hooks of `others`.
    fn strengthened(self, others: &[Self]) -> Self {
        let read = |config: &Self| File::read(&mut Diagnostics::new(&config.text, Path::new("")));
        let mut file = read(&self);
        for other in others.iter().map(read) {
            file.strengthen(&other);
        }
        Self::from_file(&file, &mut Diagnostics::new("", Path::new("")))
    }

    /// Returns the name of the pool whose settings this configuration has.
    pub fn pool(&self) -> Option<&str> {
        pool_of(&self.text)
    }
}

/// Returns the name of the pool in the text of an effective configuration.
pub fn pool_of(text: &str) -> Option<&str> {
    marker_of(text).filter(|marker| *marker != NO_POOL)
}

/// Returns the first line of the text of a configuration that was chosen from pools.
pub(super) fn header_of(text: &str) -> Option<&str> {
    text.lines().next().filter(|line| line.starts_with(HEADER))
}

/// Returns the modes of the pools in a broken file. A mode that cannot be read is `enforce`.
pub(super) fn modes(text: &str) -> Vec<Mode> {
    let (document, _) = DeTable::parse_recoverable(text);
    let Some(pools) = document.get_ref().get("node_pool") else { return Vec::new() };
    let Some(pools) = pools.get_ref().as_array() else { return vec![Mode::Enforce] };
    let mode = |pool: &Spanned<DeValue<'_>>| {
        let mode = pool.get_ref().get("mode")?.get_ref().as_str();
        Some(
            [Mode::Audit, Mode::Off].into_iter().find(|known| mode == Some(known.name())).unwrap_or_default(),
        )
    };
    pools.iter().filter_map(mode).collect()
}

/// Returns the name of the pool in the text of an effective configuration, or [`NO_POOL`]. Returns `None` if the configuration was
/// not chosen from pools, or before the labels of the node were known.
fn marker_of(text: &str) -> Option<&str> {
    header_of(text)?.strip_prefix(HEADER)
}

/// Parses labels as in `a=1,b=2`, the value of a command line option.
pub fn parse_labels(text: &str) -> Result<Labels, String> {
    let label = |text: &str| {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
        let is_valid = names::is_label_key(key) && names::is_label_value(value);
        is_valid
            .then(|| (key.to_owned(), value.to_owned()))
            .ok_or_else(|| format!("{text:?} is not a valid label"))
    };
    text.split(',').filter(|text| !text.is_empty()).map(label).collect()
}

#[cfg(test)]
mod tests {
    use imds_ebpf_common::{Hook, Mode};

    use super::*;

    const POOLS: &str = "
        mode = 'audit'
        [[node_pool]]
        name = 'canary'
        percent = 10
        mode = 'enforce'
        [[node_pool]]
        name = 'gpu'
        node_selector = { match_labels = { pool = 'gpu' } }
        provider = 'azure'
        mode = 'off'
        [node_pool.hooks]
        host_network = true
        [hooks]
        socket = false";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("imds.toml")).map_err(|error| error.to_string())
    }

    fn node(name: &str, labels: Option<&[(&str, &str)]>) -> NodeIdentity {
        let labels = labels.map(|labels| {
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        });
        NodeIdentity { name: name.to_owned(), labels, effective: None }
    }

    fn chosen(node: &NodeIdentity) -> (Option<String>, Mode) {
        let config = parse(POOLS).unwrap().for_node(node);
        (config.pool().map(str::to_owned), config.mode)
    }

    /// Returns the name of a node that is, or is not, among the first ten percent.
    fn name(is_canary: bool) -> String {
        let mut names = (0..).map(|number| format!("node-{number}"));
        names.find(|name| (fnv1a(&format!("canary/{name}")) % 100 < 10) == is_canary).unwrap()
    }

    #[test]
    fn first_matching_pool_decides() {
        let (canary, other) = (name(true), name(false));
        let gpu: &[_] = &[("pool", "gpu")];
        let canary_mode = (Some("canary".to_owned()), Mode::Enforce);
        assert_eq!(chosen(&node(&canary, Some(gpu))), canary_mode);
        assert_eq!(chosen(&node(&other, Some(gpu))), (Some("gpu".to_owned()), Mode::Off));
        assert_eq!(chosen(&node(&other, Some(&[]))), (None, Mode::Audit));
        // A pool without a selector needs no labels.
        assert_eq!(chosen(&node(&canary, None)), canary_mode);
    }

    #[test]
    fn unknown_labels_do_not_weaken() {
        let mut unlabelled = node(&name(false), None);
        assert_eq!(chosen(&unlabelled), (None, Mode::Audit));
        // Hooks of all pools that may match.
        let config = parse(POOLS).unwrap().for_node(&unlabelled);
        assert!(config.hooks.contains(Hook::HostNetwork) && config.hooks.contains(Hook::FromPod));
        assert_eq!(parse(config.to_toml()).unwrap().to_toml(), config.to_toml());
        for (before, expected) in [
            ("# node_pool gpu\nmode = 'off'", (Some("gpu".to_owned()), Mode::Off)),
            ("# node_pool (none)\nmode = 'audit'", (None, Mode::Audit)),
            ("# node_pool deleted\n", (None, Mode::Audit)),
            // An earlier configuration without pools decides nothing.
            ("mode = 'off'", (None, Mode::Audit)),
        ] {
            unlabelled.effective = Some(before.to_owned());
            assert_eq!(chosen(&unlabelled), expected, "{before}");
        }
        // Known labels decide against an earlier configuration.
        unlabelled.labels = Some(BTreeMap::new());
        unlabelled.effective = Some("# node_pool gpu\n".to_owned());
        assert_eq!(chosen(&unlabelled), (None, Mode::Audit));
    }

    #[test]
    fn weaker_hooks_of_a_pool_need_its_labels() {
        let text = "[[node_pool]]\nname = 'gpu'\nnode_selector = { match_labels = { pool = 'gpu' } }\n\
                    hooks = { from_pod = false, socket = false }";
        let config = parse(text).unwrap().for_node(&node("a", None));
        assert!(config.hooks.contains(Hook::FromPod) && config.hooks.contains(Hook::Socket));
        let gpu = parse(text).unwrap().for_node(&node("a", Some(&[("pool", "gpu")])));
        assert!(!gpu.hooks.contains(Hook::FromPod));
    }

    #[test]
    fn recorded_pool_survives_parsing() {
        let gpu = parse(POOLS).unwrap().for_node(&node(&name(false), Some(&[("pool", "gpu")])));
        assert_eq!(parse(gpu.to_toml()).unwrap().pool(), Some("gpu"));
    }

    #[test]
    fn broken_file_has_the_strictest_mode() {
        for (text, mode) in [
            ("mode = 'audit'\nx = 1\n[[node_pool]]\nname = 'a'\nmode = 'enforce'", Mode::Enforce),
            ("mode = 'audit'\nx = 1\n[[node_pool]]\nname = 'a'\nmode = 'off'", Mode::Audit),
            ("mode = 'off'\nx = 1\n[[node_pool]]\nname = 'a'\nmode = 'audit'", Mode::Audit),
            ("mode = 'audit'\nx = 1\n[[node_pool]]\nname = 'a'\nmode = 1", Mode::Enforce),
            ("mode = 'audit'\nnode_pool = 1", Mode::Enforce),
            ("mode = 'audit'\nx = 1", Mode::Audit),
        ] {
            assert_eq!(Config::fallback(text, Path::new("f")).mode, mode, "{text}");
        }
    }

    #[test]
    fn pool_overrides_single_keys() {
        let config = parse(POOLS).unwrap();
        let gpu = config.for_node(&node(&name(false), Some(&[("pool", "gpu")])));
        assert!(gpu.hooks.contains(Hook::HostNetwork) && !gpu.hooks.contains(Hook::Socket));
        assert!(gpu.to_toml().contains("provider = \"azure\""), "{}", gpu.to_toml());
        let again = parse(gpu.to_toml()).unwrap();
        assert_eq!((again.mode, again.hooks), (Mode::Off, gpu.hooks));
    }

    #[test]
    fn canary_is_about_its_percentage() {
        let canaries =
            (0..5000).filter(|number| fnv1a(&format!("canary/aks-pool-{number:06}")) % 100 < 10).count();
        assert!((400..600).contains(&canaries), "{canaries}");
    }

    #[test]
    fn errors_name_the_pool_key() {
        for (text, position, part) in [
            ("[[node_pool]]\nname = 'a b'", "2:8", "node_pool.name"),
            ("[[node_pool]]\nname = 'a'\npercent = 0", "3:11", "node_pool.percent"),
            ("[[node_pool]]\nname = 'a'\nmode = 'audti'", "3:8", "audti"),
            ("[[node_pool]]\nname = 'a'\nexempt = []", "3:1", "exempt"),
            ("[[node_pool]]\nname = 'a'\n[node_pool.hooks]\nsockets = true", "4:1", "sockets"),
            ("[[node_pool]]\nname = 'a'\n[[node_pool]]\nname = 'a'", "4:8", "two pools"),
            ("[[node_pool]]\nname = 'a'\nprovider = 'none'", "3:12", "protects nothing"),
            (
                "[[node_pool]]\nname = 'a'\nnode_selector = {}",
                "3:17",
                "node_pool.node_selector: is empty; remove",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("imds.toml:{position}: ")) && error.contains(part), "{error}");
        }
    }
}
