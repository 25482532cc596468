//! The command `cargo xtask image`.

use std::process::Command;

use anyhow::{Context as _, Result};

use super::{build_binaries, dir};
use crate::{
    arch::Arch,
    setup::{self, Purpose},
    workspace::{execute, print_status, root},
};

/// Build the container image from the static binary, with podman
#[derive(clap::Args)]
pub(crate) struct Image {
    /// Name and tag of the image
    #[arg(long, default_value = "localhost/imds-agent:latest")]
    tag: String,
}

impl Image {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(Purpose::Image)?;
        let host = Arch::host()?;
        build_binaries(&[host])?;
        let mut podman = Command::new("podman");
        podman.args(["build", "--network", "none", "--timestamp", "0", "--tag", &self.tag, "--file"]);
        podman.arg(root().join("deploy/image/Containerfile")).arg(dir(host)?);
        execute(&mut podman).context("failed to build the image")?;
        print_status(format_args!("built the image {}", self.tag));
        Ok(())
    }
}
