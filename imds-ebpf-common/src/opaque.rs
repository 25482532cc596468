//! Optimization barriers: values whose origin the compiler does not know.
//!
//! Without them, the compiler makes a branch for each value that it knows, writes zeros with a call to memset, which BPF
//! does not have, and removes bounds checks that the verifier requires.

/// Returns the exclusive or of both values. On BPF this is one instruction, while `core::hint::black_box` writes its value
/// to the stack and reads it back.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[must_use]
pub fn opaque_xor(mut value: u64, other: u64) -> u64 {
    // SAFETY: the instruction accesses only the two registers that it names.
    unsafe {
        core::arch::asm!(
            "{0} ^= {1}", inout(reg) value, in(reg) other, options(pure, nomem, nostack, preserves_flags)
        );
    };
    value
}

/// Returns the exclusive or of both values, on the host.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
#[must_use]
pub fn opaque_xor(value: u64, other: u64) -> u64 {
    core::hint::black_box(value ^ other)
}

/// Returns `pointer` unchanged. The compiler does not know what it points to.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[must_use]
pub fn opaque_pointer<T>(mut pointer: *const T) -> *const T {
    // SAFETY: the instruction accesses only the register that it names, and adds 0 to it.
    unsafe {
        core::arch::asm!("{0} += 0", inout(reg) pointer, options(pure, readonly, nostack, preserves_flags));
    };
    pointer
}

/// Returns `pointer` unchanged, on the host.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
#[must_use]
pub fn opaque_pointer<T>(pointer: *const T) -> *const T {
    core::hint::black_box(pointer)
}

/// Returns `value` unchanged. The compiler does not know its range.
#[inline(always)]
#[must_use]
pub fn opaque(value: u64) -> u64 {
    opaque_xor(value, 0)
}
