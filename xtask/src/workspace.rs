//! The workspace and its commands.

use std::{
    env,
    fmt::Display,
    io::{self, Write as _},
    num::NonZero,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::Uid;

/// Returns the root directory of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Returns `cargo SUBCOMMAND` for the host's crates: the cargo that runs xtask, with the user's settings. It runs in
/// the user's directory, so that a relative `CARGO_TARGET_DIR` keeps its meaning.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg(subcommand);
    // Build scripts that depend on these variables of xtask would run again after each cargo command of the user's shell.
    for (name, _) in env::vars_os() {
        let is_of_xtask =
            |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.starts_with(prefix));
        if name.to_str().is_some_and(is_of_xtask) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Returns cargo's output directory of `profile` (`debug` or `release`), beside the one of xtask.
pub(crate) fn artifacts(profile: &str) -> Result<PathBuf> {
    let this = env::current_exe().context("failed to find the path of xtask")?;
    let dir = this.ancestors().nth(2).context("xtask is not in cargo's target directory")?;
    Ok(dir.join(profile))
}

/// Prints a command, runs it, and fails if the command fails.
pub(crate) fn execute(command: &mut Command) -> Result<()> {
    let what = describe(command);
    print_status(&what);
    let status = command.status().with_context(|| format!("failed to start {what}"))?;
    if !status.success() {
        bail!("{what} failed ({status})");
    }
    Ok(())
}

/// Runs a command without printing it, and returns its standard output. Fails if the command fails.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("failed to start {name}"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `work` on each item, on as many at a time as there are CPUs. Returns the results in the order in which they end.
pub(crate) fn in_parallel<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let (queue, results) = (Mutex::new(items.into_iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread panicked").next();
                    let Some(item) = next else { return };
                    let result = work(item);
                    results.lock().expect("no thread panicked").push(result);
                }
            });
        }
    });
    results.into_inner().expect("no thread panicked")
}

/// Fails with this message unless the user is root.
pub(crate) fn ensure_root(message: &str) -> Result<()> {
    ensure!(Uid::effective().is_root(), "{message}");
    Ok(())
}

/// Returns the `pip install` of libraries to a plain directory, which can be moved, unlike a virtual environment.
pub(crate) fn pip_install(dir: &Path) -> Command {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-warn-conflicts", "--disable-pip-version-check"]);
    pip.args(["--root-user-action", "ignore", "--target"]).arg(dir);
    pip
}

/// Prints a line for the user. Ignores errors: standard error may be closed.
pub(crate) fn print_status(line: impl Display) {
    let _ = writeln!(io::stderr(), "xtask: {line}");
}

/// Formats a command as it would be typed.
pub(crate) fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(name).chain(arguments).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_is_printed_as_typed() {
        assert_eq!(
            describe(Command::new("/opt/rust/bin/cargo").args(["build", "-p", "x"])),
            "cargo build -p x"
        );
    }
}
