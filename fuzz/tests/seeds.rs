//! Runs the seeds of the fuzzer and inputs that it found earlier.

use std::{fs, path::Path};

use imds_fuzz::TARGETS;

#[test]
fn seeds_uphold_the_invariants() {
    for (name, run) in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
        let seeds: Vec<_> = fs::read_dir(directory).unwrap().map(|seed| seed.unwrap().path()).collect();
        assert!(!seeds.is_empty(), "{name}");
        for seed in seeds {
            println!("{}", seed.display());
            run(&fs::read(&seed).unwrap());
        }
        run(&[]);
    }
}
