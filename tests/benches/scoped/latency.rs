//! Latency of an allowed request through the broker, compared with the same request of an exempt pod.
//!
//! Each repetition runs with the usual priority, and with a priority of the clients and the broker above all other processes. The
//! latter is the cost of the broker itself: on a busy machine, each switch of processes otherwise adds milliseconds.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use imds_tests::{
    Pod, PodLink, TestEnv,
    executable::{broker_executable, broker_of},
    measure::{Samples, table},
    poll::poll_until,
    probe::LONG,
    scaled,
};

use crate::{Bar, endpoint, priority::Priority};

/// Largest cost at the 99th percentile, in milliseconds.
const MAX_COST: f64 = 1.0;
const PER_SECOND: u32 = 200;
/// Number of requests of each pod in a repetition: three seconds.
const REQUESTS: u32 = 600;
const REPETITIONS: u32 = 11;
const REQUEST: &str =
    "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Connections {
    New,
    Reused,
}

/// Kind of the measurements in a row of the table.
#[derive(Clone, Copy, Debug)]
struct Kind {
    connections: Connections,
    priority: Priority,
}

const KINDS: [Kind; 4] = [
    Kind { connections: Connections::New, priority: Priority::RealTime },
    Kind { connections: Connections::Reused, priority: Priority::RealTime },
    Kind { connections: Connections::New, priority: Priority::Normal },
    Kind { connections: Connections::Reused, priority: Priority::Normal },
];

/// Milliseconds of the requests of both pods in one repetition.
struct Repetition {
    direct: Samples,
    scoped: Samples,
}

/// Prints the latencies and returns their bars.
pub(crate) fn measure() -> Vec<Bar> {
    let env = TestEnv::new().without_counting();
    endpoint::start(&env);
    let [direct, scoped] = [(); 2].map(|()| env.add_pod(PodLink::Routed));
    let rule = |name: &str, pod: &Pod| {
        format!("[[exempt]]\nname = '{name}'\nnetns = '{}'\n", pod.netns.path().display())
    };
    let config = format!(
        "provider = 'azure'\n[[endpoint]]\nname = 'simulated'\naddress = '{}'\n{}{}allow = ['GET /metadata/instance']\n",
        endpoint::ADDRESS,
        rule("direct", &direct),
        rule("scoped", &scoped)
    );
    let broker = broker_executable();
    let command = env.agent().config(&config).hooks(&["from_pod", "node_egress", "socket"]);
    let agent = command.args(&["--broker", broker.to_str().expect("a UTF-8 path")]).spawn_ready();
    for pod in [&direct, &scoped] {
        poll_until(LONG, "an allowed request", || in_pod(&env, pod, || Client::connect()?.ask()).ok());
    }
    let repetitions = scaled(REPETITIONS);
    let broker = broker_of(agent.pid()).expect("a broker");
    let mut results = KINDS.map(|kind| (kind, Vec::new()));
    for number in 1..=repetitions {
        eprintln!("latency: repetition {number} of {repetitions}");
        for (kind, results) in &mut results {
            kind.priority.set(broker);
            results.push(repeat(&env, &direct, &scoped, *kind));
        }
    }
    drop(agent);
    env.unload();
    println!(
        "### Latency of an allowed request\n\n{PER_SECOND} requests per second and pod; medians of {repetitions} repetitions of \
         {REQUESTS} requests.\n"
    );
    let head = [
        "connections",
        "priority",
        "exempt pod, p50",
        "p99",
        "scoped pod, p50",
        "p99",
        "difference, p50",
        "p99",
    ];
    println!("{}", table(&head, &results.each_ref().map(|(kind, results)| row(*kind, results))));
    let bar = |(kind, results): &(Kind, Vec<Repetition>)| Bar {
        name: format!("latency at p99, {}", kind.connections.name()),
        measured: difference(results, 99),
        limit: MAX_COST,
        unit: "ms",
    };
    results.iter().filter(|(kind, _)| kind.priority == Priority::RealTime).map(bar).collect()
}

fn row(kind: Kind, results: &[Repetition]) -> Vec<String> {
    let median = |of: fn(&Repetition) -> &Samples, percent| {
        Samples::new(results.iter().map(|result| of(result).quantile(percent))).median()
    };
    let (direct, scoped) = (
        |percent| median(|result| &result.direct, percent),
        |percent| median(|result| &result.scoped, percent),
    );
    let (p50, p99) = (difference(results, 50), difference(results, 99));
    let times = [direct(50), direct(99), scoped(50), scoped(99), p50, p99];
    let names = [kind.connections.name(), kind.priority.name()].map(str::to_owned);
    names.into_iter().chain(times.map(|time| format!("{time:.3} ms"))).collect()
}

/// Returns the median of the differences between the pods at this percentile.
fn difference(results: &[Repetition], percent: usize) -> f64 {
    let difference = |result: &Repetition| result.scoped.quantile(percent) - result.direct.quantile(percent);
    Samples::new(results.iter().map(difference)).median()
}

/// Sends the requests of both pods at the same time, so that other load of the machine affects both. Those of one pod are sent in
/// the middle between two of the other.
fn repeat(env: &TestEnv, direct: &Pod, scoped: &Pod, kind: Kind) -> Repetition {
    let interval = Duration::from_secs(1) / PER_SECOND;
    let start = Instant::now() + Duration::from_millis(50);
    let run = |pod, start| {
        Samples::new(in_pod(env, pod, || {
            kind.priority.set(0);
            kind.connections.requests(start, interval)
        }))
    };
    thread::scope(|scope| {
        let direct = scope.spawn(|| run(direct, start));
        let scoped = run(scoped, start + interval / 2);
        Repetition { direct: direct.join().expect("no panic"), scoped }
    })
}

fn in_pod<T: Send>(env: &TestEnv, pod: &Pod, work: impl FnOnce() -> T + Send) -> T {
    env.in_cgroup(|| pod.netns.run(work))
}

impl Connections {
    const fn name(self) -> &'static str {
        match self {
            Self::New => "new for each request",
            Self::Reused => "keep-alive",
        }
    }

    /// Returns the milliseconds of each request, including a new connection.
    fn requests(self, start: Instant, interval: Duration) -> Vec<f64> {
        let mut open = (self == Self::Reused).then(|| Client::connect().expect("connect"));
        let request = |number| {
            let at = start + interval * number;
            thread::sleep(at.saturating_duration_since(Instant::now()));
            let sent = Instant::now();
            match &mut open {
                Some(client) => client.ask().expect("a response"),
                None => Client::connect().and_then(|mut client| client.ask()).expect("a response"),
            }
            sent.elapsed().as_secs_f64() * 1e3
        };
        (0..REQUESTS).map(request).collect()
    }
}

struct Client {
    stream: TcpStream,
    response: Vec<u8>,
}

impl Client {
    fn connect() -> io::Result<Self> {
        let stream = TcpStream::connect((endpoint::ADDRESS, 80))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LONG))?;
        Ok(Self { stream, response: Vec::new() })
    }

    /// Sends a request and reads the whole response, which must have the status 200.
    fn ask(&mut self) -> io::Result<()> {
        self.stream.write_all(format!("{REQUEST}\r\n").as_bytes())?;
        self.response.clear();
        let mut buffer = [0; 4096];
        while !self.is_complete() {
            let length = self.stream.read(&mut buffer)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.response.extend_from_slice(&buffer[..length]);
        }
        if !self.response.starts_with(b"HTTP/1.1 200 ") {
            return Err(io::Error::other(String::from_utf8_lossy(&self.response).into_owned()));
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        let text = String::from_utf8_lossy(&self.response);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().ok())?
        });
        length.is_some_and(|length| body.len() >= length)
    }
}
