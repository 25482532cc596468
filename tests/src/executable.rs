//! Executable files of a test, and programs of the machine.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Writes an executable file, such as a script with its `#!` line.
pub fn write_executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("make a file executable");
}

/// Returns the path of a program in `PATH`.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Returns `$IMDS_AGENT`, or the agent that was built together with the running executable.
#[track_caller]
pub fn agent_executable() -> PathBuf {
    env::var_os("IMDS_AGENT").map_or_else(|| built_executable("imds-agent"), PathBuf::from)
}

/// Returns the broker beside `$IMDS_AGENT`, or the one that was built together with the running executable.
#[must_use]
#[track_caller]
pub fn broker_executable() -> PathBuf {
    match env::var_os("IMDS_AGENT") {
        Some(agent) => PathBuf::from(agent).with_file_name("imds-broker"),
        None => built_executable("imds-broker"),
    }
}

/// Returns the process id of the broker that runs for an agent: its only child.
#[must_use]
pub fn broker_of(agent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).ok()?;
    children.split_whitespace().find_map(|pid| pid.parse().ok())
}

#[track_caller]
fn built_executable(name: &str) -> PathBuf {
    let executable = env::current_exe().expect("path of this executable");
    let mut beside = executable.ancestors().skip(1).map(|directory| directory.join(name));
    beside.find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("no {name} beside {}: run `cargo xtask test`, or set IMDS_AGENT", executable.display())
    })
}
