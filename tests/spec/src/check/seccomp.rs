//! `linux.seccomp`: the filter is there, and calls get the answers it names.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{list, number, status, text, texts};
use crate::base::CHECKER;
use crate::kernel_calls::CALLS;
use crate::report::Report;

/// Numbers that the one call with an argument is tried with.
const ARGUMENTS: [u64; 2] = [0, 1];
const WITH_ARGUMENT: &str = "sched_get_priority_max";

pub fn check(spec: &Value, report: &mut Report) {
    let profile = &spec["linux"]["seccomp"];
    // prctl(2), PR_GET_SECCOMP: 2 is a filter.
    let mode = if profile.is_null() { 0 } else { 2 };
    let status = status();
    let seen = status.get("Seccomp").map_or("absent", String::as_str);
    report.compare("linux.seccomp: mode", mode, seen);
    if profile.is_null() {
        return;
    }
    for (name, _) in CALLS {
        let arguments = if *name == WITH_ARGUMENT {
            &ARGUMENTS[..]
        } else {
            &ARGUMENTS[..1]
        };
        for argument in arguments {
            let field = format!("linux.seccomp: {name}({argument})");
            report.compare(
                field,
                expected(profile, name, *argument),
                tried(name, *argument),
            );
        }
    }
}

/// What a profile answers.
fn expected(profile: &Value, name: &str, argument: u64) -> String {
    let rule = list(profile, "/syscalls").iter().find(|rule| {
        let arguments = list(rule, "/args");
        texts(rule, "/names").contains(&name)
            && arguments.iter().all(|wanted| wanted["value"] == argument)
    });
    if name == CALLS[CALLS.len() - 1].0 {
        // A filter that answers EPERM to a call newer than itself breaks C
        // libraries, which fall back on ENOSYS alone.
        return failure(libc::ENOSYS.into());
    }
    let (action, errno) = match rule {
        Some(rule) => (text(rule, "/action"), number(rule, "/errnoRet")),
        None => (
            text(profile, "/defaultAction"),
            number(profile, "/defaultErrnoRet"),
        ),
    };
    match action {
        "SCMP_ACT_ERRNO" => failure(errno.unwrap_or(libc::EPERM.into())),
        // Without a tracer (seccomp(2)).
        "SCMP_ACT_TRACE" => failure(libc::ENOSYS.into()),
        "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG" => "returns".to_owned(),
        _ => format!("killed by signal {}", libc::SIGSYS),
    }
}

fn failure(errno: i64) -> String {
    format!("error {errno}")
}

/// Lets another process of this program make the call.
fn tried(name: &str, argument: u64) -> String {
    let child = Command::new(CHECKER)
        .args(["call", name, &argument.to_string()])
        .stdin(Stdio::inherit())
        .stderr(Stdio::inherit())
        .output();
    match child {
        Err(error) => format!("cannot try: {error}"),
        Ok(output) => match output.status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn expected_of_a_rule_with_an_argument_is_for_that_value_alone() {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["sched_get_priority_max"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5,
             "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]});
        assert_eq!(expected(&profile, WITH_ARGUMENT, 1), "error 5");
        assert_eq!(expected(&profile, WITH_ARGUMENT, 0), "returns");
    }

    #[test]
    fn expected_of_what_no_rule_names_is_the_default() {
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13});
        assert_eq!(expected(&profile, "getsid", 0), "error 13");
        let profile = json!({"defaultAction": "SCMP_ACT_KILL_PROCESS"});
        assert_eq!(expected(&profile, "getsid", 0), "killed by signal 31");
    }
}
