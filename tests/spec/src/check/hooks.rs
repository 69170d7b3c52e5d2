//! `hooks`: each that can run before the program has run, with the container's state.

use std::fs;

use serde_json::Value;

use super::{list, text, texts};
use crate::report::Report;

pub fn check(spec: &Value, report: &mut Report) {
    for (kind, status) in [
        ("prestart", "created or creating"),
        ("createRuntime", "created or creating"),
        ("createContainer", "created or creating"),
        ("startContainer", "created or creating"),
    ] {
        for hook in list(spec, &format!("/hooks/{kind}")) {
            let file = texts(hook, "/args").last().copied().unwrap_or_default();
            let root = text(spec, "/root/path");
            // The host names it by the host's path.
            let inside = file.strip_prefix(root).unwrap_or(file);
            let state = fs::read_to_string(inside);
            let seen = state.map(|state| told(&state));
            report.compare_read(
                format!("hooks.{kind}"),
                format!("{status}, all there"),
                seen,
            );
        }
    }
    for kind in ["poststart", "poststop"] {
        if !list(spec, &format!("/hooks/{kind}")).is_empty() {
            report.unchecked(format!("hooks.{kind}"), "runs after the program has begun");
        }
    }
}

/// What matters of a state (runtime-spec, runtime.md, "State").
fn told(state: &str) -> String {
    let Ok(state) = serde_json::from_str::<Value>(state) else {
        return format!("no state: {state:?}");
    };
    let status = match text(&state, "/status") {
        "created" | "creating" => "created or creating",
        other => other,
    };
    let whole = ["/ociVersion", "/id", "/bundle"]
        .iter()
        .all(|field| !text(&state, field).is_empty())
        && state["pid"].as_u64().is_some_and(|pid| pid > 0);
    format!(
        "{status}, {}",
        if whole { "all there" } else { "incomplete" }
    )
}
