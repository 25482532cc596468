//! The program `imds-broker` with listeners in network namespaces and simulators of metadata services.

mod harness;
mod lifecycle;
mod limits;
mod requests;
mod routing;
mod sandbox;
mod simulator;
mod smuggling;

use imds_tests::routing::LOCATION;

/// Rules of most tests.
const ALLOW: [&str; 2] =
    ["GET /metadata/instance/compute/location", "HEAD /metadata/instance/compute/location"];
