//! Ways around the guard that are not packets made by hand (those are in `crafted`) nor ways of attaching (`hooks`):
//! calls that name a destination by other means, a metadata service on the node itself, and names and numbers that a
//! pod inherits from another. Each is open before the agent runs, closed by every hook that is to hold it alone, and
//! open again after `unload`.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use imds_tests::{
    METADATA, Netns, Pod, PodLink, Services, World,
    probe::{SHORT, http_get, reachable},
    skip_without_netns_cookie,
};

const TCP_FASTOPEN_CONNECT: libc::c_int = 30;

fn socket(netns: &Netns, protocol: libc::c_int) -> io::Result<OwnedFd> {
    netns.run(|| {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
        // SAFETY: a descriptor that was just made, where it is one.
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    })
}

fn address(to: Ipv4Addr) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().expect("a small constant"),
        sin_port: 80_u16.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(to).to_be() },
        sin_zero: [0; 8],
    }
}

fn set_timeout(socket: &OwnedFd) {
    let timeout = libc::timeval { tv_sec: 0, tv_usec: SHORT.subsec_micros().into() };
    for option in [libc::SO_SNDTIMEO, libc::SO_RCVTIMEO] {
        set(socket, libc::SOL_SOCKET, option, &timeout);
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let value: *const T = value;
    // SAFETY: the value is as long as the length says and outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.cast(), length) };
    assert_eq!(result, 0, "setsockopt {option}: {}", io::Error::last_os_error());
}

/// connect(2), for what the standard library has no name.
fn connect(socket: &OwnedFd, to: Ipv4Addr) -> io::Result<()> {
    let address = address(to);
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the address is as long as the length says and outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// sendto(2) with `MSG_FASTOPEN`, which connects and sends at once.
fn fast_open(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::IPPROTO_TCP)?;
    set_timeout(&socket);
    let (address, data) = (address(to), b"GET / HTTP/1.0\r\n\r\n");
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: address and data are as long as the lengths say and outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_FASTOPEN,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { answer(&socket) }
}

/// The same by the socket option, where connect(2) waits for the first write.
fn fast_open_connect(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::IPPROTO_TCP)?;
    set_timeout(&socket);
    set(&socket, libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &1_i32);
    connect(&socket, to)?;
    exchange(&socket)
}

fn mptcp(netns: &Netns, to: Ipv4Addr) -> io::Result<()> {
    let socket = socket(netns, libc::IPPROTO_MPTCP)?;
    set_timeout(&socket);
    connect(&socket, to)?;
    exchange(&socket)
}

fn exchange(socket: &OwnedFd) -> io::Result<()> {
    let data = b"GET / HTTP/1.0\r\n\r\n";
    // SAFETY: the data is as long as the length says.
    let sent =
        unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { answer(socket) }
}

fn answer(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0_u8; 16];
    // SAFETY: the buffer is as long as the length says.
    let read = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if read > 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A way is open without the agent, closed by each of `hooks` alone, and open again.
fn assert_held(world: &World, hooks: &[&'static str], way: &str, is_open: &(dyn Fn() -> bool + Sync)) {
    let is_open = || world.in_cgroup(is_open);
    assert!(is_open(), "{way} is not open without the agent");
    for &hook in hooks {
        let agent = world.agent().hooks(&[hook]).spawn_ready();
        world.assert_nothing_arrives(|| assert!(!is_open(), "{way} is open with {hook}"));
        drop(agent);
        world.unload();
        assert!(is_open(), "{way} is not open after {hook}");
    }
}

const ALL: [&str; 3] = ["pod_edge", "node_edge", "socket"];

#[test]
fn tcp_fast_open() {
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Routed);
    assert_held(&world, &ALL, "MSG_FASTOPEN", &|| fast_open(&pod.netns, METADATA).is_ok());
    assert_held(&world, &ALL, "TCP_FASTOPEN_CONNECT", &|| fast_open_connect(&pod.netns, METADATA).is_ok());
}

#[test]
fn multipath_tcp() {
    if skip_without_netns_cookie() {
        return;
    }
    let world = World::new();
    let pod = world.add_pod(PodLink::Bridged);
    if let Err(error) = socket(&pod.netns, libc::IPPROTO_MPTCP) {
        println!("skipped: this kernel has no MPTCP ({error})");
        return;
    }
    assert_held(&world, &ALL, "MPTCP", &|| mptcp(&pod.netns, METADATA).is_ok());
}

#[test]
fn a_metadata_service_on_the_node_itself() {
    if skip_without_netns_cookie() {
        return;
    }
    // What a proxy like kube2iam is: nothing leaves by an uplink.
    let world = World::new();
    let pods = [PodLink::Routed, PodLink::Bridged].map(|link| world.add_pod(link));
    world.node.ip(&format!("addr add {METADATA}/32 dev lo"));
    let _services = Services::start(&world.node, &[METADATA.into()]);
    for pod in &pods {
        assert_held(&world, &["pod_edge", "socket"], "a service on the node", &|| {
            http_get(&pod.netns, METADATA, SHORT).is_answer()
        });
    }
}

#[test]
fn a_link_that_is_renamed_or_moved_to_another_bridge_stays_guarded() {
    let world = World::new();
    let pod = world.add_pod(PodLink::Bridged);
    assert!(reachable(&pod.netns, METADATA));
    let _agent = world.agent().spawn_ready();
    world.assert_blocked(&pod);
    world.node.ip(&format!(
        "link set {0} down
         link set {0} name other0
         link add cni1 type bridge
         link set cni1 up
         link set other0 master cni1
         link set other0 up
         addr del {1}/24 dev {2}
         addr add {1}/24 dev cni1",
        pod.host_ifname,
        bridge_address(&world),
        World::BRIDGE
    ));
    world.assert_blocked(&pod);
    world.status_when("the new name is known", |status| {
        status.find("other0").is_some_and(|link| link.role == "pod" && link.guard.is_some())
    });
    world.assert_blocked(&pod);
}

fn bridge_address(world: &World) -> String {
    let mut command = world.node.command("ip");
    command.args(["-4", "-o", "addr", "show", "dev", World::BRIDGE]);
    let output = String::from_utf8(imds_tests::output(command).stdout).unwrap();
    let address = output.split_whitespace().find_map(|word| word.split_once('/')).expect("an address");
    address.0.to_owned()
}

#[test]
fn a_pod_that_takes_the_name_and_index_of_one_that_is_gone_is_guarded_and_starts_from_zero() {
    let world = World::new();
    let first = world.add_pod(PodLink::Routed);
    let agent = world.agent().spawn_ready();
    world.assert_blocked(&first);
    let denied = world.status().interface(&first.host_ifname).counts.denied.packets;
    assert!(denied > 0);

    // While no agent looks: the next one can't know but by the links themselves.
    agent.kill9();
    let (name, index) = (first.host_ifname.clone(), first.host_ifindex);
    first.delete();
    let successor = Netns::new("successor");
    world.node.ip(&format!(
        "link add {name} index {index} type veth peer name {} netns {}",
        Pod::IFNAME,
        successor.name()
    ));
    world.node.ip(&format!("link set {name} up"));
    let agent = world.agent().spawn_ready();
    let status = world.status();
    let interface = status.interface(&name);
    assert!(interface.ifindex == index && interface.guard.is_some(), "{interface:?}");
    assert_eq!(interface.counts.denied.packets, 0);
    assert_eq!(status.departed.denied.packets, denied);
    drop(agent);
}
