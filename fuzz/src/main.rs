//! Runs libFuzzer on the target that the environment names.
#![no_main]

use std::{env, sync::LazyLock};

use imds_fuzz::{TARGET, Target};
use libfuzzer_sys::fuzz_target;

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let name = env::var(TARGET).unwrap_or_else(|_| panic!("{TARGET} is not set"));
    Target::named(&name).unwrap_or_else(|| panic!("unknown target {name}"))
});

fuzz_target!(|data: &[u8]| CHOSEN.run(data));
