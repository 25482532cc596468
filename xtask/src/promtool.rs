//! `promtool`, with which the tests check metrics and alerts. xtask unpacks it in the cache, because Debian's package also
//! contains a service that starts.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use imds_ebpf_build::Host;

use crate::{apt, cache, workspace::print_status};

/// Debian package that contains it.
const PACKAGE: &str = "prometheus";

/// Returns the path of promtool: the installed one, or the one in the cache, which is downloaded first if it is missing.
pub(crate) fn path() -> Result<PathBuf> {
    if let Some(installed) = Host::current().find("promtool") {
        return Ok(installed);
    }
    let dir = cache::dir()?.join(PACKAGE);
    let program = dir.join("usr/bin/promtool");
    if !program.exists() {
        print_status(format_args!("downloading {PACKAGE} to {}", dir.display()));
        cache::make(&dir, |root, staging| {
            let packages = staging.join("packages");
            apt::download(&[PACKAGE.to_owned()], &packages)?;
            apt::unpack(&packages, root)
        })
        .with_context(|| format!("failed to get promtool from the package {PACKAGE}"))?;
    }
    Ok(program)
}
