//! The `[node]` table: processes of the node that may reach protected endpoints.

use std::{borrow::Cow, fmt, str::FromStr};

use imds_ebpf_common::allow_list::MAX_ALLOWED;
use serde::{Deserialize, Serialize};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    source::{Diagnostics, SourceFile},
    suggest::did_you_mean,
};

/// Most names in the path of a cgroup. The programs compare
/// [`MAX_CGROUP_LEVEL`](imds_ebpf_common::allow_list::MAX_CGROUP_LEVEL) levels below the root of the whole hierarchy, of which a
/// node in a container sees a part.
const MAX_CGROUP_DEPTH: usize = 10;
/// Most bytes in the path of a cgroup.
const MAX_CGROUP_LENGTH: usize = 1024;
/// Mount point of the hierarchy by convention.
const MOUNT: &str = "/sys/fs/cgroup";

/// Entry of the allow list of the node.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum NodeProcess {
    /// Processes with this real user ID in the initial user namespace.
    Uid(u32),
    /// Processes in the cgroup v2 with this path and below, as `/proc/PID/cgroup` shows it.
    Cgroup(String),
}

impl NodeProcess {
    /// Returns the entry for the cgroup at this path, or the reason why the path can't be in the list.
    pub fn from_cgroup(path: String) -> Result<Self, String> {
        check_path(&path)?;
        Ok(Self::Cgroup(path))
    }
}

impl FromStr for NodeProcess {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("uid", uid)) => parse_uid(uid).ok_or_else(|| {
                format!("{text:?}: a user is a number from 0 to {}, as `id -u NAME` prints it", u32::MAX - 1)
            }),
            Some(("cgroup", path)) => {
                Self::from_cgroup(path.to_owned()).map_err(|message| format!("{text:?}: {message}"))
            }
            Some((kind, _)) => {
                let suggestion = did_you_mean(kind, ["uid", "cgroup"]);
                Err(format!("{text:?} is not \"uid:NUMBER\" or \"cgroup:/PATH\"{suggestion}"))
            }
            None => {
                let kind = if parse_uid(text).is_some() {
                    "uid:"
                } else if text.starts_with('/') {
                    "cgroup:"
                } else {
                    ""
                };
                let suggestion =
                    if kind.is_empty() { String::new() } else { format!("; did you mean \"{kind}{text}\"?") };
                Err(format!("{text:?} is not \"uid:NUMBER\" or \"cgroup:/PATH\"{suggestion}"))
            }
        }
    }
}

impl fmt::Display for NodeProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "uid:{uid}"),
            Self::Cgroup(path) => write!(f, "cgroup:{path}"),
        }
    }
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct NodeTable {
    allow: Option<Spanned<Vec<Spanned<String>>>>,
}

impl NodeTable {
    /// Reports whether the table has no key.
    pub(super) fn is_empty(&self) -> bool {
        self.allow.is_none()
    }

    /// Returns the table with the valid entries of a broken file, as far as they can be read. The result is empty if the file has no
    /// `[node]` table with a key.
    /// An unknown key that may be a misspelt `node`, and a key `allow` elsewhere, count as that table.
    ///
    /// An invalid entry allows nothing. The list stays even if it has no other entry: without a list, every process of the node
    /// could reach the endpoints.
    pub(super) fn salvage(source: SourceFile<'_>) -> Self {
        let (document, _) = DeTable::parse_recoverable(source.text);
        let document = document.get_ref();
        let is_meant = |(name, value): &(&Spanned<Cow<'_, str>>, &Spanned<DeValue<'_>>)| {
            let (name, value): (&str, _) = (name.get_ref(), value.get_ref());
            let is_list = value.is_table() || value.is_array();
            is_list && (name == "allow" || is_similar_to_node(name)) || value.get("allow").is_some()
        };
        let misspelt = || document.iter().find(is_meant).map(|(_, value)| value);
        let Some(node) = document.get("node").or_else(misspelt) else { return Self::default() };
        let allow = match node.get_ref() {
            DeValue::Table(table) if table.is_empty() => return Self::default(),
            DeValue::Table(table) => table.get("allow").and_then(|allow| allow.get_ref().as_array()),
            _ => None,
        };
        let mut processes = Vec::new();
        for entry in allow.into_iter().flatten() {
            let Some(text) = entry.get_ref().as_str() else { continue };
            let text = Spanned::new(entry.span(), text.to_owned());
            processes.extend(parse_new(&text, &processes, source));
            if processes.len() == MAX_ALLOWED {
                break;
            }
        }
        let unplaced = |process: &NodeProcess| Spanned::new(0..0, process.to_string());
        Self { allow: Some(Spanned::new(0..0, processes.iter().map(unplaced).collect())) }
    }

    /// Returns the allow list; `None` if every process of the node may reach protected endpoints.
    pub(super) fn parse(&self, diagnostics: &mut Diagnostics<'_>) -> Option<Vec<NodeProcess>> {
        let texts = self.allow.as_ref()?;
        let count = texts.get_ref().len();
        if count > MAX_ALLOWED {
            let message = format!("node.allow: {count} entries; at most {MAX_ALLOWED} are possible");
            diagnostics.error(texts.span(), message);
        }
        let mut processes = Vec::new();
        for text in texts.get_ref() {
            let process = parse_new(text, &processes, diagnostics.source);
            processes.extend(diagnostics.ok(text.span(), process));
        }
        Some(processes)
    }
}

/// Reports whether the key of a table or list may be a misspelt `node`.
fn is_similar_to_node(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    let start: String = key.chars().take(8).collect();
    key.starts_with("node") && !key.starts_with("node_pool") || strsim::osa_distance(&start, "node") <= 1
}

fn parse_new(
    text: &Spanned<String>,
    others: &[NodeProcess],
    source: SourceFile<'_>,
) -> Result<NodeProcess, String> {
    let process = source.check_systemd_escapes(text.span()).and_then(|()| text.get_ref().parse());
    let process = process.and_then(|process| {
        let is_new = !others.contains(&process);
        is_new.then_some(process).ok_or_else(|| format!("{:?} is listed twice", text.get_ref()))
    });
    process.map_err(|message| format!("node.allow: {message}"))
}

/// The largest number is no user: system calls take it for "unchanged".
fn parse_uid(text: &str) -> Option<NodeProcess> {
    // Digits alone: a number's sign would parse too.
    let uid = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())??;
    (uid != u32::MAX).then_some(NodeProcess::Uid(uid))
}

fn check_path(path: &str) -> Result<(), String> {
    let Some(names) = path.strip_prefix('/') else {
        return Err("the path of a cgroup begins with a slash, as in /proc/PID/cgroup".to_owned());
    };
    if names.is_empty() {
        return Err("the root covers every process: without node.allow all of them may".to_owned());
    }
    if let Some(below) = path.strip_prefix(MOUNT).filter(|below| below.is_empty() || below.starts_with('/')) {
        let hint =
            if below.len() > 1 { format!("; did you mean \"cgroup:{below}\"?") } else { String::new() };
        return Err(format!("the path begins at the root of the hierarchy, not with its mount point{hint}"));
    }
    let is_name = |name: &str| !name.is_empty() && name != "." && name != "..";
    if !names.split('/').all(is_name) || path.chars().any(char::is_control) {
        return Err("each name in the path must be that of a cgroup".to_owned());
    }
    if names.split('/').count() > MAX_CGROUP_DEPTH || path.len() > MAX_CGROUP_LENGTH {
        return Err(format!(
            "a path has at most {MAX_CGROUP_DEPTH} names and {MAX_CGROUP_LENGTH} bytes: name a cgroup above, which covers \
             those below"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_users_and_cgroups() {
        let cgroup = |path: &str| Ok(NodeProcess::Cgroup(path.to_owned()));
        let deep = "/a".repeat(MAX_CGROUP_DEPTH);
        for (text, expected) in [
            ("uid:0", Ok(NodeProcess::Uid(0))),
            ("uid:4294967294", Ok(NodeProcess::Uid(4_294_967_294))),
            ("cgroup:/system.slice", cgroup("/system.slice")),
            ("cgroup:/system.slice/kubelet.service", cgroup("/system.slice/kubelet.service")),
            ("cgroup:/a:b", cgroup("/a:b")),
            (r"cgroup:/system.slice/foo\x2dbar.service", cgroup(r"/system.slice/foo\x2dbar.service")),
            (
                r"cgroup:/system.slice/system-getty\x2da@b.slice",
                cgroup(r"/system.slice/system-getty\x2da@b.slice"),
            ),
            (&format!("cgroup:{deep}"), cgroup(&deep)),
        ] {
            assert_eq!(text.parse(), expected);
            assert_eq!(text.parse::<NodeProcess>().unwrap().to_string(), text);
        }
        for (text, part) in [
            ("uid:", "is a number"),
            ("uid:+1", "is a number"),
            ("uid:root", "`id -u NAME`"),
            ("uid:4294967295", "is a number"),
            ("gid:0", "; did you mean \"uid\"?"),
            ("cgoup:/a", "; did you mean \"cgroup\"?"),
            ("1000", "; did you mean \"uid:1000\"?"),
            ("/a", "; did you mean \"cgroup:/a\"?"),
            ("", "is not \"uid:NUMBER\""),
            ("kubelet", "is not \"uid:NUMBER\""),
            ("cgroup:", "begins with a slash"),
            ("cgroup:a", "begins with a slash"),
            ("cgroup:/", "covers every process"),
            ("cgroup:/a/", "each name"),
            ("cgroup://a", "each name"),
            ("cgroup:/a/../b", "each name"),
            ("cgroup:/a\u{0}", "each name"),
            ("cgroup:/sys/fs/cgroup/a/b", "; did you mean \"cgroup:/a/b\"?"),
            ("cgroup:/sys/fs/cgroup", "mount point"),
            (&format!("cgroup:{deep}/a"), "at most 10"),
            (&format!("cgroup:/{}", "a".repeat(MAX_CGROUP_LENGTH)), "at most 10"),
        ] {
            let error = text.parse::<NodeProcess>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert_eq!("cgroup:/sys/fs/cgroups".parse(), cgroup("/sys/fs/cgroups"));
    }
}
