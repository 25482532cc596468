//! Pin directories on a bpffs, one for each environment.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::netns::{is_leftover, unique};

const BPFFS: &str = "/sys/fs/bpf";
const PREFIX: &str = "imds-test-";

/// A unique path for pins. The agent creates the directory; dropping this removes it with all pins.
#[derive(Debug)]
pub(crate) struct PinDir(PathBuf);

impl PinDir {
    pub(crate) fn new() -> Self {
        mount_bpffs();
        Self(Path::new(BPFFS).join(unique(PREFIX)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn remove(&self) {
        match fs::remove_dir_all(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // No panic in drop, which may run for a failing test. The next process sweeps.
            Err(error) => eprintln!("{}: {error}", self.0.display()),
        }
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the pin directories of processes that no longer exist.
pub(crate) fn sweep() {
    let Ok(entries) = fs::read_dir(BPFFS) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(|name| is_leftover(name, PREFIX)) {
            // Another process may sweep concurrently.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn mount_bpffs() {
    static MOUNTING: Mutex<()> = Mutex::new(());
    let _guard = MOUNTING.lock();
    let mounted = statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if !mounted {
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>).expect("mount bpffs");
    }
}
