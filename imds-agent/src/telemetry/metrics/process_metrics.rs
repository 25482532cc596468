//! Metrics of the agent's process, with the names that the client libraries of Prometheus use.

use std::{fs, io};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};

use super::format::Exposition;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Process {
    cpu_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
    start_seconds: f64,
}

/// Adds the metrics of this process. Leaves out those that can't be read.
pub(crate) fn add(to: &mut Exposition) {
    match read() {
        Ok(Process { cpu_seconds, virtual_bytes, resident_bytes, start_seconds }) => {
            to.counter("process_cpu_seconds", "User and system CPU time spent in seconds", cpu_seconds);
            to.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes", virtual_bytes);
            to.gauge("process_resident_memory_bytes", "Resident memory size in bytes", resident_bytes);
            let help = "Start time of the process since the Unix epoch in seconds";
            to.gauge("process_start_time_seconds", help, start_seconds);
        }
        Err(error) => log::debug!("failed to read the resources of the process: {error}"),
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        // Reading the directory opens one descriptor itself.
        let open = descriptors.count().saturating_sub(1);
        to.gauge("process_open_fds", "Number of open file descriptors", open);
    }
    if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        to.gauge("process_max_fds", "Maximum number of open file descriptors", limit);
    }
}

fn read() -> io::Result<Process> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let boot = fs::read_to_string("/proc/stat")?;
    let value = |name| sysconf(name).ok().flatten().and_then(|value| u32::try_from(value).ok());
    let ticks = value(SysconfVar::CLK_TCK).unwrap_or(100);
    let page = value(SysconfVar::PAGE_SIZE).unwrap_or(4096);
    parse(&stat, &boot, ticks, page).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Parses /proc/PID/stat and the boot time in /proc/stat (`proc_pid_stat(5)`, `proc_stat(5)`).
fn parse(stat: &str, boot: &str, ticks: u32, page: u32) -> Option<Process> {
    // The name, which is the second field and in parentheses, can contain any character.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // The remaining fields start with number 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<u32>().ok()?;
    let seconds = |in_ticks: u64| as_float(in_ticks) / f64::from(ticks);
    Some(Process {
        cpu_seconds: seconds(field(14)?.checked_add(field(15)?)?),
        virtual_bytes: field(23)?,
        resident_bytes: field(24)?.checked_mul(page.into())?,
        start_seconds: f64::from(boot) + seconds(field(22)?),
    })
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 clock ticks, which is millions of years")]
fn as_float(ticks: u64) -> f64 {
    ticks as f64
}

#[cfg(test)]
mod tests {
    use super::{super::Format, *};

    #[test]
    fn proc_stat_line() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 250 8192 3 4\n";
        let expected = Process {
            cpu_seconds: 2.0,
            virtual_bytes: 8192,
            resident_bytes: 3 * 4096,
            start_seconds: 1002.5,
        };
        assert_eq!(parse(stat, "cpu 1 2\nbtime 1000\n", 100, 4096), Some(expected));
        for broken in ["", "7 (a", "7 (a) S", "7 (a) S 1 x"] {
            assert_eq!(parse(broken, "btime 1000", 100, 4096), None, "{broken}");
        }
        assert_eq!(parse(stat, "cpu 1 2\n", 100, 4096), None);
    }

    #[test]
    fn own_process_has_all_metrics() {
        let mut exposition = Exposition::new(Format::Text);
        add(&mut exposition);
        assert_eq!(exposition.finish().matches("# TYPE ").count(), 6);
    }
}
