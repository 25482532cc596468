//! Failures of the datapath.

use std::{io, path::PathBuf};

use aya::maps::MapError;
use thiserror::Error;

use super::{attach::obstacle::ObstacleError, object::ObjectError, pin::dir::PinError};
use crate::node::netlink::NetlinkError;

/// Failure of a kernel operation.
#[derive(Debug, Error)]
pub enum DatapathError {
    /// The BPF object, a program or a map failed.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// An operation on the pin directory failed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A request to rtnetlink failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A call on a TCX or netkit link failed.
    #[error("failed to {operation} {mode} link of interface {ifindex}")]
    Link {
        /// Operation, for the message: a verb and an article.
        operation: &'static str,
        /// Name of the attach mode.
        mode: &'static str,
        /// Index of the interface.
        ifindex: u32,
        /// Error of the kernel.
        source: io::Error,
    },
    /// An obstacle that no retry removes.
    #[error(transparent)]
    Obstacle(#[from] ObstacleError),
    /// The pins belong to another network namespace.
    #[error("{} belongs to another network namespace ({netns}); use another --pin-dir, or run this command in that namespace with `nsenter --net=`", path.display())]
    WrongNetns {
        /// Path of the pin directory.
        path: PathBuf,
        /// Inode number of the namespace, as in `lsns -t net`.
        netns: u32,
    },
    /// Reading or writing a map failed.
    #[error("failed to read or write map {map}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// Error of the kernel.
        source: MapError,
    },
}

impl DatapathError {
    /// Reports whether the interface was deleted concurrently, which is not a failure.
    pub fn is_interface_deleted(&self) -> bool {
        self.errno() == Some(libc::ENODEV)
    }

    /// Returns the kernel's error number of a call on an interface.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink(error) => error.errno(),
            Self::Link { source, .. } => source.raw_os_error(),
            Self::Object(_)
            | Self::Pin(_)
            | Self::Obstacle(_)
            | Self::WrongNetns { .. }
            | Self::Map { .. } => None,
        }
    }
}

/// Adds the name of the map to the error of an operation on it.
pub(crate) fn map_error(map: &'static str) -> impl Fn(MapError) -> DatapathError + Copy {
    move |source| DatapathError::Map { map, source }
}
