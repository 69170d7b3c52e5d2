//! Real containers on this machine's kernel: needs root and a cgroup2 mount.
//!
//! The binary is executed again as the container helper, as the agent is, so it
//! runs its tests itself instead of through libtest.

mod cases;
mod fixture;

use std::panic::{AssertUnwindSafe, catch_unwind};

use fixture::Host;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some(agent_container::HELPER_ARGUMENT) {
        agent_container::helper_main();
    }
    let filters: Vec<_> = first
        .into_iter()
        .chain(arguments)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let host = match Host::prepare() {
        Ok(host) => host,
        Err(reason) => {
            println!("SKIP containers: {reason}");
            return;
        }
    };
    let mut failed = Vec::new();
    for (name, case) in cases::ALL {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let passed = catch_unwind(AssertUnwindSafe(|| {
            case(&host);
            host.assert_clean();
        }))
        .is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
    }
    host.finish();
    assert!(failed.is_empty(), "failed: {failed:?}");
}
