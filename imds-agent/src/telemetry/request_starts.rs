//! Reads the starts of requests that the programs have seen, and records them.

use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{Array, Map, MapData, RingBuf};
use imds_broker::provider::AWS;
use imds_ebpf_common::{ProviderRecord, names::MAP_PROVIDER};
use jiff::Timestamp;

use super::{
    collector::CollectorError,
    http_request::RequestEvent,
    request_recorder::RequestRecorder,
    request_start::{decode, request_event},
};
use crate::{
    datapath::{maps::request_log::RequestSource, object, pin::dir::PinDir},
    encode::field_text,
    kube::pod_ref::PodRef,
    node::link::{self, VERIFY_PREFIX},
};

/// Reader of the ring buffer of starts. Only one process at a time may read it.
pub(super) struct RequestStarts {
    ring: RingBuf<MapData>,
    recorder: RequestRecorder,
    provider: Array<MapData, ProviderRecord>,
}

impl RequestStarts {
    pub(super) fn open(pins: &PinDir) -> Result<Self, CollectorError> {
        Ok(Self {
            ring: object::open_request_starts(pins)?,
            recorder: RequestRecorder::new(pins.clone(), RequestSource::Programs),
            provider: object::open_map(pins, MAP_PROVIDER, Map::Array)?,
        })
    }

    /// Records at most `limit` requests, and passes them to `consume`. Returns the number of requests that it read.
    pub(super) fn record(
        &mut self,
        booted: Timestamp,
        limit: u32,
        mut consume: impl FnMut(RequestEvent, Option<PodRef>),
    ) -> Result<u32, CollectorError> {
        let mut is_aws = None;
        for read in 0..limit {
            let Some(bytes) = self.ring.next() else { return Ok(read) };
            let start = decode(&bytes);
            drop(bytes);
            let Some(start) = start else { continue };
            let is_aws = match is_aws {
                Some(is_aws) => is_aws,
                None => *is_aws.insert(field_text(&self.provider.get(&0, 0)?.effective) == AWS),
            };
            let Some(event) = request_event(&start, booted, is_aws) else { continue };
            // `verify` sends these packets to test enforcement.
            if link::name_of(event.sender.ifindex).is_some_and(|name| name.starts_with(VERIFY_PREFIX)) {
                continue;
            }
            let pod = self.recorder.record(&event)?;
            consume(event, pod);
        }
        Ok(limit)
    }
}

impl RequestStarts {
    /// Moves the counts of senders whose pods became known to these pods.
    pub(super) fn merge_resolved(&mut self) -> Result<(), CollectorError> {
        self.recorder.merge_resolved()
    }
}

impl AsFd for RequestStarts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
