//! The kinds of places that a client may want its streams at.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Result, ensure};

use crate::bundle::Program;
use crate::process;
use crate::report::Facts;
use crate::shim::Shim;
use crate::start::NAMESPACE;
use crate::streams::{self, Streams, read_until};

const TALK: &str = "echo out; echo err >&2; exit 4";

async fn talk(shim: &Shim<'_>, exec: &str, uri: &str) -> Result<()> {
    process::start(shim, exec, &Program::shell(TALK), &Streams::at(uri)).await?;
    let status = process::wait_and_delete(shim, exec).await?;
    ensure!(status == 4, "it ended with {status}");
    Ok(())
}

/// `binary://`: the program has both outputs, knows whose they are, and has
/// written all of it when Delete returns.
pub async fn logging_program(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let log = shim.bundle().place().join("logged");
    // A shim may tell it to end as soon as there is nothing more to read.
    let script = format!(
        "trap '' TERM; exec 5>&-; {{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID\"; cat <&3; cat <&4; }} >{}",
        log.display()
    );
    let mut uri = "binary:///bin/sh?-c=".to_owned();
    for byte in script.bytes() {
        write!(uri, "%{byte:02x}")?;
    }
    let exec = "logged";
    talk(shim, exec, &uri).await?;
    let logged = fs::read_to_string(&log)?;
    let (whose, rest) = logged.split_once('\n').unwrap_or_default();
    ensure!(rest == "out\nerr\n", "the log says {logged:?}");
    let whose = whose
        .replace(shim.id(), "CONTAINER")
        .replace(NAMESPACE, "NAMESPACE");
    facts.insert("whose".to_owned(), whose.replace(exec, "EXEC"));
    Ok(())
}

/// `file://`: made with its directory, and appended to when it is there.
pub async fn log_file(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let file = shim.bundle().place().join("made/for/it");
    let uri = format!("file://{}", file.display());
    talk(shim, "file-new", &uri).await?;
    let sorted = || -> Result<Vec<String>> {
        let text = fs::read_to_string(&file)?;
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        // Two streams in one file: in whichever order.
        lines.sort();
        Ok(lines)
    };
    facts.insert("a new file".to_owned(), sorted()?.join(" "));
    ensure!(sorted()? == ["err", "out"], "{:?}", sorted()?);
    talk(shim, "file-old", &uri).await?;
    facts.insert("the same once more".to_owned(), sorted()?.join(" "));
    ensure!(sorted()? == ["err", "err", "out", "out"], "{:?}", sorted()?);
    Ok(())
}

/// A terminal: its first size, and that a later one is seen.
pub async fn terminal(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let exec = "terminal";
    let patience = shim.settings().patience();
    let mut streams = Streams::fifos(shim.bundle().place(), exec, true)?;
    let program = Program::shell("tty; stty size; read line; stty size; echo read $line; exit 6");
    process::start(shim, exec, &program.terminal(100, 40), &streams).await?;
    let mut stdout = streams.take_stdout();
    let first = read_until(&mut stdout, b"40 100\r\n", patience).await?;
    shim.client().resize(shim.exec(exec), 120, 50).await?;
    streams::write_input(&streams.stdin, b"a word\n", patience).await?;
    let second = read_until(&mut stdout, b"read a word\r\n", patience).await?;
    let text = [first, second].concat();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let lines: Vec<_> = text.lines().skip(1).collect();
    let tty = text.lines().next().unwrap_or_default();
    ensure!(tty.starts_with("/dev/pts/"), "the terminal is {tty}");
    facts.insert("what it said".to_owned(), lines.join(" | "));
    ensure!(
        lines == ["40 100", "a word", "50 120", "read a word"],
        "{lines:?}"
    );
    let status = process::wait_and_delete(shim, exec).await?;
    ensure!(status == 6, "it ended with {status}");
    Ok(())
}

/// No streams: `/dev/null`, which ends at once and takes all.
pub async fn none(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let program = Program::shell("cat && echo lost && echo lost >&2 && head -c 100000 /dev/zero");
    let status = process::run(shim, "no-streams", &program).await?;
    facts.insert("status".to_owned(), status.to_string());
    ensure!(status == 0, "it ended with {status}");
    Ok(())
}
