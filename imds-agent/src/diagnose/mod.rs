//! Commands that examine a node: requirements, foreign programs and rules, and a proof that enforcement works.

mod devices;
pub mod doctor;
pub mod preflight;
pub mod verify;
