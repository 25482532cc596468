//! Runs the seeds of the fuzzer and inputs that it found earlier.

use std::{fs, path::Path};

use imds_fuzz::Target;

#[test]
fn seeds_uphold_the_invariants() {
    for target in Target::ALL {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name());
        let seeds: Vec<_> = fs::read_dir(directory).unwrap().map(|seed| seed.unwrap().path()).collect();
        assert!(!seeds.is_empty(), "{}", target.name());
        for seed in seeds {
            println!("{}", seed.display());
            target.run(&fs::read(&seed).unwrap());
        }
        target.run(&[]);
    }
}
