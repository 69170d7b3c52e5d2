//! The node's console log, which is a test result: a kernel that complains makes the run fail.

use std::fs;
use std::io;
use std::path::Path;

/// What the kernel says when something is wrong that must not pass unseen.
const FAULTS: [&str; 9] = [
    "Oops",
    "Kernel panic",
    "BUG:",
    "kernel BUG at",
    "WARNING: CPU",
    "general protection fault",
    "INFO: rcu",
    "soft lockup",
    "blocked for more than",
];

/// Lines shown with each fault: a call trace is the interesting part.
const LINES_AFTER: usize = 25;

/// The first fault in a console log, with the lines that follow; `None` when all is well.
pub fn first_fault(log: &str) -> Option<String> {
    let mut lines = log
        .lines()
        .skip_while(|line| !FAULTS.iter().any(|fault| line.contains(fault)));
    let first = lines.next()?;
    let mut shown = vec![first];
    shown.extend(lines.take(LINES_AFTER));
    Some(shown.join("\n"))
}

/// Reads a console log; what is not UTF-8 is replaced.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// The last `count` lines of `log`.
pub fn tail(log: &str, count: usize) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_fault_oops_is_shown_with_its_trace() {
        let log = "booting\n[ 1.0] Oops: 0000 [#1] SMP\n[ 1.0] CPU: 0\n";
        assert_eq!(
            first_fault(log).unwrap(),
            "[ 1.0] Oops: 0000 [#1] SMP\n[ 1.0] CPU: 0"
        );
    }

    #[test]
    fn first_fault_ordinary_log_is_none() {
        assert_eq!(first_fault("Linux version 6.12\nNODE setup done\n"), None);
        assert_eq!(first_fault("Debug: loaded\n"), None);
    }

    #[test]
    fn tail_keeps_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
    }
}
