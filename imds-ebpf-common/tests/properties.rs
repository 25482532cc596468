//! Property tests of the parser and the verdict, with generated packets, packets built by etherparse and random bytes.

use std::collections::BTreeSet;

use etherparse::{EtherType, PacketBuilder, SingleVlanHeader, VlanId};
use imds_ebpf_common::{
    Address, Endpoint, IMDS_IPV4, InMemoryPolicy, LinkLayer, Mode, PolicyFilter, PolicyLookup, Service,
    Verdict, classify, classify_address,
    endpoint::{MAX_ALLOWED_PORTS, TCP, UDP, allows, allows_any},
    filter::{MAX_BUCKET_LEN, bucket},
    packet::{MAX_EXTENSION_HEADERS, MAX_VLAN_TAGS},
};
use proptest::{collection::vec, prelude::*, sample::select};

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
/// Offset of the end of the destination address in an IPv4 header.
const DESTINATION_END: usize = 20;

const IMDS_IPV6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
/// Endpoint that is also a DNS resolver: udp/53 and tcp/53 are allowed.
const RESOLVER_IPV4: [u8; 4] = [168, 63, 129, 16];
const RESOLVER_IPV6: [u8; 16] = [0xfd, 0x20, 0, 0xce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];

fn endpoints() -> [(Address, Endpoint); 4] {
    let mut dns = [Service::NONE; MAX_ALLOWED_PORTS];
    (dns[0], dns[1]) = (Service::new(UDP, 53), Service::new(TCP, 53));
    let endpoint = |allowed_ports| Endpoint { name: [0; 16], id: 1, allow_ports: allowed_ports };
    [
        (Address::from_ipv4(IMDS_IPV4), endpoint([Service::NONE; MAX_ALLOWED_PORTS])),
        (Address::from_ipv6(IMDS_IPV6), endpoint([Service::NONE; MAX_ALLOWED_PORTS])),
        (Address::from_ipv4(RESOLVER_IPV4), endpoint(dns)),
        (Address::from_ipv6(RESOLVER_IPV6), endpoint(dns)),
    ]
}

fn with_tables<T>(mode: Mode, work: impl FnOnce(&InMemoryPolicy<'_>) -> T) -> T {
    let endpoints = endpoints();
    let filter = PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
    work(&InMemoryPolicy { filter: &filter, endpoints: &endpoints, exemptions: &[], mode })
}

fn verdict(packet: &[u8], link_layer: LinkLayer, mode: Mode) -> Verdict {
    with_tables(mode, |policy| classify(packet, link_layer, policy))
}

/// Generates mostly the endpoint and addresses that differ in one bit, which would reveal a wrong mask.
fn address() -> impl Strategy<Value = [u8; 4]> {
    prop_oneof![
        3 => Just(IMDS_IPV4),
        1 => (0..32_u32).prop_map(|bit| (u32::from_be_bytes(IMDS_IPV4) ^ (1 << bit)).to_be_bytes()),
        1 => any::<[u8; 4]>(),
    ]
}

/// Generates an IPv4 packet with random protocol, options, fragment field and payload, and returns its destination too.
fn ipv4() -> impl Strategy<Value = ([u8; 4], Vec<u8>)> {
    (any::<[u8; 4]>(), address(), any::<u8>(), 0..=10_usize, any::<u16>(), vec(any::<u8>(), 0..64)).prop_map(
        |(source, destination, protocol, options, fragment, payload)| {
            let mut packet = vec![0x45 + u8::try_from(options).unwrap(), 0];
            packet
                .extend(u16::try_from(DESTINATION_END + options * 4 + payload.len()).unwrap().to_be_bytes());
            packet.extend([0, 7]);
            packet.extend(fragment.to_be_bytes());
            packet.extend([64, protocol, 0, 0]);
            packet.extend(source);
            packet.extend(destination);
            packet.extend(vec![1; options * 4]);
            packet.extend(payload);
            (destination, packet)
        },
    )
}

/// Generates an IPv6 address that embeds an IPv4 address.
fn embedded([a, b, c, d]: [u8; 4]) -> impl Strategy<Value = [u8; 16]> {
    let form = move |prefix: [u8; 12]| {
        let mut address = [0; 16];
        address[..12].copy_from_slice(&prefix);
        address[12..].copy_from_slice(&[a, b, c, d]);
        address
    };
    prop_oneof![
        Just(form([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff])),
        Just(form([0; 12])),
        Just(form([0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0])),
        any::<[u8; 10]>().prop_map(move |rest| {
            let mut address = [0; 16];
            address[..6].copy_from_slice(&[0x20, 0x02, a, b, c, d]);
            address[6..].copy_from_slice(&rest);
            address
        }),
    ]
}

/// Generates an IPv6 destination, and `Some` if it is an endpoint: `true` if the endpoint allows DNS.
fn destination_v6() -> impl Strategy<Value = ([u8; 16], Option<bool>)> {
    let flipped = |address: [u8; 16]| {
        (0..128_u32).prop_map(move |bit| (u128::from_be_bytes(address) ^ (1 << bit)).to_be_bytes())
    };
    prop_oneof![
        Just((IMDS_IPV6, Some(false))),
        Just((RESOLVER_IPV6, Some(true))),
        embedded(IMDS_IPV4).prop_map(|address| (address, Some(false))),
        embedded(RESOLVER_IPV4).prop_map(|address| (address, Some(true))),
        flipped(IMDS_IPV6).prop_map(|address| (address, None)),
        flipped(RESOLVER_IPV6).prop_map(|address| (address, None)),
        embedded([169, 254, 169, 253]).prop_map(|address| (address, None)),
        any::<[u8; 16]>().prop_map(|address| (address, None)),
    ]
}

/// Generates extension headers: kind, length in 8-octet units after the first, and for fragments offset and flags.
fn extensions() -> impl Strategy<Value = Vec<(u8, u8, u16)>> {
    let fragment = prop_oneof![3 => 0..8_u16, 1 => any::<u16>()];
    vec((select(vec![0, 60, 44, 43, 51, 135]), 0..4_u8, fragment), 0..=MAX_EXTENSION_HEADERS + 2)
}

fn transport() -> impl Strategy<Value = (u8, u16)> {
    (
        prop_oneof![4 => select(vec![UDP, TCP]), 1 => any::<u8>()],
        prop_oneof![2 => Just(53_u16), 1 => any::<u16>()],
    )
}

fn ipv6(destination: [u8; 16], extensions: &[(u8, u8, u16)], (protocol, port): (u8, u16)) -> Vec<u8> {
    let kinds: Vec<u8> = extensions.iter().map(|&(kind, ..)| kind).chain([protocol]).collect();
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, kinds[0], 64];
    packet.extend([0xfd; 16]);
    packet.extend(destination);
    for (&(kind, length, fragment), next) in extensions.iter().zip(&kinds[1..]) {
        if kind == 44 {
            packet.extend([*next, 0]);
            packet.extend(fragment.to_be_bytes());
            packet.extend([0; 4]);
        } else {
            packet.extend([*next, length]);
            packet.extend(vec![1; 6 + usize::from(length) * 8]);
        }
    }
    packet.extend([0x9c, 0x40]);
    packet.extend(port.to_be_bytes());
    packet.extend([0; 4]);
    packet
}

/// Reports whether the parser can see that a packet built by [`ipv6`] goes to a DNS port.
fn shows_dns(extensions: &[(u8, u8, u16)], (protocol, port): (u8, u16)) -> bool {
    let is_walked =
        |&(kind, _, fragment): &(u8, u8, u16)| matches!((kind, fragment >> 3), (0 | 60, _) | (44, 0));
    extensions.len() <= MAX_EXTENSION_HEADERS
        && extensions.iter().all(is_walked)
        && [UDP, TCP].contains(&protocol)
        && port == 53
}

/// Builds a frame from an Ethernet header, these VLAN tags, `ether_type` and `inner`.
fn tagged(macs: [u8; 12], tags: &[(u16, u16)], ether_type: u16, inner: &[u8]) -> Vec<u8> {
    let mut frame = macs.to_vec();
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ether_type.to_be_bytes());
    frame.extend(inner);
    frame
}

fn tags(count: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<(u16, u16)>> {
    vec((select(vec![0x8100, 0x88a8, 0x9100, 0x9200, 0x9300]), any::<u16>()), count)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn only_protected_destinations_are_denied(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), (destination, packet) in ipv4(),
    ) {
        let expected = if destination == IMDS_IPV4 { Verdict::Denied } else { Verdict::Unrelated };
        let frame = tagged(macs, &tags, 0x0800, &packet);
        prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, Mode::Enforce), expected);
        prop_assert_eq!(verdict(&packet, LinkLayer::None, Mode::Enforce), expected);
    }

    #[test]
    fn truncated_packets_by_cut_position(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), (_, mut packet) in ipv4(), cut: prop::sample::Index,
    ) {
        packet[16..20].copy_from_slice(&IMDS_IPV4);
        let frame = tagged(macs, &tags, 0x0800, &packet);
        let cut = cut.index(frame.len() + 1);
        let is_whole = cut >= ETHERNET_LEN + VLAN_LEN * tags.len() + DESTINATION_END;
        let expected = if is_whole { Verdict::Denied } else { Verdict::Unrelated };
        prop_assert_eq!(verdict(&frame[..cut], LinkLayer::Ethernet, Mode::Enforce), expected);
    }

    #[test]
    fn non_ip_is_unrelated(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), ether_type: u16, (_, packet) in ipv4(),
    ) {
        prop_assume!(![0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x9200, 0x9300].contains(&ether_type));
        let frame = tagged(macs, &tags, ether_type, &packet);
        prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, Mode::Enforce), Verdict::Unrelated);
    }

    #[test]
    fn more_vlan_tags_are_denied(
        macs: [u8; 12], tags in tags(MAX_VLAN_TAGS + 1..20), (_, packet) in ipv4(),
    ) {
        let frame = tagged(macs, &tags, 0x0800, &packet);
        prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, Mode::Enforce), Verdict::Denied);
    }

    #[test]
    fn mode_affects_protected_packets_only(macs: [u8; 12], (destination, packet) in ipv4()) {
        let frame = tagged(macs, &[], 0x0800, &packet);
        for (mode, expected) in
            [(Mode::Enforce, Verdict::Denied), (Mode::Audit, Verdict::Audited), (Mode::Off, Verdict::Off)]
        {
            let is_guarded = destination == IMDS_IPV4;
            let verdict = verdict(&frame, LinkLayer::Ethernet, mode);
            prop_assert_eq!(verdict, if is_guarded { expected } else { Verdict::Unrelated });
        }
    }

    #[test]
    fn ipv6_by_destination_and_allowed_port(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), (destination, endpoint) in destination_v6(),
        extensions in extensions(), transport in transport(),
    ) {
        let packet = ipv6(destination, &extensions, transport);
        let expected = match endpoint {
            None => Verdict::Unrelated,
            Some(true) if shows_dns(&extensions, transport) => Verdict::Allowed,
            Some(_) => Verdict::Denied,
        };
        let frame = tagged(macs, &tags, 0x86dd, &packet);
        prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, Mode::Enforce), expected);
        prop_assert_eq!(verdict(&packet, LinkLayer::None, Mode::Enforce), expected);
    }

    #[test]
    fn truncated_ipv6_is_never_allowed(
        macs: [u8; 12], extensions in extensions(), cut: prop::sample::Index,
    ) {
        let packet = ipv6(RESOLVER_IPV6, &extensions, (UDP, 53));
        let whole = tagged(macs, &[], 0x86dd, &packet);
        let cut = cut.index(whole.len() + 1);
        let shows_port = shows_dns(&extensions, (UDP, 53)) && cut + 4 >= whole.len();
        let expected = if cut < ETHERNET_LEN + 40 {
            Verdict::Unrelated
        } else if shows_port {
            Verdict::Allowed
        } else {
            Verdict::Denied
        };
        prop_assert_eq!(verdict(&whole[..cut], LinkLayer::Ethernet, Mode::Enforce), expected);
    }

    #[test]
    fn ipv4_resolver_packet_must_show_dns(
        (_, mut packet) in ipv4(), version_ihl in prop_oneof![3 => 0x45..=0x4f_u8, 1 => any::<u8>()],
        fragment in prop_oneof![select(vec![0_u16, 0x4000, 0x2000]), any::<u16>()], transport in transport(),
        cut: prop::sample::Index,
    ) {
        packet.resize(100, 0);
        packet[0] = version_ihl;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = transport.0;
        packet[16..20].copy_from_slice(&RESOLVER_IPV4);
        let ports = usize::from(version_ihl & 0xf) * 4;
        packet[ports + 2..ports + 4].copy_from_slice(&transport.1.to_be_bytes());
        // Below 20 bytes, the port has overwritten the header.
        prop_assume!(ports >= 20);
        let cut = 20 + cut.index(81);
        let is_dns = (0x45..=0x4f).contains(&version_ihl) && fragment << 3 == 0 && ports + 4 <= cut
            && [UDP, TCP].contains(&transport.0) && transport.1 == 53;
        let expected = if is_dns { Verdict::Allowed } else { Verdict::Denied };
        let frame = tagged([2; 12], &[], 0x0800, &packet[..cut]);
        prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, Mode::Enforce), expected);
        for mode in [Mode::Audit, Mode::Off] {
            prop_assert_eq!(verdict(&frame, LinkLayer::Ethernet, mode) == Verdict::Allowed, is_dns);
        }
    }

    #[test]
    fn sockets_and_packets_agree((destination, _) in destination_v6(), transport in transport()) {
        let packet = ipv6(destination, &[], transport);
        let (protocol, port) = transport;
        let of_socket = with_tables(Mode::Enforce, |policy| {
            classify_address(Address::from_ipv6(destination), Some(Service::new(protocol, port)), policy)
        });
        prop_assert_eq!(of_socket, verdict(&packet, LinkLayer::None, Mode::Enforce));
    }

    #[test]
    fn bloom_filter_has_every_endpoint_form((destination, endpoint) in destination_v6()) {
        let address = Address::from_ipv6(destination);
        prop_assert_eq!(Address::from_ipv6(address.octets()), address);
        let found = with_tables(Mode::Enforce, |policy| {
            (policy.may_be_protected(address.slot()), policy.allowed_ports(address.slot(), &address).map(allows_any))
        });
        prop_assert_eq!(found.1, endpoint);
        prop_assert!(found.0 || endpoint.is_none());
    }

    /// Uses small numbers, so that many services are equal or differ by one.
    #[test]
    fn only_listed_ports_are_allowed(
        listed in vec((select(vec![TCP, UDP]), 0_u16..4), 0..=MAX_ALLOWED_PORTS),
        asked in (select(vec![0, 1, TCP, UDP]), 0_u16..4),
    ) {
        let mut allowed_ports = [Service::NONE; MAX_ALLOWED_PORTS];
        for (to, (protocol, port)) in allowed_ports.iter_mut().zip(&listed) {
            *to = Service::new(*protocol, *port);
        }
        let endpoint = Endpoint { name: [0; 16], id: 1, allow_ports: allowed_ports };
        prop_assert_eq!(allows(&endpoint.allow_ports, Service::new(asked.0, asked.1)), listed.contains(&asked));
    }

    #[test]
    fn any_bytes_have_an_explained_verdict(bytes in vec(any::<u8>(), 0..96)) {
        for link_layer in [LinkLayer::Ethernet, LinkLayer::None] {
            let enforced = verdict(&bytes, link_layer, Mode::Enforce);
            // Random bytes do not contain the address of an endpoint, so they must pass.
            prop_assert_eq!(enforced, Verdict::Unrelated);
        }
    }
}

#[test]
fn reference_parser_agrees() {
    let mut tcp = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .vlan(etherparse::VlanHeader::Single(SingleVlanHeader {
            pcp: etherparse::VlanPcp::ZERO,
            drop_eligible_indicator: false,
            vlan_id: VlanId::try_new(5).unwrap(),
            ether_type: EtherType::IPV4,
        }))
        .ipv4([10, 0, 0, 2], IMDS_IPV4, 64)
        .tcp(40_000, 80, 1, 1024)
        .syn()
        .write(&mut tcp, &[])
        .unwrap();
    assert_eq!(verdict(&tcp, LinkLayer::Ethernet, Mode::Enforce), Verdict::Denied);

    let mut v6 = Vec::new();
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 169, 254, 169, 254];
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6([1; 16], mapped, 64)
        .udp(1, 2)
        .write(&mut v6, &[1])
        .unwrap();
    assert_eq!(verdict(&v6, LinkLayer::Ethernet, Mode::Enforce), Verdict::Denied);
}

#[test]
fn bloom_filter_has_few_false_positives() {
    let in_a_row: [fn(u8) -> Address; 4] = [
        |n| Address::from_ipv4([10, 0, n, 7]),
        |n| Address::from_ipv4([10, 0, 7, n]),
        |n| Address::from_ipv4([10, 0, n >> 4, n & 15]),
        |n| Address::from_ipv6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, n]),
    ];
    for address in in_a_row {
        let buckets: BTreeSet<_> = (0..=255).map(|n| bucket(address(n).slot())).collect();
        assert_eq!(buckets.len(), 256, "neighbours share buckets");
    }
    let addresses: Vec<_> = (0..=255).map(in_a_row[0]).collect();
    let endpoint = Endpoint { name: [0; 16], id: 1, allow_ports: [Service::NONE; MAX_ALLOWED_PORTS] };
    let filter = PolicyFilter::new(addresses.iter().map(|address| (*address, &endpoint)));
    assert!(addresses.iter().all(|address| filter.has_address(address.slot())));
    let bits: u32 = filter.addresses.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(bits, 256, "neighbours share slots");
    for address in &addresses {
        assert_eq!(filter.table().find(*address), Some(&endpoint.allow_ports));
    }
    let imds = Address::from_ipv4(IMDS_IPV4);
    assert_eq!(filter.table().find(imds), None);
    // A change does not touch the previous table, which programs may still be reading.
    let mut later = filter;
    later.set_endpoints([(imds, &endpoint)]);
    assert!(later.current != filter.current && later.tables.contains(filter.table()));
    assert!(later.table().find(imds).is_some() && !later.has_address(addresses[0].slot()));
    later.add_addresses(&filter);
    assert!(later.has_address(addresses[0].slot()) && later.table().find(addresses[0]).is_none());
}

#[test]
fn longest_bucket_is_searched_to_its_end() {
    // All addresses have the same slot.
    let addresses: Vec<_> = (0..4).map(|n| Address::from_ipv4([10, n, 10, n])).collect();
    let all_equal = addresses.iter().all(|address| address.slot() == addresses[0].slot());
    assert!(addresses.len() == MAX_BUCKET_LEN && all_equal);
    let endpoint = Endpoint { name: [0; 16], id: 1, allow_ports: [Service::NONE; MAX_ALLOWED_PORTS] };
    let filter = PolicyFilter::new(addresses.iter().map(|address| (*address, &endpoint)));
    assert!(addresses.iter().all(|address| filter.table().find(*address).is_some()));
}
