//! `imds-agent top`: a live view of pods, verdicts per second and the latest events.

mod model;
mod view;

pub use self::{
    model::{Command, Model, SortOrder},
    view::draw,
};
