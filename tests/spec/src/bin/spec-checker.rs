//! The program of the containers: it checks its own container and prints what
//! it found, as JSON in one line.
//!
//! It has no `main` of Rust's: that one ignores SIGPIPE and catches SIGSEGV
//! before the program begins, which would hide what the container inherited.
#![no_main]
#![expect(
    unsafe_code,
    reason = "the name of C's main is one that the linker looks for"
)]

use std::io::{self, Read, Write};
use std::path::Path;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use bulkhead_spec_checker::base::CONFIG;
use bulkhead_spec_checker::report::REPORT_MARK;
use bulkhead_spec_checker::{check, kernel_calls};
use libc::{c_char, c_int};

/// Where the C library starts the program. It finds its arguments by `std::env`,
/// which does not need Rust's own start.
///
/// # Safety
/// Called once, by the C library.
// SAFETY: no other item of the program has this name.
#[unsafe(no_mangle)]
pub extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    match run() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("spec-checker: {error:#}");
            1
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["check", ..] => report(),
        ["call", name, argument] => call(name, argument),
        ["hook", file] => hook(Path::new(file)),
        ["hold"] => loop {
            std::thread::park();
        },
        _ => bail!("wanted: check | call NAME NUMBER | hook FILE | hold"),
    }
}

fn report() -> Result<()> {
    let config = fs::read(CONFIG).with_context(|| format!("read {CONFIG}"))?;
    let spec = serde_json::from_slice(&config).with_context(|| format!("read {CONFIG}"))?;
    let report = serde_json::to_string(&check::container(&spec))?;
    println!("{REPORT_MARK}{report}");
    Ok(())
}

/// A system call's answer, for a parent under the same seccomp filter.
fn call(name: &str, argument: &str) -> Result<()> {
    let argument = argument.parse().context(argument.to_owned())?;
    match kernel_calls::call(name, argument) {
        Ok(()) => println!("returns"),
        Err(error) => println!("error {}", error.raw_os_error().unwrap_or_default()),
    }
    Ok(())
}

/// Leaves the container's state, which a hook gets, in a file.
fn hook(file: &Path) -> Result<()> {
    let mut state = Vec::new();
    io::stdin()
        .read_to_end(&mut state)
        .context("read the state")?;
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    let mut out = fs::File::create(file).with_context(|| format!("make {}", file.display()))?;
    out.write_all(&state)
        .with_context(|| format!("write {}", file.display()))
}
