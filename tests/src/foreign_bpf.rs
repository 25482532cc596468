//! BPF programs of other software on a node, and operations that detach the agent's programs.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use aya::programs::tc::TcAttachType;

use crate::{
    Netns,
    hook::{direction, run_tc},
    pins::PinDir,
};

/// TC action that ends classification and lets the packet pass.
pub const TC_ACT_OK: i32 = 0;

// Commands and constants of include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_NETKIT_PEER: u32 = 55;
const BPF_F_BEFORE: u32 = 1 << 3;
/// Helper function `bpf_redirect`.
const REDIRECT: u32 = 23;
const SET_HASH_INVALID: u32 = 41;
const SET_HASH: u32 = 48;

/// A program that treats every packet or call alike. The kernel frees it with its last link or filter.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    pin: PathBuf,
    _pins: PinDir,
}

impl ForeignProgram {
    /// Loads a program that returns `action`.
    #[must_use]
    pub fn returning(action: i32) -> Self {
        // r0 = action; exit
        let instructions = [0xb7_u64 | u64::from(action.cast_unsigned()) << 32, 0x95];
        Self::load(&instructions, TC).expect("load a program of two instructions")
    }

    /// Loads an XDP program that lets every frame pass.
    #[must_use]
    pub fn passing_frames() -> Self {
        // r0 = XDP_PASS; exit
        let kind = Kind { prog_type: BPF_PROG_TYPE_XDP, expected_attach_type: 0 };
        Self::load(&[0xb7 | 2 << 32, 0x95], kind).expect("load a program of two instructions")
    }

    /// Loads a program for packets of a cgroup that lets every packet pass.
    #[must_use]
    pub fn passing_packets() -> Self {
        // r0 = 1; exit
        let kind = Kind { prog_type: BPF_PROG_TYPE_CGROUP_SKB, expected_attach_type: 0 };
        Self::load(&[0xb7 | 1 << 32, 0x95], kind).expect("load a program of two instructions")
    }

    /// Loads a program that sends packets out of the interface with this index.
    #[must_use]
    pub fn redirecting(ifindex: u32) -> Self {
        Self::calling(REDIRECT, &[ifindex, 0]).expect("load a program that calls bpf_redirect")
    }

    /// Loads a program that assigns the mark of every packet and leaves the packet to the next program.
    #[must_use]
    pub fn setting_mark(mark: u32) -> Self {
        // r2 = mark; ((struct __sk_buff *)r1)->mark = r2; r0 = TC_ACT_UNSPEC; exit
        let instructions = [
            0xb7 | 2 << 8 | u64::from(mark) << 32,
            0x63 | 0x21 << 8 | 8 << 16,
            0xb7 | u64::from(u32::MAX) << 32,
            0x95,
        ];
        Self::load(&instructions, TC).expect("load a program of four instructions")
    }

    /// Loads a program that sets the flow hash of every packet and leaves the packet to the next program. Without a hash, the
    /// kernel computes a new one.
    #[must_use]
    pub fn setting_hash(hash: Option<u32>) -> Self {
        let helper = if hash.is_some() { SET_HASH } else { SET_HASH_INVALID };
        // r2 = hash; call helper; r0 = TC_ACT_UNSPEC; exit
        let instructions = [
            0xb7 | 2 << 8 | u64::from(hash.unwrap_or_default()) << 32,
            0x85 | u64::from(helper) << 32,
            0xb7 | u64::from(u32::MAX) << 32,
            0x95,
        ];
        Self::load(&instructions, TC).expect("load a program of four instructions")
    }

    /// Loads a TC program that returns the result of a kernel helper. Without arguments, the helper receives the
    /// context.
    pub fn calling(helper: u32, arguments: &[u32]) -> io::Result<Self> {
        // r1 = argument; …; call helper; exit
        let set = |(register, argument): (u64, &u32)| 0xb7 | register << 8 | u64::from(*argument) << 32;
        let mut instructions: Vec<_> = (1..).zip(arguments).map(set).collect();
        instructions.extend([0x85 | u64::from(helper) << 32, 0x95]);
        Self::load(&instructions, TC)
    }

    /// Loads a cgroup socket program for this `bpf_attach_type` that allows every call.
    #[must_use]
    pub fn allowing_calls(attach_type: u32) -> Self {
        // r0 = 1; exit
        let instructions = [0xb7_u64 | 1 << 32, 0x95];
        let kind = Kind { prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR, expected_attach_type: attach_type };
        Self::load(&instructions, kind).expect("load a program of two instructions")
    }

    /// Loads a cgroup program for IPv4 sockets and this `bpf_attach_type` that redirects every call to `address`, as a
    /// Service load balancer does.
    #[must_use]
    pub fn redirecting_calls(attach_type: u32, address: Ipv4Addr) -> Self {
        let address = u64::from(u32::from_ne_bytes(address.octets()));
        // r2 = address; ((struct bpf_sock_addr *)r1)->user_ip4 = r2; r0 = 1; exit
        let instructions = [0xb7 | 2 << 8 | address << 32, 0x63 | 0x21 << 8 | 4 << 16, 0xb7 | 1 << 32, 0x95];
        let kind = Kind { prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR, expected_attach_type: attach_type };
        Self::load(&instructions, kind).expect("load a program of four instructions")
    }

    /// Attaches the program to a cgroup, after all others.
    #[must_use]
    pub fn attach_cgroup(&self, cgroup: &Path, attach_type: u32) -> ForeignLink {
        let cgroup = File::open(cgroup).expect("open a cgroup").into();
        let mut attributes = LinkCreate {
            prog_fd: raw(&self.program),
            target_ifindex: raw(&cgroup),
            attach_type,
            ..LinkCreate::default()
        };
        ForeignLink(Some(bpf_fd(BPF_LINK_CREATE, &mut attributes).expect("create a link of a cgroup")))
    }

    /// Attaches the program to a cgroup without `BPF_F_ALLOW_MULTI`, so that no other program can be attached there.
    #[must_use]
    pub fn attach_cgroup_alone(&self, cgroup: &Path, attach_type: u32) -> AloneOnCgroup {
        let cgroup = File::open(cgroup).expect("open a cgroup").into();
        let program = self.program.try_clone().expect("duplicate a descriptor");
        let attached = AloneOnCgroup { cgroup, program, attach_type };
        bpf(BPF_PROG_ATTACH, &mut attached.attributes()).expect("attach to a cgroup");
        attached
    }

    fn load(instructions: &[u64], kind: Kind) -> io::Result<Self> {
        let mut attributes = ProgLoad {
            prog_type: kind.prog_type,
            expected_attach_type: kind.expected_attach_type,
            insn_cnt: instructions.len().try_into().expect("a few instructions"),
            insns: address(instructions),
            license: address(c"GPL".to_bytes_with_nul()),
            prog_name: *b"foreign\0\0\0\0\0\0\0\0\0",
            ..ProgLoad::default()
        };
        let program = bpf_fd(BPF_PROG_LOAD, &mut attributes)?;

        let pins = PinDir::new();
        fs::create_dir(pins.path()).expect("a directory on bpffs");
        let pin = pins.path().join("foreign");
        let path = c_path(&pin);
        let mut attributes =
            ObjPin { pathname: address(path.as_bytes_with_nul()), bpf_fd: raw(&program), file_flags: 0 };
        bpf(BPF_OBJ_PIN, &mut attributes).expect("pin a program");
        Ok(Self { program, pin, _pins: pins })
    }

    /// Returns the descriptor of the program.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Returns the path at which the program is pinned.
    pub fn pin(&self) -> &Path {
        &self.pin
    }

    /// Attaches the program to a TCX hook before all others.
    #[must_use]
    pub fn attach_tcx_first(&self, netns: &Netns, ifindex: u32, hook: TcAttachType) -> ForeignLink {
        let attach_type = match hook {
            TcAttachType::Egress => BPF_TCX_EGRESS,
            TcAttachType::Ingress | TcAttachType::Custom(_) => BPF_TCX_INGRESS,
        };
        self.attach_first(netns, ifindex, attach_type)
    }

    /// Attaches the program before all others at the peer of the netkit pair whose primary device has this index.
    #[must_use]
    pub fn attach_netkit_peer_first(&self, netns: &Netns, ifindex: u32) -> ForeignLink {
        self.attach_first(netns, ifindex, BPF_NETKIT_PEER)
    }

    fn attach_first(&self, netns: &Netns, ifindex: u32, attach_type: u32) -> ForeignLink {
        let mut attributes = LinkCreate {
            prog_fd: raw(&self.program),
            target_ifindex: ifindex,
            attach_type,
            flags: BPF_F_BEFORE,
            ..LinkCreate::default()
        };
        // The kernel looks the index up in the caller's namespace.
        ForeignLink(Some(netns.run(|| bpf_fd(BPF_LINK_CREATE, &mut attributes)).expect("create a link")))
    }

    /// Adds the program as a direct-action filter to clsact, which the interface must have.
    pub fn attach_filter(&self, netns: &Netns, interface: &str, hook: TcAttachType, priority: u16) {
        let (pin, priority) = (self.pin.to_str().expect("a UTF-8 path"), priority.to_string());
        let filter =
            ["filter", "add", "dev", interface, direction(hook), "prio", &priority, "protocol", "all"];
        run_tc(netns, &[&filter[..], &["bpf", "direct-action", "pinned", pin]].concat());
    }
}

/// Link of a foreign program. Dropping it detaches the program immediately, also if a new process has not yet closed its copy of the
/// descriptor.
#[derive(Debug)]
pub struct ForeignLink(Option<OwnedFd>);

impl ForeignLink {
    /// Pins the link over the object at `to`.
    pub fn pin_over(&self, to: &Path) {
        pin_object_over(self.0.as_ref().expect("an open link"), to);
    }

    /// Closes the link, which stays attached as long as it has a pin.
    pub fn close(mut self) {
        self.0 = None;
    }
}

impl Drop for ForeignLink {
    fn drop(&mut self) {
        // Fails if the kernel has detached the program with its interface or cgroup.
        if let Some(link) = &self.0 {
            let _detached = bpf(BPF_LINK_DETACH, &mut raw(link));
        }
    }
}

/// A program that is attached to a cgroup without a link. Dropping this detaches it.
#[derive(Debug)]
pub struct AloneOnCgroup {
    cgroup: OwnedFd,
    program: OwnedFd,
    attach_type: u32,
}

impl AloneOnCgroup {
    fn attributes(&self) -> ProgAttach {
        let (target_fd, attach_bpf_fd) = (raw(&self.cgroup), raw(&self.program));
        ProgAttach { target_fd, attach_bpf_fd, attach_type: self.attach_type, attach_flags: 0 }
    }
}

impl Drop for AloneOnCgroup {
    fn drop(&mut self) {
        if let Err(error) = bpf(BPF_PROG_DETACH, &mut self.attributes()) {
            eprintln!("detach from a cgroup: {error}");
        }
    }
}

/// Pins the object at `from` also at `to`, and replaces the pin there.
pub fn replace_pin(from: &Path, to: &Path) {
    let object = open(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    pin_object_over(&object, to);
}

/// Pins an object at `to`, and replaces the pin there.
pub fn pin_object_over(object: &OwnedFd, to: &Path) {
    // bpffs rejects names with dots.
    let new = to.with_file_name("foreign_new");
    let path = c_path(&new);
    let mut attributes =
        ObjPin { pathname: address(path.as_bytes_with_nul()), bpf_fd: raw(object), file_flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attributes).unwrap_or_else(|error| panic!("{}: {error}", new.display()));
    fs::rename(&new, to).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
}

/// Detaches a pinned link as `bpftool link detach` does. The pin remains and refers to a defunct link.
pub fn detach_link(pin: &Path) {
    let link = open(pin).unwrap_or_else(|error| panic!("{}: {error}", pin.display()));
    bpf(BPF_LINK_DETACH, &mut raw(&link)).expect("detach a link");
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = c_path(pin);
    let mut attributes = ObjPin { pathname: address(path.as_bytes_with_nul()), bpf_fd: 0, file_flags: 0 };
    bpf_fd(BPF_OBJ_GET, &mut attributes)
}

/// Program type, and the expected attach type if the program type needs one.
#[derive(Clone, Copy, Debug)]
struct Kind {
    prog_type: u32,
    expected_attach_type: u32,
}

const TC: Kind = Kind { prog_type: BPF_PROG_TYPE_SCHED_CLS, expected_attach_type: 0 };

/// Part of `union bpf_attr` that `BPF_PROG_LOAD` needs.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// Part of `union bpf_attr` for `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Start of `union bpf_attr` as `BPF_PROG_ATTACH` and `BPF_PROG_DETACH` read it.
#[repr(C)]
struct ProgAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Part of `union bpf_attr` for `BPF_LINK_CREATE` of a TCX, netkit or cgroup link. Cgroup links have a descriptor in
/// the field of the interface index.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    reserved: u32,
    expected_revision: u64,
}

fn bpf_fd<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: callers pass only commands that return a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: the kernel accesses at most `size` bytes of the attributes and assumes zero for the rest of the union.
    // Memory that the attributes point to outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result.try_into().expect("descriptors are C ints"))
    }
}

fn address<T>(data: &[T]) -> u64 {
    data.as_ptr() as u64
}

fn raw(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path without zero bytes")
}
