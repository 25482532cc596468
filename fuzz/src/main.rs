//! Runs libFuzzer on the target that the environment names.
#![no_main]

use std::{env, sync::LazyLock};

use imds_fuzz::{TARGET, TARGETS};
use libfuzzer_sys::fuzz_target;

static CHOSEN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = env::var(TARGET).unwrap_or_else(|_| panic!("{TARGET} is not set"));
    let target = TARGETS.into_iter().find(|(known, _)| *known == name);
    target.unwrap_or_else(|| panic!("unknown target {name}")).1
});

fuzz_target!(|data: &[u8]| CHOSEN(data));
