//! All hooks on, as without a configuration: all attack vectors of one pod, one after another.

use imds_tests::{PodLink, World, known_here};

use crate::{ALL, AWS, calls, ipv6, raw};

#[test]
fn all_vectors_are_denied_with_all_hooks() {
    let world = World::new().with_ipv6();
    let pod = world.add_pod(PodLink::Routed);
    let address = world.add_pod_ipv6(&pod);
    let ways = world.ways(&[]).config(AWS);
    let ways = calls::plain(ways, &pod);
    let ways = calls::uncommon(ways, &pod);
    let ways = raw::ways(ways, &pod);
    let ways = ipv6::packets_to_endpoint(ways, &pod, address);
    let before = world.arrivals();
    assert_eq!(ways.open_with(&known_here(&ALL)), Vec::<&str>::new());
    assert_eq!(world.arrivals(), before);
    ways.assert_held();
}
