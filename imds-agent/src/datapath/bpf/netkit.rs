//! The hooks of netkit pairs.

use std::io;

use aya_obj::generated::{bpf_attach_type::BPF_NETKIT_PEER, bpf_cmd::BPF_PROG_QUERY};

use super::{Entry, MPROG_MAX, bpf_mut};

/// Returns the programs that see the packets of a netkit pair's peer, in the order in which they run.
///
/// `ifindex` is the primary device of the pair. The kernel answers with an error for every other device
/// (`netkit_prog_query`, `drivers/net/netkit.c`).
pub fn netkit_peer_entries(ifindex: u32) -> io::Result<Vec<Entry>> {
    /// The part of `union bpf_attr` that a query of a `bpf_mprog` hook fills.
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
        attach_type: BPF_NETKIT_PEER as u32,
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
    Ok(entries.map(|(program, link)| Entry { program, link }).collect())
}
