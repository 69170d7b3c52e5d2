//! Second stage of an exec: a process in the namespaces of a running container,
//! until it executes the user's program.
//!
//! Unlike the init it is among processes of the user's: whatever it finds in
//! the container's file system may change under its hands.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::setsid;
use oci_spec::runtime::Process;

use crate::apparmor::OnExec;
use crate::control::{Channel, ExecSpec, Report};
use crate::hooks::StartHooks;
use crate::rootfs::Tree;
use crate::scheduling;
use crate::setup::{self, SetupError, become_streams, failed, prepare};
use crate::terminal::Terminal;
use crate::user_namespace;

/// What the helper hands over.
#[derive(Debug)]
pub struct Joined {
    pub spec: ExecSpec,
    /// Become descriptors 0, 1 and 2; without them there is a terminal.
    pub streams: Option<[OwnedFd; 3]>,
    /// `cgroup.procs` of the container.
    pub procs: OwnedFd,
    /// `cgroup.procs` of the cgroup that its init is in.
    pub procs_of_init: OwnedFd,
    /// The guest's.
    pub procfs: OwnedFd,
}

/// Becomes the user's program, or reports why not and ends.
pub fn main(channel: &Channel, joined: Joined) -> ! {
    let Err(error) = run(channel, joined);
    setup::give_up(channel, &error)
}

fn run(channel: &Channel, joined: Joined) -> Result<Infallible, SetupError> {
    let Joined { spec, streams, .. } = joined;
    // Not the helper but this process, so that one more process is enough for a
    // limit: moving into a cgroup is never refused for it, unlike a fork in it.
    join_cgroup(joined.procs, joined.procs_of_init).map_err(SetupError::Cgroup)?;
    let apparmor = OnExec::open(&joined.procfs, &spec.process)?;
    drop(joined.procfs);
    scheduling::go_on_on(&spec.process)?;
    setsid().map_err(failed("start a session"))?;
    if user_namespace::of(spec.linux.as_ref()).is_some() {
        user_namespace::become_root().map_err(failed("become root of the user namespace"))?;
    }
    let process = &spec.process;
    let streams = match streams {
        Some(streams) => streams,
        None => open_terminal(process, channel)?,
    };
    become_streams(&streams)?;
    drop(streams);
    let (prepared, warnings) = prepare(process, spec.linux.as_ref(), apparmor)?;
    channel.send(&Report::Ready { warnings }, &[])?;
    setup::wait_for_start(channel, &prepared, StartHooks::default())
}

/// A cgroup that has sub-cgroups with controllers takes no process (EBUSY); the
/// init of such a container has moved into one of them.
fn join_cgroup(procs: OwnedFd, procs_of_init: OwnedFd) -> io::Result<()> {
    let join = |procs: OwnedFd| File::from(procs).write_all(b"0");
    match join(procs) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => join(procs_of_init),
        result => result,
    }
}

fn open_terminal(process: &Process, channel: &Channel) -> Result<[OwnedFd; 3], SetupError> {
    let root = open(
        Path::new("/"),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    let tree = Tree::new(root.map_err(failed("open the root directory"))?);
    let terminal = Terminal::open(&tree, process)?;
    channel.send(&Report::Console, &[terminal.master.as_fd()])?;
    setup::control(terminal)
}
