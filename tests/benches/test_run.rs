//! What the programs cost, by `BPF_PROG_TEST_RUN`, against an empty program measured in the same run.
//!
//! Rounds are interleaved, so that what else the machine does falls on all alike; the median counts.

use std::hint::black_box;

use aya::programs::SchedClassifier;
use etherparse::PacketBuilder;
use imds_agent::datapath::object::OBJECT;
use imds_ebpf_common::{
    IMDS_IPV4, Mode, Policy,
    names::{MAP_POLICY, PROG_POD_EDGE},
};
use imds_tests::{
    foreign::Foreign,
    program::{self, Object},
};

const TC_ACT_UNSPEC: i32 = -1;
const ROUNDS: usize = 31;
const REPEAT: u32 = 500_000;

fn main() {
    let empty = Foreign::returning(TC_ACT_UNSPEC);
    let empty = program::pinned(empty.pin());
    let mut enforcing = Object::load(OBJECT);
    enforcing.set(MAP_POLICY, Policy { mode: Mode::Enforce as u32, ..Policy::default() });
    let ours = enforcing.program(PROG_POD_EDGE);

    println!(
        "{ROUNDS} rounds of {REPEAT} runs each; median time of one run, and how many times an empty program's"
    );
    println!("{:<34} {:>9} {:>9} {:>7} {:>15}", "PACKET", "EMPTY", "OURS", "RATIO", "RATIO, MIN-MAX");
    for (name, packet) in packets() {
        let rounds: Vec<_> = (0..ROUNDS).map(|_| round(&empty, ours, &packet)).collect();
        let column = |of: fn(&(f64, f64)) -> f64| {
            let mut values: Vec<_> = rounds.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let [empty, ours, ratios] =
            [column(|round| round.0), column(|round| round.1), column(|round| round.1 / round.0)];
        println!(
            "{name:<34} {:>6.2} ns {:>6.2} ns {:>7.2} {:>8.2} - {:.2}",
            empty[ROUNDS / 2],
            ours[ROUNDS / 2],
            ratios[ROUNDS / 2],
            ratios[0],
            ratios[ROUNDS - 1]
        );
    }
}

/// Nanoseconds of an empty run and of one of ours, one right after the other.
fn round(empty: &SchedClassifier, ours: &SchedClassifier, packet: &[u8]) -> (f64, f64) {
    let time = |program| program::nanoseconds(program, black_box(packet), REPEAT);
    (time(empty), time(ours))
}

fn packets() -> Vec<(&'static str, Vec<u8>)> {
    let ethernet = || PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let udp = |destination| {
        let mut packet = Vec::new();
        ethernet().ipv4([10, 244, 0, 7], destination, 64).udp(1, 2).write(&mut packet, &[0; 22]).unwrap();
        packet
    };
    let mut ipv6 = Vec::new();
    ethernet().ipv6([0xfd; 16], [0xfc; 16], 64).udp(1, 2).write(&mut ipv6, &[0; 2]).unwrap();
    let mut arp = udp([0; 4]);
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let mut vlan = udp([198, 51, 100, 10]);
    vlan.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    vec![
        ("IPv4, not ours", udp([198, 51, 100, 10])),
        ("IPv4, 169.254.169.253", udp([169, 254, 169, 253])),
        ("IPv6, not ours", ipv6),
        ("ARP", arp),
        ("IPv4 with a VLAN tag, not ours", vlan),
        ("IPv4 to 169.254.169.254, denied", udp(IMDS_IPV4)),
    ]
}
