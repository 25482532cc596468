//! Programs of a few instructions, and names of programs.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya_obj::generated::{
    bpf_cmd::{BPF_PROG_GET_FD_BY_ID, BPF_PROG_LOAD},
    bpf_func_id::BPF_FUNC_clone_redirect,
    bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS,
};
use imds_ebpf_common::names::PREFIX;

use super::{bpf_fd, info, kind_of, link};

pub(super) const EXIT: u64 = 0x95;

/// A TC program that leaves every packet to the next one.
pub fn load_idle() -> io::Result<OwnedFd> {
    let unspecified = u64::from((-1_i32).cast_unsigned());
    load(&[set(0, unspecified), EXIT])
}

/// A TC program that sends a clone of every packet out of the interface with this index. A clone has no socket, like a
/// packet that the node forwards.
pub fn load_redirect(ifindex: u32) -> io::Result<OwnedFd> {
    const DROP: u64 = 2;
    let call = 0x85 | (BPF_FUNC_clone_redirect as u64) << 32;
    load(&[set(2, ifindex.into()), set(3, 0), call, set(0, DROP), EXIT])
}

/// Whether the program with this id is known to be somebody else's: by its name, which takes `CAP_SYS_ADMIN` to ask for.
#[must_use]
pub fn is_foreign(id: u32) -> bool {
    name(id).is_ok_and(|name| !name.starts_with(PREFIX.as_bytes()))
}

/// Returns the name of the program with this id, as far as the kernel shows it: that takes `CAP_SYS_ADMIN`.
#[must_use]
pub fn program_name(id: u32) -> Option<String> {
    let name = name(id).ok()?;
    let name = name.split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// Returns the name of a map or a program, or that of the program of a link, as far as the kernel shows it.
pub fn object_name(object: impl AsFd) -> io::Result<Option<String>> {
    /// The start of `struct bpf_map_info`.
    #[repr(C)]
    #[derive(Default)]
    struct MapInfo {
        before: [u32; 6],
        name: [u8; 16],
    }
    /// The start of `struct bpf_prog_info`.
    #[repr(C)]
    #[derive(Default)]
    struct ProgramInfo {
        before: [u64; 8],
        name: [u8; 16],
    }
    let name = match kind_of(&object)?.as_str() {
        "bpf-map" => info::<MapInfo>(object)?.name,
        "bpf-prog" => info::<ProgramInfo>(object)?.name,
        "bpf_link" | "bpf-link" => return Ok(link(object)?.and_then(|link| program_name(link.program))),
        _ => return Ok(None),
    };
    Ok(Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()))
}

/// Reports whether the program with this id is known to be an agent's, by its name.
#[must_use]
pub fn is_ours(id: u32) -> bool {
    name(id).is_ok_and(|name| name.starts_with(PREFIX.as_bytes()))
}

fn name(id: u32) -> io::Result<[u8; 16]> {
    #[repr(C)]
    struct Attr {
        prog_id: u32,
        next_id: u32,
        open_flags: u32,
    }
    /// The start of `struct bpf_prog_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        before: [u64; 8],
        name: [u8; 16],
    }
    let program = bpf_fd(BPF_PROG_GET_FD_BY_ID, Attr { prog_id: id, next_id: 0, open_flags: 0 })?;
    Ok(info::<Info>(program)?.name)
}

/// `register = value`, 32 bits of it.
pub(super) const fn set(register: u64, value: u64) -> u64 {
    0xb7 | register << 8 | value << 32
}

pub(super) fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
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
    }
    let attr = Attr {
        prog_type: BPF_PROG_TYPE_SCHED_CLS as u32,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"imds_probe\0\0\0\0\0\0",
    };
    bpf_fd(BPF_PROG_LOAD, attr)
}

/// Whether the kernel compiled a program.
pub fn is_compiled(program: impl AsFd) -> io::Result<bool> {
    /// The start of `struct bpf_prog_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        jited_len: u32,
        xlated_len: u32,
        jited: u64,
        xlated: u64,
    }
    Ok(info::<Info>(program)?.jited_len != 0)
}
