//! The allow list of the node: of the processes in the node's network namespace, only those in the list reach the
//! endpoints.

mod list_changes;
mod listed_processes;
mod verify_and_rootless;

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
};

use imds_tests::{
    Cgroup, METADATA, TestEnv,
    poll::poll_until,
    probe::{LONG, SHORT, http_exchange},
    status::NodeAllow,
};

const HOOK: &str = "node_allow";
/// A cloud with endpoints of both families.
const AWS: &str = "provider = 'aws'";
const HTTP_PORT: u16 = 80;
const ECHO_PORT: u16 = 7;
/// Users without an account on any machine.
const USER: u32 = 61_184;
const OTHER_USER: u32 = 61_185;
/// Hooks of the tests that change the configuration file.
const HOOKS: &str = "[hooks]\nsocket = false\nnode_egress = false\n";

/// The configuration with these entries of the allow list.
fn allow(entries: &[&str]) -> String {
    let quoted: Vec<_> = entries.iter().map(|entry| format!("\"{entry}\"")).collect();
    format!("[node]\nallow = [{}]\n", quoted.join(", "))
}

fn uid(user: u32) -> String {
    format!("uid:{user}")
}

/// The entry for a cgroup, as `/proc/PID/cgroup` shows its path.
fn entry(path: &Path) -> String {
    let root = path.ancestors().filter(|path| path.join("cgroup.controllers").exists()).last().unwrap();
    format!("cgroup:/{}", path.strip_prefix(root).unwrap().display())
}

/// Runs `work` as a process of a user in the node's network namespace and this cgroup.
fn run_as<T: Send>(env: &TestEnv, cgroup: &Cgroup, user: u32, work: impl FnOnce() -> T + Send) -> T {
    cgroup.run(|| {
        env.node.run(|| {
            // The system call itself, which changes only the calling thread. The thread ends with this closure.
            // SAFETY: the call takes three numbers.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
            work()
        })
    })
}

fn http(address: impl Into<IpAddr>) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address.into(), HTTP_PORT), SHORT)?;
    http_exchange(&mut stream, SHORT).map(drop)
}

fn udp(any: &str) -> UdpSocket {
    let socket = UdpSocket::bind(any).expect("bind a UDP socket");
    socket.set_read_timeout(Some(SHORT)).expect("set a timeout");
    socket
}

fn echo(any: &str, address: impl Into<IpAddr>) -> io::Result<()> {
    let socket = udp(any);
    socket.send_to(b"echo", (address.into(), ECHO_PORT))?;
    socket.recv(&mut [0; 16]).map(drop)
}

/// Reports whether the user's call reaches the endpoint. Repeats a call without an answer in time. Panics if a call fails with
/// another error than EPERM.
#[track_caller]
fn reaches(env: &TestEnv, cgroup: &Cgroup, user: u32) -> bool {
    poll_until(LONG, "an answer or a denial", || match run_as(env, cgroup, user, || http(METADATA)) {
        Ok(()) => Some(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Some(false),
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => None,
        Err(error) => panic!("neither reached nor denied: {error}"),
    })
}

#[track_caller]
fn node_allow(env: &TestEnv) -> NodeAllow {
    env.status().node_allow.expect("node_allow is on")
}
