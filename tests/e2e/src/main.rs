//! Runs the checks in as many nodes as `--test-threads` says, and fails also
//! when a node's own kernel complained.

use std::{env, process::ExitCode, sync::Arc, time::Instant};

use anyhow::Result;
use bulkhead_e2e::{checks, labs::Labs, stand_ins};
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
    let labs = Arc::new(Labs::open(arguments.test_threads.unwrap_or(1).max(1))?);
    let conclusion = libtest_mimic::run(arguments, trials(Some(&labs)));
    if let Some(labs) = Arc::into_inner(labs)
        && !conclusion.has_failed()
    {
        labs.close(arguments.filter.is_none())?;
    }
    Ok(conclusion)
}

fn trials(labs: Option<&Arc<Labs>>) -> Vec<Trial> {
    let all = checks::ALL.iter().flat_map(|group| group.iter());
    all.map(|(name, check)| {
        let held = labs.cloned();
        let trial = Trial::test(*name, move || match held {
            Some(labs) => told(name, || {
                labs.with(|lab| {
                    check(lab)?;
                    stand_ins::expect_no_other(lab)
                })
            }),
            None => Err("no node".into()),
        });
        trial.with_ignored_flag(is_for_soak(name))
    })
    .collect()
}

/// Says at once how long a check took and why it failed: a run that is stopped
/// half-way would not.
fn told(name: &str, check: impl FnOnce() -> Result<()>) -> Result<(), Failed> {
    let started = Instant::now();
    let result = check().map_err(|error| format!("{error:#}"));
    let seconds = started.elapsed().as_secs_f32();
    match &result {
        Ok(()) => println!("  {name}: {seconds:.1} s"),
        Err(error) => println!("  {name} failed after {seconds:.1} s: {error}"),
    }
    result.map_err(Failed::from)
}

fn is_for_soak(name: &str) -> bool {
    let listed = checks::FOR_SOAK.iter().find(|(listed, _)| *listed == name);
    if let (Some((name, reason)), None) = (listed, env::var_os("BULKHEAD_SOAK")) {
        println!("SKIP {name}: {reason}");
        return true;
    }
    false
}
