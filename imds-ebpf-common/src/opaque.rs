//! Values of which the compiler does not know how they came about.
//!
//! It makes one branch for each value that it knows, of zeros in a row a call that the verifier refuses, and drops checks
//! that the verifier wants to see.

/// The exclusive or of both. On BPF this costs no more than the operator, where `core::hint::black_box` writes its value
/// to the stack and reads it again.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[must_use]
pub fn opaque_xor(mut value: u64, other: u64) -> u64 {
    // SAFETY: one instruction, on the two registers that it names.
    unsafe {
        core::arch::asm!(
            "{0} ^= {1}", inout(reg) value, in(reg) other, options(pure, nomem, nostack, preserves_flags)
        );
    };
    value
}

/// The exclusive or of both.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
#[must_use]
pub fn opaque_xor(value: u64, other: u64) -> u64 {
    core::hint::black_box(value ^ other)
}

/// The same pointer.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[must_use]
pub fn opaque_pointer<T>(mut pointer: *const T) -> *const T {
    // SAFETY: one instruction, on the register that it names, which it leaves as it is.
    unsafe {
        core::arch::asm!("{0} += 0", inout(reg) pointer, options(pure, readonly, nostack, preserves_flags));
    };
    pointer
}

/// The same pointer.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
#[must_use]
pub fn opaque_pointer<T>(pointer: *const T) -> *const T {
    core::hint::black_box(pointer)
}

/// The same value.
#[inline(always)]
#[must_use]
pub fn opaque(value: u64) -> u64 {
    opaque_xor(value, 0)
}
