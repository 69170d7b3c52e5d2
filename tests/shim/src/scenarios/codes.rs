//! How programs end.

use anyhow::{Context, Result, bail, ensure};

use crate::bundle::Program;
use crate::process;
use crate::report::Facts;
use crate::shim::Shim;
use crate::streams::{self, Streams, read_until};

/// What an ordinary run tries: the edges of what means something.
const SOME_CODES: [u32; 10] = [0, 1, 2, 42, 126, 127, 128, 137, 254, 255];
/// `SIGHUP`, `SIGINT`, `SIGQUIT`, `SIGABRT`, `SIGKILL`, `SIGSEGV`, `SIGTERM`,
/// and the first and last that the C library leaves of the real-time signals.
const SOME_SIGNALS: [u32; 9] = [1, 2, 3, 6, 9, 11, 15, 34, 64];
/// Those which do not end a process that has not asked for them (signal(7)):
/// `SIGCHLD`, `SIGCONT`, the stops, `SIGURG`, `SIGWINCH`; and the two that the
/// C library keeps to itself.
const HARMLESS: [u32; 10] = [17, 18, 19, 20, 21, 22, 23, 28, 32, 33];

/// Every exit code is the program's.
pub async fn exits(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let codes: Vec<u32> = if shim.settings().soak {
        (0..256).collect()
    } else {
        SOME_CODES.to_vec()
    };
    for &code in &codes {
        let program = Program::shell(&format!("exit {code}"));
        let status = process::run(shim, &format!("exit-{code}"), &program).await?;
        ensure!(status == code, "`exit {code}` ended with {status}");
    }
    facts.insert("right codes".to_owned(), codes.len().to_string());
    Ok(())
}

/// Every death by a signal is told as 128 and its number.
pub async fn signals(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let signals: Vec<u32> = if shim.settings().soak {
        (1..=64)
            .filter(|signal| !HARMLESS.contains(signal))
            .collect()
    } else {
        SOME_SIGNALS.to_vec()
    };
    for &signal in &signals {
        let exec = format!("signal-{signal}");
        let status = killed(shim, &exec, signal).await.context(exec)?;
        ensure!(
            status == 128 + signal,
            "signal {signal} ended it with {status}"
        );
    }
    facts.insert("right deaths".to_owned(), signals.len().to_string());
    Ok(())
}

async fn killed(shim: &Shim<'_>, exec: &str, signal: u32) -> Result<u32> {
    let patience = shim.settings().patience();
    let mut streams = Streams::fifos(shim.bundle().place(), exec, false)?;
    // No shell, which ignores some signals: what comes back shows that the
    // program itself runs.
    process::start(shim, exec, &Program::new(&["cat"]), &streams).await?;
    streams::write_input(&streams.stdin, b"ready\n", patience).await?;
    read_until(&mut streams.take_stdout(), b"ready", patience).await?;
    shim.client().kill(shim.exec(exec), signal, false).await?;
    process::wait_and_delete(shim, exec).await
}

/// Many execs at once each get their own code.
pub async fn at_once(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let count: u32 = if shim.settings().soak { 64 } else { 16 };
    let mut execs = Vec::new();
    for number in 0..count {
        execs.push(async move {
            let program = Program::shell(&format!("exit {}", number + 1));
            let exec = format!("at-once-{number}");
            let status = process::run(shim, &exec, &program).await?;
            if status == number + 1 {
                Ok(())
            } else {
                bail!("{exec} ended with {status}")
            }
        });
    }
    join_all(execs).await?;
    facts.insert("right codes".to_owned(), count.to_string());
    Ok(())
}

/// Polls all of them, until all have ended or one has failed.
async fn join_all(futures: Vec<impl Future<Output = Result<()>>>) -> Result<()> {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        let mut failed = None;
        futures.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Pending => true,
            std::task::Poll::Ready(outcome) => {
                failed = failed.take().or(outcome.err());
                false
            }
        });
        match failed {
            Some(error) => std::task::Poll::Ready(Err(error)),
            None if futures.is_empty() => std::task::Poll::Ready(Ok(())),
            None => std::task::Poll::Pending,
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn join_all_runs_them_together() {
        let barrier = tokio::sync::Barrier::new(3);
        let meet = || async {
            barrier.wait().await;
            Ok(())
        };
        join_all(vec![meet(), meet(), meet()]).await.expect("meet");
    }

    #[tokio::test]
    async fn join_all_tells_the_first_failure() {
        let fail = |fails: bool| async move {
            if fails {
                bail!("fails")
            }
            std::future::pending::<Result<()>>().await
        };
        join_all(vec![fail(false), fail(true)])
            .await
            .expect_err("fails");
    }
}
