//! The BPF program that gives connections to the loopback to one listener.
#![expect(unsafe_code, reason = "the bpf system call has no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const BPF_FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_FUNC_SK_RELEASE: i32 = 86;
const BPF_FUNC_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

/// Offsets into `struct bpf_sk_lookup`; addresses are in network order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high four.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// `r<to> = r<from>`.
const fn copy(to: u8, from: u8) -> Instruction {
    op(0xbf, to, from, 0, 0) // BPF_ALU64 | BPF_MOV | BPF_X
}

/// `r<to> = value`.
const fn set(to: u8, value: i32) -> Instruction {
    op(0xb7, to, 0, 0, value) // BPF_ALU64 | BPF_MOV | BPF_K
}

/// `r0 = *(u32 *)(r6 + offset)`: r6 holds the context.
const fn load(offset: i16) -> Instruction {
    op(0x61, 0, 6, offset, 0) // BPF_LDX | BPF_MEM | BPF_W
}

/// Skips `count` instructions unless r0 is `value`.
const fn unless(value: i32, count: i16) -> Instruction {
    op(0x55, 0, 0, count, value) // BPF_JMP | BPF_JNE | BPF_K
}

const fn skip(count: i16) -> Instruction {
    op(0x05, 0, 0, count, 0) // BPF_JMP | BPF_JA
}

const fn call(function: i32) -> Instruction {
    op(0x85, 0, 0, 0, function) // BPF_JMP | BPF_CALL
}

/// The listener is the only entry of the map of this descriptor.
fn program(map: BorrowedFd<'_>) -> [Instruction; 34] {
    const LOOPBACK_IP6_END: i32 = 1_i32.to_be();
    [
        copy(6, 1),
        load(PROTOCOL),
        unless(libc::IPPROTO_TCP, 29),
        load(FAMILY),
        unless(libc::AF_INET, 4),
        load(LOCAL_IP4),
        op(0x57, 0, 0, 0, 0xff_i32), // r0 &= 0xff: the first octet, on a little-endian host
        unless(127, 24),
        skip(9),
        unless(libc::AF_INET6, 22),
        load(LOCAL_IP6[0]),
        unless(0, 20),
        load(LOCAL_IP6[1]),
        unless(0, 18),
        load(LOCAL_IP6[2]),
        unless(0, 16),
        load(LOCAL_IP6[3]),
        unless(LOOPBACK_IP6_END, 14),
        // BPF_LD | BPF_IMM | BPF_DW, which takes two: r1 = the map.
        op(0x18, 1, BPF_PSEUDO_MAP_FD, 0, map.as_raw_fd()),
        op(0, 0, 0, 0, 0),
        op(0x62, 10, 0, -4, 0), // *(u32 *)(r10 - 4) = 0: the entry
        copy(2, 10),
        op(0x07, 2, 0, 0, -4), // r2 += -4
        call(BPF_FUNC_MAP_LOOKUP_ELEM),
        op(0x15, 0, 0, 7, 0), // skips 7 if r0 == 0
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(BPF_FUNC_SK_ASSIGN),
        copy(1, 7),
        call(BPF_FUNC_SK_RELEASE),
        set(0, SK_PASS),
        op(0x95, 0, 0, 0, 0), // exit
    ]
}

/// Gives connections to a namespace's loopback to `listener`, as long as the
/// returned descriptor is open.
pub(super) fn steer(listener: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = create_map(listener)?;
    // What is loaded keeps the map, and what is attached keeps what is loaded.
    attach(load_program(map.as_fd())?.as_fd(), namespace)
}

fn create_map(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// The part of `union bpf_attr` for `BPF_MAP_CREATE`; what the kernel does
    /// not find in the size it is told, it takes as zero.
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    /// The part for `BPF_MAP_UPDATE_ELEM`.
    #[repr(C)]
    struct Update {
        map_fd: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let map = descriptor(
        BPF_MAP_CREATE,
        &mut Create {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
        },
    )?;
    let (key, value) = (0_u32, number(listener));
    bpf(
        BPF_MAP_UPDATE_ELEM,
        &mut Update {
            map_fd: number(map.as_fd()),
            padding: 0,
            key: ptr::from_ref(&key) as u64,
            value: ptr::from_ref(&value) as u64,
            flags: 0,
        },
    )?;
    Ok(map)
}

fn load_program(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// The part for `BPF_PROG_LOAD`.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
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
    let program = program(map);
    descriptor(
        BPF_PROG_LOAD,
        &mut Load {
            prog_type: BPF_PROG_TYPE_SK_LOOKUP,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            // At most 15 bytes and a NUL.
            prog_name: *b"pod_loopback\0\0\0\0",
            expected_attach_type: BPF_SK_LOOKUP,
            ..Load::default()
        },
    )
}

fn attach(program: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// The part for `BPF_LINK_CREATE`.
    #[repr(C)]
    struct Link {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
    }
    descriptor(
        BPF_LINK_CREATE,
        &mut Link {
            prog_fd: number(program),
            target_fd: number(namespace),
            attach_type: BPF_SK_LOOKUP,
            flags: 0,
        },
    )
}

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// A command that makes a descriptor.
fn descriptor<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    let made = bpf(command, attributes)? as RawFd;
    // SAFETY: the command succeeded, and each of those that come here returns a new
    // descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is the command's part of `union bpf_attr` (all callers are
    // in this file), `repr(C)`, without padding, and outlives the call together with
    // everything its addresses refer to.
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
