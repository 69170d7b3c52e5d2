//! Runs every check in one node, one after another, and fails also when the
//! node's own kernel complained.

use std::{process::ExitCode, sync::Arc};

use anyhow::Result;
use bulkhead_e2e::{checks, lab::Lab};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    match run(&arguments) {
        Ok(conclusion) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<Conclusion> {
    let lab = Arc::new(Lab::open()?);
    println!("node: {}", lab.node().mode());
    let conclusion = libtest_mimic::run(arguments, trials(Some(&lab)));
    if let Some(lab) = Arc::into_inner(lab) {
        lab.close()?;
    }
    Ok(conclusion)
}

fn trials(lab: Option<&Arc<Lab>>) -> Vec<Trial> {
    let all = checks::ALL.iter().flat_map(|group| group.iter());
    all.map(|(name, check)| {
        let held = lab.cloned();
        let trial = Trial::test(*name, move || match held {
            Some(lab) => check(&lab).map_err(|error| Failed::from(format!("{error:#}"))),
            None => Err("no node".into()),
        });
        trial.with_ignored_flag(lab.is_some_and(|lab| is_skipped(lab, name)))
    })
    .collect()
}

fn is_skipped(lab: &Lab, name: &str) -> bool {
    let listed = checks::SKIPPED.iter().find(|(skipped, _)| *skipped == name);
    if let (Some((name, reason)), false) = (listed, lab.soak()) {
        println!("SKIP {name}: {reason}");
        return true;
    }
    false
}
