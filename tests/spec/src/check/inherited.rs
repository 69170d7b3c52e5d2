//! What a container must not inherit from its runtime: descriptors, signal
//! masks and dispositions; and its session and streams.

use std::fs::{self, File, OpenOptions};
use std::io;

use rustix::termios::isatty;
use serde_json::Value;

use super::status;
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    report.compare("descriptors", "0 1 2", descriptors().join(" "));
    let status = status();
    for name in ["SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"] {
        let seen = status.get(name).map_or("absent", String::as_str);
        report.compare(format!("signals: {name}"), "0000000000000000", seen);
    }
    // proc_pid_stat(5): the sixth field, the third after the program's name.
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let session = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(3));
    let pid = std::process::id().to_string();
    report.compare("session", pid, session.unwrap_or("unknown"));
    streams(spec, report);
}

/// The numbers of the open descriptors but for the one that lists them.
fn descriptors() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return vec!["no /proc/self/fd".to_owned()];
    };
    let own = format!("/proc/{}/fd", std::process::id());
    let mut numbers: Vec<_> = entries
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| *target != *own))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    numbers.sort();
    numbers
}

fn streams(spec: &Value, report: &mut Report) {
    let terminal = spec["process"]["terminal"] == true;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let seen = [isatty(&stdin), isatty(&stdout), isatty(&stderr)];
    report.compare(
        "process.terminal",
        format!("{:?}", [terminal; 3]),
        format!("{seen:?}"),
    );
    // Programs write their logs to these names, as any user.
    let write = OpenOptions::new().write(true).open("/dev/stdout");
    let opened = |file: io::Result<File>| file.map(|_| "opens");
    report.compare_read("stdio: /dev/stdout", "opens", opened(write));
    if terminal {
        let console = opened(OpenOptions::new().write(true).open("/dev/tty"));
        report.compare_read("process.terminal: /dev/tty", "opens", console);
    }
}
