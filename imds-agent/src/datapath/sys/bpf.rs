//! Wrappers of bpf(2) commands that aya lacks.
//!
//! aya identifies interfaces by name, which can move to another interface. These functions take interface indices, and
//! return the information that the reconcile loop needs.

mod cgroup;
mod link_target;
mod program;
mod sink;

use std::{
    ffi::{CString, c_long},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr, thread,
    time::Duration,
};

use aya_obj::generated::{
    BPF_F_BEFORE,
    bpf_attach_type::{self},
    bpf_cmd::{
        self, BPF_LINK_CREATE, BPF_LINK_DETACH, BPF_LINK_UPDATE, BPF_MAP_FREEZE, BPF_MAP_UPDATE_ELEM,
        BPF_OBJ_GET, BPF_OBJ_GET_INFO_BY_FD, BPF_OBJ_PIN, BPF_PROG_QUERY,
    },
    bpf_link_type::BPF_LINK_TYPE_CGROUP,
};

pub use self::{
    cgroup::{CgroupPrograms, cgroup_programs, effective_programs},
    link_target::{Direction, HookEntry, Link, MprogHook, Target},
    program::{
        ProgLoad, btf_load, is_agent_program, is_compiled, is_foreign, load_noop_program, load_redirect,
        object_name, prog_load, program_id, program_name,
    },
    sink::{MAX_SINK_IDS, link_create_after, load_sink},
};

/// Capacity of the list of programs of one hook: `BPF_MPROG_MAX` (`include/linux/bpf_mprog.h`).
const MPROG_MAX: u32 = 64;
/// Largest number of programs on one hook. The last entry of the list is always empty (`bpf_mprog_max`).
pub const MAX_PROGRAMS: u32 = MPROG_MAX - 1;

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const LOOPBACK: u32 = 1;

/// Reports whether the kernel supports TCX (6.6, commit e420bed02507).
#[must_use]
pub fn has_tcx() -> bool {
    tcx_entries(LOOPBACK, Direction::Ingress).is_ok()
}

/// Attaches a program to a TCX or netkit hook of an interface, before all others.
pub fn link_create_first(
    program: impl AsFd,
    ifindex: u32,
    hook: impl Into<MprogHook>,
) -> io::Result<OwnedFd> {
    // Without a relative program, BPF_F_BEFORE inserts at the head of the list.
    let attach_type = hook.into().attach_type() as u32;
    link_create(program.as_fd().as_raw_fd(), ifindex, attach_type, BPF_F_BEFORE)
}

/// Attaches a program to a cgroup. Other programs on the cgroup stay, because links always use `BPF_F_ALLOW_MULTI`.
pub fn link_create_cgroup(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let cgroup = cgroup.as_fd().as_raw_fd().cast_unsigned();
    link_create(program.as_fd().as_raw_fd(), cgroup, attach_type as u32, 0)
}

fn link_create(prog_fd: i32, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: i32,
        /// File descriptor of a cgroup, or interface index.
        target: u32,
        attach_type: u32,
        flags: u32,
        relative: u32,
        pad: u32,
        expected_revision: u64,
    }
    let attr = Attr { prog_fd, target, attach_type, flags, relative: 0, pad: 0, expected_revision: 0 };
    bpf_fd(BPF_LINK_CREATE, attr)
}

/// Replaces the program of a link atomically.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: i32,
        new_prog_fd: i32,
        flags: u32,
        old_prog_fd: u32,
    }
    let attr = Attr {
        link_fd: link.as_fd().as_raw_fd(),
        new_prog_fd: program.as_fd().as_raw_fd(),
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, attr).map(drop)
}

/// Detaches a link at once, even if other processes have it open.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: i32,
    }
    bpf(BPF_LINK_DETACH, Attr { link_fd: link.as_fd().as_raw_fd() }).map(drop)
}

/// Returns the description of a link, or `None` if the object is not a link.
pub fn link(link: impl AsFd) -> io::Result<Option<Link>> {
    /// First fields of `struct bpf_link_info`, with those of interface and cgroup links.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        // TCX and netkit links: interface index and attach type. cgroup links: 64-bit id and attach type.
        target: [u32; 4],
    }
    if !is_link(&link)? {
        return Ok(None);
    }
    let info: Info = info(link)?;
    let [first, second, third, _] = info.target;
    let target = match (info.kind, MprogHook::from_link(info.kind, second)) {
        (_, Some(hook)) => Target::Interface { ifindex: first, hook },
        (kind, _) if kind == BPF_LINK_TYPE_CGROUP as u32 => {
            // The two words in memory order are the 64-bit id.
            let (first, second) = (first.to_ne_bytes(), second.to_ne_bytes());
            let mut id = [0; 8];
            id[..4].copy_from_slice(&first);
            id[4..].copy_from_slice(&second);
            Target::Cgroup { id: u64::from_ne_bytes(id), attach_type: third }
        }
        _ => Target::Other,
    };
    Ok(Some(Link { id: info.id, program: info.program, target }))
}

/// Lists the programs on a TCX hook of an interface, in the order in which they run.
pub fn tcx_entries(ifindex: u32, direction: Direction) -> io::Result<Vec<HookEntry>> {
    entries(ifindex, direction.into())
}

/// Lists the programs on a TCX or netkit hook of an interface, in the order in which they run. Returns an error if the kernel
/// or the interface does not have the hook.
pub fn entries(ifindex: u32, hook: MprogHook) -> io::Result<Vec<HookEntry>> {
    #[repr(C)]
    struct Attr {
        target_ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let (mut programs, mut links) = ([0_u32; MPROG_MAX as usize], [0_u32; MPROG_MAX as usize]);
    let mut attr = Attr {
        target_ifindex: ifindex,
        attach_type: hook.attach_type() as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr() as u64,
        count: MPROG_MAX,
        pad: 0,
        prog_attach_flags: 0,
        link_ids: links.as_mut_ptr() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    bpf_mut(BPF_PROG_QUERY, &mut attr)?;
    let entries = programs.into_iter().zip(links).take(attr.count as usize);
    Ok(entries.map(|(program, link)| HookEntry { program, link }).collect())
}

/// Opens the object that is pinned at `path`.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf_fd(BPF_OBJ_GET, PinAttr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })
}

/// Pins an object at `path`, which must not exist.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = object.as_fd().as_raw_fd();
    bpf(BPF_OBJ_PIN, PinAttr { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 }).map(drop)
}

/// Writes the only element of an array map. The length of `value` must be the value size of the map.
pub fn map_write(map: impl AsFd, value: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: i32,
        reserved: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = 0_u32;
    let (key, value) = ((&raw const key) as u64, value.as_ptr() as u64);
    bpf(BPF_MAP_UPDATE_ELEM, Attr { map_fd: map.as_fd().as_raw_fd(), reserved: 0, key, value, flags: 0 })
        .map(drop)
}

/// Makes a map read-only for all processes, so that the verifier treats its values as constants.
pub fn map_freeze(map: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: i32,
        reserved: u32,
    }
    bpf(BPF_MAP_FREEZE, Attr { map_fd: map.as_fd().as_raw_fd(), reserved: 0 }).map(drop)
}

#[repr(C)]
struct PinAttr {
    pathname: u64,
    bpf_fd: i32,
    file_flags: u32,
}

/// Returns the description of a BPF object. `T` contains the first fields of the `struct bpf_…_info` of its type, as integers.
fn info<T: Default>(object: impl AsFd) -> io::Result<T> {
    #[repr(C)]
    struct Attr {
        bpf_fd: i32,
        info_len: u32,
        info: u64,
    }
    let mut info = T::default();
    let info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let attr = Attr { bpf_fd: object.as_fd().as_raw_fd(), info_len, info: (&raw mut info) as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, attr)?;
    Ok(info)
}

/// Reports whether a BPF object is a link. The kernel describes an object of any type, without an error for an unexpected one.
fn is_link(object: &impl AsFd) -> io::Result<bool> {
    // The name has an underscore for a new link (bpf_link_prime), and a hyphen for a reopened one (bpf_link_new_fd).
    Ok(matches!(kind_of(object)?.as_str(), "bpf_link" | "bpf-link"))
}

/// Returns the name of the anonymous inode of a BPF object: `bpf-map`, `bpf-prog`, `bpf_link` or `bpf-link`.
fn kind_of(object: &impl AsFd) -> io::Result<String> {
    let path = format!("/proc/self/fd/{}", object.as_fd().as_raw_fd());
    let name = std::fs::read_link(path)?;
    let name = name.to_string_lossy();
    Ok(name.strip_prefix("anon_inode:").unwrap_or_default().to_owned())
}

fn bpf_fd<T>(command: bpf_cmd, attr: T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just created this descriptor for this process, and no other owner exists.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: bpf_cmd, mut attr: T) -> io::Result<c_long> {
    bpf_mut(command, &mut attr)
}

fn bpf_mut<T>(command: bpf_cmd, attr: &mut T) -> io::Result<c_long> {
    // SAFETY: every T of this module and its children contains the first fields of the command's part of `union bpf_attr`,
    // without implicit padding. Pointers in it refer to buffers of the given sizes, which outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Waits until all programs that were running at the call have ended. Programs run in RCU read-side critical sections, and
/// `MEMBARRIER_CMD_GLOBAL` (Linux 4.3) calls `synchronize_rcu` (kernel/sched/membarrier.c).
pub fn wait_for_programs() {
    // SAFETY: the system call takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Kernels with nohz_full CPUs reject the command. No program runs this long for a packet.
        thread::sleep(Duration::from_millis(100));
    }
}
