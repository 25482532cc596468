//! Loading of programs, small built-in programs, and names of programs.

use std::{
    ffi::{CStr, c_char},
    io,
    os::fd::{AsFd, OwnedFd},
    slice,
};

use aya_obj::generated::{
    bpf_attr,
    bpf_cmd::{BPF_BTF_LOAD, BPF_PROG_GET_FD_BY_ID, BPF_PROG_LOAD},
    bpf_func_id::BPF_FUNC_clone_redirect,
    bpf_insn, bpf_map_info, bpf_prog_info,
    bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS,
};
use imds_ebpf_common::names::PREFIX;

use super::{bpf_fd, info, kind_of, link, number, raw_fd, zeroed};

pub(crate) const EXIT: u64 = 0x95;
/// Level of the verifier's log: instructions (`BPF_LOG_LEVEL1`) and statistics (`BPF_LOG_STATS`).
const LOG_LEVEL: u32 = 1 | 4;

/// Loads a TC program that passes every packet to the next program.
pub fn load_noop_program() -> io::Result<OwnedFd> {
    let unspecified = u64::from((-1_i32).cast_unsigned());
    load(&[set(0, unspecified), EXIT])
}

/// Loads a TC program that sends a clone of every packet to the egress of the interface with this index, and drops the
/// original. A clone has no socket, like a packet that the node forwards.
pub fn load_redirect(ifindex: u32) -> io::Result<OwnedFd> {
    const DROP: u64 = 2;
    let call = 0x85 | (BPF_FUNC_clone_redirect as u64) << 32;
    load(&[set(2, ifindex.into()), set(3, 0), call, set(0, DROP), EXIT])
}

/// Reports whether the program with this id is known not to belong to imds-agent. Compares the name, which is readable only
/// with `CAP_SYS_ADMIN`.
pub fn is_foreign(id: u32) -> bool {
    name(id).is_ok_and(|name| !name.starts_with(PREFIX.as_bytes()))
}

/// Returns the name of the program with this id; `None` if it has none, or without `CAP_SYS_ADMIN`.
pub fn program_name(id: u32) -> Option<String> {
    let name = name(id).ok()?;
    let name = name.split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// Returns the name of a map or a program, or the name of a link's program; `None` for other objects, and for links without
/// `CAP_SYS_ADMIN`.
pub fn object_name(object: impl AsFd) -> io::Result<Option<String>> {
    let name = match kind_of(&object)?.as_str() {
        "bpf-map" => bytes(info::<bpf_map_info>(object)?.name),
        "bpf-prog" => bytes(info::<bpf_prog_info>(object)?.name),
        "bpf_link" | "bpf-link" => return Ok(link(object)?.and_then(|link| program_name(link.program))),
        _ => return Ok(None),
    };
    Ok(Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()))
}

/// Reports whether the program with this id is known to belong to an imds-agent, by its name.
pub fn is_agent_program(id: u32) -> bool {
    name(id).is_ok_and(|name| name.starts_with(PREFIX.as_bytes()))
}

fn name(id: u32) -> io::Result<[u8; 16]> {
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    let program = bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    Ok(bytes(info::<bpf_prog_info>(program)?.name))
}

/// Returns the bytes of a name. `c_char` is signed on some architectures.
fn bytes(name: [c_char; 16]) -> [u8; 16] {
    name.map(|char| u8::from_ne_bytes(char.to_ne_bytes()))
}

/// Returns the instruction `register = value`, with a 32-bit value.
pub(crate) const fn set(register: u64, value: u64) -> u64 {
    0xb7 | register << 8 | value << 32
}

pub(crate) fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    // SAFETY: both types are 8 bytes of plain data, and the kernel checks every field of the instructions.
    let instructions = unsafe { slice::from_raw_parts(instructions.as_ptr().cast(), instructions.len()) };
    let request = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_CLS as u32,
        instructions,
        license: c"Dual MIT/GPL",
        name: *b"imds_probe\0\0\0\0\0\0",
        attach_type: 0,
        btf: None,
        func_info: (&[], 0),
        line_info: (&[], 0),
    };
    prog_load(&request, &mut [])
}

/// Request to load a program.
pub struct ProgLoad<'a> {
    /// Type of the program, as a `bpf_prog_type`.
    pub prog_type: u32,
    /// Instructions, relocated to the file descriptors of the maps.
    pub instructions: &'a [bpf_insn],
    /// License string. The kernel allows some helpers only for GPL-compatible ones.
    pub license: &'a CStr,
    /// Name, padded with at least one zero byte.
    pub name: [u8; 16],
    /// Expected attach type, as a `bpf_attach_type`; 0 for program types without one.
    pub attach_type: u32,
    /// BTF of the object, which `func_info` and `line_info` refer to.
    pub btf: Option<&'a OwnedFd>,
    /// Records of functions, and the size of a record in bytes.
    pub func_info: (&'a [u8], usize),
    /// Records of source lines, and the size of a record in bytes.
    pub line_info: (&'a [u8], usize),
}

/// Loads a program. The verifier writes its log to `log` unless that is empty. `ENOSPC` means that the log does not fit.
pub fn prog_load(request: &ProgLoad<'_>, log: &mut [u8]) -> io::Result<OwnedFd> {
    /// Largest number of attempts while the kernel returns `EAGAIN`, which means that a signal interrupted the verifier.
    const ATTEMPTS: u32 = 5;
    // The kernel rejects records without BTF.
    let records = |(bytes, size): (&[u8], usize)| match (request.btf, bytes.len().checked_div(size)) {
        (Some(_), Some(count)) => Ok((bytes.as_ptr() as u64, number(count)?, number(size)?)),
        _ => Ok::<_, io::Error>((0, 0, 0)),
    };
    let (func_info, func_info_cnt, func_info_rec_size) = records(request.func_info)?;
    let (line_info, line_info_cnt, line_info_rec_size) = records(request.line_info)?;
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_3.prog_type = request.prog_type;
    attr.__bindgen_anon_3.insn_cnt = number(request.instructions.len())?;
    attr.__bindgen_anon_3.insns = request.instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.license = request.license.as_ptr() as u64;
    if !log.is_empty() {
        attr.__bindgen_anon_3.log_level = LOG_LEVEL;
        attr.__bindgen_anon_3.log_size = number(log.len())?;
        attr.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    }
    attr.__bindgen_anon_3.prog_name = request.name.map(|byte| c_char::from_ne_bytes([byte]));
    attr.__bindgen_anon_3.expected_attach_type = request.attach_type;
    attr.__bindgen_anon_3.prog_btf_fd = request.btf.map_or(0, raw_fd);
    attr.__bindgen_anon_3.func_info_rec_size = func_info_rec_size;
    attr.__bindgen_anon_3.func_info = func_info;
    attr.__bindgen_anon_3.func_info_cnt = func_info_cnt;
    attr.__bindgen_anon_3.line_info_rec_size = line_info_rec_size;
    attr.__bindgen_anon_3.line_info = line_info;
    attr.__bindgen_anon_3.line_info_cnt = line_info_cnt;
    let mut loaded = bpf_fd(BPF_PROG_LOAD, &mut attr);
    for _ in 1..ATTEMPTS {
        if !loaded.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN)) {
            break;
        }
        loaded = bpf_fd(BPF_PROG_LOAD, &mut attr);
    }
    loaded
}

/// Loads type information for maps and programs.
pub fn btf_load(btf: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed::<bpf_attr>();
    attr.__bindgen_anon_7.btf = btf.as_ptr() as u64;
    attr.__bindgen_anon_7.btf_size = number(btf.len())?;
    bpf_fd(BPF_BTF_LOAD, &mut attr)
}

/// Returns the id of a program.
pub fn program_id(program: impl AsFd) -> io::Result<u32> {
    Ok(info::<bpf_prog_info>(program)?.id)
}

/// Reports whether the kernel has compiled the program to native code (JIT).
pub fn is_compiled(program: impl AsFd) -> io::Result<bool> {
    Ok(info::<bpf_prog_info>(program)?.jited_prog_len != 0)
}
