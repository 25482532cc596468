//! Hash of the files that determine the BPF object, except the toolchain.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// Files and directories that are hashed as a whole, relative to the workspace.
const SOURCES: [&str; 9] = [
    "imds-ebpf/Cargo.toml",
    "imds-ebpf/profile.toml",
    "imds-ebpf/src",
    "imds-ebpf-build/src/btf.rs",
    "imds-ebpf-build/src/map_fields.rs",
    "imds-ebpf-build/src/object.rs",
    "imds-ebpf-build/src/toolchain.rs",
    "imds-ebpf-common/Cargo.toml",
    "imds-ebpf-common/src",
];
/// Dependencies of the BPF crates, and the crate that writes the object. Other dependencies of the workspace may change
/// without a new object.
const DEPENDENCIES: [&str; 4] = ["aya-ebpf", "aya-log-common", "network-types", "object"];
const MANIFEST: &str = "Cargo.toml";
const LOCK: &str = "Cargo.lock";

/// Returns all paths that [`sha256`] reads, for cargo's `rerun-if-changed`.
pub(crate) fn paths(workspace: &Path) -> impl Iterator<Item = PathBuf> {
    SOURCES.iter().chain(&[MANIFEST, LOCK]).map(|path| workspace.join(path))
}

/// Returns the hash of the sources in hexadecimal. File names count relative to the workspace, so that every checkout gives
/// the same hash.
pub(crate) fn sha256(workspace: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut add = |name: &str, content: &[u8]| {
        for part in [name.as_bytes(), content] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
    };
    let mut files = Vec::new();
    for path in SOURCES {
        list(&workspace.join(path), &mut files)?;
    }
    files.sort();
    for path in &files {
        let content = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        let name = path.strip_prefix(workspace).unwrap_or(path);
        add(&name.to_string_lossy(), &content);
    }
    let read = |name: &str| {
        let path = workspace.join(name);
        fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))
    };
    for line in read(MANIFEST)?.lines().filter(|line| is_relevant(line)) {
        add(MANIFEST, line.as_bytes());
    }
    for package in locked(&read(LOCK)?) {
        add(LOCK, package.as_bytes());
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// Appends the files below `path`, or `path` itself.
fn list(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("failed to list {}", path.display()))? {
        list(&entry?.path(), files)?;
    }
    Ok(())
}

/// Reports whether a line of the workspace's manifest is an input of the object: a dependency, or a key that the BPF crates
/// inherit.
fn is_relevant(line: &str) -> bool {
    let key = line.split_once(" = ").map(|(key, _)| key);
    key.is_some_and(|key| DEPENDENCIES.contains(&key) || ["edition", "version"].contains(&key))
}

/// Returns the entries of Cargo.lock for [`DEPENDENCIES`] and everything that these depend on.
fn locked(lock: &str) -> BTreeSet<&str> {
    let packages = || lock.split("[[package]]\n").skip(1);
    let mut found = BTreeSet::new();
    let mut queue = DEPENDENCIES.to_vec();
    while let Some(name) = queue.pop() {
        let header = format!("name = \"{name}\"\n");
        for package in packages().filter(|package| package.starts_with(&header)) {
            if found.insert(package) {
                // The form of a dependency is ` "NAME",` or ` "NAME VERSION",`.
                let dependencies = package.lines().filter_map(|line| line.strip_prefix(" \""));
                queue.extend(dependencies.filter_map(|line| line.split([' ', '"']).next()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

    #[test]
    fn only_entries_of_the_dependencies_are_relevant() {
        let lock = "version = 4\n\n[[package]]\nname = \"aya-ebpf\"\ndependencies = [\n \"syn 2.0.1\",\n]\n\n\
                    [[package]]\nname = \"syn\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"syn\"\nversion = \"2.0.1\"\n\n\
                    [[package]]\nname = \"tokio\"\ndependencies = [\n \"aya-ebpf\",\n]\n";
        let names = locked(lock).into_iter().map(|package| package.lines().next().unwrap());
        assert_eq!(names.collect::<Vec<_>>(), [r#"name = "aya-ebpf""#, r#"name = "syn""#, r#"name = "syn""#]);
    }

    #[test]
    fn manifest_has_every_relevant_key() {
        let manifest = fs::read_to_string(Path::new(WORKSPACE).join(MANIFEST)).unwrap();
        assert_eq!(manifest.lines().filter(|line| is_relevant(line)).count(), DEPENDENCIES.len() + 2);
    }

    #[test]
    fn every_dependency_of_the_bpf_crates_is_listed() {
        for manifest in ["imds-ebpf/Cargo.toml", "imds-ebpf-common/Cargo.toml"] {
            let manifest = fs::read_to_string(Path::new(WORKSPACE).join(manifest)).unwrap();
            let (_, dependencies) = manifest.split_once("[dependencies]\n").unwrap();
            // The BPF crates have no optional dependency, and [dev-dependencies] follow.
            let names = dependencies.lines().map_while(|line| (!line.starts_with('[')).then_some(line));
            let names = names.filter_map(|line| line.strip_suffix(".workspace = true"));
            for name in names.filter(|name| !name.starts_with("imds-")) {
                assert!(DEPENDENCIES.contains(&name), "{name}");
            }
        }
    }

    #[test]
    fn every_source_changes_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        for path in paths(dir.path()) {
            let file = if path.ends_with("src") { path.join("module/lib.rs") } else { path };
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let mut hashes = BTreeSet::from([sha256(dir.path()).unwrap()]);
        let relevant = [(MANIFEST, "edition = \"2024\""), (LOCK, "[[package]]\nname = \"object\"\n")];
        let sources = SOURCES.map(|path| (path, "changed"));
        for (path, content) in sources.into_iter().chain(relevant) {
            let path = dir.path().join(path);
            fs::write(if path.is_dir() { path.join("module/lib.rs") } else { path }, content).unwrap();
            assert!(hashes.insert(sha256(dir.path()).unwrap()), "{content}");
        }
        fs::write(dir.path().join(MANIFEST), "edition = \"2024\"\ntokio = \"1\"\n").unwrap();
        assert!(!hashes.insert(sha256(dir.path()).unwrap()));
    }
}
