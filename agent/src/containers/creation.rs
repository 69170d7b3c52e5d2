//! Creating a container or a process in one.

use std::{io, os::fd::OwnedFd, path::Path, sync::Arc};

use agent_container::{ContainerStdio, CreateOptions, Process};
use agent_protocol::{
    POD_DIR, SHARE_DIR,
    api::{ProcessId, Stdio, stream_header::Kind},
};
use oci_spec::runtime::Spec;

use super::entry::{Entry, Running};
use super::error::ContainerError;
use super::identity::init_of;
use crate::{
    guest::CONTAINERS_CGROUP,
    reaper::Reaper,
    stdio::{Pipes, StreamTable, open_pipes},
};

/// Creates a container and offers the streams of its init. Blocks.
pub fn create(
    reaper: &Arc<Reaper>,
    streams: &StreamTable,
    id: &str,
    bundle: &Path,
    spec: &Spec,
    stdio: &Stdio,
) -> Result<Entry, ContainerError> {
    let name = init_of(id);
    let no_stdio = |source| ContainerError::Stdio {
        process: (&name).into(),
        source,
    };
    let (for_process, ours) = open_stdio(stdio).map_err(no_stdio)?;
    let creation = reaper.creation();
    let container = agent_container::create(CreateOptions {
        id,
        bundle,
        spec,
        stdio: for_process,
        share_dir: Path::new(SHARE_DIR),
        pod_dir: Path::new(POD_DIR),
        cgroup_root: Path::new(CONTAINERS_CGROUP),
    })
    .map_err(|source| ContainerError::Create {
        id: id.to_owned(),
        source,
    })?;
    let init = Running {
        process: Arc::clone(container.init()),
        exit: creation.watch(container.init().pid()),
    };
    for warning in container.warnings() {
        tracing::warn!(container = %id, "{warning}");
    }
    match with_console(ours, &init.process) {
        Ok(ours) => streams.insert(&name, ours),
        Err(source) => {
            if let Err(error) = container.delete() {
                tracing::error!(container = %id, %error, "left behind");
            }
            return Err(no_stdio(source));
        }
    }
    Ok(Entry::new(id, container, init))
}

/// Creates a process in a container; its streams are to be offered once it is
/// known. Blocks.
pub fn exec(
    reaper: &Arc<Reaper>,
    entry: &Entry,
    name: &ProcessId,
    asked: &oci_spec::runtime::Process,
    stdio: &Stdio,
) -> Result<(Running, Ends), ContainerError> {
    let no_stdio = |source| ContainerError::Stdio {
        process: name.into(),
        source,
    };
    let (for_process, ours) = open_stdio(stdio).map_err(no_stdio)?;
    let creation = reaper.creation();
    let (made, warnings) =
        entry
            .container
            .exec(asked, for_process)
            .map_err(|source| ContainerError::Exec {
                process: name.into(),
                source,
            })?;
    let running = Running {
        exit: creation.watch(made.pid()),
        process: Arc::new(made),
    };
    for warning in warnings {
        tracing::warn!(container = %name.container_id, exec = %name.exec_id, "{warning}");
    }
    // A process that nobody is told of ends with the last reference to it.
    let ours = with_console(ours, &running.process).map_err(no_stdio)?;
    Ok((running, ours))
}

/// The agent's ends of a process's streams.
pub type Ends = Vec<(Kind, OwnedFd)>;

/// What the process gets, and our ends of it; those of a terminal come later.
fn open_stdio(wanted: &Stdio) -> io::Result<(ContainerStdio, Ends)> {
    if wanted.terminal {
        return Ok((ContainerStdio::Terminal, Vec::new()));
    }
    let Pipes { process, agent } = open_pipes(wanted)?;
    let [stdin, stdout, stderr] = process;
    let streams = ContainerStdio::Streams {
        stdin,
        stdout,
        stderr,
    };
    Ok((streams, agent))
}

/// Our ends, of the terminal when the process has one.
fn with_console(ends: Ends, process: &Process) -> io::Result<Ends> {
    match process.take_console() {
        Some(console) => {
            let input = console.try_clone()?;
            Ok(vec![(Kind::STDIN, input), (Kind::STDOUT, console)])
        }
        None => Ok(ends),
    }
}
