//! `bulkhead-conformance`: runs critest, the Kubernetes project's validation of CRI runtimes, against containerd 2.4 in
//! nodes, with runc and with Bulkhead, and compares.

mod critest;
mod nodes;
mod report;
mod skips;
mod verdict;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use nodes::Nodes;
use report::Spec;
use skips::Skips;
use verdict::Verdict;

/// Runs critest with each runtime. `BULKHEAD_PREFIX` names the installation under test.
#[derive(Parser)]
struct Arguments {
    /// The runtimes, in order; the first ones tell what the node itself cannot pass.
    #[arg(long, value_delimiter = ',', default_values = ["runc", "bulkhead"])]
    runtimes: Vec<Runtime>,
    /// How many nodes share the specs.
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// Only specs whose full name contains this.
    #[arg(long, default_value = "")]
    focus: String,
    /// Only the specs of `subset.txt`.
    #[arg(long)]
    subset: bool,
    /// Where reports and logs are kept.
    #[arg(long, default_value = "tests/conformance/results")]
    out: PathBuf,
}

/// A runtime handler of the node's containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Runtime {
    /// What the suite's own project tests against.
    Runc,
    /// The runtime under test.
    Bulkhead,
}

impl Runtime {
    /// Its name in containerd's configuration.
    fn handler(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Bulkhead => "bulkhead",
        }
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether Bulkhead passed.
fn run(arguments: &Arguments) -> Result<bool> {
    fs::create_dir_all(&arguments.out)
        .with_context(|| format!("create {}", arguments.out.display()))?;
    let skips = Skips::ours()?;
    let nodes = Nodes::up(arguments.nodes)?;
    let listed = nodes.list()?;
    skips::each_is_one_of(skips.names(), &listed)?;
    skips::each_is_one_of(skips::subset(), &listed)?;
    let chosen: Vec<_> = listed
        .iter()
        .filter(|name| name.contains(&arguments.focus))
        .filter(|name| !arguments.subset || skips::subset().any(|one| one == *name))
        .cloned()
        .collect();

    let mut verdict = Verdict::default();
    for runtime in &arguments.runtimes {
        let (skipped, run): (Vec<_>, Vec<_>) = chosen
            .iter()
            .cloned()
            .partition(|name| *runtime == Runtime::Bulkhead && skips.reason(name).is_some());
        let specs = nodes.run(*runtime, &run, &arguments.out)?;
        keep(arguments, *runtime, &specs)?;
        verdict.add(*runtime, specs, &skipped);
    }
    println!("{}", verdict.table(&skips));
    nodes.down()?;
    // What the subset has was chosen because it can be passed.
    Ok(verdict.passed() && (verdict.complete() || !arguments.subset))
}

fn keep(arguments: &Arguments, runtime: Runtime, specs: &[Spec]) -> Result<()> {
    let file = arguments.out.join(format!("{}.json", runtime.handler()));
    fs::write(&file, serde_json::to_vec_pretty(specs)?)
        .with_context(|| format!("write {}", file.display()))
}
