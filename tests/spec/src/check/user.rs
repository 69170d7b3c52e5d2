//! `process.user`.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{list, number, status};
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    let status = status();
    let seen = |name: &str| status.get(name).cloned().unwrap_or_default();
    for (field, name) in [("uid", "Uid"), ("gid", "Gid")] {
        let asked = number(spec, &format!("/process/user/{field}")).unwrap_or_default();
        // Real, effective, saved, and that of the file system.
        let expected = [asked.to_string().as_str(); 4].join(" ");
        report.compare(format!("process.user.{field}"), expected, seen(name));
    }
    let expected: BTreeSet<_> = list(spec, "/process/user/additionalGids")
        .iter()
        .filter_map(Value::as_u64)
        .collect();
    let groups: BTreeSet<u64> = seen("Groups")
        .split(' ')
        .filter_map(|gid| gid.parse().ok())
        .collect();
    report.compare(
        "process.user.additionalGids",
        format!("{expected:?}"),
        format!("{groups:?}"),
    );
    let umask = number(spec, "/process/user/umask").unwrap_or(0o022);
    report.compare("process.user.umask", format!("{umask:04o}"), seen("Umask"));
}
