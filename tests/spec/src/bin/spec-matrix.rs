//! Runs the matrix in a node, under both runtimes, and judges what came of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use bulkhead_spec_checker::known::{self, KNOWN};
use bulkhead_spec_checker::matrix::{self, Case, Variation};
use bulkhead_spec_checker::report::{Outcome, Run, Runtime};
use bulkhead_spec_checker::{judge, variations};
use clap::Parser;

#[path = "spec-matrix/containers.rs"]
mod containers;

use containers::Containers;

/// Runs the checker under runc and Bulkhead and compares.
#[derive(Parser)]
struct Arguments {
    /// The checker's binary.
    #[arg(long, default_value = "/tmp/spec-checker")]
    checker: PathBuf,
    /// Where the combinations come from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also every variation alone, where it is otherwise those that one of the
    /// runtimes refuses, and this many random combinations.
    #[arg(long)]
    whole: Option<usize>,
    /// Only these: cases by name (`packed-0`) or kind (`packed`), and variations, each alone.
    #[arg(long)]
    only: Vec<String>,
    /// Only this runtime.
    #[arg(long)]
    runtime: Option<String>,
    /// Leaves every run as JSON, a line each, in this file.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Runs nothing, and judges what `--results` left in this file.
    #[arg(long)]
    judge: Option<PathBuf>,
    /// Prints the known differences as the document has them, and ends.
    #[arg(long)]
    document: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.document {
        print!("{}", known::document());
        return Ok(ExitCode::SUCCESS);
    }
    let runs = match &arguments.judge {
        Some(file) => read(file)?,
        None => run_all(&arguments)?,
    };
    let judgement = judge::judge(&runs, KNOWN);
    println!("{}", judgement.table);
    if judgement.problems.is_empty() {
        println!("no difference but the known");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{} problems:\n{}",
        judgement.problems.len(),
        judgement.problems.join("\n")
    );
    Ok(ExitCode::FAILURE)
}

fn run_all(arguments: &Arguments) -> Result<Vec<Run>> {
    let cases = cases(arguments);
    println!("seed {}: {} cases", arguments.seed, cases.len());
    let containers = Containers::prepare(Path::new("/var/lib/spec-matrix"), &arguments.checker)?;
    let mut runs = Vec::new();
    for runtime in Runtime::ALL {
        let wanted = arguments.runtime.as_deref();
        if wanted.is_none_or(|name| name == runtime.to_string()) {
            runs.extend(run(&containers, runtime, &cases)?);
        }
    }
    if let Some(file) = &arguments.results {
        let lines: Result<Vec<_>, _> = runs.iter().map(serde_json::to_string).collect();
        let lines = lines?.join("\n") + "\n";
        fs::write(file, lines).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(runs)
}

fn read(file: &Path) -> Result<Vec<Run>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let runs: Result<_, _> = text.lines().map(serde_json::from_str).collect();
    runs.with_context(|| format!("read {}", file.display()))
}

fn cases(arguments: &Arguments) -> Vec<Case> {
    let all = variations::all();
    let single = |variation: &Variation| {
        arguments.whole.is_some()
            || known::is_refused_by_one(variation.name)
            || arguments.only.iter().any(|name| name == variation.name)
    };
    let singles: Vec<_> = all.iter().filter(|one| single(one)).copied().collect();
    let may_combine = |variation: &Variation| !known::is_refused(variation.name);
    let mut cases = matrix::alone(&singles);
    cases.extend(matrix::packed(&all, arguments.seed, may_combine));
    let random = arguments.whole.unwrap_or_default();
    cases.extend(matrix::random(&all, arguments.seed, random, may_combine));
    if !arguments.only.is_empty() {
        cases.retain(|case| arguments.only.iter().any(|name| is_named(case, name)));
    }
    cases
}

/// By its own name, by the kind that its name begins with, or by what it varies alone.
fn is_named(case: &Case, name: &str) -> bool {
    let alone = matches!(&case.variations[..], [one] if one.name == name);
    alone || case.name == name || case.name.split('-').next() == Some(name)
}

fn run(containers: &Containers, runtime: Runtime, cases: &[Case]) -> Result<Vec<Run>> {
    let pod = containers.pod(runtime)?;
    let runs = cases.iter().map(|case| {
        let started = Instant::now();
        let outcome = containers.run(&pod, case)?;
        let short = match &outcome {
            Outcome::Report(_) => "reported",
            Outcome::Failed(error) => error.trim(),
        };
        let names: BTreeSet<_> = case.variations.iter().map(|one| one.name).collect();
        eprintln!(
            "{:5.1} s {runtime} {} {short} {names:?}",
            started.elapsed().as_secs_f32(),
            case.name
        );
        Ok(Run {
            case: case.name.clone(),
            variations: names.into_iter().map(str::to_owned).collect(),
            runtime,
            outcome,
        })
    });
    runs.collect()
}
