//! SELinux in enforcing mode, with a small policy. Needs the kernel parameters `lsm=selinux selinux=1`, and no other policy.

use std::{fs, path::Path};

use imds_tests::{METADATA, WHOLE_TEST, lacks_program, probe::reachable, skip, skip_unless_disposable};

use crate::{Confined, distribution::POLICIES, succeed};

/// A policy that restricts bpf(2) only: of its two types, `confined_t` has no permission.
const POLICY: &str = include_str!("bpf.cil");
const SELINUXFS: &str = "/sys/fs/selinux";

#[test]
fn denied_bpf_is_refused() {
    if skip_unless_disposable("loads an SELinux policy") || lacks_program(WHOLE_TEST, &["secilc"]) {
        return;
    }
    if !Path::new(SELINUXFS).join("load").exists() {
        skip(WHOLE_TEST, "there is no SELinux, which the kernel command line enables");
        return;
    }
    if Path::new(POLICIES).exists() {
        return skip(WHOLE_TEST, "the machine is for the policy of a distribution");
    }
    let confined = Confined::new("exec", "system_u:system_r:confined_t");
    let [source, policy] = ["bpf.cil", "policy"].map(|name| confined.env.scratch_dir().join(name));
    fs::write(&source, POLICY).unwrap();
    let contexts = confined.env.scratch_dir().join("contexts");
    let args = ["--output", policy.to_str().unwrap(), "--filecontext", contexts.to_str().unwrap()];
    succeed("secilc", &args, &source);
    fs::write(Path::new(SELINUXFS).join("load"), fs::read(&policy).unwrap()).unwrap();
    fs::write(Path::new(SELINUXFS).join("enforce"), "1").unwrap();

    assert!(reachable(&confined.pod.netns, METADATA));
    confined.assert_refused("SELinux context system_u:system_r:confined_t");
    let (_, table, _) = confined.run(&["doctor"]);
    assert!(table.contains("SELinux context system_u:system_r:confined_t"), "{table}");
    // The test itself has another type.
    let agent = confined.env.agent().hooks(&["from_pod", "node_egress"]).spawn_ready();
    confined.env.assert_blocked(&confined.pod);
    drop(agent);
    confined.env.unload();
    assert!(reachable(&confined.pod.netns, METADATA));
    fs::write(Path::new(SELINUXFS).join("enforce"), "0").unwrap();
}
