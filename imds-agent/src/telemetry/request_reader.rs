//! Reads the log of requests for a command.

use aya::maps::MapError;

use super::{CollectorError, http_request::RequestEvent};
use crate::datapath::{
    maps::request_log::{RequestLog, RequestSource},
    pin::dir::PinDir,
};

/// Reader of recorded requests, with a position for each source.
pub(super) struct RequestReader {
    log: RequestLog,
    sources: [(RequestSource, u64); 2],
    /// Number of requests that were overwritten between the last two reads; `None` before the first.
    missed: Option<u64>,
}

impl RequestReader {
    /// Opens a reader that starts with the first unread request, or `earlier` requests before the last one. Returns `None` if no
    /// request was recorded yet.
    pub(super) fn open(pins: &PinDir, earlier: Option<u64>) -> Result<Option<Self>, CollectorError> {
        let Some(log) = RequestLog::open(pins)? else { return Ok(None) };
        let mut sources = RequestSource::ALL.map(|source| (source, 0));
        for (source, position) in &mut sources {
            *position = match earlier {
                Some(earlier) => log.last(*source)?.saturating_sub(earlier),
                None => log.last_printed(*source)?,
            };
        }
        Ok(Some(Self { log, sources, missed: None }))
    }

    /// Returns the requests since the last call. If `marks` is true, they count as read for later readers.
    pub(super) fn read(&mut self, marks: bool) -> Result<Vec<RequestEvent>, MapError> {
        let (mut all, mut missed) = (Vec::new(), 0_u64);
        for (source, position) in &mut self.sources {
            let (records, last) = self.log.since(*source, *position)?;
            let unread = last.saturating_sub(*position);
            missed = missed.saturating_add(unread.saturating_sub(records.len() as u64));
            *position = last;
            if marks {
                self.log.set_last_printed(*source, last)?;
            }
            all.extend(records.iter().filter_map(RequestEvent::from_record));
        }
        // Requests that were overwritten before this reader started do not count as missed.
        self.missed = Some(self.missed.map_or(0, |_| missed));
        Ok(all)
    }

    /// Returns the number of requests that were overwritten before the last [`RequestReader::read`] could return them.
    pub(super) fn missed(&self) -> u64 {
        self.missed.unwrap_or_default()
    }
}
