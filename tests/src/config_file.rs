//! A configuration file that changes while the agent runs.

use std::{fs, path::PathBuf};

use crate::{AgentCommand, Status, TestEnv};

/// A configuration file in the scratch directory of an environment.
#[derive(Debug)]
pub struct ConfigFile<'e> {
    env: &'e TestEnv,
    /// Path of the file.
    pub path: PathBuf,
}

impl<'e> ConfigFile<'e> {
    /// Creates the file with this text.
    #[must_use]
    pub fn new(env: &'e TestEnv, text: &str) -> Self {
        let path = env.scratch_dir().join("imds.toml");
        fs::write(&path, text).expect("write the configuration file");
        Self { env, path }
    }

    /// Returns the command of an agent that reads the file and attaches its programs to the environment's cgroup.
    pub fn agent(&self) -> AgentCommand<'e> {
        let cgroup = self.env.cgroup().to_str().expect("a UTF-8 path");
        let path = self.path.to_str().expect("a UTF-8 path");
        self.env.agent().config_file(path).args(&["--cgroup", cgroup])
    }

    /// Replaces the file atomically, as editors do.
    pub fn replace(&self, text: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, text).expect("write the new file");
        fs::rename(new, &self.path).expect("replace the configuration file");
    }

    /// Replaces the file and waits until the new configuration is effective.
    #[track_caller]
    pub fn reload(&self, text: &str) -> Status {
        let before = self.env.status().generation();
        self.replace(text);
        self.env.status_when("the configuration is effective", |status| {
            let is_valid = status.configuration.as_ref().is_some_and(|config| config.rejected.is_none());
            is_valid && status.generation() > before
        })
    }
}
