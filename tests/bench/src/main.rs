//! Brings up a node, measures in it, prints the table and keeps the samples.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::Comparison;
use bulkhead_node::{Node, NodeCommand, NodeOptions};
use clap::Parser;
use serde::Serialize;

/// Measures start-up in one node, in turns with what it is compared with.
#[derive(Parser)]
struct Arguments {
    /// Installation of Bulkhead.
    #[arg(long)]
    prefix: PathBuf,
    /// `bench-in-node`, static.
    #[arg(long)]
    in_node: PathBuf,
    /// `bench-init`, static.
    #[arg(long)]
    init: PathBuf,
    /// Runs of each way.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Where the samples are kept, as JSON.
    #[arg(long, default_value = "tests/bench/results/start.json")]
    out: PathBuf,
}

/// What is kept of a run.
#[derive(Serialize)]
struct Report {
    /// `nested` or `emulated`: times of different modes do not compare.
    mode: String,
    comparisons: Vec<Comparison>,
}

/// On hardware; the node multiplies it.
const TIMEOUT: Duration = Duration::from_mins(5);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let report = measure(&arguments)?;
    println!("node: {}\n", report.mode);
    for comparison in &report.comparisons {
        println!("{comparison}");
    }
    if let Some(directory) = arguments.out.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&arguments.out, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("write {}", arguments.out.display()))?;
    println!("samples: {}", arguments.out.display());
    Ok(())
}

fn measure(arguments: &Arguments) -> Result<Report> {
    let scratch = tempfile::tempdir()?;
    let initramfs = scratch.path().join("initramfs.cpio");
    fs::write(
        &initramfs,
        rootfs_builder::initramfs::archive(&arguments.init)?,
    )?;

    let node = Node::up(NodeOptions::new("bench").prefix(&arguments.prefix))?;
    node.push(&arguments.in_node, "/tmp/bench-in-node".as_ref())?;
    node.push(&initramfs, "/tmp/initramfs.cpio".as_ref())?;
    let command = NodeCommand::new("/tmp/bench-in-node")
        .args(["--prefix", "/opt/bulkhead"])
        .args(["--initramfs", "/tmp/initramfs.cpio"])
        .args(["--runs", &arguments.runs.to_string()])
        .args(["--time-factor", &node.time_factor().to_string()])
        .timeout(TIMEOUT);
    let output = node.run(command)?;
    ensure!(
        output.status.success(),
        "the measurement ended with {}: {}",
        output.status,
        output.stderr_text()
    );
    let report = Report {
        mode: node.mode().to_string(),
        comparisons: serde_json::from_slice(&output.stdout)?,
    };
    node.down()?;
    Ok(report)
}
