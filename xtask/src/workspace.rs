//! This workspace, and how its commands are started.

use std::{
    env,
    fmt::Display,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// The directory of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// `cargo SUBCOMMAND` for the host's crates: the cargo that runs us, with the settings of its user. In his directory
/// too, for a relative `CARGO_TARGET_DIR` to mean the same.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg(subcommand);
    cargo
}

/// The directory of what cargo builds with `profile` (`debug` or `release`), wherever the user has it: beside our own.
pub(crate) fn artifacts(profile: &str) -> Result<PathBuf> {
    let this = env::current_exe().context("could not tell where xtask itself is")?;
    let dir = this.ancestors().nth(2).context("xtask is not in cargo's target directory")?;
    Ok(dir.join(profile))
}

/// Says what it runs, runs it, and fails where that does.
pub(crate) fn execute(command: &mut Command) -> Result<()> {
    let what = describe(command);
    say(&what);
    let status = command.status().with_context(|| format!("could not start {what}"))?;
    if !status.success() {
        bail!("{what} failed ({status})");
    }
    Ok(())
}

/// One line for the user. That nobody may read it is no reason to stop.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "xtask: {line}");
}

/// A command as it would be typed.
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
