//! Every known attack vector. Each one is open without the agent, denied by each listed hook alone, denied by all hooks
//! together, and open again after `unload` (`AttackVectors::assert_blocked_all`). Vectors that are known to be open are
//! ignored tests with the reason: `cargo test --test bypass -- --ignored` lists them. Tests of device types that a
//! kernel lacks are skipped with a notice.
//!
//! | | vector | tests, here or in the named file |
//! | --- | --- | --- |
//! | 1 | TCP to any port | `calls::tcp_and_udp_every_call` |
//! | 2 | UDP with any call | `calls::tcp_and_udp_every_call` |
//! | 3 | ICMP and any other protocol | `raw::any_protocol_from_raw_socket`, `crafted::every_ip_packet_form_is_denied` |
//! | 4 | crafted frames, spoofed sources | `crafted::spoofed_source_is_denied`, `raw` |
//! | 5 | IPv4 addresses at IPv6 sockets | `calls::tcp_and_udp_every_call` |
//! | 6 | TCP Fast Open, MPTCP, `io_uring` | `calls::tcp_fast_open_mptcp_and_io_uring` |
//! | 7 | IPv6 endpoints, extension headers | `ipv6`, `ipv6_fragments` |
//! | 8 | IPv4 options, source routes, fragments | `crafted`, `source_route`, `fragments` |
//! | 9 | VLAN tags and devices | `crafted::priority_tags_are_denied`, `crafted::vlan_through_bridge_is_denied`, `vlans` |
//! | 10 | Services and DNAT | `services` |
//! | 11 | tunnels that end on the node | `tunnels` |
//! | 12 | macvlan, ipvlan, netkit | `links` |
//! | 13 | NAT64 and 6to4 | `ipv6::addresses_that_embed_the_endpoint`, `translated` |
//! | 14 | a network namespace within a pod | `links::netns_within…`, `links::macvlan_within_a_pod` |
//! | 15 | a pod's first packet while no agent runs | `reuse::successor_is_denied_from_first_packet`, `hooks.rs`, `restart.rs` |
//! | 16 | interfaces that are renamed, moved or recreated | `reuse` |
//! | 17 | a pod that reuses the identity of another one | `reuse` |
//! | 18 | a flood while programs are replaced | `restart.rs` |
//! | 19 | removal of programs, links and pins | `restore.rs` |
//! | 20 | programs of other software | `coexist.rs` |
//! | 21 | a metadata service on the node | `on_node` |
//! | 22 | super-packets, jumbo frames | `gso`, `crafted::fragmented_jumbo_frame_is_denied` |
//! | 23 | an ifb in the pod | `links::ifb_in_the_pod`, `on_node::a_metadata_service_on_the_node_by_an_ifb` |
//! | 25 | rules that write marks, programs that write the hash | `limits::rules_that_write_marks_change_nothing`, `limits::hash_of_passed_packets_exempts_no_pod` |
//! | 28 | connections that are open before the agent starts | `limits::response_to_an_earlier_request`, `limits::earlier_connection_…` |
//! | 29 | ARP and MAC spoofing | `limits::spoofing_…` |
//! | 30 | reflected requests | `limits::reflected_requests_return_no_response` |
//! | | all vectors of one pod, all hooks on | `together` |
//! | | traffic that must keep working | `harmless` |

mod calls;
mod crafted;
mod fragments;
mod gso;
mod harmless;
mod ipv6;
mod ipv6_fragments;
mod limits;
mod links;
mod on_node;
mod raw;
mod reuse;
mod services;
mod source_route;
mod together;
mod translated;
mod tunnels;
mod vlans;

/// Hooks that see every call of a pod's socket.
const ALL: [&str; 3] = ["from_pod", "node_egress", "socket"];
/// TC hooks, which see packets.
const TC_HOOKS: [&str; 2] = ["from_pod", "node_egress"];
/// Configuration with endpoints of both address families.
const AWS: &str = "provider = 'aws'";
