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
    io, mem,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr, thread,
    time::Duration,
};

use aya::{
    Pod,
    maps::{Array, IterableMap, MapData, MapError},
    sys::SyscallError,
};
use aya_obj::generated::{
    BPF_F_AFTER, BPF_F_BEFORE, BPF_F_ID, BPF_F_LINK,
    bpf_attach_type::{self, BPF_TCX_EGRESS},
    bpf_attr,
    bpf_cmd::{
        self, BPF_LINK_CREATE, BPF_LINK_DETACH, BPF_LINK_UPDATE, BPF_MAP_FREEZE, BPF_MAP_LOOKUP_ELEM,
        BPF_MAP_UPDATE_ELEM, BPF_OBJ_GET, BPF_OBJ_GET_INFO_BY_FD, BPF_OBJ_PIN, BPF_PROG_QUERY,
    },
    bpf_link_info,
    bpf_link_type::BPF_LINK_TYPE_CGROUP,
};

pub use self::{
    cgroup::{CgroupPrograms, cgroup_programs, effective_programs},
    link_target::{HookEntry, Link, MprogHook, Target},
    program::{
        ProgLoad, btf_load, is_agent_program, is_compiled, is_foreign, load_noop_program, load_redirect,
        object_name, prog_load, program_id, program_name,
    },
    sink::{MAX_SINK_IDS, load_sink},
};

/// Capacity of the list of programs of one hook: `BPF_MPROG_MAX` (`include/linux/bpf_mprog.h`), and for cgroups
/// `BPF_CGROUP_MAX_PROGS` (`include/linux/bpf-cgroup.h`).
const MPROG_MAX: usize = 64;
/// Largest number of programs on one hook. The last entry of the list is always empty (`bpf_mprog_max`).
pub const MAX_PROGRAMS: usize = MPROG_MAX - 1;

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const LOOPBACK: u32 = 1;

/// Reports whether the kernel supports TCX (6.6, commit e420bed02507).
pub fn has_tcx() -> bool {
    entries(LOOPBACK, MprogHook::TcxIngress).is_ok()
}

/// Attaches a program to a TCX or netkit hook of an interface, before all others.
pub fn link_create_first(program: impl AsFd, ifindex: u32, hook: MprogHook) -> io::Result<OwnedFd> {
    // Without a relative program, BPF_F_BEFORE inserts at the head of the list.
    link_create(program, ifindex, hook.attach_type(), BPF_F_BEFORE, 0)
}

/// Attaches a program to TCX egress of an interface, directly after the program of `agent`.
///
/// Directly after the agent's program, no other program can accept or redirect test packets so that they leave the node.
pub fn link_create_after(program: impl AsFd, ifindex: u32, agent: HookEntry) -> io::Result<OwnedFd> {
    let (flags, relative_id) = match agent {
        HookEntry { program, link: 0 } => (BPF_F_AFTER | BPF_F_ID, program),
        HookEntry { link, .. } => (BPF_F_AFTER | BPF_F_ID | BPF_F_LINK, link),
    };
    link_create(program, ifindex, BPF_TCX_EGRESS, flags, relative_id)
}

/// Attaches a program to a cgroup. Other programs on the cgroup stay, because links always use `BPF_F_ALLOW_MULTI`.
pub fn link_create_cgroup(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    link_create(program, raw_fd(&cgroup), attach_type, 0, 0)
}

/// Creates a link to `target`, an interface index or the file descriptor of a cgroup.
fn link_create(
    program: impl AsFd,
    target: u32,
    attach_type: bpf_attach_type,
    flags: u32,
    relative_id: u32,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed::<bpf_attr>();
    attr.link_create.__bindgen_anon_1.prog_fd = raw_fd(&program);
    attr.link_create.__bindgen_anon_2.target_fd = target;
    attr.link_create.attach_type = attach_type as u32;
    attr.link_create.flags = flags;
    attr.link_create.__bindgen_anon_3.tcx.__bindgen_anon_1.relative_id = relative_id;
    bpf_fd(BPF_LINK_CREATE, &mut attr)
}

/// Replaces the program of a link atomically.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed::<bpf_attr>();
    attr.link_update.link_fd = raw_fd(&link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw_fd(&program);
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link at once, even if other processes have it open.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed::<bpf_attr>();
    attr.link_detach.link_fd = raw_fd(&link);
    bpf(BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Returns the description of a link, or `None` if the object is not a link.
pub fn link(link: impl AsFd) -> io::Result<Option<Link>> {
    if !is_link(&link)? {
        return Ok(None);
    }
    let info: bpf_link_info = info(link)?;
    // SAFETY: the kernel or `info` has initialized all bytes, and every member of the union consists of integers.
    let tcx = unsafe { info.__bindgen_anon_1.tcx };
    // Netkit links have the fields of TCX links.
    let target = match MprogHook::from_link(info.type_, tcx.attach_type) {
        Some(hook) => Target::Interface { ifindex: tcx.ifindex, hook },
        None if info.type_ == BPF_LINK_TYPE_CGROUP as u32 => {
            // SAFETY: as above.
            let cgroup = unsafe { info.__bindgen_anon_1.cgroup };
            Target::Cgroup { id: cgroup.cgroup_id, attach_type: cgroup.attach_type }
        }
        None => Target::Other,
    };
    Ok(Some(Link { id: info.id, program: info.prog_id, target }))
}

/// Lists the programs on a TCX or netkit hook of an interface, in the order in which they run. Returns an error if the kernel
/// or the interface does not have the hook.
pub fn entries(ifindex: u32, hook: MprogHook) -> io::Result<Vec<HookEntry>> {
    let mut links = [0; MPROG_MAX];
    let (programs, _) = query(ifindex, hook.attach_type(), 0, Some(&mut links))?;
    Ok(programs.into_iter().zip(links).map(|(program, link)| HookEntry { program, link }).collect())
}

/// Returns the ids of the programs at a hook of `target`, an interface index or the file descriptor of a cgroup, and their
/// attach flags. Writes the ids of their links to `links`, which the kernel supports only for interfaces.
fn query(
    target: u32,
    attach_type: bpf_attach_type,
    query_flags: u32,
    links: Option<&mut [u32; MPROG_MAX]>,
) -> io::Result<(Vec<u32>, u32)> {
    let mut programs = [0_u32; MPROG_MAX];
    let mut attr = zeroed::<bpf_attr>();
    attr.query.__bindgen_anon_1.target_fd = target;
    attr.query.attach_type = attach_type as u32;
    attr.query.query_flags = query_flags;
    attr.query.prog_ids = programs.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.count = number(programs.len())?;
    attr.query.link_ids = links.map_or(0, |links| links.as_mut_ptr() as u64);
    bpf(BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: all bytes are initialized, and every field of this member consists of integers.
    let answer = unsafe { attr.query };
    // SAFETY: both members of the union are the same integer.
    let count = unsafe { answer.__bindgen_anon_2.count };
    Ok((programs.into_iter().take(count as usize).collect(), answer.attach_flags))
}

/// Opens the object that is pinned at `path`.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    bpf_fd(BPF_OBJ_GET, &mut attr)
}

/// Pins an object at `path`, which must not exist.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw_fd(&object);
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Writes the only element of an array map. The length of `value` must be the value size of the map.
pub fn map_write(map: impl AsFd, value: &[u8]) -> io::Result<()> {
    let key = 0_u32;
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_2.map_fd = raw_fd(&map);
    attr.__bindgen_anon_2.key = (&raw const key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Reads the first element of an array. The value stays on the heap, because the pages of a stack that once grew stay with the process.
pub fn first_element<V: Pod>(array: &Array<MapData, V>) -> Result<Box<V>, MapError> {
    let key = 0_u32;
    let mut value = Box::<V>::new_zeroed();
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_2.map_fd = raw_fd(IterableMap::map(array).fd());
    attr.__bindgen_anon_2.key = (&raw const key) as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)
        .map_err(|io_error| SyscallError { call: "bpf_map_lookup_elem", io_error })?;
    // SAFETY: all bytes are initialized, and every value of them is valid for a `Pod`.
    Ok(unsafe { value.assume_init() })
}

/// Makes a map read-only for all processes, so that the verifier treats its values as constants.
pub fn map_freeze(map: impl AsFd) -> io::Result<()> {
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_2.map_fd = raw_fd(&map);
    bpf(BPF_MAP_FREEZE, &mut attr).map(drop)
}

/// Returns the description of a BPF object. `T` is the `struct bpf_…_info` of its type.
fn info<T: Copy>(object: impl AsFd) -> io::Result<T> {
    let mut info = zeroed::<T>();
    let mut attr = zeroed::<bpf_attr>();
    attr.info.bpf_fd = raw_fd(&object);
    attr.info.info_len = number(size_of::<T>())?;
    attr.info.info = (&raw mut info) as u64;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
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

/// Returns an object without any values. `T` is one of the C structures or unions of the kernel's interface.
fn zeroed<T: Copy>() -> T {
    // SAFETY: every T of this module and its children consists of integers, for which zero bytes are valid.
    unsafe { mem::zeroed() }
}

/// Returns the number of a descriptor. Takes a reference, because a descriptor is closed where its owner is dropped.
fn raw_fd(object: &impl AsFd) -> u32 {
    object.as_fd().as_raw_fd().cast_unsigned()
}

fn number(number: usize) -> io::Result<u32> {
    u32::try_from(number).map_err(io::Error::other)
}

fn bpf_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just created this descriptor for this process, and no other owner exists.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls bpf(2). A kernel that does not know the last fields of `attr` accepts zeros in them.
fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<c_long> {
    // SAFETY: pointers in the attributes refer to buffers of the given sizes, which outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_int, ptr::from_mut(attr), size_of::<bpf_attr>())
    };
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
