//! PID namespaces that containers share: the pod's, whose init is the agent's
//! own, and those of containers that another joins. Each is there once a
//! container's configuration names it.

use std::{
    fmt,
    fs::{self, File},
    io::{self, PipeWriter, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use agent_protocol::{PID_NAMESPACES_DIR, POD_PID_NAMESPACE, POD_USER_NAMESPACE};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, chdir, dup2_stderr, dup2_stdout, pause, pivot_root},
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::{
    kernel_calls::{forget_children, fork},
    namespaces,
};

/// Name by which the agent's binary is executed as the init of the pod's PID
/// namespace (`argv[0]`), and by which containers see it.
pub const POD_INIT: &str = "pod-init";
/// Nobody, in no user's way: no container's files are this user's by accident.
const POD_INIT_ID: u32 = 65_535;
/// What it says once containers may see it.
const READY: &str = "ready";

/// Whose PID namespace a container shares.
#[derive(Debug, PartialEq, Eq)]
pub enum Shared {
    /// The pod's.
    Pod,
    /// That of the container of this identity.
    Of(String),
}

impl fmt::Display for Shared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod => write!(formatter, "the pod"),
            Self::Of(id) => write!(formatter, "container {id:?}"),
        }
    }
}

impl Shared {
    /// What a configuration asks for; `None` for what is none of the two, which
    /// creation then refuses unless it is a new one.
    pub fn asked(spec: &Spec) -> Option<Self> {
        let linux = spec.linux().as_ref()?;
        let mut namespaces = linux.namespaces().iter().flatten();
        let pid = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)?;
        let path = pid.path().as_deref()?;
        if path == Path::new(POD_PID_NAMESPACE) {
            return Some(Self::Pod);
        }
        let id = path.strip_prefix(PID_NAMESPACES_DIR).ok()?;
        Some(Self::Of(id.to_str()?.to_owned()))
    }
}

/// Those that are held. Every method blocks: one works at a time.
#[derive(Debug, Default)]
pub struct PidNamespaces {
    /// Whether the pod's is there.
    pod: Mutex<bool>,
}

impl PidNamespaces {
    /// Makes the pod's, unless it is there.
    ///
    /// # Errors
    /// What the kernel refused; nothing is left.
    pub fn hold_pod(&self) -> io::Result<()> {
        let mut there = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        if !*there {
            let init = spawn_pod_init()?;
            hold(init, Path::new(POD_PID_NAMESPACE)).inspect_err(|_| {
                let init = Pid::from_raw(init.cast_signed());
                let _ = kill(init, Signal::SIGKILL);
            })?;
            *there = true;
        }
        Ok(())
    }

    /// Lets others join the PID namespace of `init`, of container `id`.
    ///
    /// # Errors
    /// When there is no such process, or what the kernel refused.
    pub fn hold_of(&self, id: &str, init: u32) -> io::Result<()> {
        let _one_at_a_time = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        let place = place_of(id);
        if place.exists() {
            return Ok(());
        }
        fs::create_dir_all(PID_NAMESPACES_DIR)?;
        hold(init, &place)
    }

    /// Lets go of the PID namespace of container `id`, if it is held.
    pub fn let_go_of(&self, id: &str) {
        let _one_at_a_time = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        let place = place_of(id);
        if !place.exists() {
            return;
        }
        let unmounted = umount2(&place, MntFlags::MNT_DETACH).map_err(io::Error::from);
        if let Err(error) = unmounted.and_then(|()| fs::remove_file(&place)) {
            tracing::error!(container = %id, %error, "its PID namespace is still held");
        }
    }
}

/// Of a checked identity, which is one plain name.
fn place_of(id: &str) -> PathBuf {
    Path::new(PID_NAMESPACES_DIR).join(id)
}

fn hold(process: u32, place: &Path) -> io::Result<()> {
    let namespace = PathBuf::from(format!("/proc/{process}/ns/pid"));
    File::create(place)?;
    let no = None::<&str>;
    mount(Some(&namespace), place, no, MsFlags::MS_BIND, no).map_err(|errno| {
        // The first error is the one to tell.
        let _ = fs::remove_file(place);
        errno.into()
    })
}

/// Makes a PID namespace with an init in it; returns its pid once it is what
/// containers may see. By a process of one thread, which can enter a user namespace,
/// from a thread of its own, which alone enters the pod's others and ends.
fn spawn_pod_init() -> io::Result<u32> {
    let in_thread = || {
        namespaces::join_shared()?;
        let mut maker = Command::new("/proc/self/exe")
            .arg0(POD_INIT)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut told = String::new();
        if let Some(mut output) = maker.stdout.take() {
            output.read_to_string(&mut told)?;
        }
        let pid = told.strip_prefix(READY).map(str::trim).map(str::parse);
        match pid {
            Some(Ok(pid)) => Ok(pid),
            _ if told.is_empty() => Err(io::Error::other(format!("{POD_INIT} ended too early"))),
            _ => Err(io::Error::other(format!("{POD_INIT}: {told}"))),
        }
    };
    let thread = thread::Builder::new()
        .name(POD_INIT.to_owned())
        .spawn(in_thread)?;
    let ended = thread.join();
    ended.map_err(|_| io::Error::other("the thread panicked"))?
}

/// What the agent's binary is then: it makes the init, tells its pid and ends. The
/// agent, whose child the init becomes, reaps both, as every process.
pub fn pod_init_main() -> ! {
    let made = make_pod_init();
    match &made {
        Ok(pid) => print!("{READY} {pid}"),
        Err(error) => print!("{error}"),
    }
    let _ = io::stdout().flush();
    std::process::exit(i32::from(made.is_err()))
}

fn make_pod_init() -> io::Result<i32> {
    // Its init's memory stays the guest's, which no root of a user namespace may
    // look into: that is decided when a program is executed, and it executes none.
    prctl::set_dumpable(false)?;
    if Path::new(POD_USER_NAMESPACE).exists() {
        namespaces::enter_user_namespace(&File::open(POD_USER_NAMESPACE)?)?;
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    let (mut told, tell) = io::pipe()?;
    let Some(pid) = fork()? else {
        drop(told);
        be_pod_init(tell);
    };
    drop(tell);
    let mut words = String::new();
    told.read_to_string(&mut words)?;
    match words.as_str() {
        READY => Ok(pid),
        "" => Err(io::Error::other("it ended too early")),
        error => Err(io::Error::other(error)),
    }
}

/// It takes in the orphans of the containers, whose ends the kernel then forgets, for
/// as long as the VM lives.
fn be_pod_init(mut tell: PipeWriter) -> ! {
    let ready = become_pod_init().and_then(|null| {
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        tell.write_all(READY.as_bytes())
    });
    match ready {
        Ok(()) => {
            drop(tell);
            loop {
                pause();
            }
        }
        Err(error) => {
            let _ = write!(tell, "{error}");
            std::process::exit(1)
        }
    }
}

/// Containers see it, so it has nothing that they could want: no privilege, no
/// file but an empty directory, no memory that may be read. Returns `/dev/null`.
fn become_pod_init() -> io::Result<File> {
    forget_children()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)?;
    let no = None::<&str>;
    mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no)?;
    let bare = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let name = Some(POD_INIT);
    mount(name, "/run", Some("tmpfs"), bare, Some("mode=0555,size=4k"))?;
    chdir("/run")?;
    pivot_root(".", ".")?;
    // The old root now lies over the new one.
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    // Or it would be called what its path was.
    prctl::set_name(c"pod-init")?;
    prctl::set_no_new_privs()?;
    namespaces::become_user(POD_INIT_ID).map_err(|errno| {
        io::Error::other(format!(
            "become user {POD_INIT_ID} (does the pod map it?): {errno}"
        ))
    })?;
    prctl::set_dumpable(false)?;
    Ok(null)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxBuilder, LinuxNamespaceBuilder, SpecBuilder};

    fn asked(path: Option<&str>) -> Option<Shared> {
        let namespace = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
        let namespace = match path {
            Some(path) => namespace.path(path),
            None => namespace,
        };
        let namespaces = vec![namespace.build().expect("namespace")];
        let linux = LinuxBuilder::default().namespaces(namespaces).build();
        let spec = SpecBuilder::default().linux(linux.expect("linux")).build();
        Shared::asked(&spec.expect("spec"))
    }

    #[test]
    fn asked_is_told_by_the_path() {
        assert_eq!(asked(None), None);
        assert_eq!(asked(Some("/run/bulkhead/pod/ns/pid")), Some(Shared::Pod));
        let of_a = Some(Shared::Of("a".to_owned()));
        assert_eq!(asked(Some("/run/bulkhead/pod/ns/pid-of/a")), of_a);
        assert_eq!(asked(Some("/proc/1/ns/pid")), None);
    }
}
