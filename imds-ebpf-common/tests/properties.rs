//! Properties of the parser and the verdict, against packets built by etherparse and against any bytes at all.

use etherparse::{EtherType, PacketBuilder, SingleVlanHeader, VlanId};
use imds_ebpf_common::{
    Frame, IMDS_IPV4, Mode, Verdict, judge,
    packet::{MAX_VLAN_TAGS, ipv4_destination},
};
use proptest::{collection::vec, prelude::*, sample::select};

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
/// Up to and with the destination address.
const DESTINATION_END: usize = 20;

fn verdict(packet: &[u8], frame: Frame, mode: Mode) -> Verdict {
    judge(packet, frame, || mode)
}

/// Addresses: mostly the endpoint and its neighbours, where a wrong mask would show.
fn address() -> impl Strategy<Value = [u8; 4]> {
    prop_oneof![
        3 => Just(IMDS_IPV4),
        1 => (0..32_u32).prop_map(|bit| (u32::from_be_bytes(IMDS_IPV4) ^ (1 << bit)).to_be_bytes()),
        1 => any::<[u8; 4]>(),
    ]
}

/// An IPv4 packet with a UDP datagram, options and fragmentation as they come.
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

/// `inner`, of `ether_type`, behind an Ethernet header and these VLAN tags.
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
    fn a_packet_is_denied_if_and_only_if_its_destination_is_guarded(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), (destination, packet) in ipv4(),
    ) {
        let expected = if destination == IMDS_IPV4 { Verdict::Deny } else { Verdict::Foreign };
        let frame = tagged(macs, &tags, 0x0800, &packet);
        prop_assert_eq!(ipv4_destination(&frame[..], Frame::Ethernet), Some(destination));
        prop_assert_eq!(verdict(&frame, Frame::Ethernet, Mode::Enforce), expected);
        prop_assert_eq!(verdict(&packet, Frame::Ip, Mode::Enforce), expected);
    }

    #[test]
    fn cut_off_behind_the_destination_it_is_denied_and_before_it_is_foreign(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), (_, mut packet) in ipv4(), cut: prop::sample::Index,
    ) {
        packet[16..20].copy_from_slice(&IMDS_IPV4);
        let frame = tagged(macs, &tags, 0x0800, &packet);
        let cut = cut.index(frame.len() + 1);
        let is_whole = cut >= ETHERNET_LEN + VLAN_LEN * tags.len() + DESTINATION_END;
        let expected = if is_whole { Verdict::Deny } else { Verdict::Foreign };
        prop_assert_eq!(verdict(&frame[..cut], Frame::Ethernet, Mode::Enforce), expected);
    }

    #[test]
    fn what_is_not_ipv4_is_foreign(
        macs: [u8; 12], tags in tags(0..=MAX_VLAN_TAGS), ether_type: u16, (_, packet) in ipv4(),
    ) {
        prop_assume!(![0x0800, 0x8100, 0x88a8, 0x9100, 0x9200, 0x9300].contains(&ether_type));
        let frame = tagged(macs, &tags, ether_type, &packet);
        prop_assert_eq!(verdict(&frame, Frame::Ethernet, Mode::Enforce), Verdict::Foreign);
    }

    #[test]
    fn more_tags_than_devices_can_stack_are_not_looked_through(
        macs: [u8; 12], tags in tags(MAX_VLAN_TAGS + 1..20), (_, packet) in ipv4(),
    ) {
        let frame = tagged(macs, &tags, 0x0800, &packet);
        prop_assert_eq!(verdict(&frame, Frame::Ethernet, Mode::Enforce), Verdict::Foreign);
    }

    #[test]
    fn the_mode_decides_over_guarded_packets_only(macs: [u8; 12], (destination, packet) in ipv4()) {
        let frame = tagged(macs, &[], 0x0800, &packet);
        for (mode, expected) in
            [(Mode::Enforce, Verdict::Deny), (Mode::Audit, Verdict::Audit), (Mode::Off, Verdict::Allow)]
        {
            let mut asked = false;
            let verdict = judge(&frame[..], Frame::Ethernet, || { asked = true; mode });
            prop_assert_eq!(asked, destination == IMDS_IPV4);
            prop_assert_eq!(verdict, if asked { expected } else { Verdict::Foreign });
        }
    }

    #[test]
    fn any_bytes_have_a_verdict_that_their_destination_explains(bytes in vec(any::<u8>(), 0..96)) {
        for frame in [Frame::Ethernet, Frame::Ip] {
            let is_guarded = ipv4_destination(&bytes[..], frame) == Some(IMDS_IPV4);
            prop_assert_eq!(verdict(&bytes, frame, Mode::Enforce) == Verdict::Deny, is_guarded);
        }
    }
}

#[test]
fn a_second_opinion_on_what_a_packet_looks_like() {
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
    assert_eq!(verdict(&tcp, Frame::Ethernet, Mode::Enforce), Verdict::Deny);

    let mut v6 = Vec::new();
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 169, 254, 169, 254];
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6([1; 16], mapped, 64)
        .udp(1, 2)
        .write(&mut v6, &[1])
        .unwrap();
    assert_eq!(verdict(&v6, Frame::Ethernet, Mode::Enforce), Verdict::Foreign);
}
