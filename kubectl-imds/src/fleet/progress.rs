//! Progress bar on standard error, if that is a terminal.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

const WIDTH: usize = 30;
const INTERVAL: Duration = Duration::from_millis(100);
/// Fewer nodes answer before a bar could be read.
const MIN_TOTAL: usize = 2;

/// A progress bar. Dropping it clears its line.
#[derive(Debug)]
pub(super) struct Progress {
    total: usize,
    done: usize,
    errors: usize,
    drawn: Option<Instant>,
    is_visible: bool,
}

impl Progress {
    pub(super) fn new(total: usize) -> Self {
        let is_visible = total >= MIN_TOTAL && io::stderr().is_terminal();
        let mut progress = Self { total, done: 0, errors: 0, drawn: None, is_visible };
        progress.draw();
        progress
    }

    pub(super) fn advance(&mut self, is_error: bool) {
        self.done += 1;
        self.errors += usize::from(is_error);
        self.draw();
    }

    fn draw(&mut self) {
        let is_due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= INTERVAL);
        if self.is_visible && is_due {
            self.drawn = Some(Instant::now());
            // A closed terminal shows no progress.
            let _ = write!(io::stderr(), "\r{}", self.line());
        }
    }

    fn line(&self) -> String {
        let filled = (self.done * WIDTH).checked_div(self.total).unwrap_or(WIDTH).min(WIDTH);
        let bar = format!("{}{}", "#".repeat(filled), "-".repeat(WIDTH - filled));
        let errors =
            if self.errors > 0 { format!(", {} without an answer", self.errors) } else { String::new() };
        format!("[{bar}] {}/{} nodes{errors}", self.done, self.total)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_visible {
            let _ = write!(io::stderr(), "\r{:width$}\r", "", width = self.line().len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_shows_the_share() {
        let progress = Progress { total: 5000, done: 2500, errors: 3, drawn: None, is_visible: false };
        let expected = format!("[{}{}] 2500/5000 nodes, 3 without an answer", "#".repeat(15), "-".repeat(15));
        assert_eq!(progress.line(), expected);
    }
}
