//! libFuzzer with one of the targets: `BULKHEAD_FUZZ_TARGET` names it, since
//! libFuzzer takes every word of the command line for itself. One binary, so that
//! there is one instrumented build to link.
#![no_main]

use std::sync::OnceLock;

use bulkhead_fuzz::{TARGETS, Target};

const VARIABLE: &str = "BULKHEAD_FUZZ_TARGET";

fn target() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var(VARIABLE).unwrap_or_default();
        Target::named(&name).unwrap_or_else(|| {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            panic!("{VARIABLE}={name:?}: need one of {}", names.join(", "));
        })
    })
}

/// As Rust's own `main` does, which libFuzzer's replaces: writing to a socket
/// whose other end is gone is an error, not the end.
fn ignore_broken_pipes() {
    #![expect(unsafe_code, reason = "setting a signal's disposition")]
    // SAFETY: SIG_IGN is a disposition without a handler, and no other thread runs yet.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

libfuzzer_sys::fuzz_target!(
    init: {
        ignore_broken_pipes();
        target();
    },
    |input: &[u8]| target().check(input)
);
