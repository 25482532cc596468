//! The command `cargo xtask run`.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::Result;

use crate::{
    build,
    supervise::{Supervisor, exit_code},
    workspace::{ensure_root, execute, print_status},
};

/// Default pin directory of the agent.
const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/imds";
/// Default directory of the agent's last good configuration.
const DEFAULT_STATE_DIR: &str = "/var/lib/imds-agent";

/// Protect this node until Ctrl-C: build and run the agent, then unload its programs
///
/// Programs that were loaded before stay loaded, as they do with --once.
#[derive(clap::Args)]
pub(crate) struct Run {
    /// Options of `imds-agent run`
    #[arg(last = true)]
    agent_args: Vec<OsString>,
}

impl Run {
    pub(crate) fn run(self) -> Result<ExitCode> {
        ensure_root(
            "the agent loads BPF programs: run it as root, e.g. `sudo -E env \"PATH=$PATH\" cargo xtask run`",
        )?;
        let agent = build::debug()?;
        let pin_dir = directory(&self.agent_args, "--pin-dir", DEFAULT_PIN_DIR);
        let state_dir = directory(&self.agent_args, "--state-dir", DEFAULT_STATE_DIR);
        let was_loaded = pin_dir.exists();

        // Also covers `unload`, which a second Ctrl-C must not interrupt.
        let supervisor = Supervisor::new()?;
        let status = supervisor.run(Command::new(&agent).arg("run").args(&self.agent_args))?;
        match after_run(was_loaded, pin_dir.exists(), &self.agent_args) {
            AfterRun::Nothing => {}
            // Discards the output, because writing to a closed terminal would end the command.
            AfterRun::Unload => execute(unload(&agent, &pin_dir, &state_dir).stdout(Stdio::null()))?,
            AfterRun::Leave(why) => print_status(format_args!(
                "{why}: enforcement continues until `{} unload --pin-dir {}`",
                agent.display(),
                pin_dir.display()
            )),
        }
        Ok(ExitCode::from(exit_code(status)))
    }
}

fn unload(agent: &Path, pin_dir: &Path, state_dir: &Path) -> Command {
    let mut unload = Command::new(agent);
    unload.arg("unload").arg("--pin-dir").arg(pin_dir).arg("--state-dir").arg(state_dir);
    unload
}

/// Action for the programs after the agent has ended.
#[derive(Debug, Eq, PartialEq)]
enum AfterRun {
    Nothing,
    Unload,
    Leave(&'static str),
}

fn after_run(was_loaded: bool, is_loaded: bool, agent_args: &[OsString]) -> AfterRun {
    if !is_loaded {
        AfterRun::Nothing
    } else if was_loaded {
        AfterRun::Leave("programs were loaded before this run")
    } else if agent_args.iter().any(|argument| argument == "--once") {
        AfterRun::Leave("the agent ran once")
    } else {
        AfterRun::Unload
    }
}

/// Returns the directory after `option` in the agent's arguments, or the default.
fn directory(agent_args: &[OsString], option: &str, default: &str) -> PathBuf {
    let separate = agent_args.windows(2).find(|pair| pair[0] == option).map(|pair| pair[1].as_os_str());
    let joined = agent_args.iter().find_map(|argument| {
        argument.as_bytes().strip_prefix(option.as_bytes())?.strip_prefix(b"=").map(OsStr::from_bytes)
    });
    separate.or(joined).map_or_else(|| Path::new(default).into(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn only_own_programs_are_unloaded() {
        assert_eq!(after_run(false, true, &args(&["--config", "x"])), AfterRun::Unload);
        assert_eq!(after_run(false, false, &[]), AfterRun::Nothing);
        assert!(matches!(after_run(true, true, &[]), AfterRun::Leave(_)));
        assert!(matches!(after_run(false, true, &args(&["--once"])), AfterRun::Leave(_)));
    }

    #[test]
    fn directories_match_the_agent() {
        let pin_dir = |agent_args: &[&str]| directory(&args(agent_args), "--pin-dir", DEFAULT_PIN_DIR);
        assert_eq!(pin_dir(&["--once"]), Path::new(DEFAULT_PIN_DIR));
        assert_eq!(pin_dir(&["--pin-dir", "/sys/fs/bpf/a b"]), Path::new("/sys/fs/bpf/a b"));
        assert_eq!(pin_dir(&["--once", "--pin-dir=/p"]), Path::new("/p"));
        assert_eq!(pin_dir(&["--pin-dir"]), Path::new(DEFAULT_PIN_DIR));
        assert_eq!(directory(&args(&["--state-dir=/s", "--pin-dir=/p"]), "--state-dir", ""), Path::new("/s"));
    }
}
