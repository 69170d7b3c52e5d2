//! The creator's side of creation.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{LinuxResources, Spec};

use crate::cgroup::{Cgroup, CgroupError};
use crate::container::Container;
use crate::control::{Channel, ChannelError, Report, Request};
use crate::process::Process;
use crate::spec_support::{self, Unsupported};

/// The standard streams of a container's init.
#[derive(Debug)]
pub enum ContainerStdio {
    /// Descriptors that become 0, 1 and 2.
    Streams {
        /// Becomes descriptor 0.
        stdin: OwnedFd,
        /// Becomes descriptor 1.
        stdout: OwnedFd,
        /// Becomes descriptor 2.
        stderr: OwnedFd,
    },
    /// A pseudo terminal in the container's own devpts; its master is
    /// [`Process::take_console`] of the init.
    Terminal,
}

/// What [`create`] needs.
#[derive(Debug)]
pub struct CreateOptions<'a> {
    /// The container's identity; names its cgroup unless the specification does.
    pub id: &'a str,
    /// The configuration, as [`crate::parse`] returns it.
    pub spec: &'a Spec,
    /// The init's standard streams. The creator's copies are closed when
    /// [`create`] returns.
    pub stdio: ContainerStdio,
    /// `root.path` lies below this, the source of every bind mount below this or
    /// `pod_dir`; on the way from here there is no symbolic link.
    pub share_dir: &'a Path,
    /// Namespaces that are joined by path lie below this.
    pub pod_dir: &'a Path,
    /// The containers' parent cgroup (cgroup v2): it exists, has no process in
    /// it, and everything below it is this crate's.
    pub cgroup_root: &'a Path,
}

/// Why a container was not created. Whatever had been made is gone again.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The specification asks for what is not supported.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The identity cannot name a cgroup.
    #[error("{id:?} cannot name a container's cgroup")]
    Id {
        /// The identity.
        id: String,
    },
    /// `process.terminal` says one thing, the streams another.
    #[error("process.terminal is {terminal}, which the container's standard streams are not")]
    Stdio {
        /// What the specification says.
        terminal: bool,
    },
    /// The container's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The helper cannot be executed.
    #[error("cannot execute the container helper")]
    Helper(#[source] io::Error),
    /// Talking to the helper failed.
    #[error("cannot talk to the container helper")]
    Channel(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The helper or the init was killed, for instance by the memory limit.
    #[error("the container's init ended before it was ready: is its memory limit too small?")]
    Ended,
    /// What the helper or the init reports, its causes included.
    #[error("{0}")]
    Init(String),
}

impl From<ChannelError> for CreateError {
    fn from(error: ChannelError) -> Self {
        Self::Channel(Box::new(error))
    }
}

/// Creates a container up to the point where its init waits to be started:
/// namespaces, mounts, cgroup and limits are there, and the program was found.
///
/// Blocks on file systems and on the helper: not for an async executor's thread.
/// The helper and the init become children of the calling process, which must
/// reap them; nothing here waits for them.
///
/// # Errors
/// Of which [`CreateError::Unsupported`], [`CreateError::Id`],
/// [`CreateError::Stdio`] and [`CgroupError::Exists`] are the caller's. Whatever
/// the error, no process, mount or cgroup is left.
pub fn create(options: CreateOptions<'_>) -> Result<Container, CreateError> {
    let spec = options.spec;
    spec_support::validate(spec)?;
    let asked = spec.process().as_ref();
    let terminal = asked.and_then(oci_spec::runtime::Process::terminal) == Some(true);
    if terminal != matches!(options.stdio, ContainerStdio::Terminal) {
        return Err(CreateError::Stdio { terminal });
    }
    let resources = resources(spec);
    let path = cgroup_path(options.id, spec)?;
    let cgroup = Cgroup::create(options.cgroup_root, &path, resources)?;
    let result = launch(&options, &cgroup).and_then(|launched| {
        cgroup.limit_processes(resources)?;
        Ok(launched)
    });
    // The container alone holds its streams now: their end is its end.
    drop(options);
    match result {
        Ok(launched) => Ok(launched.into_container(cgroup, spec)),
        Err(error) => {
            // The first error is the one to tell.
            let _ = cgroup.remove();
            Err(error)
        }
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// Relative to the containers' parent.
fn cgroup_path(id: &str, spec: &Spec) -> Result<PathBuf, CreateError> {
    let asked = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref())
        .filter(|path| !path.as_os_str().is_empty());
    if let Some(path) = asked {
        return Ok(path.clone());
    }
    if id.is_empty() || id == "." || id == ".." || id.contains(['/', '\0']) {
        return Err(CreateError::Id { id: id.to_owned() });
    }
    Ok(id.into())
}

/// What the helper and the init have told.
#[derive(Default)]
struct Reported {
    init: Option<(i32, OwnedFd)>,
    console: Option<OwnedFd>,
    warnings: Vec<String>,
}

struct Launched {
    channel: Channel,
    pid: i32,
    pidfd: OwnedFd,
    reported: Reported,
}

impl Launched {
    fn into_container(self, cgroup: Cgroup, spec: &Spec) -> Container {
        let mut warnings = spec_support::warnings(spec);
        warnings.extend(self.reported.warnings);
        let init = Process::new(self.pid, self.pidfd, self.channel, self.reported.console);
        Container::new(cgroup, init, warnings, spec)
    }
}

fn launch(options: &CreateOptions<'_>, cgroup: &Cgroup) -> Result<Launched, CreateError> {
    let specification = specification(options.spec)?;
    let directory = cgroup.open()?;
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![specification.as_fd(), directory.as_fd()];
    if let ContainerStdio::Streams {
        stdin,
        stdout,
        stderr,
    } = &options.stdio
    {
        descriptors.extend([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
    }
    let channel = spawn_helper()?;
    channel.send(
        &Request {
            share_dir: options.share_dir.to_owned(),
            pod_dir: options.pod_dir.to_owned(),
            terminal: matches!(options.stdio, ContainerStdio::Terminal),
        },
        &descriptors,
    )?;
    let mut reported = Reported::default();
    wait_until_ready(&channel, &mut reported)?;
    let (pid, pidfd) = reported.init.take().ok_or(CreateError::Ended)?;
    Ok(Launched {
        channel,
        pid,
        pidfd,
        reported,
    })
}

/// The specification as JSON, at its beginning.
fn specification(spec: &Spec) -> Result<File, CreateError> {
    let json = serde_json::to_vec(spec).map_err(|error| CreateError::Channel(Box::new(error)))?;
    let mut file = memfd_create("specification", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| CreateError::Channel(Box::new(errno)))?;
    file.write_all(&json)
        .and_then(|()| file.rewind())
        .map_err(|error| CreateError::Channel(Box::new(error)))?;
    Ok(file)
}

/// Executes the caller's own binary again; its descriptor 0 is our socket, and
/// no other descriptor of ours is inherited.
fn spawn_helper() -> Result<Channel, CreateError> {
    let (channel, theirs) = Channel::pair()?;
    // Dropping the handle neither waits nor kills: the caller reaps it. Nothing
    // may be set here that keeps the standard library from using posix_spawn:
    // its other way waits for the child if the execution fails.
    Command::new("/proc/self/exe")
        .arg(crate::HELPER_ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(CreateError::Helper)?;
    Ok(channel)
}

fn wait_until_ready(channel: &Channel, reported: &mut Reported) -> Result<(), CreateError> {
    loop {
        let (report, descriptors) = channel.receive::<Report>()?.ok_or(CreateError::Ended)?;
        let descriptor = descriptors.into_iter().next();
        match report {
            Report::Cloned { pid } => reported.init = descriptor.map(|pidfd| (pid, pidfd)),
            Report::Console => reported.console = descriptor,
            Report::Ready { warnings } => {
                reported.warnings = warnings;
                return Ok(());
            }
            Report::Failed { message } => return Err(CreateError::Init(message)),
        }
    }
}
