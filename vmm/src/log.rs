//! Lines for the host's log: stderr, which the launcher reads.

use std::error::Error;
use std::io::Write;

/// Writes one line. Nobody may be reading any more; that harms nothing.
pub fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "bulkhead-vmm: {line}");
}

/// The whole chain of causes, outermost first.
pub fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let link = error.to_string();
        // Some libraries print their cause themselves.
        if !text.ends_with(&link) {
            text.push_str(": ");
            text.push_str(&link);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use thiserror::Error;

    #[derive(Debug, Error)]
    #[error("outer{}", if *told { ": inner" } else { "" })]
    struct Outer {
        told: bool,
        #[source]
        source: Inner,
    }

    #[derive(Debug, Error)]
    #[error("inner")]
    struct Inner;

    #[test]
    fn describe_gives_each_cause_once() {
        for told in [false, true] {
            let source = Inner;
            assert_eq!(describe(&Outer { told, source }), "outer: inner");
        }
    }
}
