//! Execs in a running container.

use anyhow::{Result, ensure};
use containerd_shim_protos::api::ExecProcessRequest;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use crate::bundle::Program;
use crate::client::Answer;
use crate::shim::Shim;
use crate::streams::Streams;

/// How an exec ended, and what it wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status.
    pub status: u32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// Adds an exec whose specification is `spec`, whatever that says.
///
/// # Errors
/// The shim's.
pub async fn add_raw(shim: &Shim<'_>, exec: &str, spec: &[u8], streams: &Streams) -> Answer<()> {
    let request = ExecProcessRequest {
        id: shim.id().to_owned(),
        exec_id: exec.to_owned(),
        terminal: streams.terminal,
        stdin: streams.stdin.clone(),
        stdout: streams.stdout.clone(),
        stderr: streams.stderr.clone(),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: spec.to_vec(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    };
    shim.client().exec(&request).await.map(drop)
}

/// Adds an exec.
///
/// # Errors
/// The shim's.
pub async fn add(shim: &Shim<'_>, exec: &str, program: &Program, streams: &Streams) -> Answer<()> {
    let spec = program.to_json().to_string();
    add_raw(shim, exec, spec.as_bytes(), streams).await
}

/// Adds an exec and starts it; returns its pid.
///
/// # Errors
/// The shim's.
pub async fn start(
    shim: &Shim<'_>,
    exec: &str,
    program: &Program,
    streams: &Streams,
) -> Answer<u32> {
    add(shim, exec, program, streams).await?;
    Ok(shim.client().start(shim.exec(exec)).await?.pid)
}

/// Waits for an exec's end and deletes it at once.
///
/// # Errors
/// When a call fails, or Wait and Delete tell different ends.
pub async fn wait_and_delete(shim: &Shim<'_>, exec: &str) -> Result<u32> {
    let waited = shim.client().wait(shim.exec(exec)).await?;
    let deleted = shim.client().delete(shim.exec(exec)).await?;
    ensure!(
        (waited.exit_status, &waited.exited_at) == (deleted.exit_status, &deleted.exited_at),
        "exec {exec}: Wait told {waited}, Delete {deleted}"
    );
    Ok(waited.exit_status)
}

/// Runs an exec without streams to its end.
///
/// # Errors
/// As the calls.
pub async fn run(shim: &Shim<'_>, exec: &str, program: &Program) -> Result<u32> {
    start(shim, exec, program, &Streams::none()).await?;
    wait_and_delete(shim, exec).await
}

/// Runs an exec to its end, deletes it at once, and returns what it wrote.
///
/// # Errors
/// As the calls, or when an output has no end.
pub async fn run_with_output(shim: &Shim<'_>, exec: &str, program: &Program) -> Result<Ended> {
    let mut streams = Streams::fifos(shim.bundle().place(), exec, false)?;
    start(shim, exec, program, &streams).await?;
    let outputs = streams.collect();
    let status = wait_and_delete(shim, exec).await?;
    let (stdout, stderr) = outputs.ended(shim.settings().patience()).await?;
    Ok(Ended {
        status,
        stdout,
        stderr,
    })
}
