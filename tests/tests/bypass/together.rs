//! All hooks on, as without a configuration: all attack vectors of one pod, one after another.

use imds_tests::{PodLink, TestEnv, known_here};

use crate::{ALL, AWS, calls, ipv6, raw};

#[test]
fn all_vectors_are_denied_with_all_hooks() {
    let env = TestEnv::new().with_ipv6();
    let pod = env.add_pod(PodLink::Routed);
    let address = env.add_pod_ipv6(&pod);
    let vectors = env.vectors(&[]).config(AWS);
    let vectors = calls::plain(vectors, &pod);
    let vectors = calls::uncommon(vectors, &pod);
    let vectors = raw::vectors(vectors, &pod);
    let vectors = ipv6::packets_to_endpoint(vectors, &pod, address);
    let before = env.received_packets();
    assert_eq!(vectors.open_with(&known_here(&ALL)), Vec::<&str>::new());
    assert_eq!(env.received_packets(), before);
    vectors.assert_blocked_all();
}
