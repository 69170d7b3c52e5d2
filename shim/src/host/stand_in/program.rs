//! The program that a stand-in executes: it names itself and waits for ever.
//!
//! It must run inside any container's root file system, where there is no
//! loader and no library, and there is one of it for each task and exec. So it
//! is a few instructions in an executable of our own making: one page of
//! memory, nothing to link, nothing to be found by name.
#![expect(
    unsafe_code,
    reason = "assembled code is reached by the addresses of its first and last byte"
)]

use std::arch::global_asm;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, Result};

// Position independent, and reads only itself: it is copied into the
// executable as it is. Signals keep their default effect, so any that would
// end a process ends this one.
global_asm!(
    ".pushsection .rodata.bulkhead_stand_in, \"a\"",
    ".global bulkhead_stand_in_begin",
    ".global bulkhead_stand_in_end",
    "bulkhead_stand_in_begin:",
    "    mov eax, 157", // SYS_prctl
    "    mov edi, 15",  // PR_SET_NAME: execveat left the descriptor's number
    "    lea rsi, [rip + 3f]",
    "    syscall",
    "2:  mov eax, 34", // SYS_pause, again after a signal that is caught or ignored
    "    syscall",
    "    jmp 2b",
    "3:  .asciz \"bulkhead-standi\"", // 15 bytes: TASK_COMM_LEN less the NUL
    "bulkhead_stand_in_end:",
    ".popsection",
);

unsafe extern "C" {
    static bulkhead_stand_in_begin: u8;
    static bulkhead_stand_in_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: both symbols lie in one read-only section of this executable, the
    // second behind the last byte of what begins at the first.
    unsafe {
        let begin = &raw const bulkhead_stand_in_begin;
        let end = &raw const bulkhead_stand_in_end;
        std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin))
    }
}

/// Where the executable is loaded: the usual base of x86-64 executables.
const BASE: u64 = 0x40_0000;
/// Sizes of `Elf64_Ehdr` and `Elf64_Phdr` (System V ABI).
const EHDR_BYTES: u16 = 64;
const PHDR_BYTES: u16 = 56;

/// A static ELF executable of one read-only, executable segment.
fn executable() -> Vec<u8> {
    const ET_EXEC: u16 = 2;
    const EM_X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    const PT_GNU_STACK: u32 = 0x6474_e551;
    const PF_X: u32 = 1;
    const PF_W: u32 = 2;
    const PF_R: u32 = 4;
    let headers = u64::from(EHDR_BYTES) + 2 * u64::from(PHDR_BYTES);
    let size = headers + code().len() as u64;

    let mut image = Vec::new();
    // Class 64, little endian, version 1, System V ABI.
    image.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [ET_EXEC, EM_X86_64] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1_u32.to_le_bytes());
    // Entry, program headers, no section headers.
    for word in [BASE + headers, u64::from(EHDR_BYTES), 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [EHDR_BYTES, PHDR_BYTES, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, address: u64, size: u64, align: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(flags.to_le_bytes());
        for word in [0, address, address, size, size, align] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(PT_LOAD, PF_R | PF_X, BASE, size, 4096);
    // Without it the kernel makes the stack executable.
    segment(PT_GNU_STACK, PF_R | PF_W, 0, 0, 16);
    image.extend(code());
    image
}

/// The executable as a sealed memfd, one for all stand-ins of this process.
pub(in super::super) fn open() -> Result<&'static OwnedFd> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let made = make()?;
    Ok(PROGRAM.get_or_init(|| made))
}

fn make() -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create("bulkhead-stand-in", flags | MemfdFlags::EXEC) {
        // Kernels before 6.3 have no such flag: there a memfd is executable.
        Err(Errno::INVAL) => memfd_create("bulkhead-stand-in", flags)?,
        other => other?,
    };
    let mut file = File::from(file);
    file.write_all(&executable())
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let file = OwnedFd::from(file);
    fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(file)
}
