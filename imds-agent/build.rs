//! Builds the BPF object that the agent embeds, and tells it what it is built from.

use std::env;

use anyhow::Result;

fn main() -> Result<()> {
    println!("cargo::rerun-if-env-changed=IMDS_COMMIT");
    let commit = env::var("IMDS_COMMIT").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=IMDS_COMMIT={commit}");
    let object = imds_ebpf_build::build()?;
    println!("cargo::rustc-env=IMDS_EBPF_OBJECT={}", object.path.display());
    println!("cargo::rustc-env=IMDS_EBPF_SHA256={}", object.sha256);
    Ok(())
}
