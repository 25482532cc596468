//! Interface names for which the operator overrides the classification.

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::source::Diagnostics;

/// Globs of interface names for which the operator overrides the classification.
#[derive(Clone, Debug, Default)]
pub struct Interfaces {
    include: GlobSet,
    exclude: GlobSet,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct InterfacesTable {
    include: Vec<Spanned<String>>,
    exclude: Vec<Spanned<String>>,
}

impl Interfaces {
    /// Reports whether the operator declares an interface to be a pod's.
    pub fn includes(&self, name: &str) -> bool {
        self.include.is_match(name)
    }

    /// Reports whether the operator excludes an interface from enforcement.
    pub fn excludes(&self, name: &str) -> bool {
        self.exclude.is_match(name)
    }

    pub(super) fn parse(table: &InterfacesTable, diagnostics: &mut Diagnostics<'_>) -> Self {
        let InterfacesTable { include, exclude } = table;
        let is_included =
            |glob: &&Spanned<String>| include.iter().any(|other| other.as_ref() == glob.as_ref());
        for glob in exclude.iter().filter(is_included) {
            let message = format!("interfaces.exclude: {:?} is also in interfaces.include", glob.as_ref());
            diagnostics.error(glob.span(), message);
        }
        Self {
            include: compile(include, "interfaces.include", diagnostics),
            exclude: compile(exclude, "interfaces.exclude", diagnostics),
        }
    }
}

fn compile(globs: &[Spanned<String>], key: &str, diagnostics: &mut Diagnostics<'_>) -> GlobSet {
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        let compiled = match glob.as_ref().as_str() {
            "" => Err(format!("{key}: \"\" matches no interface; remove it")),
            text => Glob::new(text).map_err(|error| format!("{key}: {error}")),
        };
        if let Some(glob) = diagnostics.ok(glob.span(), compiled) {
            set.add(glob);
        }
    }
    let all = globs.first().map(Spanned::span).unwrap_or_default();
    diagnostics.ok(all, set.build().map_err(|error| format!("{key}: {error}"))).unwrap_or_default()
}
