//! Alternating agents of versions with different map layouts.

use std::{
    env,
    fs::{self, Permissions},
    ops::Range,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    thread::sleep,
    time::Duration,
};

use aya::maps::{Array, Map, MapData, MapInfo};
use imds_ebpf_common::Policy;
use imds_tests::{AttachMode, hook, probe::LONG, scaled, skip_without_tcx};

use super::{Case, Random};

/// Environment variable with the binary of an older version, which is tested in addition to a synthetic one.
const PREVIOUS: &str = "IMDS_PREVIOUS_AGENT";

/// Returns agents with a map layout that this agent does not recognize, and vice versa.
fn others(case: &Case) -> Vec<PathBuf> {
    env::var_os(PREVIOUS).map(PathBuf::from).into_iter().chain([made_up(case)]).collect()
}

/// Returns a copy of the agent with a different map layout: its map of counters has a smaller capacity.
fn made_up(case: &Case) -> PathBuf {
    let mut binary = fs::read(case.agent().command().get_program()).unwrap();
    let room = MapInfo::from_pin(case.env.pin_dir().join("maps/imds_counters")).unwrap().max_entries();
    let object = embedded_object(&binary);
    let (room, less) = (room.to_le_bytes(), (room - 1).to_le_bytes());
    let places: Vec<_> = object.clone().filter(|&at| binary[at..].starts_with(&room)).collect();
    assert!(!places.is_empty(), "the embedded object does not contain the capacity of the counters");
    for at in places {
        binary[at..at + room.len()].copy_from_slice(&less);
    }
    let path = case.env.scratch_dir().join("imds-agent");
    fs::write(&path, binary).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

/// Returns the range of the BPF object in the agent's binary: its sections up to the section header table.
fn embedded_object(binary: &[u8]) -> Range<usize> {
    // A 64-bit little-endian ELF file with the machine type EM_BPF.
    let is_object = |start: &usize| {
        binary[*start..].starts_with(b"\x7fELF\x02\x01\x01") && binary[*start + 18..].starts_with(&[247, 0])
    };
    let start = (0..binary.len() - 64).step_by(8).find(is_object).expect("a BPF object in the agent");
    // Field e_shoff of Elf64_Ehdr.
    let length = u64::from_le_bytes(*binary[start + 40..].first_chunk().unwrap());
    start..start + usize::try_from(length).unwrap()
}

/// Asserts that each interface has exactly one program, which is the agent's.
#[track_caller]
fn assert_taken_over(case: &Case) {
    for pod in &case.pods {
        let programs = hook::programs(&case.env.node, &pod.host_ifname);
        assert!(programs.len() == 1 && programs[0].is_ours(), "{programs:?}");
    }
}

fn upgraded_and_back(backend: AttachMode) {
    let case = Case::with_sockets(backend);
    let mut random = Random::new();
    let (mut kills, mut changes) = (0, 0);
    for other in others(&case) {
        case.under_flood(|| {
            for round in 0..scaled(6) {
                // Upgrades to the other version and back.
                for agent in [case.agent().binary(&other), case.agent()] {
                    let agent = agent.spawn_ready();
                    agent.wait_for_log("starting with new maps and counters", LONG);
                    assert_taken_over(&case);
                    changes += 1;
                    if round % 2 == 0 {
                        agent.kill9();
                    } else {
                        assert!(agent.terminate().success());
                    }
                }
            }
            for _ in 0..scaled(40) {
                let agent = if random.is_true() { case.agent() } else { case.agent().binary(&other) };
                let agent = agent.spawn();
                sleep(Duration::from_millis(random.below(250)));
                agent.kill9();
                kills += 1;
            }
            case.agent().spawn_ready().kill9();
            assert_taken_over(&case);
        });
    }
    println!("{changes} changes of version, {kills} kills on the way");
    case.assert_well();
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn other_map_layout_and_back_tcx() {
    if !skip_without_tcx() {
        upgraded_and_back(AttachMode::Tcx);
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn other_map_layout_and_back_clsact() {
    upgraded_and_back(AttachMode::Clsact);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn maps_of_same_size_and_other_schema() {
    let case = Case::with_sockets(AttachMode::Clsact);
    case.under_flood(|| {
        for _ in 0..scaled(5) {
            let pin = case.env.pin_dir().join("maps/imds_policy");
            let mut policies: Array<MapData, Policy> =
                Map::Array(MapData::from_pin(pin).unwrap()).try_into().unwrap();
            let policy = policies.get(&0, 0).unwrap();
            policies.set(0, Policy { layout: policy.layout - 1, ..policy }, 0).unwrap();
            let agent = case.agent().spawn_ready();
            agent.wait_for_log("the maps have schema", LONG);
            agent.kill9();
        }
    });
    case.assert_well();
}
