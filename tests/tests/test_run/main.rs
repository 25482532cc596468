//! The BPF programs on crafted packets: the kernel's verifier, JIT and helpers give the same result as the host's code
//! for each packet.

mod budget;
mod requests;

use std::time::Duration;

use etherparse::{EtherType, Ipv4Extensions, Ipv4Header, PacketBuilder, SingleVlanHeader, VlanId, ip_number};
use imds_agent::datapath::object::OBJECT;
use imds_ebpf_common::{
    Address, AttachMode, Counter, CounterKey, Endpoint, ExemptionKey, ExemptionRecord, Hook, IMDS_IPV4,
    InterfaceRecord, Mode, Policy, PolicyFilter, ProbeRecord, Role, Service, Subject, SubjectKind, Verdict,
    names::{
        MAP_COUNTERS, MAP_ENDPOINTS, MAP_EXEMPT, MAP_EXEMPT_SOURCES, MAP_EXEMPT_USE, MAP_INTERFACES,
        MAP_POLICY, MAP_PROBES, MAP_PROBING, MAPS, PROG_FROM_POD, PROG_FROM_POD_L3, PROG_NODE_EGRESS,
        SECTION_FILTER, in_object, programs,
    },
    packet::MAX_VLAN_TAGS,
};
use imds_tests::{
    WHOLE_TEST,
    program::{Object, action, marked},
    skip,
};
use nix::time::{ClockId, clock_gettime};

const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const POD: [u8; 4] = [10, 244, 0, 7];
const OTHER: [u8; 4] = [198, 51, 100, 10];
const ETHERNET_LEN: usize = 14;

const IMDS: Endpoint =
    Endpoint { name: *b"imds\0\0\0\0\0\0\0\0\0\0\0\0", id: 1, allow_ports: [Service::NONE; 8] };

/// Loads programs for which 169.254.169.254 is an endpoint.
fn unwritten_object() -> Object {
    let mut object = Object::load(OBJECT);
    object.insert(MAP_ENDPOINTS, Address::from_ipv4(IMDS_IPV4), IMDS);
    object.set(SECTION_FILTER, PolicyFilter::new([(Address::from_ipv4(IMDS_IPV4), &IMDS)]));
    object
}

fn object(mode: Mode) -> Object {
    let mut object = unwritten_object();
    object.set(MAP_POLICY, Policy { mode: mode as u32, ..Policy::default() });
    object
}

fn ethernet() -> etherparse::PacketBuilderStep<etherparse::Ethernet2Header> {
    PacketBuilder::ethernet2([0x02, 0, 0, 0, 0, 1], [0x02, 0, 0, 0, 0, 2])
}

fn udp(destination: [u8; 4]) -> Vec<u8> {
    let mut packet = Vec::new();
    ethernet().ipv4(POD, destination, 64).udp(5353, 53).write(&mut packet, b"payload").unwrap();
    packet
}

fn raw(destination: [u8; 4], protocol: u8) -> Vec<u8> {
    let header = Ipv4Header::new(8, 64, protocol.into(), POD, destination).unwrap();
    let mut packet = Vec::new();
    let ip = etherparse::IpHeaders::Ipv4(header, Ipv4Extensions::default());
    ethernet().ip(ip).write(&mut packet, protocol.into(), &[0; 8]).unwrap();
    packet
}

/// Returns `packet` with VLAN tags inserted after its MAC addresses.
fn with_tags(packet: &[u8], tags: &[u16]) -> Vec<u8> {
    let (macs, rest) = packet.split_at(12);
    let tags = tags.iter().flat_map(|tpid| [tpid.to_be_bytes(), [0, 5]].concat());
    macs.iter().copied().chain(tags).chain(rest.iter().copied()).collect()
}

/// Returns packets that must be denied if they go to the endpoint and pass if they go elsewhere.
fn packets_to(destination: [u8; 4]) -> Vec<(&'static str, Vec<u8>)> {
    let mut tcp = Vec::new();
    ethernet().ipv4(POD, destination, 64).tcp(40_000, 80, 7, 64_240).syn().write(&mut tcp, &[]).unwrap();
    let mut icmp = Vec::new();
    ethernet().ipv4(POD, destination, 64).icmpv4_echo_request(1, 1).write(&mut icmp, &[0; 48]).unwrap();
    let mut tagged = Vec::new();
    ethernet()
        .vlan(etherparse::VlanHeader::Single(SingleVlanHeader {
            vlan_id: VlanId::try_new(7).unwrap(),
            ether_type: EtherType::IPV4,
            ..SingleVlanHeader::default()
        }))
        .ipv4(POD, destination, 64)
        .udp(1, 2)
        .write(&mut tagged, &[])
        .unwrap();
    let mut with_options = Ipv4Header::new(8, 64, ip_number::UDP, POD, destination).unwrap();
    with_options.options = [1_u8; 40].into();
    let mut options = Vec::new();
    let ip = etherparse::IpHeaders::Ipv4(with_options, Ipv4Extensions::default());
    ethernet().ip(ip).write(&mut options, ip_number::UDP, &[0; 8]).unwrap();
    let mut fragment = udp(destination);
    fragment[ETHERNET_LEN + 6..ETHERNET_LEN + 8].copy_from_slice(&0x2003_u16.to_be_bytes());
    let mut nonsense = udp(destination);
    nonsense[ETHERNET_LEN] = 0xf1;
    let mut jumbo = Vec::new();
    ethernet().ipv4(POD, destination, 64).udp(1, 2).write(&mut jumbo, &[0; 3000]).unwrap();
    let cut = udp(destination)[..ETHERNET_LEN + 20].to_vec();
    let forged = [&[0xff; 6][..], &[0; 6], &udp(destination)[12..]].concat();
    vec![
        ("TCP SYN", tcp),
        ("UDP", udp(destination)),
        ("ICMP echo", icmp),
        ("SCTP", raw(destination, 132)),
        ("IPv4 in IPv4", raw(destination, 4)),
        ("an unassigned protocol", raw(destination, 253)),
        ("40 bytes of options", options),
        ("a fragment that is not the first", fragment),
        ("a header of a version and length that do not exist", nonsense),
        ("a jumbo frame", jumbo),
        ("truncated after the destination", cut),
        ("broadcast from no address", forged),
        ("802.1Q built by etherparse", tagged),
        ("802.1Q", with_tags(&udp(destination), &[0x8100])),
        ("802.1ad", with_tags(&udp(destination), &[0x88a8])),
        ("QinQ", with_tags(&udp(destination), &[0x88a8, 0x8100])),
        ("QinQ with the pre-standard EtherType", with_tags(&udp(destination), &[0x9100, 0x9200])),
        ("the maximum number of stacked tags", with_tags(&udp(destination), &[0x8100; MAX_VLAN_TAGS])),
    ]
}

#[test]
fn every_packet_to_endpoint_is_denied() {
    let object = object(Mode::Enforce);
    let program = object.program(PROG_FROM_POD);
    for ((name, protected), (_, other)) in packets_to(IMDS_IPV4).into_iter().zip(packets_to(OTHER)) {
        assert_eq!(action(program, &protected), TC_ACT_SHOT, "{name}");
        assert_eq!(action(program, &other), TC_ACT_UNSPEC, "{name} to another address");
    }
    let too_many = with_tags(&udp(OTHER), &[0x8100; MAX_VLAN_TAGS + 1]);
    assert_eq!(action(program, &too_many), TC_ACT_SHOT, "more tags than the parser skips");
}

#[test]
fn lookalikes_of_the_endpoint_pass() {
    let object = object(Mode::Enforce);
    let program = object.program(PROG_FROM_POD);
    let mut from_endpoint = Vec::new();
    ethernet().ipv4(IMDS_IPV4, POD, 64).udp(80, 4000).write(&mut from_endpoint, &IMDS_IPV4).unwrap();
    let mut arp = udp(IMDS_IPV4);
    arp[12..14].copy_from_slice(&0x0806_u16.to_be_bytes());
    let mut ipv6 = Vec::new();
    ethernet().ipv6([0xfd; 16], [0xfc; 16], 64).udp(1, 2).write(&mut ipv6, &[]).unwrap();
    for (name, packet) in [
        ("the endpoint as the source", from_endpoint),
        ("ARP", arp),
        ("IPv6", ipv6),
        (
            "truncated inside the destination",
            with_tags(&udp(IMDS_IPV4), &[0x8100])[..ETHERNET_LEN + 4 + 19].to_vec(),
        ),
        ("a tag without payload", with_tags(&udp(IMDS_IPV4), &[0x8100])[..ETHERNET_LEN + 2].to_vec()),
    ] {
        assert_eq!(action(program, &packet), TC_ACT_UNSPEC, "{name}");
    }
    for last in 0..=255_u8 {
        let neighbour = [169, 254, 169, last];
        let expected = if last == 254 { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
        assert_eq!(action(program, &udp(neighbour)), expected, "{neighbour:?}");
    }
}

#[test]
fn layer_3_packets_by_the_layer_3_program() {
    let object = object(Mode::Enforce);
    let program = object.program(PROG_FROM_POD_L3);
    for ((name, protected), (_, other)) in packets_to(IMDS_IPV4).into_iter().zip(packets_to(OTHER)).take(8) {
        assert_eq!(action(program, &protected[ETHERNET_LEN..]), TC_ACT_SHOT, "{name}");
        assert_eq!(action(program, &other[ETHERNET_LEN..]), TC_ACT_UNSPEC, "{name} to another address");
    }
}

#[test]
fn mode_decides_and_verdicts_are_counted() {
    for (mode, verdict, expected) in [
        (Mode::Enforce, Verdict::Denied, TC_ACT_SHOT),
        (Mode::Audit, Verdict::Audited, TC_ACT_UNSPEC),
        (Mode::Off, Verdict::Off, TC_ACT_UNSPEC),
    ] {
        let object = object(mode);
        let program = object.program(PROG_FROM_POD);
        let packet = udp(IMDS_IPV4);
        for _ in 0..3 {
            assert_eq!(action(program, &packet), expected, "{mode:?}");
            assert_eq!(action(program, &udp(OTHER)), TC_ACT_UNSPEC, "{mode:?}");
        }
        // A test run's packet comes from the loopback interface.
        for counted in Verdict::COUNTED {
            let key = CounterKey::new(1, Hook::FromPod, counted);
            let counters: Vec<Counter> = object.per_cpu(MAP_COUNTERS, &key);
            let sum = counters.iter().fold((0, 0), |sum, cpu| (sum.0 + cpu.packets, sum.1 + cpu.bytes));
            let expected = if counted == verdict { (3, 3 * packet.len() as u64) } else { (0, 0) };
            assert_eq!(sum, expected, "{mode:?}: {counted:?}");
        }
    }
}

/// Loads programs with these exemptions.
fn object_with(exemptions: &[(ExemptionKey, ExemptionRecord)], mode: Mode) -> Object {
    let mut object = object(mode);
    object.set(MAP_POLICY, Policy { mode: mode as u32, ..Policy::default() });
    for (key, record) in exemptions {
        object.insert(MAP_EXEMPT, *key, *record);
    }
    let mut filter = PolicyFilter::new([(Address::from_ipv4(IMDS_IPV4), &IMDS)]);
    filter.set_subjects(exemptions.iter().map(|(exemption, _)| exemption.subject));
    object.set(SECTION_FILTER, filter);
    object
}

fn exemption(subject: Subject, address: Address, verdict: Verdict) -> (ExemptionKey, ExemptionRecord) {
    (ExemptionKey { address, subject }, ExemptionRecord::new(verdict, 1))
}

#[test]
fn exempt_sender_passes_to_its_endpoints() {
    const HERE: Address = Address::from_ipv4(IMDS_IPV4);
    const ELSEWHERE: Address = Address::from_ipv4(OTHER);
    // A test run's packet comes from the loopback interface.
    let sender = Subject::new(SubjectKind::Interface, 1);
    let [neighbour, namesake] =
        [(SubjectKind::Interface, 2), (SubjectKind::Netns, 1)].map(|(kind, id)| Subject::new(kind, id));
    for (exemption, mode, verdict) in [
        (exemption(sender, HERE, Verdict::Exempt), Mode::Enforce, Verdict::Exempt),
        (exemption(sender, Address::ANY, Verdict::Exempt), Mode::Enforce, Verdict::Exempt),
        (exemption(sender, HERE, Verdict::Audited), Mode::Enforce, Verdict::Audited),
        (exemption(sender, HERE, Verdict::Exempt), Mode::Audit, Verdict::Exempt),
        (exemption(sender, HERE, Verdict::Exempt), Mode::Off, Verdict::Off),
        (exemption(sender, ELSEWHERE, Verdict::Exempt), Mode::Enforce, Verdict::Denied),
        (exemption(neighbour, HERE, Verdict::Exempt), Mode::Enforce, Verdict::Denied),
        (exemption(namesake, Address::ANY, Verdict::Exempt), Mode::Enforce, Verdict::Denied),
        // A verdict that no agent writes.
        (exemption(sender, HERE, Verdict::Unrelated), Mode::Enforce, Verdict::Denied),
    ] {
        let object = object_with(&[exemption], mode);
        let expected = if verdict == Verdict::Denied { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
        for mark in [u32::MAX, 1] {
            let run = marked(object.program(PROG_FROM_POD), &udp(IMDS_IPV4), mark, 0);
            assert_eq!(run, Some((expected, mark)), "{exemption:?} in {mode:?}");
        }
        let key = CounterKey::new(1, Hook::FromPod, verdict);
        let counters: Vec<Counter> = object.per_cpu(MAP_COUNTERS, &key);
        assert_eq!(counters.iter().map(|cpu| cpu.packets).sum::<u64>(), 2, "{exemption:?} in {mode:?}");
    }
}

#[test]
fn bridge_probe_exempts_no_pod() {
    let mut object = object_with(&[], Mode::Enforce);
    object.set(MAP_PROBING, 1_u32);
    let subject = Subject::new(SubjectKind::Interface, 1);
    for (flags, expected) in
        [(ProbeRecord::EXEMPT, TC_ACT_UNSPEC), (ProbeRecord::EXEMPT | ProbeRecord::BRIDGE, TC_ACT_SHOT)]
    {
        object.insert(MAP_PROBES, subject, ProbeRecord { flags, ..ProbeRecord::default() });
        assert_eq!(action(object.program(PROG_FROM_POD), &udp(IMDS_IPV4)), expected);
    }
}

#[test]
fn node_egress_by_interface_and_source() {
    let [pod, (bridge, record)] = [7, 9].map(|ifindex| {
        exemption(Subject::new(SubjectKind::Interface, ifindex), Address::ANY, Verdict::Exempt)
    });
    let bridge = (bridge, ExemptionRecord { flags: ExemptionRecord::BRIDGE, ..record });
    let mut object = object_with(&[pod, bridge], Mode::Enforce);
    let record = InterfaceRecord {
        role: Role::Pod as u8,
        attach_modes: [AttachMode::Tcx as u8; 2],
        ..InterfaceRecord::default()
    };
    object.insert(MAP_INTERFACES, 7_u32, record);
    let (with_from_pod, alone) = (Hook::FromPod.bit() | Hook::NodeEgress.bit(), Hook::NodeEgress.bit());
    let check = |object: &mut Object, hooks, ingress, expected| {
        const MARK: u32 = 0x1000;
        object.set(MAP_POLICY, Policy { hooks, ..Policy::default() });
        let program = object.program(PROG_NODE_EGRESS);
        let Some(run) = marked(program, &udp(IMDS_IPV4), MARK, ingress) else {
            skip(WHOLE_TEST, "no test run with an ingress interface on this kernel");
            return false;
        };
        assert_eq!(run, (expected, MARK), "hooks {hooks:#x}, ingress {ingress}");
        assert_eq!(marked(program, &udp(OTHER), MARK, ingress), Some((TC_ACT_UNSPEC, MARK)));
        true
    };
    // The record alone does not show that `from_pod` still runs on the interface.
    if !check(&mut object, with_from_pod, 7, TC_ACT_SHOT) {
        return;
    }
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap();
    object.insert(MAP_EXEMPT_USE, 7_u32, u64::try_from(Duration::from(now).as_nanos()).unwrap());
    // The pod forwards a packet for another sender, another interface, a bridge, and without `from_pod` an address of another pod.
    for (hooks, ingress) in [(with_from_pod, 7), (with_from_pod, 8), (with_from_pod, 9), (alone, 7)] {
        assert!(check(&mut object, hooks, ingress, TC_ACT_SHOT));
    }
    let address = Address::from_ipv4(POD);
    let add_source = |object: &mut Object, ifindex| {
        let subject = Subject::new(SubjectKind::Interface, ifindex);
        object.insert(MAP_EXEMPT_SOURCES, ExemptionKey { address, subject }, 1_u32);
    };
    // The node's address, which source NAT has set.
    add_source(&mut object, 0);
    assert!(check(&mut object, with_from_pod, 7, TC_ACT_UNSPEC));
    add_source(&mut object, 7);
    add_source(&mut object, 9);
    assert!(check(&mut object, alone, 7, TC_ACT_UNSPEC));
    // A packet from a bridge needs the hash of passed packets, too, which a test run can't set.
    assert!(check(&mut object, with_from_pod, 9, TC_ACT_SHOT));
}

#[test]
fn missing_or_unknown_policy_denies() {
    let never_written = unwritten_object();
    assert_eq!(action(never_written.program(PROG_FROM_POD), &udp(IMDS_IPV4)), TC_ACT_SHOT);
    let mut unknown = unwritten_object();
    unknown.set(MAP_POLICY, Policy { mode: 77, ..Policy::default() });
    assert_eq!(action(unknown.program(PROG_FROM_POD), &udp(IMDS_IPV4)), TC_ACT_SHOT);
}

#[test]
fn unwritten_and_full_bloom_filter() {
    let mut object = Object::load(OBJECT);
    let full = PolicyFilter { addresses: [0xff; 8192], subjects: [0xff; 2048], ..PolicyFilter::EMPTY };
    object.set(SECTION_FILTER, full);
    assert_eq!(action(object.program(PROG_FROM_POD), &udp(OTHER)), TC_ACT_UNSPEC);
    // The filter makes endpoints effective. The map of endpoints is for display only.
    object.insert(MAP_ENDPOINTS, Address::from_ipv4(IMDS_IPV4), IMDS);
    assert_eq!(action(object.program(PROG_FROM_POD), &udp(IMDS_IPV4)), TC_ACT_UNSPEC);
    let with_endpoint = PolicyFilter::new([(Address::from_ipv4(IMDS_IPV4), &IMDS)]);
    object.set(
        SECTION_FILTER,
        PolicyFilter { addresses: full.addresses, subjects: full.subjects, ..with_endpoint },
    );
    assert_eq!(action(object.program(PROG_FROM_POD), &udp(IMDS_IPV4)), TC_ACT_SHOT);
    assert_eq!(action(object.program(PROG_FROM_POD), &udp(OTHER)), TC_ACT_UNSPEC);
}

#[test]
fn object_has_the_expected_names() {
    let object = Object::load(OBJECT);
    let sorted = |names: &[&str]| {
        let mut names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        names.sort();
        names
    };
    let programs: Vec<_> = programs().collect();
    assert_eq!(object.program_names(), sorted(&programs));
    assert_eq!(object.map_names(), sorted(&MAPS.map(in_object)));
    for name in programs.into_iter().chain(MAPS) {
        assert!(name.len() < 16, "the kernel truncates {name}");
    }
}
