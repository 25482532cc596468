//! Packet parser: any bytes have a verdict, the fast path agrees with the slow path, and an allowed packet has an
//! allowed port.

use imds_ebpf_common::{
    Address, Endpoint, Filter, Frame, IMDS_IPV4, Listed, Mode, Service, Verdict, is_plainly_foreign, judge,
    judge_thoroughly,
};

pub(crate) fn run(packet: &[u8]) {
    let mut dns = [Service::NONE; 8];
    dns[0] = Service::new(17, 53);
    let endpoint = |keep| Endpoint { name: [0; 16], id: 1, keep };
    let endpoints = [
        (Address::from_ipv4(IMDS_IPV4), endpoint([Service::NONE; 8])),
        (Address::from_ipv4([168, 63, 129, 16]), endpoint(dns)),
        (Address::from_ipv6([0xfd; 16]), endpoint(dns)),
    ];
    let filter = Filter::of(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
    let tables = Listed { filter: &filter, endpoints: &endpoints, grants: &[], mode: Mode::Enforce };
    for frame in [Frame::Ethernet, Frame::Ip] {
        let verdict = judge(packet, frame, &tables);
        assert_eq!(verdict, judge_thoroughly(packet, frame, &tables));
        assert!(!is_plainly_foreign(packet, frame, &tables) || verdict == Verdict::Foreign);
        assert!(verdict != Verdict::Kept || packet.windows(2).any(|pair| pair == [0, 53]));
    }
}
