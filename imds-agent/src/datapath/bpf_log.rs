//! Forwards log messages of the BPF programs to the agent's log.

use std::io;

use aya_log::EbpfLogger;
use log::Log;
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

/// Failure to read the log of the BPF programs. Enforcement does not depend on that log.
#[derive(Debug, Error)]
pub enum BpfLogError {
    /// The program does not exist, or has no log.
    #[error("failed to open the log of the BPF program {program}")]
    Open {
        /// Id of the program.
        program: u32,
        /// Error of aya-log.
        source: aya_log::Error,
    },
    /// The ring buffer of the log can't be polled.
    #[error("failed to poll the log of the BPF programs")]
    Wait(#[from] io::Error),
}

/// Log of the BPF programs, which share one ring buffer.
pub struct BpfLog {
    logger: AsyncFd<EbpfLogger<&'static dyn Log>>,
}

impl BpfLog {
    /// Opens the log of a program. Each message reaches only one reader.
    pub fn open(program: u32) -> Result<Self, BpfLogError> {
        let logger =
            EbpfLogger::init_from_id(program).map_err(|source| BpfLogError::Open { program, source })?;
        // SAFETY: the descriptor is the ring buffer's, which the logger owns and never replaces.
        let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let logger = logger.map_err(io::Error::from)?;
        Ok(Self { logger })
    }

    /// Forwards messages until polling fails, and returns the error.
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
