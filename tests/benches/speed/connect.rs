//! Socket calls: cost of connect(2) and sendto(2), and waiting time of a denied client.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use imds_tests::{
    METADATA, Pod, TestEnv,
    measure::{Samples, run_on, table},
};

use crate::restriction::{On, Restriction};

const ROUNDS: usize = 25;
const CALLS: u32 = 5_000;
const PORT: u16 = 80;
/// Timeout of a client. SDKs use one second to several minutes.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(3);
const CPU: usize = 1;

/// Measures calls to unprotected addresses, with and without the hooks.
pub(crate) fn latency(env: &TestEnv, pod: &Pod) -> String {
    let restrictions = [
        Restriction::Nothing,
        Restriction::EmptySocket,
        Restriction::EmptyAll,
        Restriction::Socket,
        Restriction::AllHooks,
    ];
    let mut costs = restrictions.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (restriction, costs) in restrictions.into_iter().zip(&mut costs) {
            let _on = restriction.turn_on(env, pod);
            costs.push(env.in_cgroup(|| pod.netns.run(calls)));
        }
    }
    let rows: Vec<_> = restrictions
        .iter()
        .zip(&costs)
        .map(|(restriction, its_costs)| {
            let mut row = vec![restriction.name().to_owned()];
            for kind in 0..3 {
                let cost = Samples::new(its_costs.iter().map(|costs| costs[kind])).median();
                let pairs = its_costs.iter().zip(&costs[0]);
                let ratio =
                    Samples::new(pairs.map(|(costs, of_nothing)| costs[kind] / of_nothing[kind])).median();
                row.extend([format!("{cost:.0} ns"), format!("{ratio:.3}")]);
            }
            row
        })
        .collect();
    let head = [
        "restriction",
        "UDP connect",
        "ratio to no restriction",
        "TCP connect and close",
        "ratio to no restriction",
        "unconnected UDP sendto",
        "ratio to no restriction",
    ];
    format!("### Calls to an address that is not protected\n\n{}", table(&head, &rows))
}

/// Returns nanoseconds of three operations: connect of a UDP socket; connect, accept and close of a TCP connection on
/// loopback; sendto on an unconnected UDP socket.
fn calls() -> [f64; 3] {
    run_on(CPU);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
    let address = listener.local_addr().expect("its address");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a UDP socket");
    let udp = || socket.connect((Ipv4Addr::LOCALHOST, PORT)).expect("connect");
    let tcp = || {
        let stream = TcpStream::connect(address).expect("connect");
        drop(listener.accept().expect("accept"));
        drop(stream);
    };
    // The receiver never reads: its full queue drops the datagrams, which keeps the cost of reception small.
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a receiver");
    let (sender, to) = (UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)), receiver.local_addr());
    let (sender, to) = (sender.expect("a sender"), to.expect("its address"));
    let sendto = || assert_eq!(sender.send_to(&[0; 64], to).expect("sendto"), 64);
    per_call(sendto, CALLS);
    [per_call(udp, CALLS), per_call(tcp, CALLS / 50), per_call(sendto, CALLS)]
}

fn per_call(call: impl Fn(), calls: u32) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        call();
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
}

/// Measures the time until a client learns that it is denied.
pub(crate) fn waiting(env: &TestEnv, pod: &Pod) -> String {
    let reject = || On::agent(env, &["from_pod"], "on_deny = 'reject'");
    let with = |restriction: Restriction| move || restriction.turn_on(env, pod);
    let rows: Vec<_> = [
        ("imds-agent, socket", time(env, pod, with(Restriction::Socket))),
        ("imds-agent, from_pod, on_deny = \"reject\"", time(env, pod, reject)),
        ("imds-agent, from_pod, on_deny = \"drop\"", time(env, pod, with(Restriction::FromPod))),
        ("AKS' rule", time(env, pod, with(Restriction::AksTcp))),
        ("AWS' rule with REJECT", time(env, pod, with(Restriction::AwsReject))),
    ]
    .into_iter()
    .map(|(name, (took, error))| vec![name.to_owned(), took, error])
    .collect();
    let head = ["restriction", "until connect(2) returns", "with"];
    format!("### Waiting time of a denied client\n\n{}", table(&head, &rows))
}

fn time<'w>(env: &TestEnv, pod: &Pod, turn_on: impl FnOnce() -> On<'w>) -> (String, String) {
    let _on = turn_on();
    let tries = env.in_cgroup(|| {
        pod.netns.run(|| {
            [(); 5].map(|()| {
                let start = Instant::now();
                let error = TcpStream::connect_timeout(&SocketAddr::from((METADATA, PORT)), CLIENT_TIMEOUT)
                    .expect_err("a connection to the metadata service");
                (start.elapsed().as_secs_f64() * 1e3, error)
            })
        })
    });
    let took = Samples::new(tries.iter().map(|(took, _)| *took)).median();
    let [(_, error), ..] = &tries;
    match error.kind() {
        ErrorKind::TimedOut => (
            format!("> {} s", CLIENT_TIMEOUT.as_secs()),
            "nothing: the client's own timeout expires".to_owned(),
        ),
        _ => (format!("{took:.2} ms"), error.to_string()),
    }
}
