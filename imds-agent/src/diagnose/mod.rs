//! Commands that examine a node: requirements, foreign programs and rules, and a proof that enforcement works.

mod devices;
pub mod doctor;
pub(crate) mod preflight;
pub(crate) mod verify;
