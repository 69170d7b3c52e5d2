//! What is tried. Each scenario holds for any shim; what it saw besides is
//! compared.

mod boot;
mod codes;
mod input;
mod kinds;
mod life;
mod order;
mod output;
mod wrong_calls;

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use anyhow::Result;

use crate::bundle::Program;
use crate::report::{Facts, Report};
use crate::shim::{Settings, Shim};
use crate::streams::{Streams, pattern};

type Outcome<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;
/// With shims of its own.
type Alone = for<'a> fn(&'a Settings, &'a mut Facts) -> Outcome<'a>;
/// Beside a container that sleeps, which others use after it.
type Beside = for<'a> fn(&'a Shim<'a>, &'a mut Facts) -> Outcome<'a>;

/// Names of scenarios, as reported.
const ALONE: &[(&str, Alone)] = &[
    ("start_as_each_containerd", |s, f| {
        Box::pin(boot::each(s, f))
    }),
    ("life", |s, f| Box::pin(life::newest(s, f))),
    ("life_for_containerd_1_7", |s, f| {
        Box::pin(life::older(s, f))
    }),
    ("output_of_init_then_delete", |s, f| {
        Box::pin(output::of_init(s, f))
    }),
    ("input_of_init", |s, f| Box::pin(input::of_init(s, f))),
    ("order_of_events", |s, f| Box::pin(order::repeated(s, f))),
    ("wrong_calls", |s, f| {
        Box::pin(wrong_calls::through_life(s, f))
    }),
    ("wrong_calls_of_execs", |s, f| {
        Box::pin(wrong_calls::of_execs(s, f))
    }),
    ("delete_before_start", |s, f| {
        Box::pin(wrong_calls::delete_before_start(s, f))
    }),
    ("kill_before_start", |s, f| {
        Box::pin(wrong_calls::kill_before_start(s, f))
    }),
];

const BESIDE: &[(&str, Beside)] = &[
    ("exit_codes", |s, f| Box::pin(codes::exits(s, f))),
    ("deaths_by_signal", |s, f| Box::pin(codes::signals(s, f))),
    ("execs_at_once", |s, f| Box::pin(codes::at_once(s, f))),
    ("output_of_exec_then_delete", |s, f| {
        Box::pin(output::of_exec(s, f))
    }),
    ("input_detached_and_attached_again", |s, f| {
        Box::pin(input::attached_again(s, f))
    }),
    ("input_of_20_mib_and_back", |s, f| {
        Box::pin(input::large(s, f))
    }),
    ("logging_program", |s, f| {
        Box::pin(kinds::logging_program(s, f))
    }),
    ("log_file", |s, f| Box::pin(kinds::log_file(s, f))),
    ("terminal", |s, f| Box::pin(kinds::terminal(s, f))),
    ("no_streams", |s, f| Box::pin(kinds::none(s, f))),
];

/// The file of [`pattern`] bytes in the root of every container that has one.
const PATTERN_FILE: &str = "pattern";
/// Its size, and what is right after an exit: more than all buffers on the way.
const PATTERN_BYTES: usize = 8 << 20;

/// Runs the scenarios whose names contain one of `filters`, or all when there is
/// none, and calls `tell` with each outcome.
pub async fn run(settings: &Settings, filters: &[String], mut tell: impl FnMut(Report)) {
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|part| name.contains(part));
    for (name, scenario) in ALONE {
        if wanted(name) {
            tell(observed(name, async |facts| scenario(settings, facts).await).await);
        }
    }
    let beside = BESIDE.iter().filter(|(name, _)| wanted(name));
    let beside: Vec<_> = beside.collect();
    if !beside.is_empty() {
        let sleeper = run_beside(settings, &beside, &mut tell).await;
        tell(sleeper);
    }
}

/// The container that sleeps, as a scenario of its own: what it leaves counts.
async fn run_beside(
    settings: &Settings,
    scenarios: &[&(&str, Beside)],
    tell: &mut impl FnMut(Report),
) -> Report {
    let sleep = Program::new(&["sleep", "1000000"]);
    observed("sleeper", async |_| {
        crate::shim::with_shim(settings, "sleeper", &sleep, async |shim| {
            shim.bundle()
                .add_file(PATTERN_FILE, &pattern(PATTERN_BYTES))?;
            shim.create(&Streams::none()).await?;
            shim.client().start(shim.init()).await?;
            for (name, scenario) in scenarios {
                tell(observed(name, async |facts| scenario(shim, facts).await).await);
            }
            shim.kill_and_delete().await.map(drop)
        })
        .await
    })
    .await
}

async fn observed(name: &str, work: impl AsyncFnOnce(&mut Facts) -> Result<()>) -> Report {
    let started = Instant::now();
    let mut facts = Facts::new();
    eprintln!("{name} ...");
    let failure = work(&mut facts).await.err();
    let failure = failure.map(|error| format!("{error:#}"));
    eprintln!(
        "{name}: {} after {:?}",
        failure.as_deref().unwrap_or("ok"),
        started.elapsed()
    );
    Report {
        scenario: name.to_owned(),
        failure,
        facts,
        elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
