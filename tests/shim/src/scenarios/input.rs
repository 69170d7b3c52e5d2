//! Standard input: a client that goes ends nothing, `CloseIO` does.

use anyhow::{Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use crate::bundle::Program;
use crate::client::Target;
use crate::process;
use crate::report::Facts;
use crate::shim::{Settings, Shim, with_shim};
use crate::streams::{self, Streams, first_difference, pattern, read_until};

const LARGE_BYTES: usize = 20 << 20;

/// Of a container's own program.
pub async fn of_init(settings: &Settings, facts: &mut Facts) -> Result<()> {
    with_shim(settings, "input", &Program::new(&["cat"]), async |shim| {
        let mut streams = Streams::fifos(shim.bundle().place(), "init", false)?;
        shim.create(&streams).await?;
        let stdout = streams.take_stdout();
        shim.client().start(shim.init()).await?;
        echo_twice(shim, shim.init(), &streams.stdin, stdout, facts).await?;
        let status = shim.client().delete(shim.init()).await?.exit_status;
        ensure!(status == 0, "Delete told {status}");
        Ok(())
    })
    .await
}

/// Of an exec.
pub async fn attached_again(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let exec = "attached-again";
    let mut streams = Streams::fifos(shim.bundle().place(), exec, false)?;
    process::start(shim, exec, &Program::new(&["cat"]), &streams).await?;
    let stdout = streams.take_stdout();
    echo_twice(shim, shim.exec(exec), &streams.stdin, stdout, facts).await?;
    shim.client().delete(shim.exec(exec)).await?;
    Ok(())
}

/// Two clients, one after the other, each write a line to a `cat` and see it
/// come back; then its input is closed.
async fn echo_twice(
    shim: &Shim<'_>,
    cat: Target<'_>,
    stdin: &str,
    mut stdout: pipe::Receiver,
    facts: &mut Facts,
) -> Result<()> {
    let patience = shim.settings().patience();
    for line in ["first client\n", "second client\n"] {
        streams::write_input(stdin, line.as_bytes(), patience).await?;
        let echoed = read_until(&mut stdout, line.as_bytes(), patience).await?;
        ensure!(echoed == line.as_bytes(), "{echoed:?} came back");
        let state = shim.client().state(cat).await?;
        let status = format!("{:?}", state.status.enum_value_or_default());
        ensure!(status == "RUNNING", "{status} once the client has gone");
    }
    // A client that is attached closes the input, and what it has written
    // before still arrives.
    let mut client = streams::open_input(stdin, patience).await?;
    client.write_all(b"last\n").await?;
    shim.client().close_stdin(cat).await?;
    drop(client);
    let last = read_until(&mut stdout, b"last\n", patience).await?;
    ensure!(last == b"last\n", "{last:?} came back");
    let status = shim.client().wait(cat).await?.exit_status;
    facts.insert("status once closed".to_owned(), status.to_string());
    ensure!(status == 0, "cat ended with {status}");
    Ok(())
}

/// As much as no buffer on the way holds, in one direction and back.
pub async fn large(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let exec = "large-input";
    let patience = shim.settings().patience();
    let wanted = pattern(LARGE_BYTES);
    let mut streams = Streams::fifos(shim.bundle().place(), exec, false)?;
    process::start(shim, exec, &Program::new(&["cat"]), &streams).await?;
    let outputs = streams.collect();
    streams::write_input(&streams.stdin, &wanted, patience).await?;
    shim.client().close_stdin(shim.exec(exec)).await?;
    let status = process::wait_and_delete(shim, exec).await?;
    ensure!(status == 0, "cat ended with {status}");
    let (stdout, _) = outputs.ended(patience).await?;
    if let Some(difference) = first_difference(&wanted, &stdout) {
        anyhow::bail!("{difference}");
    }
    facts.insert("bytes".to_owned(), stdout.len().to_string());
    Ok(())
}
