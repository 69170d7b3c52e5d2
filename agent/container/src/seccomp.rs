//! `linux.seccomp`: libseccomp makes the filter, a stub of ours goes before it.
//!
//! A profile that lists what it allows denies what did not exist when it was
//! written, usually with EPERM. C libraries take that for a refusal where ENOSYS
//! would let them fall back to an older call. So the stub answers ENOSYS to every
//! call with a number above the highest that the profile names.

use std::fs::File;
use std::io::{self, Read, Seek};

use libseccomp::error::SeccompError as LibraryError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use crate::Unsupported;
use crate::kernel_calls::install_seccomp_filter;

/// What failed with the filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("cannot compile the seccomp profile: {step}")]
    Compile {
        step: String,
        #[source]
        source: LibraryError,
    },
    #[error("cannot read the compiled seccomp profile")]
    Export(#[source] io::Error),
    #[error("the seccomp profile makes a program of {bytes} bytes, which is none")]
    Program { bytes: usize },
    #[error("cannot install the seccomp filter")]
    Install(#[source] io::Error),
}

/// `MAX_ERRNO` of linux/err.h; the kernel would take a larger one for it.
const MAX_ERRNO: u32 = 4095;

/// A program, ready to be installed.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

/// `__X32_SYSCALL_BIT` of asm/unistd.h.
const X32_BIT: u32 = 0x4000_0000;

fn arch(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
    }
}

/// Refuses what the filter cannot do here.
pub fn check(profile: &LinuxSeccomp) -> Result<(), Unsupported> {
    let listener = profile.listener_path().as_ref();
    let metadata = profile.listener_metadata().as_ref();
    for (field, set) in [
        (
            "listenerPath",
            listener.is_some_and(|path| !path.as_os_str().is_empty()),
        ),
        (
            "listenerMetadata",
            metadata.is_some_and(|text| !text.is_empty()),
        ),
    ] {
        if set {
            return Err(Unsupported::new(
                format!("linux.seccomp.{field}"),
                "a listener on the host cannot be reached from the guest",
            ));
        }
    }
    let no_errno = |value: Option<u32>| value.filter(|value| *value > MAX_ERRNO);
    if let Some(value) = no_errno(profile.default_errno_ret()) {
        return Err(Unsupported::new(
            "linux.seccomp.defaultErrnoRet",
            format!("{value} is more than {MAX_ERRNO}"),
        ));
    }
    let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
    if notifies(profile.default_action()) {
        return Err(Unsupported::new(
            "linux.seccomp.defaultAction",
            "SCMP_ACT_NOTIFY needs a listener",
        ));
    }
    for (index, rule) in profile.syscalls().iter().flatten().enumerate() {
        let refuse = |field: &str, reason: &str| {
            Err(Unsupported::new(
                format!("linux.seccomp.syscalls[{index}].{field}"),
                reason,
            ))
        };
        if notifies(rule.action()) {
            return refuse("action", "SCMP_ACT_NOTIFY needs a listener");
        }
        if no_errno(rule.errno_ret()).is_some() {
            return refuse("errnoRet", "is more than 4095");
        }
        if rule.args().iter().flatten().any(|arg| arg.index() > 5) {
            return refuse("args", "a system call has six arguments");
        }
    }
    Ok(())
}

fn compile_failed(step: impl Into<String>) -> impl FnOnce(LibraryError) -> SeccompError {
    let step = step.into();
    move |source| SeccompError::Compile { step, source }
}

impl Filter {
    /// Compiles a validated profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, SeccompError> {
        let default = action(profile.default_action(), profile.default_errno_ret());
        let mut context =
            ScmpFilterContext::new(default).map_err(compile_failed("default action"))?;
        // Whether no_new_privs is set is the specification's word, not the library's.
        context
            .set_ctl_nnp(false)
            .map_err(compile_failed("no_new_privs"))?;
        let mut arches = vec![ScmpArch::native()];
        for arch in profile.architectures().iter().flatten().copied().map(arch) {
            // No program of another architecture can be executed here.
            if audit_arch(arch).is_none() || arches.contains(&arch) {
                continue;
            }
            context
                .add_arch(arch)
                .map_err(compile_failed(format!("architecture {arch:?}")))?;
            arches.push(arch);
        }
        for rule in profile.syscalls().iter().flatten() {
            add_rules(&mut context, rule, default)?;
        }
        let library = export(&context)?;
        let mut program = match profile.default_action() {
            // A profile that lists what it denies lets newer calls through, as it says.
            LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog => Vec::new(),
            _ => stub(&highest_numbers(profile, &arches)),
        };
        program.extend(decode(&library)?);
        Ok(Self {
            program,
            flags: flags(profile),
        })
    }

    /// Installs the filter in the calling thread. Needs `no_new_privs` or `CAP_SYS_ADMIN`.
    pub fn install(&self) -> Result<(), SeccompError> {
        install_seccomp_filter(&self.program, self.flags).map_err(SeccompError::Install)
    }
}

/// The library's program as bytes. Through a memfd: exporting to memory came
/// with libseccomp 2.6, and tests link what the machine has.
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    let exported = memfd_create("seccomp", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| SeccompError::Export(errno.into()))?;
    context
        .export_bpf(&exported)
        .map_err(compile_failed("generate the program"))?;
    let mut program = Vec::new();
    (&exported)
        .rewind()
        .and_then(|()| (&exported).read_to_end(&mut program))
        .map_err(SeccompError::Export)?;
    Ok(program)
}

fn flags(profile: &LinuxSeccomp) -> libc::c_ulong {
    profile
        .flags()
        .iter()
        .flatten()
        .map(|flag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // One thread: there is none to synchronise. And without a listener
            // there is none to wait for, for which the kernel refuses the flag.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync
            | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        })
        .fold(0, |flags, flag| flags | flag)
}

fn add_rules(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SeccompError> {
    let action = action(rule.action(), rule.errno_ret());
    // The library refuses a rule that says what the default says.
    if action == default {
        return Ok(());
    }
    let mut comparisons = Vec::new();
    for arg in rule.args().iter().flatten() {
        let value = arg.value();
        let (operator, datum) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
            LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
            LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
            LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
            LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
            LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
            LinuxSeccompOperator::ScmpCmpMaskedEq => (
                ScmpCompareOp::MaskedEqual(value),
                arg.value_two().unwrap_or(0),
            ),
        };
        comparisons.push((
            arg.index(),
            ScmpArgCompare::new(arg.index() as u32, operator, datum),
        ));
    }
    // The library takes one comparison for each argument; several of one
    // argument are alternatives, as in other OCI runtimes.
    let repeated = comparisons
        .iter()
        .enumerate()
        .any(|(at, (index, _))| comparisons[..at].iter().any(|(other, _)| other == index));
    for name in rule.names() {
        // A name that this library does not know: the stub answers for the call.
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        if repeated {
            for (_, comparison) in &comparisons {
                context
                    .add_rule_conditional(action, syscall, &[*comparison])
                    .map_err(compile_failed(name))?;
            }
        } else {
            let comparisons: Vec<_> = comparisons
                .iter()
                .map(|(_, comparison)| *comparison)
                .collect();
            context
                .add_rule_conditional(action, syscall, &comparisons)
                .map_err(compile_failed(name))?;
        }
    }
    Ok(())
}

/// For each architecture, as the kernel names it, the highest number that the profile names.
fn highest_numbers(profile: &LinuxSeccomp, arches: &[ScmpArch]) -> Vec<(ScmpArch, u32)> {
    arches
        .iter()
        .filter_map(|arch| {
            let highest: Option<u32> = profile
                .syscalls()
                .iter()
                .flatten()
                .flat_map(LinuxSyscall::names)
                .filter_map(|name| ScmpSyscall::from_name_by_arch(name, *arch).ok())
                .map(ScmpSyscall::as_raw_syscall)
                // The library's own numbers for calls that an architecture lacks are negative.
                .filter_map(|number| u32::try_from(number).ok())
                .max();
            // A profile that names no call says nothing about which ones it knows.
            highest.map(|number| (*arch, number))
        })
        .collect()
}

// linux/bpf_common.h, linux/filter.h, linux/seccomp.h, linux/audit.h
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_IF_GREATER_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const DATA_NUMBER: u32 = 0;
const DATA_ARCH: u32 = 4;
const SECCOMP_RET_ERRNO: u32 = 0x0005_0000;

fn statement(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(code: u16, k: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: if_true,
        jf: if_false,
        k,
    }
}

/// `AUDIT_ARCH_*` of the architectures that this guest can execute.
fn audit_arch(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::X86 => Some(0x4000_0003),
        // x32 shares the name and differs by a bit in the number.
        ScmpArch::X8664 | ScmpArch::X32 => Some(0xc000_003e),
        _ => None,
    }
}

/// Answers ENOSYS above the highest numbers and falls through to the filter otherwise.
fn stub(highest: &[(ScmpArch, u32)]) -> Vec<libc::sock_filter> {
    let enosys = statement(RETURN, SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs());
    let mut program = Vec::new();
    for (arch, number) in highest {
        let Some(audit) = audit_arch(*arch) else {
            continue;
        };
        let mut check = vec![statement(LOAD_WORD, DATA_NUMBER)];
        match arch {
            ScmpArch::X8664 => {
                // Numbers with the x32 bit are another architecture's.
                check.push(jump(JUMP_IF_GREATER_EQUAL, X32_BIT, 2, 0));
                check.push(jump(JUMP_IF_GREATER, *number, 0, 1));
            }
            ScmpArch::X32 => {
                check.push(jump(JUMP_IF_GREATER_EQUAL, X32_BIT, 0, 2));
                check.push(jump(JUMP_IF_GREATER, number | X32_BIT, 0, 1));
            }
            _ => check.push(jump(JUMP_IF_GREATER, *number, 0, 1)),
        }
        check.push(enosys);
        program.push(statement(LOAD_WORD, DATA_ARCH));
        program.push(jump(JUMP_IF_EQUAL, audit, 1, 0));
        program.push(statement(JUMP, check.len() as u32));
        program.extend(check);
    }
    program
}

fn decode(program: &[u8]) -> Result<Vec<libc::sock_filter>, SeccompError> {
    // struct sock_filter: u16 code, u8 jt, u8 jf, u32 k, in the machine's byte order.
    let (instructions, []) = program.as_chunks::<8>() else {
        return Err(SeccompError::Program {
            bytes: program.len(),
        });
    };
    Ok(instructions
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;
    const ALLOW: u32 = 0x7fff_0000;

    fn compile(profile: Value) -> Filter {
        let profile = serde_json::from_value(profile).unwrap();
        check(&profile).unwrap();
        Filter::compile(&profile).unwrap()
    }

    /// Executes classic BPF on `struct seccomp_data` as the kernel does.
    fn answer(filter: &Filter, arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_ne_bytes());
        data.extend(arch.to_ne_bytes());
        data.extend(0_u64.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut accumulator, mut next) = (0_u32, 0);
        loop {
            let instruction = filter.program[next];
            next += 1;
            let mut compare = |holds: bool| {
                next += usize::from(if holds {
                    instruction.jt
                } else {
                    instruction.jf
                });
            };
            match instruction.code {
                LOAD_WORD => {
                    let at = instruction.k as usize;
                    accumulator = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
                }
                JUMP => next += instruction.k as usize,
                JUMP_IF_EQUAL => compare(accumulator == instruction.k),
                JUMP_IF_GREATER => compare(accumulator > instruction.k),
                JUMP_IF_GREATER_EQUAL => compare(accumulator >= instruction.k),
                0x45 => compare(accumulator & instruction.k != 0),
                0x54 => accumulator &= instruction.k,
                RETURN => return instruction.k,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn errno(number: i32) -> u32 {
        SECCOMP_RET_ERRNO | number.unsigned_abs()
    }

    #[test]
    fn compile_newer_calls_get_enosys_and_known_ones_what_the_profile_says() {
        let filter = compile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["read", "statx", "no_such_call_ever"], "action": "SCMP_ACT_ALLOW"}],
        }));
        let number = |call: i64| u32::try_from(call).unwrap();
        let none = [0; 6];
        let statx = number(libc::SYS_statx);
        assert_eq!(answer(&filter, X86_64, number(libc::SYS_read), none), ALLOW);
        assert_eq!(
            answer(&filter, X86_64, number(libc::SYS_mount), none),
            errno(libc::EPERM)
        );
        assert_eq!(
            answer(&filter, X86_64, statx + 1, none),
            errno(libc::ENOSYS)
        );
        assert_eq!(answer(&filter, X86_64, X32_BIT | statx, none), ALLOW);
        assert_eq!(
            answer(&filter, X86_64, X32_BIT | (statx + 1), none),
            errno(libc::ENOSYS)
        );
        // i386: read is 3, mount 21, statx 383.
        assert_eq!(answer(&filter, I386, 3, none), ALLOW);
        assert_eq!(answer(&filter, I386, 21, none), errno(libc::EPERM));
        assert_eq!(answer(&filter, I386, 384, none), errno(libc::ENOSYS));
    }

    #[test]
    fn compile_profile_that_lists_denials_leaves_newer_calls_alone() {
        let filter = compile(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        }));
        assert_eq!(answer(&filter, X86_64, 9999, [0; 6]), ALLOW);
        let mount = u32::try_from(libc::SYS_mount).unwrap();
        assert_eq!(answer(&filter, X86_64, mount, [0; 6]), errno(libc::ENOSYS));
    }

    #[test]
    fn compile_default_errno_and_argument_operators_have_their_effect() {
        let filter = compile(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
            "syscalls": [
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 0xffff_ffff_u32, "op": "SCMP_CMP_EQ"}]},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_LT"}, {"index": 0, "value": 40, "op": "SCMP_CMP_GT"}]},
            ],
        }));
        let call = |number: i64, first: u64| {
            answer(
                &filter,
                X86_64,
                u32::try_from(number).unwrap(),
                [first, 0, 0, 0, 0, 0],
            )
        };
        assert_eq!(call(libc::SYS_personality, 8), ALLOW);
        assert_eq!(call(libc::SYS_personality, 0xffff_ffff), ALLOW);
        assert_eq!(call(libc::SYS_personality, 9), errno(libc::EACCES));
        assert_eq!(call(libc::SYS_clone, 0x11), ALLOW);
        assert_eq!(call(libc::SYS_clone, 0x1000_0000), errno(libc::EACCES));
        assert_eq!(call(libc::SYS_socket, 1), ALLOW);
        assert_eq!(call(libc::SYS_socket, 41), ALLOW);
        assert_eq!(call(libc::SYS_socket, 40), errno(libc::EACCES));
    }

    #[test]
    fn compile_each_action_and_flag_has_its_value() {
        let actions = [
            ("SCMP_ACT_KILL", 0),
            ("SCMP_ACT_KILL_THREAD", 0),
            ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
            ("SCMP_ACT_TRAP", 0x0003_0000),
            ("SCMP_ACT_ERRNO", 0x0005_0007),
            ("SCMP_ACT_TRACE", 0x7ff0_0007),
            ("SCMP_ACT_LOG", 0x7ffc_0000),
        ];
        let mount = u32::try_from(libc::SYS_mount).unwrap();
        for (name, value) in actions {
            let filter = compile(json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_S390X"],
                "syscalls": [{"names": ["mount"], "action": name, "errnoRet": 7}],
            }));
            assert_eq!(answer(&filter, X86_64, mount, [0; 6]), value, "{name}");
        }
        let filter = compile(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                      "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        }));
        let wanted = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        assert_eq!(filter.flags, wanted);
    }

    #[test]
    fn check_what_needs_a_listener_is_refused_by_name() {
        for (profile, field) in [
            (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "defaultAction"),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/l"}),
                "listenerPath",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "m"}),
                "listenerMetadata",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}),
                "defaultErrnoRet",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096}]}),
                "syscalls[0].errnoRet",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                       "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}),
                "syscalls[0].action",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"],
                       "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}),
                "syscalls[0].args",
            ),
        ] {
            let refused = check(&serde_json::from_value(profile).unwrap()).unwrap_err();
            assert_eq!(refused.field, format!("linux.seccomp.{field}"));
        }
    }
}
