//! Cache of downloads, which is outside of the workspace in order to survive it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};

/// Returns the cache directory of this project.
pub(crate) fn dir() -> Result<PathBuf> {
    let below = |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = below("XDG_CACHE_HOME").or_else(|| Some(below("HOME")?.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("imds-agent"))
}

/// Replaces `dir` atomically. `fill` gets a directory for its new content, and one for temporary files.
pub(crate) fn make(dir: &Path, fill: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<()> {
    let staging = Staging(dir.with_added_extension(process::id().to_string()));
    let root = staging.0.join("root");
    fs::create_dir_all(&root).with_context(|| format!("failed to create {}", root.display()))?;
    fill(&root, &staging.0)?;
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    }
    fs::rename(&root, dir).with_context(|| format!("failed to create {}", dir.display()))
}

/// A directory that is removed on drop.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // Ignores errors: leftovers in the cache do no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn directory_creation_is_atomic() {
        let cache = tempfile::tempdir().unwrap();
        let dir = cache.path().join("6.1");
        let made = |content: &str, is_good: bool| {
            make(&dir, |root, staging| {
                fs::write(staging.join("package"), "")?;
                fs::write(root.join("file"), content)?;
                if is_good { Ok(()) } else { bail!("offline") }
            })
        };
        assert!(made("no", false).is_err());
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
        for content in ["old", "new"] {
            made(content, true).unwrap();
            assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), content);
        }
        assert!(made("no", false).is_err());
        assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "new");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1);
    }
}
