//! Packet parser: any bytes have a verdict, the fast path agrees with the slow path, and an allowed packet has an
//! allowed port.

use imds_ebpf_common::{
    Address, Endpoint, IMDS_IPV4, InMemoryPolicy, LinkLayer, Mode, PolicyFilter, Service, Verdict, classify,
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
    let filter = PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
    let policy =
        InMemoryPolicy { filter: &filter, endpoints: &endpoints, exemptions: &[], mode: Mode::Enforce };
    for link_layer in [LinkLayer::Ethernet, LinkLayer::None] {
        let verdict = classify(packet, link_layer, &policy);
        assert_eq!(verdict, classify_slow(packet, link_layer, &policy));
        assert!(!is_unrelated_fast(packet, link_layer, &policy) || verdict == Verdict::Unrelated);
        assert!(verdict != Verdict::Allowed || packet.windows(2).any(|pair| pair == [0, 53]));
    }
}
