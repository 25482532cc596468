//! What the programs log of themselves, in the agent's log.

use std::io;

use aya_log::EbpfLogger;
use log::Log;
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

/// Why the programs' log can't be read. Guarding does not depend on it.
#[derive(Debug, Error)]
pub enum DiagnosticsError {
    /// There is no such program, or it has no log.
    #[error("can't find the log of the BPF program {program}")]
    Open {
        /// Id of the program.
        program: u32,
        /// What aya said.
        source: aya_log::Error,
    },
    /// The log can't be waited for.
    #[error("can't wait for the log of the BPF programs")]
    Wait(#[from] io::Error),
}

/// The log of the programs, which all of them share.
pub struct Diagnostics {
    logger: AsyncFd<EbpfLogger<&'static dyn Log>>,
}

impl Diagnostics {
    /// Opens the log of a program. One reader takes what another then misses.
    pub fn open(program: u32) -> Result<Self, DiagnosticsError> {
        let logger =
            EbpfLogger::init_from_id(program).map_err(|source| DiagnosticsError::Open { program, source })?;
        // SAFETY: the descriptor is the ring buffer's, which the logger owns and never replaces.
        let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let logger = logger.map_err(io::Error::from)?;
        Ok(Self { logger })
    }

    /// Passes on what is logged, until waiting for it fails.
    pub async fn follow(mut self) -> io::Error {
        loop {
            match self.logger.readable_mut().await {
                Ok(mut ready) => {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
                Err(error) => return error,
            }
        }
    }
}
