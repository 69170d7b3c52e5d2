//! `process.capabilities`: the five sets as they are after the program was executed.

use serde_json::Value;

use super::{number, status, texts};
use crate::report::Report;

/// In the order of their numbers (linux/capability.h).
pub const NAMES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Five sets, a bit for each capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

/// Compares the five sets.
pub fn check(spec: &Value, report: &mut Report) {
    let uid = number(spec, "/process/user/uid").unwrap_or_default();
    let no_new_privileges = spec["process"]["noNewPrivileges"] == true;
    let expected = executed(asked(spec), uid == 0, no_new_privileges);
    let status = status();
    for (set, name, expected) in [
        ("bounding", "CapBnd", expected.bounding),
        ("effective", "CapEff", expected.effective),
        ("inheritable", "CapInh", expected.inheritable),
        ("permitted", "CapPrm", expected.permitted),
        ("ambient", "CapAmb", expected.ambient),
    ] {
        report.compare(
            format!("process.capabilities.{set}"),
            format!("{expected:016x}"),
            status.get(name).map_or("absent", String::as_str),
        );
    }
}

/// The sets of the configuration, an ambient capability only where it can be.
fn asked(spec: &Value) -> Sets {
    let set = |name: &str| {
        let names = texts(spec, &format!("/process/capabilities/{name}"));
        let bits = names
            .iter()
            .filter_map(|name| NAMES.iter().position(|known| known == name));
        bits.fold(0, |set, bit| set | 1 << bit)
    };
    let (inheritable, permitted) = (set("inheritable"), set("permitted"));
    Sets {
        bounding: set("bounding"),
        effective: set("effective"),
        inheritable,
        permitted,
        ambient: set("ambient") & inheritable & permitted,
    }
}

/// capabilities(7), "Transformation of capabilities during execve", of a file
/// without capabilities.
fn executed(before: Sets, is_root: bool, no_new_privileges: bool) -> Sets {
    let mut permitted = before.ambient;
    if is_root {
        permitted |= before.inheritable | before.bounding;
        if no_new_privileges {
            permitted &= before.permitted;
        }
    }
    Sets {
        permitted,
        effective: if is_root { permitted } else { before.ambient },
        ..before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Sets = Sets {
        bounding: 0b1111,
        effective: 0b0001,
        inheritable: 0b0110,
        permitted: 0b0111,
        ambient: 0b0010,
    };

    #[test]
    fn executed_by_root_gains_what_is_bounding() {
        let after = executed(BEFORE, true, false);
        assert_eq!((after.permitted, after.effective), (0b1111, 0b1111));
    }

    #[test]
    fn executed_by_root_without_new_privileges_gains_nothing() {
        let after = executed(BEFORE, true, true);
        assert_eq!((after.permitted, after.effective), (0b0111, 0b0111));
    }

    #[test]
    fn executed_by_another_user_keeps_what_is_ambient() {
        let after = executed(BEFORE, false, false);
        assert_eq!((after.permitted, after.effective), (0b0010, 0b0010));
        assert_eq!((after.bounding, after.inheritable), (0b1111, 0b0110));
    }
}
