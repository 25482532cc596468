//! Security modules that confine the agent. The tests change the machine's policy, and run in virtual machines only.

mod apparmor;
mod distribution;
mod selinux;
mod service;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use imds_tests::{Pod, PodLink, TestEnv, executable::write_executable, hook, output};

/// An environment with a pod, and a wrapper that starts the agent with another security label.
struct Confined {
    env: TestEnv,
    pod: Pod,
    wrapper: PathBuf,
}

impl Confined {
    /// `attribute` is the file below /proc/self/attr that sets the label of the next program.
    fn new(attribute: &str, label: &str) -> Self {
        Self::with_wrapper(|dir| {
            let wrapper = dir.join("confined");
            // The kernel takes each write as a label, and `echo` may write the end of the line separately.
            let set = format!("printf %s '{label}' > /proc/self/attr/{attribute}");
            let script = format!("#!/tools/sh\n{set}\nexec /imds-agent \"$@\"\n");
            write_executable(&wrapper, &script);
            wrapper
        })
    }

    /// `write_wrapper` writes a script that starts the agent to a directory, and returns its path.
    fn with_wrapper(write_wrapper: impl FnOnce(&Path) -> PathBuf) -> Self {
        let env = TestEnv::new();
        let pod = env.add_pod(PodLink::Routed);
        let wrapper = write_wrapper(env.scratch_dir());
        Self { env, pod, wrapper }
    }

    /// Runs a command of the agent, and returns its exit code, output and error messages.
    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = self.env.imds_agent(args).binary(&self.wrapper).output();
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (output.status.code(), stdout, stderr)
    }

    /// Asserts that the agent does not start, names `confinement` in one line, and leaves nothing behind.
    #[track_caller]
    fn assert_refused(&self, confinement: &str) {
        let (code, _, stderr) = self.run(&["run", "--once"]);
        assert_eq!((code, stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(stderr.contains(&format!("; the {confinement} confines this process: ")), "{stderr}");
        assert!(!self.env.pin_dir().exists());
        assert_eq!(hook::programs(&self.env.node, &self.pod.host_ifname), []);
    }
}

/// Runs a program that must succeed.
#[track_caller]
fn succeed(program: &str, args: &[&str], file: &Path) {
    let mut command = Command::new(program);
    command.args(args).arg(file);
    let output = output(command);
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}
