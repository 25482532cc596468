//! A live view of pods, verdicts per second, and what was denied last.

mod model;
mod view;

pub use self::{
    model::{Command, Model, Sort},
    view::draw,
};
