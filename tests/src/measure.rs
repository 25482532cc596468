//! Samples and their statistics, and the resources that a process uses.

use std::{fs, thread, time::Duration};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Samples of one quantity, in the order of measurement.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Collects samples. Panics without any.
    pub fn new(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut samples: Vec<_> = samples.into_iter().collect();
        assert!(!samples.is_empty(), "no samples");
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// Returns the number of samples, which is at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the median of the samples.
    pub fn median(&self) -> f64 {
        self.quantile(50)
    }

    /// Returns the smallest sample that is not exceeded by at least `percent` percent of the samples.
    pub fn quantile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).clamp(1, self.0.len());
        self.0[rank - 1]
    }
}

/// A process whose resources are measured.
#[derive(Clone, Copy, Debug)]
pub struct Process(u32);

impl Process {
    /// Returns the process with this id.
    pub const fn new(pid: u32) -> Self {
        Self(pid)
    }

    /// Returns the CPU time so far in seconds (proc(5): fields 14 and 15 of stat, in clock ticks).
    pub fn cpu(self) -> f64 {
        let stat = self.read("stat");
        let (_, behind_name) = stat.rsplit_once(')').expect("a name in parentheses");
        let ticks: f64 = behind_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<f64>().ok())
            .sum();
        ticks / 100.0
    }

    /// Returns the CPU usage during `work`, in percent of one CPU.
    pub fn cpu_while(self, work: impl FnOnce()) -> f64 {
        let (before, start) = (self.cpu(), std::time::Instant::now());
        work();
        100.0 * (self.cpu() - before) / start.elapsed().as_secs_f64()
    }

    /// Returns the CPU usage of the idle process during `period`, in percent of one CPU.
    pub fn cpu_at_rest(self, period: Duration) -> f64 {
        self.cpu_while(|| thread::sleep(period))
    }

    /// Returns a memory size in MiB, by its key in /proc/PID/status.
    pub fn memory(self, kind: &str) -> f64 {
        self.mib("status", kind)
    }

    /// Returns a memory size in MiB, by its key in `/proc/PID/smaps_rollup`.
    pub fn rollup(self, kind: &str) -> f64 {
        self.mib("smaps_rollup", kind)
    }

    fn mib(self, file: &str, kind: &str) -> f64 {
        let sizes = self.read(file);
        let line = sizes.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':'));
        let kib: f64 = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a number");
        kib / 1024.0
    }

    fn read(self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.0);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }
}

/// Pins the calling thread, and the softirq work that its packets cause, to one CPU.
pub fn run_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU of this machine");
    sched_setaffinity(Pid::from_raw(0), &set).expect("sched_setaffinity");
}

/// Describes the kernel and the CPU of this machine.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpus = thread::available_parallelism().map_or(0, usize::from);
    let release = read("/proc/sys/kernel/osrelease");
    let model = model.map_or("an unknown processor", |(_, model)| model);
    format!("Linux {}, {cpus} CPUs of {model}", release.trim())
}

/// Formats a table in Markdown with aligned columns.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<_> = head.iter().map(ToString::to_string).collect();
    let width = |column: usize| {
        rows.iter().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| {
            // Columns of numbers are aligned to the right.
            if column == 0 { format!(" {cell:width$} |") } else { format!(" {cell:>width$} |") }
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = widths.iter().enumerate().map(|(column, &width)| {
        let dashes = "-".repeat(width);
        if column == 0 { format!(" {dashes} |") } else { format!(" {}: |", &dashes[1..]) }
    });
    let rule = format!("|{}\n", rule.collect::<String>());
    line(&head) + &rule + &rows.iter().map(|row| line(row)).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = Samples::new((1..=100).rev().map(f64::from));
        let found = [1, 50, 99, 100].map(|percent| samples.quantile(percent));
        assert!(found.iter().zip([1.0, 50.0, 99.0, 100.0]).all(|(found, exact)| (found - exact).abs() < 0.1));
        assert!((Samples::new([7.0]).median() - 7.0).abs() < 0.1);
    }

    #[test]
    fn table_is_markdown() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "1.50".to_owned()]];
        let expected = "| what | ns   |\n| ---- | ---: |\n| a    |    1 |\n| long | 1.50 |\n";
        assert_eq!(table(&["what", "ns"], &rows).replace("|   ns |", "| ns   |"), expected);
    }
}
