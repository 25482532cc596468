//! Memory that the process needs for large changes only, such as its start.
//!
//! The kernel maps the pages around each page of the binary that is used (`fault_around_bytes`, mm/memory.c). After loading the
//! programs and listing the pods, most of these pages count as resident memory, but are not used again.

use std::{fs, io, mem, ops::Range};

/// Decides when the running agent trims its memory: once after each large change, such as its start, a new list of all pods, or
/// lost link events.
///
/// Dropped pages cost page faults when they are used next, and reads from disk if the page cache has lost them: under memory
/// pressure the kernel keeps code longer while it is mapped (`folio_check_references`, mm/vmscan.c). An agent at rest keeps its
/// pages, so that attaching to a new pod does not wait for them.
#[derive(Debug)]
pub(crate) struct TrimSchedule {
    is_due: bool,
}

impl TrimSchedule {
    /// Returns the schedule of an agent that starts.
    pub(crate) fn new() -> Self {
        Self { is_due: true }
    }

    pub(crate) fn on_large_change(&mut self) {
        self.is_due = true;
    }

    /// Reports whether to trim after a full resync. `is_settled` is false while attachments of the start wait.
    pub(crate) fn take(&mut self, is_settled: bool) -> bool {
        is_settled && mem::take(&mut self.is_due)
    }
}

/// Part of the stack below the caller that stays mapped, for the calls that follow.
const STACK_MARGIN: usize = 64 << 10;

/// Returns free memory of the heap and of the stack to the kernel, and drops the mapped pages of code. The pages that are still used
/// come back from the page cache when they are needed.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
    match fs::read_to_string("/proc/self/maps") {
        Ok(maps) => {
            let local = 0_u8;
            let caller = (&raw const local).addr();
            let ranges = maps.lines().filter_map(|line| code(line).or_else(|| free_stack(line, caller)));
            ranges.for_each(drop_pages);
        }
        Err(error) => log::debug!("failed to read /proc/self/maps: {error}"),
    }
}

/// Drops the pages of `data`, which must be a constant of the binary. Reading it later loads them again.
pub(crate) fn drop_constant(data: &'static [u8]) {
    let Range { start, end } = data.as_ptr_range();
    drop_pages(start.addr()..end.addr());
}

/// Returns the address range of a line of `/proc/self/maps`, if it is code of a file.
fn code(line: &str) -> Option<Range<usize>> {
    let Mapping { range, flags, name } = Mapping::parse(line)?;
    (flags == "r-xp" && name.starts_with('/')).then_some(range)
}

/// Returns the unused part of the main thread's stack, if that is the line of `/proc/self/maps` and `caller` is an address in the used
/// part. The calls at the start go deeper than those of a running agent.
fn free_stack(line: &str, caller: usize) -> Option<Range<usize>> {
    let Mapping { range, name, .. } = Mapping::parse(line)?;
    (name == "[stack]" && range.contains(&caller)).then_some(range.start..caller.checked_sub(STACK_MARGIN)?)
}

/// Line of `/proc/self/maps` about a mapping with a name.
struct Mapping<'a> {
    range: Range<usize>,
    flags: &'a str,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (range, flags, name) = (fields.next()?, fields.next()?, fields.nth(3)?);
        let (start, end) = range.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        Some(Self { range: address(start)?..address(end)?, flags, name })
    }
}

/// Drops the whole pages in `range`, which must be constant data or code of a file, or unused stack.
fn drop_pages(range: Range<usize>) {
    // SAFETY: `sysconf` takes no pointers.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(1 << 16);
    let start = range.start.next_multiple_of(page);
    let length = (range.end / page * page).saturating_sub(start);
    if length == 0 {
        return;
    }
    // SAFETY: the process has never written to these private pages of a file, so that the kernel restores them from the file. Nothing
    // lives in the unused part of a stack.
    let failed =
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED) };
    if failed != 0 {
        log::debug!("failed to drop pages of the binary: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_dropped() {
        let line =
            "55e6481cd000-55e648845000 r-xp 00254000 fe:00 5390354                    /usr/bin/imds-agent";
        assert_eq!(code(line), Some(0x55e6_481c_d000..0x55e6_4884_5000));
        for other in [
            "55e648845000-55e648890000 r--p 008cb000 fe:00 5390354 /usr/bin/imds-agent",
            "55e648845000-55e648890000 rw-p 008cb000 fe:00 5390354 /usr/bin/imds-agent",
            "7ffed3099000-7ffed314b000 rw-p 00000000 00:00 0 [stack]",
            "7ffed31c8000-7ffed31ca000 r-xp 00000000 00:00 0 [vdso]",
            "7f61539b4000-7f6153a0d000 r-xp 00000000 00:00 0 ",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn only_the_unused_stack_is_dropped() {
        let line = "7ffed3099000-7ffed314b000 rw-p 00000000 00:00 0                          [stack]";
        let (start, end) = (0x7ffe_d309_9000, 0x7ffe_d314_b000);
        assert_eq!(free_stack(line, end - 1), Some(start..end - 1 - STACK_MARGIN));
        assert!(free_stack(line, start).is_some_and(|range| range.is_empty()));
        assert_eq!(free_stack(line, end), None);
        assert_eq!(free_stack(&line.replace("[stack]", "[heap]"), end - 1), None);
    }

    #[test]
    fn an_agent_at_rest_does_not_trim() {
        let mut schedule = TrimSchedule::new();
        assert_eq!(
            [false, true, true, true].map(|is_settled| schedule.take(is_settled)),
            [false, true, false, false]
        );
        schedule.on_large_change();
        schedule.on_large_change();
        assert_eq!([true, true].map(|is_settled| schedule.take(is_settled)), [true, false]);
    }

    #[test]
    fn trimmed_process_goes_on() {
        static DATA: [u8; 1 << 16] = [7; 1 << 16];
        trim();
        drop_constant(&DATA);
        assert!(DATA.iter().all(|&byte| byte == 7));
    }
}
