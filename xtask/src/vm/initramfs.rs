//! The initramfs, which is the only file system of a virtual machine.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{kernels::Kernel, modules, plan::Plan, selinux_policy::Policy, tools::Tools};
use crate::{elf, workspace::root};

const INIT: &[u8] = include_bytes!("guest.sh");
/// Starts the agent with the profile of deploy/apparmor.
const CONFINED: &[u8] =
    b"#!/tools/sh\nprintf 'exec imds-agent' > /proc/self/attr/apparmor/exec\nexec /imds-agent \"$@\"\n";
/// Programs that the tests run. busybox lacks `ip link add type veth`, and its shell prefers its
/// built-in `setpriv`, as its `unshare` prefers its own shell.
const TOOLS: [&str; 11] = [
    "apparmor_parser",
    "bpftool",
    "busybox",
    "ip",
    "nft",
    "nsenter",
    "secilc",
    "setpriv",
    "sh",
    "tc",
    "unshare",
];

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// Builds the archive of all files that run with `kernel`.
pub(super) fn archive(tools: &Tools, kernel: &Kernel, plan: &Plan) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    cpio.add("init", INIT);
    for tool in TOOLS {
        cpio.copy_program(&format!("tools/{tool}"), &tools.guest_program(tool)?, tools)?;
    }
    cpio.add_modules(kernel)?;
    cpio.copy_program("imds-agent", &plan.agent, tools)?;
    cpio.copy_program("imds-broker", &plan.broker, tools)?;
    cpio.copy("etc/apparmor.d/imds-agent", &root().join("deploy/apparmor/imds-agent"))?;
    for planned in &plan.tests {
        cpio.copy_program(&format!("tests/{}", planned.name), &planned.path, tools)?;
        let arguments = lines(planned.arguments());
        cpio.add(&format!("arguments/{}", planned.name), arguments.as_bytes());
    }
    if plan.is_confined {
        cpio.add("confined", CONFINED);
    }
    for Policy { name, binary, file_contexts } in &plan.selinux_policies {
        cpio.copy(&format!("selinux/{name}/policy"), binary)?;
        cpio.copy(&format!("selinux/{name}/file_contexts"), file_contexts)?;
    }
    if !plan.selinux_policies.is_empty() {
        cpio.copy_program("usr/bin/imds-agent", &plan.agent, tools)?;
        cpio.copy_program("usr/bin/imds-broker", &plan.broker, tools)?;
    }
    if plan.is_brief {
        cpio.add("brief", &[]);
    }
    cpio.add("environment", lines(plan.environment.iter().map(String::as_str)).as_bytes());
    Ok(cpio.finish())
}

fn lines<'a>(items: impl Iterator<Item = &'a str>) -> String {
    items.flat_map(|item| [item, "\n"]).collect()
}

/// Returns the dynamic linker and the libraries of a program, by their paths in the archive, which the dynamic linker
/// searches by default. Static programs have none.
fn libraries(program: &Path, tools: &Tools) -> Result<BTreeMap<String, PathBuf>> {
    let (mut found, mut left) = (BTreeMap::new(), vec![program.to_owned()]);
    while let Some(path) = left.pop() {
        for needed in elf::needs(&path)? {
            let Entry::Vacant(entry) = found.entry(needed) else { continue };
            let library = tools
                .guest_library(entry.key())
                .with_context(|| format!("failed to find {}, which {} needs", entry.key(), path.display()))?;
            left.push(entry.insert(library).clone());
        }
    }
    Ok(found)
}

/// An archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

impl Cpio {
    /// Adds an executable, and its parent directories if they are missing.
    pub(super) fn add(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entry(&path[..end], DIRECTORY, &[]);
        }
        self.entry(path, EXECUTABLE, content);
    }

    /// Adds the modules of the kernel, and their names in the order in which to load them.
    pub(super) fn add_modules(&mut self, kernel: &Kernel) -> Result<()> {
        let modules = modules::load_order(&kernel.modules)?;
        for module in &modules {
            self.add(&format!("modules/{}.ko", module.name), &module.content);
        }
        self.add("modules/order", lines(modules.iter().map(|module| module.name.as_str())).as_bytes());
        Ok(())
    }

    pub(super) fn add_directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    pub(super) fn add_symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK, target.as_bytes());
    }

    pub(super) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("failed to read {}", from.display()))?;
        self.add(path, &content);
        Ok(())
    }

    /// Adds a program with its libraries.
    pub(super) fn copy_program(&mut self, path: &str, from: &Path, tools: &Tools) -> Result<()> {
        self.copy(path, from)?;
        for (path, library) in libraries(from, tools)? {
            self.copy(&path, &library)?;
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        if !self.paths.insert(path.to_owned()) {
            return;
        }
        // Inode, mode, owner, group, links, time, size, two device numbers of two words, length of the name, checksum.
        let header =
            [self.paths.len(), mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, path.len() + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_the_kernel_format() {
        let mut cpio = Cpio::default();
        cpio.add("/a/b", b"hello");
        cpio.add("a/b", b"once");
        let bytes = cpio.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3, "{text}");
        let file = "070701\
                    00000002000081ed00000000000000000000000100000000\
                    0000000500000000000000000000000000000000\
                    0000000400000000a/b\0\0\0hello\0\0\0";
        assert!(text.contains(file), "{text}");
        assert!(text.contains("TRAILER!!!"));
    }
}
