//! Programs of tests whose Debian package also starts a service. xtask unpacks them in the cache and installs nothing.

use std::path::PathBuf;

use anyhow::Result;
use imds_ebpf_build::Host;

use crate::{apt, cache};

/// A program of a Debian package.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnpackedProgram {
    /// Name of the executable.
    pub(crate) name: &'static str,
    package: &'static str,
    /// Environment variable with its path, for the tests.
    pub(crate) variable: &'static str,
    /// Part of the tests that needs it.
    pub(crate) part: &'static str,
}

/// Programs of `cargo xtask test`.
pub(crate) const OF_TESTS: [UnpackedProgram; 2] = [
    UnpackedProgram {
        name: "promtool",
        package: "prometheus",
        variable: "PROMTOOL",
        part: "promtool on metrics and alerts",
    },
    UnpackedProgram {
        name: "docker-registry",
        package: "docker-registry",
        variable: "DOCKER_REGISTRY",
        part: "the publishing steps of a release against a registry",
    },
];

impl UnpackedProgram {
    /// Returns its path: of the installed program, or in the cache, to which it is downloaded if it is missing.
    pub(crate) fn path(self) -> Result<PathBuf> {
        if let Some(installed) = Host::current().find(self.name) {
            return Ok(installed);
        }
        let dir = cache::dir()?.join(self.package);
        let program = dir.join("usr/bin").join(self.name);
        if !program.exists() {
            apt::unpack_to_cache(&[self.package.to_owned()], &dir)?;
        }
        Ok(program)
    }
}
