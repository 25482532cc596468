//! Log of the agent on standard error.

mod line_format;
mod line_queue;

use std::{
    env,
    io::{self, Write as _},
    panic,
    sync::OnceLock,
    thread,
};

use log::{LevelFilter, Log, Metadata, Record};

pub(crate) use self::line_format::LogFormat;
use self::{line_format::LineFormat, line_queue::LineQueue};

/// Environment variable with log filters. [`LogOptions::level`] overrides it.
const FILTERS: &str = "RUST_LOG";
/// Prefix of the log targets of the agent and of the BPF programs.
const OWN: &str = "imds";
/// Libraries whose messages of level info do not concern operators.
const LIBRARIES: [&str; 12] = [
    "aya",
    "h2",
    "hyper",
    "kube",
    "mio",
    "netlink",
    "polling",
    "rtnetlink",
    "rustls",
    "tokio",
    "tower",
    "want",
];

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LogOptions {
    pub format: LogFormat,
    /// Lowest level to log. Overrides the filters of `RUST_LOG`.
    pub level: Option<LevelFilter>,
    /// Passes lines to a thread, so that the process never waits for the reader of its standard error.
    pub is_queued: bool,
}

struct Logger {
    filter: env_logger::Logger,
    format: LineFormat,
}

static QUEUE: OnceLock<(LineQueue, LineFormat)> = OnceLock::new();

pub(crate) fn init(options: LogOptions) -> io::Result<()> {
    let format = LineFormat::new(options.format);
    if options.is_queued {
        let (queue, _) = QUEUE.get_or_init(|| (LineQueue::default(), format));
        thread::Builder::new().name("imds-log".to_owned()).spawn(move || {
            let report = |count| {
                let message = format!("dropped {count} log lines: standard error was not read");
                format.line(log::Level::Warn, module_path!(), &message)
            };
            queue.write_all(report)
        })?;
        panic::set_hook(Box::new(|info| {
            log::error!("{info}");
            flush();
        }));
    }
    let filter = filter(options.level, env::var(FILTERS).ok().as_deref());
    let level = filter.filter();
    // If a logger is set already, it stays.
    if log::set_boxed_logger(Box::new(Logger { filter, format })).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

/// Returns the number of lines that were dropped because standard error was not read.
pub(crate) fn dropped() -> u64 {
    QUEUE.get().map_or(0, |(queue, _)| queue.dropped())
}

/// Waits until all lines are written, or until standard error accepts none.
pub(crate) fn flush() {
    if let Some((queue, _)) = QUEUE.get() {
        queue.flush();
    }
}

pub(crate) fn write_final_error(text: &str) {
    match QUEUE.get() {
        Some((queue, format)) => queue.push_last(format.final_error(text)),
        // A closed standard error must not cause a panic.
        None => {
            let _closed = writeln!(io::stderr(), "{}", crate::escape::escape_lines(text));
        }
    }
}

fn filter(level: Option<LevelFilter>, filters: Option<&str>) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    let quiet = level.unwrap_or(LevelFilter::Info).min(LevelFilter::Warn);
    for library in LIBRARIES {
        builder.filter_module(library, quiet);
    }
    // The agent reports the errors of this library itself.
    builder.filter_module("kube_client", LevelFilter::Off);
    match (level, filters.filter(|filters| !filters.is_empty())) {
        (Some(level), _) => builder.filter_level(quiet).filter_module(OWN, level),
        (None, Some(filters)) => builder.parse_filters(filters),
        (None, None) => builder.filter_level(LevelFilter::Info),
    };
    builder.build()
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let line = self.format.line(record.level(), record.target(), &record.args().to_string());
        match QUEUE.get() {
            Some((queue, _)) => queue.push(line),
            None => {
                let _closed = io::stderr().write_all(&line);
            }
        }
    }

    fn flush(&self) {
        flush();
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    fn logs(level: Option<LevelFilter>, filters: Option<&str>, target: &str, at: Level) -> bool {
        filter(level, filters).enabled(&Metadata::builder().target(target).level(at).build())
    }

    #[test]
    fn option_overrides_environment() {
        let own = "imds_agent::controller";
        assert!(logs(None, None, own, Level::Info) && !logs(None, None, own, Level::Debug));
        assert!(logs(None, Some("debug"), own, Level::Debug));
        assert!(logs(None, Some("imds_agent=debug"), own, Level::Debug));
        assert!(!logs(Some(LevelFilter::Warn), Some("debug"), own, Level::Info));
        assert!(logs(Some(LevelFilter::Trace), Some("error"), own, Level::Trace));
        assert!(logs(Some(LevelFilter::Debug), None, "imds_ebpf", Level::Debug));
    }

    #[test]
    fn libraries_are_quiet_unless_named() {
        for library in
            ["hyper_util::client", "kube_client::client", "rustls::conn", "tower::buffer", "aya_obj::btf"]
        {
            for (level, filters) in [(None, None), (None, Some("info")), (Some(LevelFilter::Trace), None)] {
                assert!(!logs(level, filters, library, Level::Info), "{library}");
            }
        }
        assert!(logs(None, Some("info,hyper=debug"), "hyper::proto", Level::Debug));
        assert!(logs(None, None, "rustls::conn", Level::Warn));
        assert!(!logs(Some(LevelFilter::Error), None, "rustls::conn", Level::Warn));
    }
}
