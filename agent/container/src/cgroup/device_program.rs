//! Loading a BPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE` and attaching it to a cgroup.
#![expect(unsafe_code, reason = "the bpf system call has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the low four bits, source in the high four.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// The part of `union bpf_attr` for `BPF_PROG_LOAD`; what the kernel does not
/// find in the size it is told, it takes as zero.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
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
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is the command's part of `union bpf_attr` (the only
    // two callers are below), `repr(C)`, without padding, and outlives the call
    // together with everything its addresses refer to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Loads the program. The kernel's verifier checks it.
pub fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attributes = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        // At most 15 bytes and a NUL.
        prog_name: *b"devices_of_cgrp\0",
        expected_attach_type: BPF_CGROUP_DEVICE,
        ..LoadAttributes::default()
    };
    let descriptor = bpf(BPF_PROG_LOAD, &mut attributes)? as RawFd;
    // SAFETY: BPF_PROG_LOAD succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Attaches a loaded program until the cgroup's end or until it is replaced; in
/// one step in the place of `instead_of`, which was attached. Programs of its
/// parents keep their say.
pub fn attach(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    instead_of: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let number = |descriptor: BorrowedFd<'_>| descriptor.as_raw_fd().cast_unsigned();
    let replace = if instead_of.is_some() {
        BPF_F_REPLACE
    } else {
        0
    };
    let mut attributes = AttachAttributes {
        target_fd: number(cgroup),
        attach_bpf_fd: number(program),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | replace,
        replace_bpf_fd: instead_of.map_or(0, number),
    };
    bpf(BPF_PROG_ATTACH, &mut attributes).map(drop)
}
