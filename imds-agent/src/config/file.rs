//! Keys of the file and their defaults, as serde reads and writes them.

use std::ops::Range;

use imds_ebpf_common::{DenyAction, DenyErrno, Hook, Mode};
use serde::{Deserialize, Serialize};
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, Deserializer, Error},
};

use super::{
    endpoint::{EndpointTable, Presets},
    event_sinks::EventsTable,
    exemption::ExemptTable,
    hooks::{Hooks, HooksTable},
    interfaces::InterfacesTable,
    kubernetes::KubernetesTable,
    listen::MetricsTable,
    node_pool::{NodePoolTable, OVERRIDES},
    node_table::NodeTable,
    source::Diagnostics,
    suggest::did_you_mean_of,
};

/// Number of reported errors. A file with more of them is probably not a configuration file.
const MAX_ERRORS: usize = 50;

/// All keys of the file. Tables come last, because TOML requires that.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    #[serde(with = "ModeName")]
    pub(super) mode: Mode,
    #[serde(with = "DenyActionName")]
    pub(super) on_deny: DenyAction,
    #[serde(with = "DenyErrnoName")]
    pub(super) on_deny_errno: DenyErrno,
    pub(super) provider: Spanned<String>,
    pub(super) extra_endpoints: Vec<Spanned<String>>,
    pub(super) hooks: Spanned<HooksTable>,
    #[serde(skip_serializing_if = "NodeTable::is_empty")]
    pub(super) node: NodeTable,
    pub(super) interfaces: InterfacesTable,
    pub(super) metrics: MetricsTable,
    pub(super) events: EventsTable,
    pub(super) kubernetes: KubernetesTable,
    pub(super) preset: Presets,
    pub(super) endpoint: Vec<EndpointTable>,
    pub(super) exempt: Vec<ExemptTable>,
    /// Not part of the effective configuration of a node.
    #[serde(skip_serializing)]
    pub(super) node_pool: Vec<NodePoolTable>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            on_deny: DenyAction::default(),
            on_deny_errno: DenyErrno::default(),
            provider: Spanned::new(0..0, "auto".to_owned()),
            extra_endpoints: Vec::new(),
            hooks: Spanned::new(0..0, HooksTable::default()),
            node: NodeTable::default(),
            interfaces: InterfacesTable::default(),
            metrics: MetricsTable::default(),
            events: EventsTable::default(),
            kubernetes: KubernetesTable::default(),
            preset: Presets::new(),
            endpoint: Vec::new(),
            exempt: Vec::new(),
            node_pool: Vec::new(),
        }
    }
}

impl File {
    /// Reads as much as possible. Invalid keys are recorded as errors, and left out.
    pub(super) fn read(diagnostics: &mut Diagnostics<'_>) -> Self {
        let text = diagnostics.source.text;
        let (mut document, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            // The rest of a text with syntax errors is unreliable.
            for error in errors.iter().take(MAX_ERRORS) {
                diagnostics.error(error.span().unwrap_or_default(), message(error, text));
            }
            return Self::default();
        }
        while diagnostics.count() < MAX_ERRORS {
            let error = match Self::deserialize(Deserializer::from(document.clone())) {
                Ok(file) => return file,
                Err(error) => error,
            };
            let span = error.span().unwrap_or_default();
            let key = remove(document.get_mut(), &span);
            let prefix = key.as_ref().map(|key| format!("{key}: ")).unwrap_or_default();
            diagnostics.error(span, prefix + &message(&error, text));
            if key.is_none() {
                break;
            }
        }
        Self::default()
    }

    /// Reads the file with the settings of a pool instead of those outside of the pools. Records the first error and returns `None` if
    /// a setting is invalid. The file itself must be valid.
    pub(super) fn read_pool(index: usize, diagnostics: &mut Diagnostics<'_>) -> Option<Self> {
        let text = diagnostics.source.text;
        let (mut document, _) = DeTable::parse_recoverable(text);
        let table = document.get_mut();
        let pools = table.remove("node_pool")?.into_inner();
        let DeValue::Table(mut pool) = pools.as_array()?.get(index)?.get_ref().clone() else { return None };
        for key in OVERRIDES {
            let Some((key, value)) = pool.remove_entry(key) else { continue };
            match (value.get_ref(), table.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut)) {
                (DeValue::Table(switches), Some(DeValue::Table(defaults))) => {
                    defaults.extend(switches.clone());
                }
                _ => drop(table.insert(key, value)),
            }
        }
        let span = |error: &Error| error.span().unwrap_or_default();
        let failed =
            |error: Error| diagnostics.error(span(&error), format!("node_pool.{}", message(&error, text)));
        Self::deserialize(Deserializer::from(document)).map_err(failed).ok()
    }

    /// Returns the enabled hooks. The allow list of the node is the switch of its hook.
    pub(super) fn hooks(&self) -> Hooks {
        let node_allow = if self.node.is_empty() { 0 } else { Hook::NodeAllow.bit() };
        Hooks::from(self.hooks.get_ref()).union(Hooks::from_bits(node_allow))
    }

    /// Adopts the mode of `other` if it is stricter, and adds its hooks.
    pub(super) fn strengthen(&mut self, other: &Self) {
        if strictness(other.mode) < strictness(self.mode) {
            self.mode = other.mode;
        }
        self.hooks.get_mut().add(other.hooks.get_ref());
    }

    /// Returns the file with the `socket` hook off.
    pub(super) fn without_socket(self) -> Self {
        let hooks = self.hooks.into_inner().without_socket();
        Self { hooks: Spanned::new(0..0, hooks), ..self }
    }

    /// Returns the file as TOML, with all defaults.
    pub(super) fn to_toml(&self) -> String {
        // Cannot fail: TOML can represent strings, booleans and lists of them.
        toml::to_string(self).unwrap_or_else(|error| format!("# failed to serialize: {error}\n"))
    }
}

/// Returns a number that is lowest for the strictest mode.
pub(super) const fn strictness(mode: Mode) -> u8 {
    match mode {
        Mode::Enforce => 0,
        Mode::Audit => 1,
        Mode::Off => 2,
    }
}

/// Removes the smallest key or list element that contains `span`, and returns its key.
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let mut removed = None;
    for (key, value) in table.iter_mut() {
        let name = key.get_ref();
        if let Some(below) = remove_below(value.get_mut(), span) {
            return Some(if below.is_empty() { name.to_string() } else { format!("{name}.{below}") });
        }
        if contains(&key.span(), span) || contains(&value.span(), span) {
            removed = Some(key.clone());
            break;
        }
    }
    removed.map(|key| {
        table.remove(&key);
        key.into_inner().into_owned()
    })
}

/// Variant of [`remove`] for a value. Returns an empty key for an element of a list.
fn remove_below(value: &mut DeValue<'_>, span: &Range<usize>) -> Option<String> {
    match value {
        DeValue::Table(table) => remove(table, span),
        DeValue::Array(array) => {
            if let Some(below) = array.iter_mut().find_map(|element| remove_below(element.get_mut(), span)) {
                return Some(below);
            }
            let (before, mut remaining) = (array.len(), DeArray::new());
            for element in array.iter().filter(|element| !contains(&element.span(), span)) {
                remaining.push(element.clone());
            }
            *array = remaining;
            (array.len() < before).then(String::new)
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => None,
    }
}

fn contains(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end && !outer.is_empty()
}

/// Returns the parser's message on one line, with the text that it refers to.
fn message(error: &Error, text: &str) -> String {
    let there = text.get(error.span().unwrap_or_default()).unwrap_or_default();
    let message = error.message().lines().collect::<Vec<_>>().join("; ");
    // serde's word for a list.
    let message = message.replace("expected a sequence", "expected a list");
    let suggestion = did_you_mean_of(&message);
    if there.is_empty() || there.contains('\n') || message.contains(there) {
        message + &suggestion
    } else {
        format!("{message}: {there}{suggestion}")
    }
}

/// Names of [`Mode`] in the file.
#[derive(Deserialize, Serialize)]
#[serde(remote = "Mode", rename_all = "lowercase")]
enum ModeName {
    Enforce,
    Audit,
    Off,
}

/// Names of [`DenyAction`] in the file.
#[derive(Deserialize, Serialize)]
#[serde(remote = "DenyAction", rename_all = "lowercase")]
enum DenyActionName {
    Drop,
    Reject,
    Explain,
}

/// Names of [`DenyErrno`] in the file.
#[derive(Deserialize, Serialize)]
#[serde(remote = "DenyErrno", rename_all = "UPPERCASE")]
enum DenyErrnoName {
    Eperm,
    Econnrefused,
    Ehostunreach,
    Enetunreach,
}
