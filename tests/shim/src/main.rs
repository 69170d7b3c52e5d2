//! Runs the scenarios against one shim and prints a JSON line for each.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use shim_harness::events::Sink;
use shim_harness::scenarios;
use shim_harness::shim::Settings;

/// Drives a containerd shim by itself, as containerd does.
#[derive(Parser)]
struct Arguments {
    /// The shim's binary.
    #[arg(long)]
    shim: PathBuf,
    /// A directory with busybox's files: the root of every container, read-only.
    #[arg(long)]
    rootfs: PathBuf,
    /// An empty directory to work in, on a file system that overlayfs can write
    /// to; what is left of a failed scenario stays in it.
    #[arg(long)]
    scratch: PathBuf,
    /// Run the full counts.
    #[arg(long)]
    soak: bool,
    /// How much slower than hardware this machine is.
    #[arg(long, default_value_t = 1)]
    time_factor: u32,
    /// Run only the scenarios whose names contain one of these.
    filters: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = &arguments.scratch;
    std::fs::create_dir_all(scratch).with_context(|| format!("make {}", scratch.display()))?;
    let sink = Sink::listen(&scratch.join("containerd.sock.ttrpc")).await?;
    let settings = Settings {
        shim: arguments.shim,
        rootfs: arguments.rootfs,
        scratch: arguments.scratch,
        soak: arguments.soak,
        time_factor: arguments.time_factor,
        sink,
    };
    let mut written = Ok(());
    scenarios::run(&settings, &arguments.filters, |report| {
        // A line at a time: whoever kills a run that hangs knows how far it came.
        let line = serde_json::to_string(&report).expect("a report encodes");
        let mut stdout = std::io::stdout();
        let told = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        if written.is_ok() {
            written = told;
        }
    })
    .await;
    written.context("write a report")
}
