//! The checks that run inside of a container, one module for each part of the
//! specification. Each reads its fields from the configuration as JSON.

pub mod capabilities;
mod cgroup;
mod devices;
mod hooks;
mod inherited;
mod isolation;
mod mounts;
mod paths;
mod process;
mod seccomp;
mod user;

use std::collections::BTreeMap;
use std::{fs, io};

use serde_json::Value;

use crate::report::Report;

/// Checks the container that this process runs in against its configuration.
pub fn container(spec: &Value) -> Report {
    let mut report = Report::default();
    for check in [
        // First: the later ones open files.
        inherited::check,
        process::check,
        user::check,
        capabilities::check,
        mounts::check,
        paths::check,
        devices::check,
        isolation::check,
        cgroup::check,
        seccomp::check,
        hooks::check,
    ] {
        check(spec, &mut report);
    }
    report
}

/// The list at a JSON pointer; an absent one is empty.
fn list<'a>(spec: &'a Value, pointer: &str) -> &'a [Value] {
    let list = spec.pointer(pointer).and_then(Value::as_array);
    list.map_or(&[], Vec::as_slice)
}

/// The text at a JSON pointer; an absent one is empty.
fn text<'a>(spec: &'a Value, pointer: &str) -> &'a str {
    let text = spec.pointer(pointer).and_then(Value::as_str);
    text.unwrap_or_default()
}

/// The texts of a list.
fn texts<'a>(spec: &'a Value, pointer: &str) -> Vec<&'a str> {
    list(spec, pointer)
        .iter()
        .filter_map(Value::as_str)
        .collect()
}

/// The number at a JSON pointer.
fn number(spec: &Value, pointer: &str) -> Option<i64> {
    spec.pointer(pointer).and_then(Value::as_i64)
}

/// Whether the configuration asks for a namespace, new or by path.
fn has_namespace(spec: &Value, kind: &str) -> bool {
    list(spec, "/linux/namespaces")
        .iter()
        .any(|namespace| text(namespace, "/type") == kind)
}

/// `/proc/self/status`, a value for each of its names.
fn status() -> BTreeMap<String, String> {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), words(value)))
        .collect()
}

/// The words of a text, with one space between them.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The words of a file.
fn file_words(path: &str) -> io::Result<String> {
    fs::read_to_string(path).map(|text| words(&text))
}
