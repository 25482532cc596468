//! The command `cargo xtask ebpf`.

use anyhow::{Context as _, Result, ensure};
use imds_ebpf_build::Object;

use crate::{
    setup::{self, Purpose},
    workspace::{artifacts, print_status, root},
};

/// Build the BPF object from source and store it in imds-ebpf/prebuilt, from where the build of the agent takes it
///
/// Run this after changes of the BPF programs, and commit the result.
#[derive(clap::Args)]
pub(crate) struct Ebpf {
    /// Compare the built object with the stored one, byte by byte, and change nothing
    #[arg(long)]
    check: bool,
}

impl Ebpf {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(Purpose::Ebpf)?;
        let workspace = root().canonicalize().context("failed to find the workspace")?;
        let built = Object::compile(&workspace, &artifacts("ebpf")?)?;
        if self.check {
            check(&built, Object::stored(&workspace)?.as_ref())?;
        } else {
            print_status(format_args!("wrote {}", built.store(&workspace)?.display()));
        }
        Ok(())
    }
}

/// Fails unless the stored object is current and equals the built one.
fn check(built: &Object, stored: Option<&Object>) -> Result<()> {
    let stored = stored.context(
        "the stored BPF object does not match the sources: run `cargo xtask ebpf` and commit the result",
    )?;
    ensure!(
        built.toolchain() == stored.toolchain(),
        "the stored BPF object was built with another toolchain: run `cargo xtask ebpf` and commit the result\nstored:\n{}here:\n{}",
        stored.toolchain(),
        built.toolchain()
    );
    ensure!(
        built.bytes == stored.bytes,
        "the stored BPF object differs from the build: run `cargo xtask ebpf` and commit the result"
    );
    print_status("the stored BPF object matches the build");
    Ok(())
}
