//! The command `cargo xtask manifests`.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::{
    cache,
    dist::Chart,
    setup::{self, Purpose},
    test::HOST_CRATES,
    workspace::{artifacts, cargo, execute, pip_install, print_status, root},
};

/// Helm's engine, the schemas of Kubernetes and CEL, from `PyPI`. Another version gets its own directory.
const LIBRARIES: [&str; 3] =
    ["cel-expr-python==0.1.3", "helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0"];
const RENDER: &str = include_str!("../../render.py");

/// Render the chart and the kustomizations in deploy, and validate them against the schemas of Kubernetes
#[derive(clap::Args)]
pub(crate) struct Manifests {
    /// Only download Helm and the schemas
    #[arg(long)]
    fetch: bool,
    /// Also write the README of the chart from its values
    #[arg(long)]
    write: bool,
}

impl Manifests {
    pub(crate) fn run(self) -> Result<ExitCode> {
        setup::ensure(Purpose::Manifests)?;
        let name = LIBRARIES.map(|library| library.replace("==", "-")).join("-");
        let python = cache::dir()?.join("python").join(name);
        if !python.exists() {
            print_status("downloading Helm and the schemas of Kubernetes");
            cache::make(&python, |root, _| install(root))?;
        }
        if self.fetch {
            return Ok(ExitCode::SUCCESS);
        }
        // Same features as for the tests, so that nothing is compiled twice.
        execute(cargo("build").args(HOST_CRATES))?;
        let (debug, package) = (artifacts("debug")?, artifacts("tmp")?.join("imds-agent.tgz"));
        fs::create_dir_all(artifacts("tmp")?)?;
        fs::write(&package, Chart::read(None)?.package)
            .with_context(|| format!("failed to write {}", package.display()))?;
        let mut render = Command::new("python3");
        render.args(["-c", RENDER]).arg(root().canonicalize()?).arg(debug.join("imds-agent")).arg(package);
        render.args(self.write.then_some("--write"));
        print_status("rendering and validating the manifests in deploy");
        let status = render.env("PYTHONPATH", python).status().context("failed to start python3")?;
        Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn install(dir: &Path) -> Result<()> {
    execute(pip_install(dir).args(LIBRARIES))
        .context("failed to install Helm and the schemas: is this machine online?")
}
