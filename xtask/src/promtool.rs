//! `promtool`, with which the tests check metrics and alerts. xtask unpacks it in the cache, because Debian's package also
//! contains a service that starts.

use std::path::PathBuf;

use anyhow::Result;
use imds_ebpf_build::Host;

use crate::{apt, cache};

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
        apt::unpack_to_cache(&[PACKAGE.to_owned()], &dir)?;
    }
    Ok(program)
}
