//! The initramfs, which is the only file system of a virtual machine.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{kernels::Kernel, modules, plan::Plan, tools::Tools};

const INIT: &[u8] = include_bytes!("guest.sh");
/// Programs of this machine that the tests run. busybox lacks `ip link add type veth`, and its shell prefers its
/// built-in `setpriv`, as its `unshare` prefers its own shell.
const TOOLS: [&str; 9] = ["bpftool", "busybox", "ip", "nft", "nsenter", "setpriv", "sh", "tc", "unshare"];

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// Builds the archive of all files that run with `kernel`.
pub(super) fn archive(programs: &Tools, kernel: &Kernel, plan: &Plan) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    cpio.add("init", INIT);
    for tool in TOOLS {
        cpio.copy_program(&format!("tools/{tool}"), &programs.find(tool)?)?;
    }
    let modules = modules::load_order(&kernel.modules)?;
    for module in &modules {
        cpio.add(&format!("modules/{}.ko", module.name), &module.content);
    }
    cpio.add("modules/order", lines(modules.iter().map(|module| module.name.as_str())).as_bytes());
    cpio.copy_program("imds-agent", &plan.agent)?;
    for planned in &plan.tests {
        cpio.copy_program(&format!("tests/{}", planned.name), &planned.path)?;
        let arguments = lines(planned.arguments());
        cpio.add(&format!("arguments/{}", planned.name), arguments.as_bytes());
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

/// Returns the libraries of a program, according to the dynamic linker.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output =
        Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("failed to start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        bail!("{} has missing libraries: {text}", program.display());
    }
    Ok(parse_ldd(&text))
}

/// Parses lines of the forms `NAME => PATH (ADDRESS)` and `PATH (ADDRESS)`. Static programs have none.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// An archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

impl Cpio {
    /// Adds an executable, and its parent directories if they are missing.
    fn add(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entry(&path[..end], DIRECTORY, &[]);
        }
        self.entry(path, EXECUTABLE, content);
    }

    fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("failed to read {}", from.display()))?;
        self.add(path, &content);
        Ok(())
    }

    /// Adds a program with its libraries.
    fn copy_program(&mut self, path: &str, from: &Path) -> Result<()> {
        self.copy(path, from)?;
        for library in libraries(from)? {
            self.copy(&library.to_string_lossy(), &library)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
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

    #[test]
    fn libraries_are_parsed_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text), expected);
        assert!(parse_ldd("\tnot a dynamic executable\n").is_empty());
    }
}
