//! TUN and TAP devices whose traffic this process reads and writes.

use std::{fs::File, io, os::fd::AsRawFd as _};

use crate::Netns;

/// Mode of a TUN device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TunMode {
    /// Carries IP packets without Ethernet headers.
    Tun,
    /// Carries Ethernet frames, like the NIC of a virtual machine.
    Tap,
}

/// Creates a device in `netns`. Each read and write of the file is one packet or frame. The kernel deletes the device
/// when the file is closed.
#[must_use]
pub fn open_tun(netns: &Netns, name: &str, mode: TunMode) -> File {
    // The kernel takes the network namespace of the thread that opens the file.
    netns.run(|| open(name, mode)).unwrap_or_else(|error| panic!("failed to create {name}: {error}"))
}

fn open(name: &str, mode: TunMode) -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq consists of integers and byte arrays, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let kind = match mode {
        TunMode::Tun => libc::IFF_TUN,
        TunMode::Tap => libc::IFF_TAP,
    };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(kind | libc::IFF_NO_PI).expect("small flags");
    // SAFETY: TUNSETIFF takes a pointer to an ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result == 0 { Ok(device) } else { Err(io::Error::last_os_error()) }
}

/// Changes the hardware type (`ARPHRD_*`) that the kernel reports for the device, which must be down.
pub fn set_hardware_type(device: &File, hardware_type: u16) {
    // SAFETY: TUNSETLINK takes an integer.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETLINK, libc::c_ulong::from(hardware_type)) };
    assert_eq!(result, 0, "failed to set the hardware type: {}", io::Error::last_os_error());
}
