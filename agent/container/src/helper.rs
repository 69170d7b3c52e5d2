//! First stage: the helper, single-threaded, in the agent's namespaces.
//!
//! For a container it takes what only these namespaces can give (the mounts'
//! sources), joins the container's cgroup and the pod's namespaces, and clones
//! the init into the new ones. For an exec it joins the namespaces of the init
//! and clones a process into them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::dup2_stdin;
use oci_spec::runtime::{Linux, Process, Spec};
use serde::de::DeserializeOwned;

use crate::control::{Channel, ChannelError, ExecSpec, Report, Request};
use crate::credentials::{self, CredentialsError};
use crate::hooks::{HookError, StartHooks};
use crate::init::{self, Init};
use crate::joined::{self, Joined};
use crate::kernel_calls::{Cloned, clone_sibling, close_descriptors_from};
use crate::namespaces::{self, NamespaceError, Owner};
use crate::outside::{self, Announcement, OutsideError};
use crate::rootfs::{self, RootfsError, Sources};
use crate::scheduling::{self, SchedulingError};
use crate::user_namespace;

/// What failed before the process existed.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the creator is gone")]
    CreatorGone,
    #[error("the request came without its descriptors")]
    Descriptors,
    #[error("cannot read the specification")]
    Specification(#[source] io::Error),
    #[error("cannot set oomScoreAdj to {value}")]
    OomScore {
        value: i32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    #[error("cannot give the standard streams to the container's user")]
    Streams(#[source] Errno),
    #[error("cannot open /proc of the guest")]
    Procfs(#[source] Errno),
    #[error("cannot map the user namespace's ids")]
    IdMaps(#[source] io::Error),
    #[error(transparent)]
    Outside(#[from] OutsideError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("cannot join the container's cgroup")]
    Cgroup(#[source] io::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error("cannot join the namespaces of the container's init")]
    JoinInit(#[source] Errno),
    #[error("cannot clone a process into the container's namespaces")]
    Clone(#[source] io::Error),
}

/// What the agent's binary runs when executed with [`crate::HELPER_ARGUMENT`].
///
/// The process must be as the kernel made it: no thread, no descriptor of its
/// own. Returns in neither of the two processes that it becomes.
pub fn helper_main() -> ! {
    let code = match connect() {
        Ok(channel) => {
            let failed = run(&channel).err();
            // Without the creator there is nobody to tell.
            match &failed {
                None | Some(HelperError::Outside(OutsideError::Told)) => {}
                Some(error) => drop(channel.send(&Report::failed(error), &[])),
            }
            i32::from(failed.is_some())
        }
        // Executed by hand: descriptor 0 is no socket of the creator's.
        Err(error) => {
            eprintln!("{}: {error}: started by hand?", crate::HELPER_ARGUMENT);
            2
        }
    };
    std::process::exit(code);
}

/// The socket came as descriptor 0; every other descriptor but the standard
/// streams is closed, should the agent have forgotten a close-on-exec.
fn connect() -> io::Result<Channel> {
    close_descriptors_from(3)?;
    // The agent's memory is nobody's business, in whatever namespace.
    prctl::set_dumpable(false)?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(Channel::from_socket(socket))
}

fn run(channel: &Channel) -> Result<(), HelperError> {
    let (request, descriptors) = channel
        .receive::<Request>()?
        .ok_or(HelperError::CreatorGone)?;
    match request {
        Request::Create {
            id,
            bundle,
            share_dir,
            pod_dir,
            terminal,
        } => {
            let ([specification, cgroup], streams) = sort(descriptors, terminal)?;
            let spec: Spec = read_document(specification)?;
            let hooks = StartHooks::prepare(&spec, &id, &bundle)?;
            let [share_dir, pod_dir] = [share_dir.as_path(), pod_dir.as_path()];
            create(channel, spec, hooks, &cgroup, streams, share_dir, pod_dir)
        }
        Request::Exec { terminal } => {
            let ([spec, init, procs, procs_of_init], streams) = sort(descriptors, terminal)?;
            let joined = Joined {
                spec: read_document(spec)?,
                streams,
                procs,
                procs_of_init,
                procfs: open_procfs()?,
            };
            exec(channel, &init, joined)
        }
    }
}

type Streams = Option<[OwnedFd; 3]>;

/// The descriptors that a request names, and the standard streams after them.
fn sort<const NAMED: usize>(
    descriptors: Vec<OwnedFd>,
    terminal: bool,
) -> Result<([OwnedFd; NAMED], Streams), HelperError> {
    let mut descriptors = descriptors.into_iter();
    let named: Vec<_> = descriptors.by_ref().take(NAMED).collect();
    let named = named.try_into().map_err(|_| HelperError::Descriptors)?;
    if terminal {
        return Ok((named, None));
    }
    let streams: Vec<_> = descriptors.collect();
    let streams = streams.try_into().map_err(|_| HelperError::Descriptors)?;
    Ok((named, Some(streams)))
}

/// Gets ready, with the agent's privileges, what the process inherits.
fn prepare(process: &Process, linux: Option<&Linux>, streams: &Streams) -> Result<(), HelperError> {
    // The agent's own is -1000: a container that inherited it could fill the
    // guest's memory, and the OOM killer would find nothing to kill. Before the
    // first limit counts.
    let value = process.oom_score_adj().unwrap_or(0);
    fs::write("/proc/self/oom_score_adj", value.to_string())
        .map_err(|source| HelperError::OomScore { value, source })?;
    if let Some(maps) = user_namespace::of(linux) {
        credentials::raise_limits(process)?;
        let uid = maps.guest_uid(process.user().uid());
        if let (Some(uid), Some(streams)) = (uid, streams) {
            user_namespace::give(streams, uid).map_err(HelperError::Streams)?;
        }
    }
    Ok(())
}

fn create(
    channel: &Channel,
    spec: Spec,
    hooks: StartHooks,
    cgroup: &OwnedFd,
    streams: Streams,
    share_dir: &Path,
    pod_dir: &Path,
) -> Result<(), HelperError> {
    if let Some(process) = spec.process() {
        prepare(process, spec.linux().as_ref(), &streams)?;
    }
    // In the cgroup from here on, so that killing the cgroup is enough to clean up.
    openat(
        cgroup,
        "cgroup.procs",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)
    .and_then(|procs| File::from(procs).write_all(b"0"))
    .map_err(HelperError::Cgroup)?;

    let procfs = open_procfs()?;
    let mut sources = Sources::open(&spec, share_dir, pod_dir, cgroup, &procfs)?;
    let owner = namespaces::join(&spec, pod_dir)?;
    let mut new = namespaces::new_ones(&spec);
    if new.contains(namespaces::NEW_TIME) {
        namespaces::make_time(&spec)?;
        new -= namespaces::NEW_TIME;
    }
    let maps = user_namespace::of_spec(&spec);
    if maps.is_some() {
        rootfs::leave_mounts_of_guest()?;
    }
    let ready = |to_init: &Channel, pid: i32, pidfd: &OwnedFd| match maps {
        Some(maps) => {
            if owner.is_none() {
                maps.write(&procfs, pid).map_err(HelperError::IdMaps)?;
            }
            Ok(outside::set_up(channel, to_init, pidfd.as_fd(), &spec)?)
        }
        None => Ok(()),
    };
    if let Some(made) = clone_announced(channel, new, owner.as_ref(), ready)? {
        sources.made = made;
        let init = Init {
            spec,
            sources,
            streams,
            hooks,
            procfs,
        };
        init::main(channel, init);
    }
    Ok(())
}

fn exec(channel: &Channel, init: &OwnedFd, joined: Joined) -> Result<(), HelperError> {
    let ExecSpec { process, linux } = &joined.spec;
    prepare(process, linux.as_ref(), &joined.streams)?;
    scheduling::start_on(process)?;
    let own_user_namespace = user_namespace::of(linux.as_ref()).is_some();
    namespaces::join_those_of(init, own_user_namespace).map_err(HelperError::JoinInit)?;
    let ready = |_: &Channel, _, _: &OwnedFd| Ok(());
    if clone_announced(channel, CloneFlags::empty(), None, ready)?.is_some() {
        joined::main(channel, joined);
    }
    Ok(())
}

/// Clones a process that is the creator's child. In it, once the creator knows
/// it and `ready` has done what it does to it, returns the mounts that it gets.
fn clone_announced(
    channel: &Channel,
    namespaces: CloneFlags,
    owner: Option<&Owner>,
    ready: impl FnOnce(&Channel, i32, &OwnedFd) -> Result<(), HelperError>,
) -> Result<Option<HashMap<usize, OwnedFd>>, HelperError> {
    let (announce, announced) = Channel::pair()?;
    let cloned = match owner {
        None => clone_sibling(namespaces).map_err(HelperError::Clone)?,
        Some(owner) => clone_within(channel, namespaces, owner)?,
    };
    match cloned {
        Cloned::Child => {
            drop(announce);
            Ok(Some(wait_until_announced(&Channel::from_socket(announced))))
        }
        Cloned::Parent { pid, pidfd } => {
            drop(announced);
            channel.send(&Report::Cloned { pid }, &[pidfd.as_fd()])?;
            ready(&announce, pid, &pidfd)?;
            // A receiver that is gone is a process that was killed: the creator sees that.
            let _ = announce.send(&Announcement::Go, &[]);
            Ok(None)
        }
    }
}

/// As [`clone_sibling`], by a process in between that has become a member of `owner`,
/// which so owns what is new. The caller remains what it is.
fn clone_within(
    creator: &Channel,
    namespaces: CloneFlags,
    owner: &Owner,
) -> Result<Cloned, HelperError> {
    let (from_between, to_helper) = Channel::pair()?;
    // Everybody's sibling: the creator's child is the process that it clones, too.
    let between = clone_sibling(CloneFlags::empty()).map_err(HelperError::Clone)?;
    let to_helper = Channel::from_socket(to_helper);
    if matches!(between, Cloned::Parent { .. }) {
        drop(to_helper);
        return match from_between.receive()? {
            Some((Report::Cloned { pid }, mut pidfd)) if pidfd.len() == 1 => {
                let pidfd = pidfd.remove(0);
                Ok(Cloned::Parent { pid, pidfd })
            }
            _ => Err(HelperError::Outside(OutsideError::Told)),
        };
    }
    drop(from_between);
    let cloned = owner
        .enter()
        .map_err(HelperError::Namespace)
        .and_then(|()| clone_sibling(namespaces).map_err(HelperError::Clone));
    let code = match cloned {
        Ok(Cloned::Child) => return Ok(Cloned::Child),
        Ok(Cloned::Parent { pid, pidfd }) => i32::from(
            to_helper
                .send(&Report::Cloned { pid }, &[pidfd.as_fd()])
                .is_err(),
        ),
        Err(error) => {
            let _ = creator.send(&Report::failed(&error), &[]);
            1
        }
    };
    std::process::exit(code)
}

/// The creator must know the process before the process says anything. If the helper
/// died before it told, nobody ever will.
fn wait_until_announced(announced: &Channel) -> HashMap<usize, OwnedFd> {
    let mut mounts = HashMap::new();
    loop {
        match announced.receive::<Announcement>() {
            Ok(Some((Announcement::Mount(index), descriptors))) => {
                mounts.extend(descriptors.into_iter().map(|mount| (index, mount)));
            }
            Ok(Some((Announcement::Go, _))) => return mounts,
            Ok(None) | Err(_) => std::process::exit(1),
        }
    }
}

/// The guest's, which the process that is made has no way to by name.
fn open_procfs() -> Result<OwnedFd, HelperError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty()).map_err(HelperError::Procfs)
}

fn read_document<T: DeserializeOwned>(memfd: OwnedFd) -> Result<T, HelperError> {
    let mut json = Vec::new();
    File::from(memfd)
        .read_to_end(&mut json)
        .map_err(HelperError::Specification)?;
    serde_json::from_slice(&json).map_err(|error| HelperError::Specification(error.into()))
}
