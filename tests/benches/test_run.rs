//! Cost of the BPF programs, measured with `BPF_PROG_TEST_RUN` against an empty program in the same run.
//!
//! Rounds are interleaved, so that other load of the machine affects all programs alike. The results are medians.

use std::hint::black_box;

use aya::programs::SchedClassifier;
use etherparse::PacketBuilder;
use imds_agent::datapath::object::OBJECT;
use imds_ebpf_common::{
    Address, Endpoint, IMDS_IPV4, Mode, Policy, PolicyFilter, Service,
    endpoint::{MAX_ENDPOINTS, UDP},
    names::{MAP_ENDPOINTS, MAP_POLICY, PROG_FROM_POD, SECTION_FILTER},
};
use imds_tests::{
    foreign_bpf::ForeignProgram,
    measure::{Samples, machine, table},
    program::{self, Object},
};

const TC_ACT_UNSPEC: i32 = -1;
const IMDS_IPV6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
const RESOLVER_IPV6: [u8; 16] = [0xfd, 0x20, 0, 0xce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
const ROUNDS: usize = 31;
const REPEAT: u32 = 500_000;

fn main() {
    let empty = ForeignProgram::returning(TC_ACT_UNSPEC);
    let empty = program::pinned(empty.pin());
    let mut enforcing = Object::load(OBJECT);
    enforcing.set(MAP_POLICY, Policy { mode: Mode::Enforce as u32, ..Policy::default() });
    let endpoints = endpoints();
    for (address, endpoint) in &endpoints {
        enforcing.insert(MAP_ENDPOINTS, *address, *endpoint);
    }
    enforcing.set(
        SECTION_FILTER,
        PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint))),
    );
    let ours = enforcing.program(PROG_FROM_POD);

    let rows: Vec<_> = packets()
        .into_iter()
        .map(|(name, packet)| {
            let rounds: Vec<_> = (0..ROUNDS).map(|_| round(&empty, ours, &packet)).collect();
            let column = |of: fn(&(f64, f64)) -> f64| Samples::new(rounds.iter().map(of));
            let ratios = column(|round| round.1 / round.0);
            vec![
                name.to_owned(),
                format!("{:.2} ns", column(|round| round.0).median()),
                format!("{:.2} ns", column(|round| round.1).median()),
                format!("{:.2}", ratios.median()),
                format!("{:.2} to {:.2}", ratios.quantile(0), ratios.quantile(100)),
            ]
        })
        .collect();
    println!("{}; {MAX_ENDPOINTS} endpoints; medians of {ROUNDS} rounds of {REPEAT} runs.\n", machine());
    let head = ["packet", "empty program", "from_pod", "times empty", "least and most"];
    println!("{}", table(&head, &rows));
    println!("{}", instructions(&enforcing));
}

/// Returns a table with the sizes of the programs.
fn instructions(object: &Object) -> String {
    let rows: Vec<_> = object
        .program_names()
        .into_iter()
        .map(|name| {
            let number =
                |number: Option<u32>| number.map_or("unknown".to_owned(), |number| number.to_string());
            let [instructions, machine_code] = object.sizes(&name);
            let verified = number(object.verified_instructions(&name));
            vec![
                format!("`{name}`"),
                number(instructions),
                format!("{} bytes", number(machine_code)),
                verified,
            ]
        })
        .collect();
    table(&["program", "instructions", "compiled", "followed by the verifier"], &rows)
}

/// Returns the largest possible set of endpoints.
fn endpoints() -> Vec<(Address, Endpoint)> {
    let endpoint = |id, allowed_ports| Endpoint { name: [0; 16], id, allow_ports: allowed_ports };
    let nothing = [Service::NONE; 8];
    let mut dns = nothing;
    dns[0] = Service::new(UDP, 53);
    let mut endpoints = vec![
        (Address::from_ipv4(IMDS_IPV4), endpoint(1, nothing)),
        (Address::from_ipv4([168, 63, 129, 16]), endpoint(2, dns)),
        (Address::from_ipv6(IMDS_IPV6), endpoint(3, nothing)),
        (Address::from_ipv6(RESOLVER_IPV6), endpoint(4, dns)),
    ];
    for id in 5..=u8::MAX {
        endpoints
            .push((Address::from_ipv4([10, 99, id, 254_u8.wrapping_sub(id)]), endpoint(id.into(), nothing)));
    }
    endpoints.push((Address::from_ipv4([10, 98, 0, 1]), endpoint(256, nothing)));
    assert_eq!(endpoints.len(), MAX_ENDPOINTS);
    endpoints
}

/// Returns the nanoseconds of a run of the empty program and of the agent's program, measured one right after the
/// other.
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
    let ipv6 = |destination, port| {
        let mut packet = Vec::new();
        ethernet().ipv6([0xfd; 16], destination, 64).udp(1, port).write(&mut packet, &[0; 2]).unwrap();
        packet
    };
    let documentation = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let mut arp = udp([0; 4]);
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let mut vlan = udp([198, 51, 100, 10]);
    vlan.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    vec![
        ("IPv4, unprotected", udp([198, 51, 100, 10])),
        ("IPv4, 169.254.169.253", udp([169, 254, 169, 253])),
        ("IPv6, unprotected", ipv6(documentation, 2)),
        ("ARP", arp),
        ("IPv4 with a VLAN tag, unprotected", vlan),
        ("IPv4 to 169.254.169.254, denied", udp(IMDS_IPV4)),
        ("IPv4 to 168.63.129.16, denied", udp([168, 63, 129, 16])),
        ("IPv4 to another endpoint, denied", udp([10, 98, 0, 1])),
        ("IPv6 to fd00:ec2::254, denied", ipv6(IMDS_IPV6, 80)),
        ("IPv6 to fd20:ce::254, allowed", ipv6(RESOLVER_IPV6, 53)),
    ]
}
