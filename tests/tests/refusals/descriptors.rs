//! Limits of open files.

use std::{os::unix::process::CommandExt as _, process::Command};

use imds_tests::output;
use nix::sys::resource::{Resource, setrlimit};

use super::{FailedStart, assert_line};

/// tokio panics if it can't open its descriptors.
#[test]
fn few_descriptors_end_each_command_with_advice() {
    let start = FailedStart::new();
    let commands: [&[&str]; 8] = [
        &["run", "--once"],
        &["status"],
        &["events", "--no-follow"],
        &["report"],
        &["doctor"],
        &["verify"],
        &["config", "show"],
        &["unload"],
    ];
    let limited = |mut command: Command, limit| {
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)) };
        output(command)
    };
    for args in commands {
        let command =
            if args[0] == "run" { start.agent().args(&args[1..]) } else { start.env.imds_agent(args) };
        // A dynamically linked binary does not start with fewer.
        for limit in 4..=30 {
            let output = limited(command.command(), limit);
            let stderr = String::from_utf8_lossy(&output.stderr);
            let is_expected = matches!(output.status.code(), Some(0..=3));
            assert!(is_expected && !stderr.contains("panicked"), "{args:?} with {limit}: {output:?}");
            if limit <= 7 {
                let advice = format!("raise the limit of open files, which is {limit}, with `ulimit -n`");
                assert_line(&output, 1, &["failed to ", "Too many open files", &advice]);
            }
        }
    }
    assert!(limited(start.agent().args(&["--once"]).command(), 1000).status.success());
}
