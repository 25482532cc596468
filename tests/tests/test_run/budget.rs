//! Instructions that the verifier processes for each program, compared with those recorded for the running kernel.

use std::collections::BTreeMap;

use aya::util::KernelVersion;
use imds_agent::datapath::object::{OBJECT, kernel_features};
use imds_ebpf_common::names::programs;
use imds_tests::{WHOLE_TEST, program::Object, skip};

/// Upper bound of the instructions for a program on any kernel, so that an agent starts quickly.
const MAX_VERIFIED: u32 = 4096;
/// Growth in percent over the recorded number that needs a new record.
const MAX_GROWTH: u32 = 5;
/// Lines `KERNEL PROGRAM INSTRUCTIONS`.
const RECORDED: &str = include_str!("verified_instructions.txt");

fn recorded(kernel: &str) -> BTreeMap<&'static str, u32> {
    let lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
    let words = lines.filter_map(|line| line.split_whitespace().collect::<Vec<_>>().try_into().ok());
    let of_kernel = words.filter(|[of, _, _]: &[&str; 3]| *of == kernel);
    of_kernel.map(|[_, program, count]| (program, count.parse().expect("a number"))).collect()
}

/// Returns the variables of the object with every combination of the features that this kernel has.
fn variants() -> Vec<Vec<(&'static str, u8)>> {
    kernel_features().into_iter().fold(vec![Vec::new()], |variants, (name, supported)| {
        let with = |value| variants.iter().map(move |variant| [&variant[..], &[(name, value)]].concat());
        (0..=supported).flat_map(with).collect()
    })
}

#[test]
fn verifier_instructions_are_in_the_budget() {
    let mut counted = BTreeMap::<_, u32>::new();
    for variables in variants() {
        let object = Object::load_with(OBJECT, &variables);
        for name in programs() {
            let Some(verified) = object.verified_instructions(name) else {
                return skip(WHOLE_TEST, "no count of verified instructions on this kernel");
            };
            let largest = counted.entry(name).or_default();
            *largest = verified.max(*largest);
        }
    }
    let version = KernelVersion::current().unwrap().code();
    let kernel = format!("{}.{}", version >> 16, (version >> 8) & 0xff);
    let lines: Vec<_> = counted.iter().map(|(name, count)| format!("{kernel} {name} {count}")).collect();
    let lines = lines.join("\n");
    println!("{lines}");
    let recorded = recorded(&kernel);
    for (name, &count) in &counted {
        assert!(count < MAX_VERIFIED, "{name}: {count}");
        let allowed = recorded.get(name).map_or(MAX_VERIFIED, |count| count * (100 + MAX_GROWTH) / 100);
        assert!(
            count <= allowed,
            "{name} has {count} verified instructions, more than {allowed}: if the growth is intended, replace the lines of this \
             kernel in verified_instructions.txt by\n{lines}"
        );
    }
}
