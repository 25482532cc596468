//! Transmit ring of a packet socket, whose frames stay in memory that the sender can change.

use std::{io, os::fd::AsRawFd as _, ptr::NonNull};

use crate::{Netns, PacketSocket};

/// Offset of the frame in its slot: the aligned length of `struct tpacket2_hdr`.
const FRAME_OFFSET: usize = 32;
const SLOT_LEN: usize = 2048;
const SLOTS: usize = 32;

/// A packet socket with a ring for sending (`PACKET_TX_RING`, packet(7)).
#[derive(Debug)]
pub struct TxRing {
    socket: PacketSocket,
    memory: NonNull<u8>,
    used: usize,
}

impl TxRing {
    /// Opens a ring that sends on `interface` of `netns`.
    #[must_use]
    pub fn new(netns: &Netns, interface: &str) -> Self {
        let socket = PacketSocket::frames(netns, interface);
        socket.set(libc::SOL_PACKET, libc::PACKET_VERSION, libc::tpacket_versions::TPACKET_V2 as libc::c_int);
        let size = SLOT_LEN * SLOTS;
        socket.set_value(
            libc::SOL_PACKET,
            libc::PACKET_TX_RING,
            // Fields of struct tpacket_req: size and number of the blocks, size and number of the slots.
            &[size, 1, SLOT_LEN, SLOTS].map(|value| u32::try_from(value).expect("a small number")),
        );
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: maps new memory, whose size is the one of the ring.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, socket.as_raw_fd(), 0) };
        assert_ne!(memory, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Self { socket, memory: NonNull::new(memory.cast()).expect("an address"), used: 0 }
    }

    /// Sends a frame, and returns the number of its slot. The kernel reads the slot until the frame has left.
    pub fn send(&mut self, frame: &[u8]) -> usize {
        const TP_STATUS_SEND_REQUEST: u32 = 1;
        assert!(self.used < SLOTS && frame.len() <= SLOT_LEN - FRAME_OFFSET);
        let slot = self.used;
        self.used += 1;
        self.write(slot, frame);
        // Status and length are the first fields of struct tpacket2_hdr.
        let length = u32::try_from(frame.len()).expect("a frame of a slot");
        let header = self.slot(slot).cast::<u32>();
        // SAFETY: the second word of the slot is within the mapped ring.
        let length_field = unsafe { header.add(1) };
        // SAFETY: the field is within the mapped ring and aligned.
        unsafe { length_field.write_volatile(length) };
        // SAFETY: the header is within the mapped ring and aligned.
        unsafe { header.write_volatile(TP_STATUS_SEND_REQUEST) };
        // A full queue of the interface drops the frame.
        let _dropped = self.socket.send(&[]);
        slot
    }

    /// Overwrites the frame in a slot, also one that waits in the queue of the interface.
    pub fn write(&self, slot: usize, frame: &[u8]) {
        assert!(slot < SLOTS && frame.len() <= SLOT_LEN - FRAME_OFFSET);
        // SAFETY: the slot is within the mapped ring, and longer than the offset.
        let start = unsafe { self.slot(slot).add(FRAME_OFFSET) };
        // SAFETY: the frame fits in the slot, and no reference to the ring exists.
        unsafe { start.copy_from(NonNull::from(frame).cast(), frame.len()) };
    }

    fn slot(&self, slot: usize) -> NonNull<u8> {
        // SAFETY: callers pass numbers of slots, which are within the mapped ring.
        unsafe { self.memory.add(slot * SLOT_LEN) }
    }
}

impl Drop for TxRing {
    fn drop(&mut self) {
        // SAFETY: unmaps the memory that `new` has mapped, which has no other user.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), SLOT_LEN * SLOTS) };
    }
}
