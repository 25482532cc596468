//! Packet parser: any bytes have a verdict, the fast path agrees with the slow path, and an allowed packet has an
//! allowed port.

use imds_ebpf_common::{
    Address, Endpoint, IMDS_IPV4, InMemoryPolicy, LinkLayer, Mode, PolicyTable, Service, Verdict, classify,
    classify_slow, is_unrelated_fast,
};

pub(crate) fn run(packet: &[u8]) {
    let mut dns = [Service::NONE; 8];
    dns[0] = Service::new(17, 53);
    let endpoint = |allowed_ports| Endpoint { name: [0; 16], id: 1, allow_ports: allowed_ports };
    let endpoints = [
        (Address::from_ipv4(IMDS_IPV4), endpoint([Service::NONE; 8])),
        (Address::from_ipv4([168, 63, 129, 16]), endpoint(dns)),
        (Address::from_ipv6([0xfd; 16]), endpoint(dns)),
    ];
    let filter = PolicyTable::of(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
    let policy = InMemoryPolicy { filter: &filter, endpoints: &endpoints, grants: &[], mode: Mode::Enforce };
    for frame in [LinkLayer::Ethernet, LinkLayer::None] {
        let verdict = classify(packet, frame, &policy);
        assert_eq!(verdict, classify_slow(packet, frame, &policy));
        assert!(!is_unrelated_fast(packet, frame, &policy) || verdict == Verdict::Unrelated);
        assert!(verdict != Verdict::Allowed || packet.windows(2).any(|pair| pair == [0, 53]));
    }
}
