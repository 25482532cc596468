//! `imds-agent top`: a live view of the verdicts per second of each interface and hook, and of the latest events.

mod model;
mod view;

pub(crate) use self::{
    model::{Command, Model},
    view::draw,
};
