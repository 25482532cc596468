//! Messages of RFC 5424 over Unix datagrams, UDP and TCP.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::unix::net::UnixDatagram,
    process::Child,
    time::Duration,
};

use imds_tests::{
    METADATA, PodLink, TestEnv, WHOLE_TEST, lacks_program,
    poll::poll_until,
    probe::{LONG, SHORT, http_get},
    skip_without_netns_cookie,
};
use nix::sys::prctl;

use crate::{send, sink, sink_records, sinks, wait_failing, wait_working};

/// Returns priority, structured data and text of a message, and checks its header.
fn parse(message: &str) -> (String, String, String) {
    assert!(!message.chars().any(char::is_control), "{message:?}");
    let (header, rest) = message.split_once(" [denial@32473 ").unwrap();
    let fields: Vec<_> = header.split(' ').collect();
    assert_eq!(fields.len(), 6, "{header}");
    assert!(fields[1].ends_with('Z') && fields[1].contains('T'), "{header}");
    assert_eq!((fields[3], fields[5]), ("imds-agent", "denial"));
    // The structured data ends at the first bracket that is not escaped.
    let is_escaped = |at: usize| rest[..at].bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1;
    let end = rest.match_indices(']').find(|&(at, _)| !is_escaped(at)).unwrap().0;
    (fields[0].to_owned(), rest[..end].to_owned(), rest[end + 2..].to_owned())
}

fn receive(receive: impl FnOnce(&mut [u8]) -> std::io::Result<usize>) -> String {
    let mut buffer = vec![0; 65_536];
    let length = receive(&mut buffer).expect("a message");
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn unix_socket_that_is_replaced() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let path = env.scratch_dir().join("log.sock");
    let bind = || {
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket
    };
    let socket = bind();
    let agent =
        env.agent().config(&sinks(&[sink("syslog", "address", path.to_str().unwrap())])).spawn_ready();
    send(&pod, [40_000]);
    let (priority, data, text) = parse(&receive(|buffer| socket.recv(buffer)));
    assert_eq!(priority, "<84>1");
    for part in ["verdict=\"denied\"", "src_port=\"40000\"", "dst_name=\"imds\"", "count=\"1\""] {
        assert!(data.contains(part), "{data}");
    }
    assert!(text.starts_with(&format!("denied tcp {}:40000 -> {METADATA}:80 (imds)", pod.address)), "{text}");

    // A restart of journald: records of the time without a socket are sent afterwards.
    drop(socket);
    fs::remove_file(&path).unwrap();
    send(&pod, [40_001, 40_002]);
    wait_failing(&env, "No such file or directory");
    assert_eq!(env.status().state, "enforcing");
    let socket = bind();
    for port in [40_001, 40_002] {
        let (_, data, _) = parse(&receive(|buffer| socket.recv(buffer)));
        assert!(data.contains(&format!("src_port=\"{port}\"")), "{data}");
    }
    wait_working(&env);
    assert_eq!(sink_records(&env, &format!("syslog:{}", path.display()), "written"), 3);
    drop(agent);
    env.unload();
}

#[test]
fn thread_name_stays_in_its_parameter() {
    if skip_without_netns_cookie() {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let socket = env.node.run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let address = format!("udp://{}", socket.local_addr().unwrap());
    let config = sinks(&[sink("syslog", "address", address)]);
    let agent = env.agent().config(&config).hooks(&["socket"]).spawn_ready();
    env.in_cgroup(|| {
        prctl::set_name(c"\"] <0>1\r\n\\x").unwrap();
        assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    });
    let (_, data, _) = parse(&receive(|buffer| socket.recv(buffer)));
    assert!(data.contains(r#" process="\"\] <0>1\\r\\n\\x""#), "{data}");
    drop(agent);
    env.unload();
}

/// Reads a message with its octet count.
fn read_counted(stream: &mut BufReader<TcpStream>) -> String {
    let mut count = Vec::new();
    stream.read_until(b' ', &mut count).unwrap();
    let count = std::str::from_utf8(&count).unwrap().trim().parse().expect("a count");
    let mut message = vec![0; count];
    stream.read_exact(&mut message).unwrap();
    String::from_utf8(message).unwrap()
}

#[test]
fn tcp_receiver_that_closes_the_connection() {
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let listener = env.node.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    let agent = env.agent().config(&sinks(&[sink("syslog", "address", address)])).spawn_ready();
    for port in [40_000_u16, 40_010] {
        send(&pod, [port, port + 1]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut stream = BufReader::new(stream);
        for port in [port, port + 1] {
            let (_, data, _) = parse(&read_counted(&mut stream));
            assert!(data.contains(&format!("src_port=\"{port}\"")), "{data}");
        }
        // The agent notices the end of the connection before it sends the next message.
        drop(stream);
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(agent);
    env.unload();
}

/// Ends a process when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn rsyslog_parses_the_structured_data() {
    if skip_without_netns_cookie() || lacks_program(WHOLE_TEST, &["rsyslogd"]) {
        return;
    }
    let env = TestEnv::new();
    let pod = env.add_pod(PodLink::Routed);
    let [config, output, pid] =
        ["rsyslog.conf", "denials.jsonl", "pid"].map(|name| env.scratch_dir().join(name));
    let text = format!(
        "module(load=\"imtcp\")\nmodule(load=\"mmpstrucdata\")\n\
         input(type=\"imtcp\" address=\"127.0.0.1\" port=\"601\" ruleset=\"denials\")\n\
         template(name=\"denial\" type=\"list\") {{\n  property(name=\"$!rfc5424-sd!denial@32473\")\n  constant(value=\"\\n\")\n}}\n\
         ruleset(name=\"denials\") {{\n  action(type=\"mmpstrucdata\")\n\
         action(type=\"omfile\" file=\"{}\" template=\"denial\")\n}}\n",
        output.display()
    );
    fs::write(&config, text).unwrap();
    let mut command = env.node.command("rsyslogd");
    let _rsyslog = Process(
        command.arg("-n").arg("-f").arg(&config).arg("-i").arg(&pid).spawn().expect("start rsyslogd"),
    );
    let config = sinks(&[sink("syslog", "address", "tcp://127.0.0.1:601")]);
    let agent = env.agent().config(&config).hooks(&["socket"]).spawn_ready();
    env.in_cgroup(|| {
        prctl::set_name(c"\"] <0>1\n\\x").unwrap();
        assert!(!http_get(&pod.netns, METADATA, SHORT).is_answer());
    });
    let records = poll_until(LONG * 3, "a record", || {
        Some(crate::records(&output)).filter(|records| !records.is_empty())
    });
    assert_eq!((&records[0]["verdict"], &records[0]["dst_name"]), (&"denied".into(), &"imds".into()));
    assert_eq!(records[0]["process"], r#""] <0>1\n\x"#);
    drop(agent);
    env.unload();
}
