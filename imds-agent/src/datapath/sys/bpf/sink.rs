//! The packet sink of `imds-agent verify`: counts the test packets of one run at the egress of an interface and drops them.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use aya_obj::generated::{
    BPF_PSEUDO_MAP_FD,
    bpf_func_id::{BPF_FUNC_get_socket_cookie, BPF_FUNC_map_lookup_elem, BPF_FUNC_skb_load_bytes_relative},
};

use super::program::{EXIT, load, set};

/// Number of test packets that a sink can distinguish.
pub const MAX_SINK_IDS: u32 = 256;

/// Stack offsets from the frame pointer: 40 bytes of the IP header, 20 bytes of the TCP header, a socket cookie, a map key.
const IP: i16 = -64;
const TCP: i16 = -24;
const COOKIE: i16 = -72;
const KEY: i16 = -76;

/// Loads a TC program that counts test packets in `counts` and drops them. Other packets go to the next program.
///
/// Test packets are TCP SYN segments with the sequence number `marker` (bytes in network order), or of a socket whose cookie is
/// in `cookies`. The number of a test packet is the TCP window of a marked segment, or the value in `cookies`.
pub fn load_sink(marker: [u8; 4], counts: BorrowedFd<'_>, cookies: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    load(&instructions(marker, counts, cookies))
}

/// One line of the assembler: an instruction or a label.
#[derive(Clone, Copy)]
enum Step {
    /// Instruction that is not a jump.
    Run(u64),
    /// Forward jump to the label with this name.
    Jump(u64, &'static str),
    /// Label of the following instruction.
    Label(&'static str),
}

use Step::{Jump, Label, Run};

fn instructions(marker: [u8; 4], counts: BorrowedFd<'_>, cookies: BorrowedFd<'_>) -> Vec<u64> {
    let mut steps = vec![Run(copy(6, 1))];
    steps.extend(load_bytes(Run(set(2, 0)), IP, 40));
    steps.extend([
        // Reads the IP version, and computes the offset of the TCP header in register 7.
        Run(load_byte(1, IP)),
        Run(0x77 | 1 << 8 | 4 << 32),
        Jump(equal(1, 4), "ipv4"),
        Jump(differs(1, 6), "next"),
        Run(load_byte(2, IP + 6)),
        Jump(differs(2, 6), "next"),
        Run(set(7, 40)),
        Jump(0x05, "tcp"),
        Label("ipv4"),
        Run(load_byte(2, IP + 9)),
        Jump(differs(2, 6), "next"),
        Run(load_byte(7, IP)),
        Run(0x57 | 7 << 8 | 0xf << 32),
        Run(0x67 | 7 << 8 | 2 << 32),
        Label("tcp"),
    ]);
    steps.extend(load_bytes(Run(copy(2, 7)), TCP, 20));
    steps.extend([
        // Masks the ECN flags, which a SYN may have.
        Run(load_byte(1, TCP + 13)),
        Run(0x57 | 1 << 8 | 0x3f << 32),
        Jump(differs(1, 2), "next"),
        Run(0x61 | 1 << 8 | 10 << 12 | offset(TCP + 4)),
        // 32-bit comparison.
        Jump(0x56 | 1 << 8 | u64::from(u32::from_ne_bytes(marker)) << 32, "cookie"),
        Run(0x69 | 8 << 8 | 10 << 12 | offset(TCP + 14)),
        // Converts 16 bits from network byte order.
        Run(0xdc | 8 << 8 | 16 << 32),
        Jump(0x05, "count"),
        Label("cookie"),
        Run(copy(1, 6)),
        Run(call(BPF_FUNC_get_socket_cookie as u64)),
        Jump(equal(0, 0), "next"),
        Run(0x7b | 10 << 8 | offset(COOKIE)),
    ]);
    steps.extend(look_up(cookies, COOKIE));
    steps.extend([
        Jump(equal(0, 0), "next"),
        Run(0x61 | 8 << 8),
        Label("count"),
        Run(0x63 | 10 << 8 | 8 << 12 | offset(KEY)),
    ]);
    steps.extend(look_up(counts, KEY));
    steps.extend([
        Jump(equal(0, 0), "drop"),
        Run(set(1, 1)),
        // Atomic 64-bit addition of register 1.
        Run(0xdb | 1 << 12),
        Label("drop"),
        Run(set(0, 2)),
        Run(EXIT),
        Label("next"),
        Run(set(0, u64::from(u32::MAX))),
        Run(EXIT),
    ]);
    assemble(&steps)
}

/// Returns the instructions, with the offsets of jumps resolved.
fn assemble(steps: &[Step]) -> Vec<u64> {
    let is_instruction = |step: &&Step| !matches!(step, Label(_));
    let position = |name: &str| {
        let before = steps.iter().take_while(|step| !matches!(step, Label(found) if *found == name));
        before.filter(is_instruction).count()
    };
    let instructions = steps.iter().filter(is_instruction).enumerate();
    let assembled = instructions.map(|(index, step)| match step {
        Run(instruction) => *instruction,
        Jump(instruction, name) => instruction | offset((position(name) - index - 1).try_into().unwrap_or(0)),
        Label(_) => 0,
    });
    assembled.collect()
}

/// Calls `bpf_skb_load_bytes_relative(skb, OFFSET, stack, length, BPF_HDR_START_NET)`. Shorter packets go to the next program.
fn load_bytes(offset: Step, stack: i16, length: u64) -> [Step; 8] {
    [
        Run(copy(1, 6)),
        offset,
        Run(copy(3, 10)),
        Run(add(3, stack)),
        Run(set(4, length)),
        Run(set(5, 1)),
        Run(call(BPF_FUNC_skb_load_bytes_relative as u64)),
        Jump(differs(0, 0), "next"),
    ]
}

/// Calls `bpf_map_lookup_elem(map, stack)` for a key on the stack.
fn look_up(map: BorrowedFd<'_>, stack: i16) -> [Step; 5] {
    [
        Run(0x18
            | 1 << 8
            | u64::from(BPF_PSEUDO_MAP_FD) << 12
            | u64::from(map.as_raw_fd().cast_unsigned()) << 32),
        Run(0),
        Run(copy(2, 10)),
        Run(add(2, stack)),
        Run(call(BPF_FUNC_map_lookup_elem as u64)),
    ]
}

const fn call(function: u64) -> u64 {
    0x85 | function << 32
}

const fn copy(to: u64, from: u64) -> u64 {
    0xbf | to << 8 | from << 12
}

#[expect(clippy::cast_sign_loss, reason = "the kernel sign-extends the immediate")]
const fn add(register: u64, number: i16) -> u64 {
    0x07 | register << 8 | (number as i32 as u32 as u64) << 32
}

const fn load_byte(register: u64, stack: i16) -> u64 {
    0x71 | register << 8 | 10 << 12 | offset(stack)
}

const fn equal(register: u64, number: u64) -> u64 {
    0x15 | register << 8 | number << 32
}

const fn differs(register: u64, number: u64) -> u64 {
    0x55 | register << 8 | number << 32
}

#[expect(clippy::cast_sign_loss, reason = "the instruction has 16 bits for it")]
const fn offset(offset: i16) -> u64 {
    (offset as u16 as u64) << 16
}
