//! What runs of the past told: each left its console, and the newest word on a test executable counts.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

use super::{
    console::{Executable, Guest},
    kernels::Line,
};

/// What is known of a kernel.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) release: String,
    /// Of the newest run that looked.
    pub(super) guest: Guest,
    /// Test executables that ran whole, by their names.
    pub(super) results: BTreeMap<String, Outcome>,
    /// What the kernel complained of, in any of the runs that count.
    pub(super) complaints: Vec<String>,
}

/// How a test executable did, and in which run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) executable: Executable,
    pub(super) commit: String,
    pub(super) divisor: u32,
}

/// A new console of a kernel.
pub(super) fn new_console(dir: &Path, line: Line) -> PathBuf {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    dir.join(format!("kernel-{line}.{}.log", since_epoch.as_secs()))
}

/// Removes the consoles older than that of a run that was whole.
pub(super) fn forget_before(dir: &Path, line: Line, console: &Path) -> Result<()> {
    for older in consoles(dir, line)?.into_iter().take_while(|older| older != console) {
        fs::remove_file(&older).with_context(|| format!("could not remove {}", older.display()))?;
    }
    Ok(())
}

/// What all consoles of a kernel tell together, if there is any.
pub(super) fn read(dir: &Path, line: Line) -> Result<Option<Record>> {
    let mut guests = Vec::new();
    for path in consoles(dir, line)? {
        let console = fs::read(&path).with_context(|| format!("could not read {}", path.display()))?;
        guests.push(Guest::from_console(&String::from_utf8_lossy(&console)));
    }
    Ok(Record::of(guests))
}

/// The consoles of a kernel, oldest first.
fn consoles(dir: &Path, line: Line) -> Result<Vec<PathBuf>> {
    let prefix = format!("kernel-{line}.");
    let mut consoles = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))? {
        let path = entry.with_context(|| format!("could not list {}", dir.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let time = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".log"));
        if let Some(time) = time.and_then(|time| time.parse::<u64>().ok()) {
            consoles.push((time, path));
        }
    }
    consoles.sort();
    Ok(consoles.into_iter().map(|(_, path)| path).collect())
}

impl Record {
    /// Of the runs of one kernel, oldest first. Those of another release than the newest's are of no account.
    pub(super) fn of(guests: Vec<Guest>) -> Option<Self> {
        let release = guests.iter().rev().find_map(|guest| guest.release.clone())?;
        let (mut results, mut complaints, mut newest) = (BTreeMap::new(), Vec::new(), Guest::default());
        for mut guest in guests.into_iter().filter(|guest| guest.release.as_ref() == Some(&release)) {
            let (commit, divisor) = (guest.commit.clone().unwrap_or_default(), guest.divisor.unwrap_or(1));
            let mut executables = std::mem::take(&mut guest.executables);
            if let Some(name) = guest.unfinished.take_if(|_| guest.end.is_some()) {
                executables.insert(name, Executable { is_whole: true, ..Executable::default() });
            }
            executables.retain(|_, executable| executable.is_whole);
            if !executables.is_empty() {
                complaints.append(&mut guest.complaints);
            }
            results.extend(
                executables.into_iter().map(|(name, executable)| {
                    (name, Outcome { executable, commit: commit.clone(), divisor })
                }),
            );
            if guest.doctor.is_some() {
                let took = std::mem::take(&mut newest.took);
                newest = guest;
                if newest.took.is_empty() {
                    newest.took = took;
                }
            }
        }
        Some(Self { release, guest: newest, results, complaints })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(consoles: &[&str]) -> Record {
        Record::of(consoles.iter().map(|console| Guest::from_console(console)).collect()).unwrap()
    }

    const WHOLE: &str = "@kernel 6.1.0\n@divisor 4\n@commit aaa\n@doctor {}\n@took guard: clsact\n\
                         @begin follow --include-ignored\ntest a ... FAILED\n@end follow 101 9\n\
                         @begin unload \ntest b ... ok\n@end unload 0 5\nTEST-RC=1\n";

    #[test]
    fn newer_complete_run_counts() {
        let again = "@kernel 6.1.0\n@divisor 4\n@commit bbb\n@doctor {}\n@begin follow \ntest a ... ok\n@end follow 0 7\n\
                     @begin unload part\ntest b ... FAILED\n@end unload 101 1\n";
        let record = of(&[WHOLE, again]);
        let of = |name: &str| {
            let outcome = &record.results[name];
            (outcome.executable.code, outcome.executable.seconds, outcome.commit.as_str())
        };
        assert_eq!(of("follow"), (Some(0), Some(7), "bbb"));
        assert_eq!(of("unload"), (Some(0), Some(5), "aaa"));
        assert_eq!(record.guest.took["guard"], "clsact");
    }

    #[test]
    fn died_machine_differs_from_cut_console() {
        let cut = "@kernel 6.1.0\n@begin unload \ntest b ... ok\n";
        assert_eq!(of(&[WHOLE, cut]).results["unload"].executable.code, Some(0));
        let died = [cut, "Kernel panic\n@machine ended early\n"].concat();
        assert_eq!(of(&[WHOLE, &died]).results["unload"].executable.code, None);
    }

    #[test]
    fn another_release_is_another_kernel() {
        let newer = "@kernel 6.1.9\n@commit ccc\n@begin follow \n@end follow 0 7\n";
        let record = of(&[WHOLE, newer]);
        assert_eq!(record.results.keys().collect::<Vec<_>>(), ["follow"]);
        assert!(Record::of(Vec::new()).is_none());
    }

    #[test]
    fn consoles_are_grouped_and_ordered() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel-6.1.200.log", "kernel-6.1.99.log", "kernel-6.12.7.log", "kernel-6.1.cpio"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let last = dir.path().join("kernel-6.1.200.log");
        assert_eq!(consoles(dir.path(), Line::V6_1).unwrap().len(), 2);
        forget_before(dir.path(), Line::V6_1, &last).unwrap();
        assert_eq!(consoles(dir.path(), Line::V6_1).unwrap(), [last]);
    }
}
