//! A program executed until it ends, within a limit.

use std::{
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Executes `command` and tells how long it took; `None` if it had to be
/// killed because `limit` was over.
///
/// # Errors
/// When it cannot be executed, or fails.
pub fn run(mut command: Command, limit: Duration) -> Result<Option<Duration>> {
    let shown = format!("{command:?}");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("cannot execute {shown}"))?;
    let pid = Pid::from_raw(child.id().cast_signed());

    // The waiter takes the time itself, so that what it costs to tell of the
    // end is not measured.
    let (ended, end) = mpsc::channel();
    let waiter = thread::spawn(move || {
        let output = child.wait_with_output();
        let elapsed = started.elapsed();
        ended.send(()).ok();
        output.map(|output| (elapsed, output))
    });
    let hung = end.recv_timeout(limit).is_err();
    if hung {
        kill(pid, Signal::SIGKILL).ok();
    }
    let (elapsed, output) = waiter.join().expect("waiting does not panic")?;
    if hung {
        return Ok(None);
    }
    ensure_success(&shown, &output)?;
    Ok(Some(elapsed))
}

fn ensure_success(shown: &str, output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "{shown} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_program_that_ends_gives_its_time() -> Result<()> {
        let mut sleep = Command::new("sleep");
        sleep.arg("0.1");
        let took = run(sleep, Duration::from_mins(1))?.context("killed")?;
        assert!(took >= Duration::from_millis(100), "{took:?}");
        Ok(())
    }

    #[test]
    fn run_program_that_hangs_is_killed() -> Result<()> {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let started = Instant::now();
        assert_eq!(run(sleep, Duration::from_millis(50))?, None);
        assert!(started.elapsed() < Duration::from_secs(30));
        Ok(())
    }

    #[test]
    fn run_program_that_fails_is_an_error_with_its_words() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo broken >&2; exit 3"]);
        let error = run(shell, Duration::from_mins(1)).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
    }
}
