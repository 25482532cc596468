//! Replies to crafted packets, byte by byte: an independent implementation of the protocols (etherparse) parses the
//! replies of the BPF programs.

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader, icmpv6::DestUnreachableCode,
};
use imds_agent::datapath::object::OBJECT;
use imds_ebpf_common::{
    Address, DenyAction, Endpoint, IMDS_IPV4, Mode, Policy, PolicyFilter, Service,
    event::RateLimiter,
    names::{MAP_ENDPOINTS, MAP_POLICY, PROG_FROM_POD, PROG_FROM_POD_L3, SECTION_FILTER},
};
use imds_tests::program::{Object, try_run};
use proptest::{prelude::*, test_runner::TestRunner};

const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;
const POD: [u8; 4] = [10, 244, 0, 7];
const POD_V6: [u8; 16] = [0xfd, 0x10, 2, 0x44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
const IMDS_IPV6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn rejecting() -> Object {
    let endpoint = |id| Endpoint { name: [0; 16], id, allow_ports: [Service::NONE; 8] };
    let endpoints =
        [(Address::from_ipv4(IMDS_IPV4), endpoint(1)), (Address::from_ipv6(IMDS_IPV6), endpoint(2))];
    let mut object = Object::load(OBJECT);
    for (address, endpoint) in endpoints {
        object.insert(MAP_ENDPOINTS, address, endpoint);
    }
    object.set(
        SECTION_FILTER,
        PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint))),
    );
    object.set(
        MAP_POLICY,
        Policy { mode: Mode::Enforce as u32, on_deny: DenyAction::Reject as u32, ..Policy::default() },
    );
    object
}

/// Returns a runner with at most as many cases as one CPU answers per second, so that the rate limit does not apply.
fn runner() -> TestRunner {
    let cases = RateLimiter::MAX_REPLIES / 2;
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
}

/// Builds a packet with Ethernet and IP headers, for either version of IP.
fn packet(
    v6: bool,
    write: impl FnOnce(etherparse::PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8>,
) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    write(if v6 { ethernet.ipv6(POD_V6, IMDS_IPV6, 64) } else { ethernet.ipv4(POD, IMDS_IPV4, 64) })
}

/// Parses the reply, and asserts that its addresses and checksums are correct.
fn answer(after: &[u8], v6: bool) -> SlicedPacket<'_> {
    let answer = SlicedPacket::from_ethernet(after).expect("a packet");
    assert_eq!((&after[..6], &after[6..12]), (&MACS.0[..], &MACS.1[..]));
    match answer.net.as_ref().expect("an IP header") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!((header.source(), header.destination()), (IMDS_IPV4, POD));
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert_eq!(usize::from(header.total_len()), after.len() - 14);
            assert!(header.dont_fragment() && !v6);
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            assert_eq!((header.source(), header.destination()), (IMDS_IPV6, POD_V6));
            assert_eq!(usize::from(header.payload_length()), after.len() - 54);
            assert!(v6);
        }
        NetSlice::Arp(_) => panic!("an ARP packet"),
    }
    answer
}

#[test]
fn tcp_reset_is_accepted_by_the_stack() {
    let object = rejecting();
    let segment = (
        any::<bool>(),
        any::<(u16, u16, u32, u32)>(),
        0_u8..64,
        proptest::collection::vec(any::<u8>(), 0..200),
        0_usize..10,
    );
    let result =
        runner().run(&segment, |(v6, (source, port, sequence, acknowledged), flags, data, options)| {
            let before = packet(v6, |ip| {
                let mut tcp = ip.tcp(source, port, sequence, 1000);
                for (flag, set) in [(FIN, 0), (SYN, 1), (RST, 2)] {
                    if flags & flag != 0 {
                        tcp = match set {
                            0 => tcp.fin(),
                            1 => tcp.syn(),
                            _ => tcp.rst(),
                        };
                    }
                }
                if flags & ACK != 0 {
                    tcp = tcp.ack(acknowledged);
                }
                let tcp = tcp.options_raw(&vec![1; options * 4]).unwrap();
                let mut bytes = Vec::new();
                tcp.write(&mut bytes, &data).unwrap();
                bytes
            });
            let (action, after) = try_run(object.program(PROG_FROM_POD), &before).expect("a test run");
            if flags & RST != 0 {
                prop_assert_eq!(action, TC_ACT_SHOT);
                return Ok(());
            }
            prop_assert_eq!(action, TC_ACT_REDIRECT);
            let reset = answer(&after, v6);
            let Some(TransportSlice::Tcp(tcp)) = reset.transport else { panic!("not TCP: {reset:?}") };
            prop_assert_eq!((tcp.source_port(), tcp.destination_port()), (port, source));
            prop_assert!(tcp.rst() && !tcp.syn() && !tcp.fin());
            let checksum = if v6 {
                tcp.to_header().calc_checksum_ipv6_raw(IMDS_IPV6, POD_V6, tcp.payload())
            } else {
                tcp.to_header().calc_checksum_ipv4_raw(IMDS_IPV4, POD, tcp.payload())
            };
            prop_assert_eq!(tcp.checksum(), checksum.unwrap());
            if flags & ACK == 0 {
                let length = u32::try_from(data.len()).unwrap();
                let occupied = length + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
                prop_assert!(tcp.ack() && tcp.sequence_number() == 0);
                prop_assert_eq!(tcp.acknowledgment_number(), sequence.wrapping_add(occupied));
            } else {
                prop_assert!(!tcp.ack());
                prop_assert_eq!(tcp.sequence_number(), acknowledged);
            }
            Ok(())
        });
    result.unwrap();
}

#[test]
fn icmp_error_quotes_the_packet() {
    let object = rejecting();
    let datagram =
        (any::<bool>(), any::<(u16, u16)>(), proptest::collection::vec(any::<u8>(), 0..300), any::<bool>());
    let result = runner().run(&datagram, |(v6, (source, port), data, is_udp)| {
        let before = packet(v6, |ip| {
            let mut bytes = Vec::new();
            if is_udp {
                ip.udp(source, port).write(&mut bytes, &data).unwrap();
            } else {
                // At least eight bytes of an unknown protocol.
                let data = [&[0; 8][..], &data].concat();
                ip.write(&mut bytes, IpNumber(132), &data).unwrap();
            }
            bytes
        });
        let (action, after) = try_run(object.program(PROG_FROM_POD), &before).expect("a test run");
        prop_assert_eq!(action, TC_ACT_REDIRECT);
        let error = answer(&after, v6);
        let quote = match error.transport {
            Some(TransportSlice::Icmpv4(icmp)) => {
                let unreachable = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FilterProhibited);
                prop_assert_eq!(icmp.icmp_type(), unreachable.clone());
                prop_assert_eq!(icmp.checksum(), unreachable.calc_checksum(icmp.payload()));
                prop_assert_eq!(icmp.payload().len(), 28);
                icmp.payload()
            }
            Some(TransportSlice::Icmpv6(icmp)) => {
                let unreachable = Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Prohibited);
                prop_assert_eq!(icmp.icmp_type(), unreachable);
                let checksum = unreachable.calc_checksum(IMDS_IPV6, POD_V6, icmp.payload()).unwrap();
                prop_assert_eq!(icmp.checksum(), checksum);
                prop_assert_eq!(icmp.payload().len(), 48);
                icmp.payload()
            }
            other => panic!("not ICMP: {other:?}"),
        };
        prop_assert_eq!(quote, &before[14..14 + quote.len()]);
        Ok(())
    });
    result.unwrap();
}

#[test]
fn packets_without_reply_are_dropped() {
    let object = rejecting();
    let icmp = |v4_type: Icmpv4Type| {
        packet(false, |ip| {
            let mut bytes = Vec::new();
            ip.icmpv4(v4_type).write(&mut bytes, &[0x45; 28]).unwrap();
            bytes
        })
    };
    let echo = icmp(Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 1, seq: 1 }));
    let error = icmp(Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port));
    let error_v6 = packet(true, |ip| {
        let mut bytes = Vec::new();
        let unreachable = Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port);
        ip.icmpv6(unreachable).write(&mut bytes, &[0x60; 48]).unwrap();
        bytes
    });
    let mut fragment = echo.clone();
    fragment[14 + 7] = 1;
    let mut from_multicast = echo.clone();
    from_multicast[14 + 12] = 224;
    let mut from_nobody = echo.clone();
    from_nobody[14 + 12..14 + 16].fill(0);
    let mut cut_off = echo.clone();
    cut_off.truncate(14 + 22);
    let program = object.program(PROG_FROM_POD);
    assert_eq!(try_run(program, &echo).expect("a test run").0, TC_ACT_REDIRECT);
    for (name, packet) in [
        ("an ICMP error", error),
        ("an ICMPv6 error", error_v6),
        ("a later fragment", fragment),
        ("a multicast source", from_multicast),
        ("no source", from_nobody),
        ("a packet too short to quote", cut_off),
    ] {
        let (action, after) = try_run(program, &packet).expect("a test run");
        assert_eq!((action, after), (TC_ACT_SHOT, packet), "{name}");
    }
}

#[test]
fn replies_without_link_layer_and_options() {
    let object = rejecting();
    let mut before = packet(false, |ip| {
        let mut bytes = Vec::new();
        ip.udp(1, 2).write(&mut bytes, &[7; 100]).unwrap();
        bytes
    });
    let (_, with_link_layer) = try_run(object.program(PROG_FROM_POD), &before).expect("a test run");
    let (action, without) = try_run(object.program(PROG_FROM_POD_L3), &before[14..]).expect("a test run");
    assert_eq!((action, &without[..]), (TC_ACT_REDIRECT, &with_link_layer[14..]));

    // Four bytes of options: the reply quotes the largest possible header and the data after it.
    before.splice(34..34, [1, 1, 1, 0]);
    before[14] = 0x46;
    let (action, after) = try_run(object.program(PROG_FROM_POD), &before).expect("a test run");
    assert_eq!((action, after.len()), (TC_ACT_REDIRECT, 14 + 28 + 68));
    assert_eq!(after[42..], before[14..14 + 68]);
}
