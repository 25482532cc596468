//! Compares the kernel's verdict with the host's for the same packets: well-formed, modified, truncated, tagged, IPv4
//! and IPv6.
//!
//! A run prints its seed; `IMDS_SEED=… cargo xtask test kernel_and_host` repeats it.

use std::{
    cell::Cell,
    env,
    time::{SystemTime, UNIX_EPOCH},
};

use imds_agent::datapath::object::OBJECT;
use imds_ebpf_common::{
    Address, Counter, CounterKey, Endpoint, ExemptionKey, ExemptionRecord, Hook, IMDS_IPV4, InMemoryPolicy,
    LinkLayer, Mode, NoHeader, Packet, Policy, PolicyFilter, Service, Subject, SubjectKind, Verdict,
    apply_exemption,
    endpoint::{TCP, UDP},
    find_header, is_vlan, lookup_endpoint,
    names::{
        MAP_COUNTERS, MAP_ENDPOINTS, MAP_EXEMPT, MAP_POLICY, PROG_FROM_POD, PROG_FROM_POD_L3, SECTION_FILTER,
    },
    packet::MAX_VLAN_TAGS,
};
use imds_tests::{
    program::{Object, try_action},
    scaled,
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

const PACKETS: u32 = 110_000;
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;

const IMDS_IPV6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];
/// These endpoints allow udp/53 and tcp/53.
const RESOLVER_IPV4: [u8; 4] = [168, 63, 129, 16];
const RESOLVER_IPV6: [u8; 16] = [0xfd, 0x20, 0, 0xce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];

fn endpoints() -> Vec<(Address, Endpoint)> {
    let mut dns = [Service::NONE; 8];
    (dns[0], dns[7]) = (Service::new(UDP, 53), Service::new(TCP, 53));
    let endpoint = |id, allowed_ports| Endpoint { name: [0; 16], id, allow_ports: allowed_ports };
    vec![
        (Address::from_ipv4(IMDS_IPV4), endpoint(1, [Service::NONE; 8])),
        (Address::from_ipv6(IMDS_IPV6), endpoint(2, [Service::NONE; 8])),
        (Address::from_ipv4(RESOLVER_IPV4), endpoint(3, dns)),
        (Address::from_ipv6(RESOLVER_IPV6), endpoint(4, dns)),
    ]
}

fn ipv4_address() -> impl Strategy<Value = [u8; 4]> + Clone {
    prop_oneof![
        3 => Just(IMDS_IPV4),
        5 => Just(RESOLVER_IPV4),
        1 => Just([169, 254, 169, 253]),
        1 => any::<[u8; 4]>(),
    ]
}

fn ipv6_address() -> impl Strategy<Value = [u8; 16]> {
    let embedded = (ipv4_address(), 0..5_usize, any::<[u8; 16]>()).prop_map(|(ipv4, form, noise)| {
        let mut address = [0; 16];
        address[12..].copy_from_slice(&ipv4);
        match form {
            0 => address[10..12].copy_from_slice(&[0xff; 2]),
            1 => address[..4].copy_from_slice(&[0, 0x64, 0xff, 0x9b]),
            2 => {
                address = noise;
                address[..2].copy_from_slice(&[0x20, 0x02]);
                address[2..6].copy_from_slice(&ipv4);
            }
            3 => {}
            // An address close to an endpoint's.
            _ => {
                address[..4].copy_from_slice(&[0, 0x64, 0xff, 0x9b]);
                address[usize::from(noise[0] % 12)] ^= noise[1];
            }
        }
        address
    });
    prop_oneof![
        2 => Just(IMDS_IPV6),
        4 => Just(RESOLVER_IPV6),
        3 => embedded,
        1 => any::<[u8; 16]>(),
    ]
}

/// Generates the part after an IP header, mostly DNS.
fn transport() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let protocol = prop_oneof![3 => Just(UDP), 3 => Just(TCP), 1 => any::<u8>()];
    let port = prop_oneof![3 => Just(53_u16), 1 => Just(80_u16), 1 => any::<u16>()];
    (protocol, any::<u16>(), port, vec(any::<u8>(), 0..40)).prop_map(|(protocol, source, port, rest)| {
        (protocol, [&source.to_be_bytes()[..], &port.to_be_bytes(), &rest].concat())
    })
}

fn ipv4() -> impl Strategy<Value = Vec<u8>> {
    let version_ihl = prop_oneof![6 => 0x45..=0x4f_u8, 1 => any::<u8>()];
    let fragment = prop_oneof![4 => Just(0x4000_u16), 1 => Just(0x2000_u16), 1 => any::<u16>()];
    (version_ihl, fragment, ipv4_address(), transport()).prop_map(
        |(version_ihl, fragment, address, transport)| {
            let (protocol, payload) = transport;
            let mut packet = vec![version_ihl, 0, 0, 60, 0, 7];
            packet.extend(fragment.to_be_bytes());
            packet.extend([64, protocol, 0, 0, 10, 244, 0, 7]);
            packet.extend(address);
            packet.resize((usize::from(version_ihl & 0xf) * 4).max(20), 1);
            packet.extend(payload);
            packet
        },
    )
}

fn ipv6() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![6 => select(vec![0_u8, 60, 44]), 1 => select(vec![43, 51, 135, 50, 59])];
    let fragment = prop_oneof![3 => 0..8_u16, 1 => any::<u16>()];
    let extensions = prop_oneof![
        2 => Just(Vec::new()),
        3 => vec((kind, 0..3_u8, fragment), 1..6),
        1 => vec((Just(60), any::<u8>(), Just(0)), 1..5),
    ];
    (ipv6_address(), extensions, transport()).prop_map(|(address, extensions, (protocol, payload))| {
        let kinds: Vec<u8> = extensions.iter().map(|&(kind, ..)| kind).chain([protocol]).collect();
        let mut packet = vec![0x60, 0, 0, 0, 0, 60, kinds[0], 64];
        packet.extend([0xfd; 16]);
        packet.extend(address);
        for (&(kind, length, fragment), next) in extensions.iter().zip(&kinds[1..]) {
            let length = if kind == 44 { 0 } else { length };
            packet.extend([*next, length]);
            packet.extend(fragment.to_be_bytes());
            packet.extend(vec![0; 4 + usize::from(length) * 8]);
        }
        packet.extend(payload);
        packet
    })
}

/// Generates frames, some of them modified or truncated.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let ip = prop_oneof![ipv4().prop_map(|ip| (0x0800_u16, ip)), ipv6().prop_map(|ip| (0x86dd_u16, ip))];
    let tag = (select(vec![0x8100_u16, 0x88a8, 0x9100, 0x9200, 0x9300]), any::<u16>());
    let tags = prop_oneof![3 => Just(Vec::new()), 1 => vec(tag, 0..=MAX_VLAN_TAGS + 1)];
    let changes = prop_oneof![2 => Just(Vec::new()), 1 => vec((any::<Index>(), any::<u8>()), 1..4)];
    let cut = prop_oneof![3 => Just(None), 1 => any::<Index>().prop_map(Some)];
    (ip, tags, changes, cut).prop_map(|((ether_type, ip), tags, changes, cut)| {
        let mut frame = vec![2; 12];
        for (tpid, tci) in tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(ether_type.to_be_bytes());
        frame.extend(ip);
        for (place, value) in changes {
            let place = place.index(frame.len());
            frame[place] = value;
        }
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len() + 1));
        }
        frame
    })
}

/// Packet of a test run on the receiving side of an interface. A test run sets `skb->protocol` from the place of the EtherType of
/// an Ethernet frame (`eth_type_trans`), also for a program that expects no link-layer header.
struct ReceivedPacket<'a>(&'a [u8]);

impl Packet for ReceivedPacket<'_> {
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(offset)
    }

    fn ether_type(&self, link_layer: LinkLayer) -> Option<u16> {
        let protocol = self.0.ether_type(LinkLayer::Ethernet)?;
        match link_layer {
            LinkLayer::None if !is_vlan(protocol) => self.0.ether_type(link_layer),
            LinkLayer::Ethernet | LinkLayer::None => Some(protocol),
        }
    }
}

/// Sender of a test run's packet: the loopback interface.
const SENDER: Subject = Subject::new(SubjectKind::Interface, 1);

/// Exempts the sender from one endpoint and audits it at another one.
fn exemptions() -> [(ExemptionKey, ExemptionRecord); 2] {
    let exemption =
        |address, verdict| (ExemptionKey { address, subject: SENDER }, ExemptionRecord::new(verdict, 1));
    [
        exemption(Address::from_ipv6(IMDS_IPV6), Verdict::Exempt),
        exemption(Address::from_ipv4(RESOLVER_IPV4), Verdict::Audited),
    ]
}

/// Returns the number of packets that the program counted so far, for each verdict.
fn counts(object: &Object) -> [u64; Verdict::COUNTED.len()] {
    // A test run's packet comes from the loopback interface.
    Verdict::COUNTED.map(|verdict| {
        let key = CounterKey::new(1, Hook::FromPod, verdict);
        object.per_cpu(MAP_COUNTERS, &key).iter().map(|counter: &Counter| counter.packets).sum()
    })
}

fn seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
    let fresh = now.as_secs() ^ u64::from(now.subsec_nanos()) << 32;
    let seed = env::var("IMDS_SEED").map_or(fresh, |seed| seed.parse().expect("a number"));
    println!("IMDS_SEED={seed}");
    seed
}

fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: scaled(PACKETS), failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

#[test]
fn kernel_and_host_agree_on_any_packet() {
    let endpoints = endpoints();
    let exemptions = exemptions();
    let mut filter = PolicyFilter::new(endpoints.iter().map(|(address, endpoint)| (*address, endpoint)));
    filter.set_subjects([SENDER]);
    let mut object = Object::load(OBJECT);
    object.set(MAP_POLICY, Policy { mode: Mode::Enforce as u32, ..Policy::default() });
    for (address, endpoint) in &endpoints {
        object.insert(MAP_ENDPOINTS, *address, *endpoint);
    }
    for (key, record) in exemptions {
        object.insert(MAP_EXEMPT, key, record);
    }
    object.set(SECTION_FILTER, filter);
    let tables = InMemoryPolicy {
        filter: &filter,
        endpoints: &endpoints,
        exemptions: &exemptions,
        mode: Mode::Enforce,
    };

    let compared = Cell::new(0);
    let expected_counts = Cell::new([0_u64; Verdict::COUNTED.len()]);
    let packet =
        prop_oneof![4 => frame(), 1 => frame().prop_map(|frame| frame[14.min(frame.len())..].to_vec())];
    let result = runner(seed()).run(&packet, |packet| {
        for (name, frame) in [(PROG_FROM_POD, LinkLayer::Ethernet), (PROG_FROM_POD_L3, LinkLayer::None)] {
            let received = ReceivedPacket(&packet);
            let header = find_header(&received, frame);
            let verdict = match header {
                Ok(ip) => {
                    lookup_endpoint(&received, ip, &tables).map_or(Verdict::Unrelated, |endpoint_match| {
                        apply_exemption(endpoint_match.verdict, SENDER, &endpoint_match.destination, &tables)
                    })
                }
                Err(NoHeader::TooManyTags) => Verdict::Denied,
                Err(NoHeader::NotIp) => Verdict::Unrelated,
            };
            let expected = if verdict == Verdict::Denied { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
            if let Some(action) = try_action(object.program(name), &packet) {
                prop_assert_eq!(action, expected, "{}: {:?}", name, verdict);
                compared.set(compared.get() + 1);
                let mut counts = expected_counts.get();
                let counted = Verdict::COUNTED.iter().position(|&counted| counted == verdict);
                // The programs do not count frames with too many tags.
                if let (Ok(_), Some(place)) = (header, counted) {
                    counts[place] += 1;
                }
                expected_counts.set(counts);
            }
        }
        Ok(())
    });
    result.unwrap();
    // The counters also distinguish an allowed packet from an unrelated one.
    assert_eq!(counts(&object), expected_counts.get());
    let [denied, audited, allowed, kept, exempt, redirected] = expected_counts.get();
    println!(
        "{} comparisons: {denied} denied, {audited} audited, {kept} allowed, {exempt} exempt",
        compared.get()
    );
    assert!(
        compared.get() > scaled(PACKETS) && (allowed, redirected) == (0, 0),
        "{compared:?} {expected_counts:?}"
    );
    for (count, enough) in [(denied, 8_000), (audited, 5_000), (kept, 5_000), (exempt, 2_000)] {
        assert!(count > scaled(enough).into(), "{expected_counts:?}");
    }
}
