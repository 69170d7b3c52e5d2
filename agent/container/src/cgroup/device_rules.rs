//! `linux.resources.devices`: which devices the container's processes may open
//! and make, enforced by a BPF program.
//!
//! Rules are a list of which the last that matches decides, separately for
//! reading, writing and making a node. A device that no rule matches is denied.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::CgroupError;
use super::device_program::{self, Instruction};
use crate::Unsupported;

/// Bounds the program, whose jumps are 16 bits.
const MAX_RULES: usize = 1024;

// linux/bpf.h: `struct bpf_cgroup_dev_ctx`
const DEVICE_BLOCK: u32 = 1;
const DEVICE_CHARACTER: u32 = 2;
const ACCESS_MKNOD: u32 = 1;
const ACCESS_READ: u32 = 2;
const ACCESS_WRITE: u32 = 4;
const CONTEXT_ACCESS_TYPE: i16 = 0;
const CONTEXT_MAJOR: i16 = 4;
const CONTEXT_MINOR: i16 = 8;

/// One rule; `None` matches all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    device_type: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn allow(device_type: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Self {
        Self {
            allow: true,
            device_type: Some(device_type),
            major,
            minor,
            access,
        }
    }

    fn matches_all(&self) -> bool {
        self.device_type.is_none() && self.major.is_none() && self.minor.is_none()
    }
}

const ACCESS_ALL: u32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;

const fn character(major: u32, minor: Option<u32>) -> Rule {
    Rule::allow(DEVICE_CHARACTER, Some(major), minor, ACCESS_ALL)
}

/// What every container may use whatever its rules say, as in other OCI
/// runtimes: making nodes (which does not open them) and the default devices.
const ALWAYS_ALLOWED: [Rule; 10] = [
    Rule::allow(DEVICE_CHARACTER, None, None, ACCESS_MKNOD),
    Rule::allow(DEVICE_BLOCK, None, None, ACCESS_MKNOD),
    character(1, Some(3)), // null
    character(1, Some(5)), // zero
    character(1, Some(7)), // full
    character(1, Some(8)), // random
    character(1, Some(9)), // urandom
    character(5, Some(0)), // tty
    character(5, Some(2)), // ptmx
    character(136, None),  // pts
];

fn refuse(index: usize, field: &str, reason: impl Into<String>) -> Unsupported {
    Unsupported::new(format!("linux.resources.devices[{index}].{field}"), reason)
}

fn number(value: Option<i64>, index: usize, field: &str) -> Result<Option<u32>, Unsupported> {
    match value {
        // -1 is how clients write the wildcard of cgroup version 1.
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| refuse(index, field, format!("{value} is not a device number"))),
    }
}

fn rule(index: usize, rule: &LinuxDeviceCgroup) -> Result<Rule, Unsupported> {
    let device_type = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(DEVICE_BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DEVICE_CHARACTER),
        Some(LinuxDeviceType::P) => {
            return Err(refuse(index, "type", "a FIFO has no device rules"));
        }
    };
    let major = number(rule.major(), index, "major")?;
    let minor = number(rule.minor(), index, "minor")?;
    if device_type.is_none() && (major.is_some() || minor.is_some()) {
        return Err(refuse(
            index,
            "type",
            "a rule with a device number needs the type b or c",
        ));
    }
    let mut access = 0;
    for letter in rule.access().iter().flat_map(|text| text.chars()) {
        access |= match letter {
            'r' => ACCESS_READ,
            'w' => ACCESS_WRITE,
            'm' => ACCESS_MKNOD,
            _ => {
                return Err(refuse(
                    index,
                    "access",
                    format!("{letter:?} is not r, w or m"),
                ));
            }
        };
    }
    if access == 0 {
        return Err(refuse(index, "access", "names none of r, w and m"));
    }
    Ok(Rule {
        allow: rule.allow(),
        device_type,
        major,
        minor,
        access,
    })
}

fn rules(resources: Option<&LinuxResources>) -> Result<Vec<Rule>, Unsupported> {
    let asked = resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default();
    if asked.len() > MAX_RULES {
        return Err(Unsupported::new(
            "linux.resources.devices",
            format!("{} rules, at most {MAX_RULES}", asked.len()),
        ));
    }
    let mut rules = Vec::with_capacity(asked.len() + ALWAYS_ALLOWED.len());
    for (index, asked) in asked.iter().enumerate() {
        rules.push(rule(index, asked)?);
    }
    Ok(rules)
}

/// Refuses rules that cannot be enforced.
pub fn check(resources: &LinuxResources) -> Result<(), Unsupported> {
    rules(Some(resources)).map(drop)
}

/// Whether the rules end in allowing every device, as for a privileged container.
pub fn allows_every_device(resources: Option<&LinuxResources>) -> bool {
    rules(resources).is_ok_and(|rules| {
        rules
            .iter()
            .rposition(|rule| rule.allow && rule.matches_all() && rule.access == ACCESS_ALL)
            .is_some_and(|all| rules[all..].iter().all(|rule| rule.allow))
    })
}

fn failed(cgroup: &Path) -> impl Fn(io::Error) -> CgroupError {
    move |source| CgroupError::Devices {
        path: cgroup.to_owned(),
        source,
    }
}

/// Loads the program of the rules, for a cgroup; it decides nothing yet.
pub fn load(cgroup: &Path, resources: &LinuxResources) -> Result<OwnedFd, CgroupError> {
    let failed = failed(cgroup);
    let rules = rules(Some(resources)).map_err(|refused| failed(io::Error::other(refused)));
    let mut rules = rules?;
    rules.extend(ALWAYS_ALLOWED);
    device_program::load(&compile(&rules)).map_err(failed)
}

/// Attaches a program to a cgroup, in one step in the place of another if there
/// is one.
pub fn attach(
    cgroup: &Path,
    program: &OwnedFd,
    instead_of: Option<BorrowedFd<'_>>,
) -> Result<(), CgroupError> {
    let failed = failed(cgroup);
    let directory = File::open(cgroup).map_err(&failed)?;
    device_program::attach(program.as_fd(), directory.as_fd(), instead_of).map_err(failed)
}

// Opcodes: linux/bpf.h and linux/bpf_common.h.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_IF_ANY_BIT: u8 = 0x46; // BPF_JMP32 | BPF_JSET | BPF_K
const JUMP_IF_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(code: u8, destination: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: destination,
        offset,
        immediate: immediate.cast_signed(),
    }
}

fn load_word(destination: u8, offset: i16) -> Instruction {
    Instruction {
        registers: destination | (CONTEXT << 4),
        ..instruction(LOAD_WORD, destination, offset, 0)
    }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [
        instruction(MOVE, RESULT, 0, u32::from(allow)),
        instruction(EXIT, 0, 0, 0),
    ]
}

/// Three passes, one for each kind of access: when the request asks for it, the
/// last rule about it that matches must allow it.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load_word(TYPE, CONTEXT_ACCESS_TYPE),
        instruction(AND, TYPE, 0, 0xffff),
        load_word(ACCESS, CONTEXT_ACCESS_TYPE),
        instruction(SHIFT_RIGHT, ACCESS, 0, 16),
        load_word(MAJOR, CONTEXT_MAJOR),
        load_word(MINOR, CONTEXT_MINOR),
    ];
    for access in [ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE] {
        let pass = compile_pass(rules, access);
        program.push(instruction(JUMP_IF_ANY_BIT, ACCESS, 1, access));
        program.push(instruction(JUMP, 0, pass.len() as i16, 0));
        program.extend(pass);
    }
    program.extend(answer(true));
    program
}

/// Falls through its end when the access is allowed.
fn compile_pass(rules: &[Rule], access: u32) -> Vec<Instruction> {
    let mut pass = Vec::new();
    let mut allowed = Vec::new();
    let mut decided = false;
    for rule in rules.iter().rev().filter(|rule| rule.access & access != 0) {
        let decision = if rule.allow { 1 } else { 2 };
        let conditions: Vec<_> = [
            (TYPE, rule.device_type),
            (MAJOR, rule.major),
            (MINOR, rule.minor),
        ]
        .into_iter()
        .filter_map(|(register, value)| value.map(|value| (register, value)))
        .collect();
        for (index, (register, value)) in conditions.iter().enumerate() {
            let skip = conditions.len() - 1 - index + decision;
            pass.push(instruction(
                JUMP_IF_NOT_EQUAL,
                *register,
                skip as i16,
                *value,
            ));
        }
        if rule.allow {
            allowed.push(pass.len());
            pass.push(instruction(JUMP, 0, 0, 0));
        } else {
            pass.extend(answer(false));
        }
        // What follows could not be reached, which the verifier refuses.
        if conditions.is_empty() {
            decided = true;
            break;
        }
    }
    if !decided {
        pass.extend(answer(false));
    }
    let end = pass.len();
    for index in allowed {
        pass[index].offset = (end - index - 1) as i16;
    }
    pass
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    struct Request {
        device_type: u32,
        major: u32,
        minor: u32,
        access: u32,
    }

    /// What the rules mean, written without any program.
    fn meaning(rules: &[Rule], request: Request) -> bool {
        [ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE]
            .into_iter()
            .filter(|access| request.access & access != 0)
            .all(|access| {
                rules
                    .iter()
                    .rev()
                    .find(|rule| {
                        rule.access & access != 0
                            && rule.device_type.is_none_or(|t| t == request.device_type)
                            && rule.major.is_none_or(|major| major == request.major)
                            && rule.minor.is_none_or(|minor| minor == request.minor)
                    })
                    .is_some_and(|rule| rule.allow)
            })
    }

    /// Executes a program as the kernel does, as far as ours go.
    fn run(program: &[Instruction], request: Request) -> bool {
        let mut registers = [0_u32; 6];
        let mut next = 0;
        loop {
            let Instruction {
                code,
                registers: operands,
                offset,
                immediate,
            } = program[next];
            let target = usize::from(operands & 0xf);
            let immediate = immediate.cast_unsigned();
            let mut jump = false;
            match code {
                LOAD_WORD => {
                    registers[target] = match offset {
                        CONTEXT_ACCESS_TYPE => request.access << 16 | request.device_type,
                        CONTEXT_MAJOR => request.major,
                        CONTEXT_MINOR => request.minor,
                        _ => panic!("load outside the context"),
                    }
                }
                AND => registers[target] &= immediate,
                SHIFT_RIGHT => registers[target] >>= immediate,
                MOVE => registers[target] = immediate,
                JUMP => jump = true,
                JUMP_IF_ANY_BIT => jump = registers[target] & immediate != 0,
                JUMP_IF_NOT_EQUAL => jump = registers[target] != immediate,
                EXIT => return registers[0] == 1,
                _ => panic!("unknown instruction {code:#x}"),
            }
            next += 1;
            if jump {
                next += usize::try_from(offset).expect("jumps forward only");
            }
        }
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        (
            any::<bool>(),
            proptest::option::of(1_u32..=2),
            proptest::option::of(0_u32..3),
            proptest::option::of(0_u32..3),
            1_u32..=7,
        )
            .prop_map(|(allow, device_type, major, minor, access)| Rule {
                allow,
                device_type,
                major,
                minor,
                access,
            })
    }

    proptest! {
        #[test]
        fn compile_any_rules_decides_as_they_mean(
            rules in proptest::collection::vec(any_rule(), 0..12),
            device_type in 1_u32..=2, major in 0_u32..4, minor in 0_u32..4, access in 1_u32..=7,
        ) {
            let request = Request { device_type, major, minor, access };
            prop_assert_eq!(run(&compile(&rules), request), meaning(&rules, request));
        }
    }

    fn resources(devices: &serde_json::Value) -> LinuxResources {
        serde_json::from_value(serde_json::json!({ "devices": devices })).unwrap()
    }

    #[test]
    fn compile_partial_allowances_add_up() {
        let resources = resources(&serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "w"},
        ]));
        let program = compile(&rules(Some(&resources)).unwrap());
        let mut request = Request {
            device_type: DEVICE_CHARACTER,
            major: 10,
            minor: 229,
            access: ACCESS_READ | ACCESS_WRITE,
        };
        assert!(run(&program, request));
        request.access |= ACCESS_MKNOD;
        assert!(!run(&program, request));
    }

    #[test]
    fn allows_every_device_only_without_a_later_denial() {
        let all = serde_json::json!({"allow": true, "access": "rwm"});
        let deny = serde_json::json!({"allow": false, "type": "b", "access": "w"});
        assert!(allows_every_device(Some(&resources(&serde_json::json!([
            deny, all
        ])))));
        assert!(!allows_every_device(Some(&resources(&serde_json::json!(
            [all, deny]
        )))));
        assert!(!allows_every_device(None));
    }

    #[test]
    fn check_rules_without_meaning_are_refused_by_name() {
        for (rule, field) in [
            (serde_json::json!({"allow": true}), "access"),
            (serde_json::json!({"allow": true, "access": "x"}), "access"),
            (
                serde_json::json!({"allow": true, "access": "r", "major": 1}),
                "type",
            ),
            (
                serde_json::json!({"allow": true, "access": "r", "type": "p"}),
                "type",
            ),
            (
                serde_json::json!({"allow": true, "access": "r", "type": "c", "major": -2}),
                "major",
            ),
        ] {
            let refused = check(&resources(&serde_json::json!([rule]))).unwrap_err();
            assert_eq!(refused.field, format!("linux.resources.devices[0].{field}"));
        }
    }
}
