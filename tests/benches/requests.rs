//! Ten million generated requests for the broker. Each that a rule allows has to reach an allowed handler, however a server writes its path.

use std::thread;

use imds_broker::{allow::Rule, request::Request};
use imds_tests::{
    measure::table,
    routing::{LOCATION, PATHS, QUERIES, SEPARATORS, assert_routes_are_allowed},
};

const REQUESTS: u64 = 10_000_000;
const METHODS: [&str; 6] = ["GET", "GET", "GET", "HEAD", "POST", "get"];
/// Lines after that of `Host`, most of which make a request malformed.
const HEADERS: [&str; 8] = [
    "",
    "Metadata: true\r\n",
    "Content-Length: 0\r\n",
    "Host: b\r\n",
    "Transfer-Encoding: chunked\r\n",
    "X-Original-URL: /metadata/identity\r\n",
    "X-Forwarded-For: 127.0.0.1\r\n",
    " folded: x\r\n",
];
/// Requests of a batch.
const BATCH: u64 = 100_000;

/// Numbers of requests.
#[derive(Default)]
struct Counts {
    well_formed: u64,
    allowed: u64,
}

fn main() {
    let threads = thread::available_parallelism().map_or(1, Into::into) as u64;
    let counts: Vec<Counts> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    let batches = (worker..REQUESTS / BATCH).step_by(usize::try_from(threads).unwrap_or(1));
                    batches.map(batch).fold(Counts::default(), |sum, batch| Counts {
                        well_formed: sum.well_formed + batch.well_formed,
                        allowed: sum.allowed + batch.allowed,
                    })
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a request outside of the rules")).collect()
    });
    let sum = |count: fn(&Counts) -> u64| counts.iter().map(count).sum::<u64>().to_string();
    let row = |what: &str, count: String| vec![what.to_owned(), count];
    let rows = [
        row("generated", REQUESTS.to_string()),
        row("in canonical form", sum(|counts| counts.well_formed)),
        row(
            "allowed by a rule, and routed to an allowed handler by each server",
            sum(|counts| counts.allowed),
        ),
    ];
    print!("{}", table(&["requests", "number"], &rows));
}

fn batch(number: u64) -> Counts {
    let rules = ["GET", "HEAD"].map(|method| Rule::parse(&format!("{method} {LOCATION}")).expect("a rule"));
    let mut random = Random(number + 1);
    let mut counts = Counts::default();
    for _ in 0..BATCH {
        let head = random.head();
        let Ok(request) = Request::parse(head.as_bytes()) else { continue };
        counts.well_formed += 1;
        let (method, path, query) = (request.method().as_str(), request.path(), request.query());
        if rules.iter().any(|rule| rule.allows(method, path, query)) {
            counts.allowed += 1;
            assert_routes_are_allowed(request.target());
        }
    }
    counts
}

/// Pseudorandom numbers (`SplitMix64`, <https://prng.di.unimi.it/splitmix64.c>), the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).unwrap_or_default()
    }

    fn select<'t>(&mut self, texts: &[&'t str]) -> &'t str {
        texts[self.below(texts.len())]
    }

    /// Returns the head of a request. Half of them start with an allowed path.
    fn head(&mut self) -> String {
        let method = self.select(&METHODS);
        let mut target = if self.below(2) == 0 { LOCATION.to_owned() } else { String::new() };
        for _ in 0..=self.below(4) {
            target += match self.below(11) {
                0..4 => self.select(&PATHS),
                4..8 => self.select(&SEPARATORS),
                8..10 => self.select(&QUERIES),
                _ => self.select(&["a", "A", "0", "~", "\"", "<", "{", "|", "^", "`"]),
            };
        }
        let upper = self.below(60);
        if let Some(letter) = target.get_mut(upper..=upper) {
            letter.make_ascii_uppercase();
        }
        let header = if self.below(4) == 0 { self.select(&HEADERS) } else { "" };
        format!("{method} {target} HTTP/1.1\r\nHost: a\r\n{header}\r\n")
    }
}
