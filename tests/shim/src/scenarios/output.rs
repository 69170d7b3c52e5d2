//! No byte of the output is lost, however soon the deletion follows.

use anyhow::{Context, Result, ensure};

use super::{PATTERN_BYTES, PATTERN_FILE};
use crate::bundle::Program;
use crate::process;
use crate::report::Facts;
use crate::shim::{Settings, Shim, with_shim};
use crate::streams::{Streams, first_difference, pattern};

const SCRIPT: &str = "cat /pattern; echo last words >&2; exit 3";

/// Of a container's own program.
pub async fn of_init(settings: &Settings, facts: &mut Facts) -> Result<()> {
    with_shim(settings, "output", &Program::shell(SCRIPT), async |shim| {
        let wanted = pattern(PATTERN_BYTES);
        shim.bundle().add_file(PATTERN_FILE, &wanted)?;
        let mut streams = Streams::fifos(shim.bundle().place(), "init", false)?;
        shim.create(&streams).await?;
        let outputs = streams.collect();
        shim.client().start(shim.init()).await?;
        let status = shim.client().wait(shim.init()).await?.exit_status;
        shim.client().delete(shim.init()).await?;
        let (stdout, stderr) = outputs.ended(settings.patience()).await?;
        whole(status, &wanted, &stdout, &stderr)
    })
    .await?;
    facts.insert("bytes".to_owned(), PATTERN_BYTES.to_string());
    Ok(())
}

/// Of an exec.
pub async fn of_exec(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let wanted = pattern(PATTERN_BYTES);
    let rounds = if shim.settings().soak { 20 } else { 2 };
    for round in 0..rounds {
        let exec = format!("output-{round}");
        let ended = process::run_with_output(shim, &exec, &Program::shell(SCRIPT)).await?;
        whole(ended.status, &wanted, &ended.stdout, &ended.stderr).context(exec)?;
    }
    facts.insert("rounds".to_owned(), rounds.to_string());
    Ok(())
}

fn whole(status: u32, wanted: &[u8], stdout: &[u8], stderr: &[u8]) -> Result<()> {
    ensure!(status == 3, "it ended with {status}");
    if let Some(difference) = first_difference(wanted, stdout) {
        anyhow::bail!("standard output: {difference}");
    }
    ensure!(
        stderr == b"last words\n",
        "standard error: {:?}",
        String::from_utf8_lossy(stderr)
    );
    Ok(())
}
