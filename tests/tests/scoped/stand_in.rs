//! A broker of a few lines, which speaks the protocol of the real one: it allows exact paths, and forwards the bytes of requests.
//!
//! The test executable itself is the broker: a script starts it with the name of one test.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use imds_broker::protocol::{FromBroker, MAX_MESSAGE, Outcome, Request, ToBroker};
use imds_tests::{TestEnv, executable::write_executable};
use nix::{
    cmsg_space,
    sys::{
        signal::{Signal, kill},
        socket::{ControlMessageOwned, MsgFlags, SockType, getsockopt, recvmsg, send, shutdown, sockopt},
    },
    unistd::Pid,
};

/// Returns the path of the broker under test.
pub(crate) fn broker(test_env: &TestEnv) -> PathBuf {
    let beside = || {
        let agent = PathBuf::from(env::var_os("IMDS_AGENT")?);
        Some(agent.with_file_name("imds-broker")).filter(|path| path.exists())
    };
    env::var_os("IMDS_BROKER").map(PathBuf::from).or_else(beside).unwrap_or_else(|| {
        let test = env::current_exe().unwrap();
        let command = format!("exec '{}' --exact stand_in::serve --nocapture", test.display());
        script(test_env, "stand-in", &command)
    })
}

/// Writes an executable script.
pub(crate) fn script(test_env: &TestEnv, name: &str, text: &str) -> PathBuf {
    let path = test_env.scratch_dir().join(name);
    write_executable(&path, &format!("#!/bin/sh\n{text}\n"));
    path
}

/// The broker, if standard input is its socket; else a test that passes.
#[test]
fn serve() {
    let stdin = io::stdin();
    if getsockopt(&stdin, sockopt::SockType).ok() != Some(SockType::SeqPacket) {
        return;
    }
    tell(&FromBroker::Ready {});
    let mut listeners: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    while let Some((message, descriptor)) = receive() {
        match message {
            ToBroker::Listen { id, endpoint, allow, provider } => {
                let listener = TcpListener::from(descriptor.expect("a listener"));
                listener.set_nonblocking(false).unwrap();
                listeners.insert(id, listener.try_clone().unwrap().into());
                thread::spawn(move || {
                    while let Ok((client, _)) = listener.accept() {
                        let (allow, is_aws) = (allow.clone(), provider == "aws");
                        thread::spawn(move || answer(id, client, endpoint, &allow, is_aws));
                    }
                });
                tell(&FromBroker::Listening { id });
            }
            ToBroker::Close { id } => {
                if let Some(listener) = listeners.remove(&id) {
                    // Wakes the thread that accepts.
                    let _ = shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
                }
                tell(&FromBroker::Closed { id, error: None });
            }
            ToBroker::Ping {} => tell(&FromBroker::Pong {}),
        }
    }
    std::process::exit(0);
}

fn tell(message: &FromBroker) {
    let text = serde_json::to_vec(message).unwrap();
    let _ = send(io::stdin().as_raw_fd(), &text, MsgFlags::MSG_NOSIGNAL);
}

fn receive() -> Option<(ToBroker, Option<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut space = cmsg_space!([i32; 1]);
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(io::stdin().as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
    let length = message.bytes;
    let rights = message.cmsgs().unwrap().find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just opened the descriptor for this process.
    let descriptor = rights.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) });
    (length > 0).then(|| (serde_json::from_slice(&buffer[..length]).unwrap(), descriptor))
}

fn answer(id: u32, mut client: TcpStream, endpoint: SocketAddr, allow: &[String], is_aws: bool) {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        match client.read(&mut buffer) {
            Ok(length @ 1..) => request.extend(&buffer[..length]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
    let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
    let target = line.rsplit_once(' ').map_or("", |(target, _)| target);
    let is_allowed = allow.iter().any(|allowed| allowed == target);
    let (method, path) = target.split_once(' ').unwrap_or_default();
    tell(&FromBroker::Request(Request {
        id,
        method: method.to_owned(),
        path: path.to_owned(),
        imds_version: is_aws.then(|| if head.contains("\nx-aws-ec2-metadata-token:") { 2 } else { 1 }),
        outcome: if is_allowed { Outcome::Allowed } else { Outcome::Refused },
        status: if is_allowed { 200 } else { 403 },
        reason: if is_allowed { String::new() } else { "not allowed".to_owned() },
        suppressed: 0,
    }));
    if is_allowed {
        let mut upstream = TcpStream::connect(endpoint).unwrap();
        upstream.write_all(&request).unwrap();
        let mut response = Vec::new();
        let _ = upstream.read_to_end(&mut response);
        let _ = client.write_all(&response);
    } else {
        let _ = client.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let _ = client.shutdown(Shutdown::Write);
    let _ = client.read(&mut buffer);
}

/// Sends a signal.
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// Reports whether the process still runs.
pub(crate) fn exists(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}
