//! How the tests did.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        console::Executable,
        records::{Outcome, Record},
    },
    Column,
    markdown::{code, table},
    names, of_kernels,
};

/// How much of a commit's hash is shown.
const SHORT: usize = 12;

/// What it means for who has such a kernel that a test is skipped there, by how its reason begins.
const MEANINGS: [(&str, &str); 18] = [
    ("no TCX", "clsact filters are taken instead, and tested by the same tests"),
    (
        "no SO_NETNS_COOKIE",
        "the tests' nodes are namespaces other than the initial one, where the socket hook does not work; on a machine it \
         does, as `initial_netns` shows, but knows no exempt pod: with exemptions, `hooks.socket = false`",
    ),
    (
        "TC programs do not see",
        "packets of macvlan and ipvlan pods pass `node_egress`; the socket hook denies calls of such a pod, and does not see \
         crafted frames (AF_PACKET)",
    ),
    (
        "no hook that would hold it",
        "of macvlan and ipvlan pods: what comes of both, as neither netns cookie is there. On a machine the socket hook holds \
         them",
    ),
    ("no netkit devices by this", "nothing: it is the `ip` of who ran the tests; those of layer 3 take none"),
    ("no netkit", "no pod can have one"),
    ("no ipvlan", "no pod can have one"),
    ("no macvlan", "no pod can have one"),
    (
        "programs of cgroups do not see",
        "strict mode denies the packets of all that is below the pods' cgroup, those of pods with namespaces of their own too",
    ),
    ("this kernel does not count the instructions", "nothing: it takes the programs, and newer ones count"),
    ("there is no iptables", "nothing: the emulated machines have none; the agent does not need it"),
    ("no cgroup limits memory", "nothing: the test can't be set up"),
    ("it sets the machine's clock", "nothing: the test is for machines that nobody needs"),
    ("it makes the machine's own", "nothing: the test is for machines that nobody needs"),
    ("bridges do not know VLANs", "no bridge filters by them"),
    ("no segment routing", "nothing follows such a header"),
    ("no test run of what came in", "nothing: the test can't be set up; others send such packets"),
    ("no ", "nothing comes in by one"),
];

/// How each test executable did on each kernel, and all together.
pub(super) fn results(columns: &[Column], executables: &BTreeSet<String>) -> String {
    let known = columns.iter().flat_map(|column| column.record.results.keys());
    let all: BTreeSet<_> = executables.iter().chain(known).collect();
    let rows = all.into_iter().map(|name| {
        let cell = |column: &Column| {
            column
                .record
                .results
                .get(name)
                .map_or_else(|| "not run".to_owned(), |outcome| cell(&outcome.executable))
        };
        std::iter::once(code(name)).chain(columns.iter().map(cell)).collect::<Vec<_>>()
    });
    let sums = [
        ("**passed**", (|outcome| outcome.executable.passed()) as fn(&Outcome) -> usize),
        ("**skipped**", |outcome| outcome.executable.skipped.len()),
        ("**failed**", |outcome| outcome.executable.failures()),
        ("seconds", |outcome| outcome.executable.seconds.unwrap_or(0).try_into().unwrap_or(usize::MAX)),
    ];
    let sums = sums.into_iter().map(|(head, count)| {
        let sum = |column: &Column| column.record.results.values().map(count).sum::<usize>().to_string();
        std::iter::once(head.to_owned()).chain(columns.iter().map(sum)).collect()
    });
    let divisors = std::iter::once("repetitions".to_owned()).chain(columns.iter().map(repetitions)).collect();
    of_kernels(columns, &["tests of"], rows.chain(sums).chain([divisors]))
}

/// All of a kernel in one line.
pub(super) fn summary(record: &Record, executables: &BTreeSet<String>) -> String {
    let sum = |count: fn(&Executable) -> usize| {
        record.results.values().map(|outcome| count(&outcome.executable)).sum::<usize>()
    };
    let counts =
        [(sum(|executable| executable.skipped.len()), "skipped"), (sum(Executable::failures), "**failed**")];
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    let counts = counts.map(|(count, what)| format!("{count} {what}"));
    let missing = executables.iter().filter(|name| !record.results.contains_key(*name)).count();
    let missing = (missing > 0).then(|| format!("{missing} of {} executables not run", executables.len()));
    let passed = format!("{} passed", sum(Executable::passed));
    std::iter::once(passed).chain(counts).chain(missing).collect::<Vec<_>>().join(", ")
}

fn cell(executable: &Executable) -> String {
    let failures = executable.failures();
    if executable.code.is_none() {
        return "**did not end**".to_owned();
    }
    if executable.is_empty() || (executable.passed.is_empty() && failures == 0) {
        return "-".to_owned();
    }
    let counts = [(executable.skipped.len(), "skipped"), (failures, "**failed**")];
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    let counts = counts.map(|(count, what)| format!("{count} {what}"));
    std::iter::once(executable.passed().to_string()).chain(counts).collect::<Vec<_>>().join(", ")
}

/// How many times less is done of the longest tests there.
fn repetitions(column: &Column) -> String {
    let divisors: BTreeSet<_> = column.record.results.values().map(|outcome| outcome.divisor).collect();
    let part = |divisor: u32| if divisor == 1 { "all".to_owned() } else { format!("1/{divisor}") };
    divisors.into_iter().map(part).collect::<Vec<_>>().join(" and ")
}

/// What failed, with the last word on it.
pub(super) fn failed(columns: &[Column]) -> String {
    let mut rows = Vec::new();
    for column in columns {
        for (name, outcome) in &column.record.results {
            let executable = &outcome.executable;
            for test in &executable.failed {
                let said = executable.output.get(test).map(Vec::as_slice).unwrap_or_default();
                let word = said.iter().position(|line| line.contains("panicked at"));
                let word = word.and_then(|at| said.get(at + 1)).map_or("", String::as_str);
                rows.push(vec![column.title(), code(&format!("{name}: {test}")), code(word)]);
            }
            if executable.failed.is_empty() && executable.code != Some(0) {
                rows.push(vec![column.title(), code(name), "it did not come to its end".to_owned()]);
            }
        }
        rows.extend(
            column
                .record
                .complaints
                .iter()
                .map(|complaint| vec![column.title(), String::new(), code(complaint)]),
        );
    }
    if rows.is_empty() {
        return "Nothing failed.".to_owned();
    }
    table(["kernel", "test", "its last word"].map(str::to_owned).to_vec(), rows)
}

/// What was skipped, by reasons.
pub(super) fn skipped(columns: &[Column]) -> String {
    let mut reasons: BTreeMap<String, Reason<'_>> = BTreeMap::new();
    for column in columns {
        for (name, outcome) in &column.record.results {
            let Executable { skipped, in_part, .. } = &outcome.executable;
            for (tests, is_whole) in [(skipped, true), (in_part, false)] {
                for (test, reason) in tests {
                    reasons.entry(plain(reason)).or_default().add(
                        column,
                        &format!("{name}: {test}"),
                        is_whole,
                    );
                }
            }
        }
    }
    let rows = reasons.iter().map(|(reason, told)| {
        let meaning = MEANINGS.iter().find(|(start, _)| reason.starts_with(start));
        let meaning = meaning.map_or("", |(_, meaning)| meaning);
        vec![reason.clone(), names(told.columns.iter().copied()), told.count(), meaning.to_owned()]
    });
    let head = ["reason", "on", "tests", "which means"].map(str::to_owned);
    let lists = reasons.iter().filter(|(_, told)| !told.whole.is_empty()).map(|(reason, told)| {
        let tests: Vec<_> = told.whole.iter().map(|test| code(test)).collect();
        format!("{reason}: {}", tests.join(", "))
    });
    let reasons = table(head.to_vec(), rows);
    let lists = lists.collect::<Vec<_>>().join("\n\n");
    format!("{reasons}\n\n<details><summary>Which tests those are</summary>\n\n{lists}\n\n</details>")
}

/// What was not run for a reason.
#[derive(Default)]
struct Reason<'a> {
    columns: Vec<&'a Column>,
    whole: BTreeSet<String>,
    in_part: BTreeSet<String>,
}

impl<'a> Reason<'a> {
    fn add(&mut self, column: &'a Column, test: &str, is_whole: bool) {
        if self.columns.iter().all(|known| known.line != column.line) {
            self.columns.push(column);
        }
        let tests = if is_whole { &mut self.whole } else { &mut self.in_part };
        tests.insert(test.to_owned());
    }

    fn count(&self) -> String {
        let counts = [(self.whole.len(), ""), (self.in_part.len(), "parts of ")];
        let counts = counts.into_iter().filter(|(count, _)| *count > 0);
        counts.map(|(count, what)| format!("{what}{count}")).collect::<Vec<_>>().join(", ")
    }
}

/// A reason without what `ip` said, which differs from kernel to kernel.
fn plain(reason: &str) -> String {
    let end = [" on this kernel (", " by this `ip` ("]
        .iter()
        .find_map(|end| Some(reason.find(end)? + end.len() - 2));
    reason[..end.unwrap_or(reason.len())].trim_end_matches(" on this kernel").to_owned()
}

/// The commits that a kernel's results are of.
pub(super) fn commits(record: &Record) -> BTreeSet<&str> {
    record.results.values().map(|outcome| outcome.commit.as_str()).collect()
}

/// For each commit, what was run of it.
pub(super) fn commits_of(columns: &[Column]) -> String {
    let mut all: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for column in columns {
        let usual = usual_commit(&column.record);
        for commit in commits(&column.record) {
            let of = |(name, outcome): (&String, &Outcome)| (outcome.commit == commit).then(|| code(name));
            let what = if Some(commit) == usual {
                column.title()
            } else {
                let names: Vec<_> = column.record.results.iter().filter_map(of).collect();
                format!("{} of {}", names.join(" "), column.title())
            };
            all.entry(commit).or_default().push(what);
        }
    }
    let rows = all.into_iter().map(|(commit, what)| {
        let (hash, dirty) = commit.split_once('-').unwrap_or((commit, ""));
        let changed = if dirty.is_empty() { "" } else { " and changes" };
        vec![format!("{}{changed}", code(&hash[..hash.len().min(SHORT)])), what.join(", ")]
    });
    table(["commit", "results of"].map(str::to_owned).to_vec(), rows)
}

/// That which most results are of.
fn usual_commit(record: &Record) -> Option<&str> {
    let count = |commit: &&str| record.results.values().filter(|outcome| outcome.commit == *commit).count();
    commits(record).into_iter().max_by_key(count)
}
