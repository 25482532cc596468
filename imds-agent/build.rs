//! Builds the BPF object that the agent embeds.

use anyhow::Result;

fn main() -> Result<()> {
    let object = imds_ebpf_build::build()?;
    println!("cargo::rustc-env=IMDS_EBPF_OBJECT={}", object.path.display());
    println!("cargo::rustc-env=IMDS_EBPF_SHA256={}", object.sha256);
    Ok(())
}
