//! The network, IPC and UTS namespaces that the pod's containers share, and the user
//! namespace that owns them, if the pod has one.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use agent_protocol::{POD_DIR, api::UserNamespace};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
    unistd::{Gid, Uid, setgroups, sethostname, setresgid, setresuid},
};

use crate::{kernel_calls::set_interface_up, pod::PodError};

/// Name by which the agent's binary is executed to make the namespaces of a pod that
/// has a user namespace (`argv[0]`).
pub const MAKER: &str = "pod-namespaces";
/// What it says once the user namespace is there, and once the others are.
const MADE: &str = "made";
/// What it is told in between.
const GO: &[u8] = b"go";

const SHARED: [&str; 3] = ["net", "ipc", "uts"];

fn shared_kinds() -> CloneFlags {
    CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> PodError {
    move |source| PodError::Namespace { what, source }
}

/// Makes them, held by bind mounts, with the loopback interface up. Blocks.
///
/// # Errors
/// What the kernel refused.
pub fn create(hostname: String, user: Option<&UserNamespace>) -> Result<(), PodError> {
    fs::create_dir_all(directory()).map_err(failed("namespace directory"))?;
    // Or the kernel puts a device of each kind of tunnel that it knows into every
    // network namespace.
    fs::write("/proc/sys/net/core/fb_tunnels_only_for_init_net", "1")
        .map_err(failed("network settings"))?;
    match user {
        Some(user) => {
            make_in(user)?;
            in_thread(move || {
                join_shared().map_err(failed("namespaces to set up"))?;
                set_up(&hostname)
            })
        }
        None => in_thread(move || {
            unshare(shared_kinds()).map_err(|errno| failed("namespaces")(errno.into()))?;
            set_up(&hostname)?;
            hold(Path::new("/proc/thread-self/ns"), &SHARED)
        }),
    }
}

/// The calling thread joins those that the pod's containers share.
pub fn join_shared() -> io::Result<()> {
    for name in SHARED {
        let namespace = File::open(directory().join(name))?;
        setns(&namespace, CloneFlags::empty())?;
    }
    Ok(())
}

fn directory() -> PathBuf {
    Path::new(POD_DIR).join("ns")
}

/// In a thread, whose end leaves only the bind mounts.
fn in_thread(work: impl FnOnce() -> Result<(), PodError> + Send + 'static) -> Result<(), PodError> {
    let thread = thread::Builder::new().name("namespaces".to_owned());
    let ended = thread.spawn(work).and_then(|thread| {
        let panicked = |_| io::Error::other("the thread panicked");
        thread.join().map_err(panicked)
    });
    ended.map_err(failed("namespaces"))?
}

fn set_up(hostname: &str) -> Result<(), PodError> {
    if !hostname.is_empty() {
        sethostname(hostname).map_err(|errno| failed("hostname")(errno.into()))?;
    }
    set_interface_up("lo").map_err(failed("loopback interface"))
}

fn hold(process: &Path, names: &[&str]) -> Result<(), PodError> {
    let no = None::<&str>;
    for name in names {
        let held = directory().join(name);
        File::create(&held).map_err(failed("namespace file"))?;
        mount(Some(&process.join(name)), &held, no, MsFlags::MS_BIND, no)
            .map_err(|errno| failed("namespace mount")(errno.into()))?;
    }
    Ok(())
}

/// Has a process of one thread make them: one with more may not have a user namespace
/// of its own.
fn make_in(user: &UserNamespace) -> Result<(), PodError> {
    let failed = failed("user namespace");
    let mut maker = Command::new("/proc/self/exe")
        .arg0(MAKER)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(&failed)?;
    let (Some(mut input), Some(output)) = (maker.stdin.take(), maker.stdout.take()) else {
        unreachable!("both were asked for");
    };
    let mut output = BufReader::new(output);
    expect_made(&mut output).map_err(&failed)?;
    let process = PathBuf::from(format!("/proc/{}", maker.id()));
    for (file, map) in [("uid_map", &user.uid_map), ("gid_map", &user.gid_map)] {
        fs::write(process.join(file), map).map_err(&failed)?;
    }
    input.write_all(GO).map_err(&failed)?;
    expect_made(&mut output).map_err(&failed)?;
    let names = [&SHARED[..], &["user"]].concat();
    // The end of its input is that of the process, which the agent reaps.
    hold(&process.join("ns"), &names)
}

/// A line of the maker's, which is what it has done or why not.
fn expect_made(output: &mut impl BufRead) -> io::Result<()> {
    let mut told = String::new();
    output.read_line(&mut told)?;
    match told.trim_end() {
        MADE => Ok(()),
        "" => Err(io::Error::other(format!("{MAKER} ended too early"))),
        error => Err(io::Error::other(format!("{MAKER}: {error}"))),
    }
}

/// What the agent's binary is then.
pub fn maker_main() -> ! {
    let made = make();
    if let Err(error) = &made {
        println!("{error}");
    }
    std::process::exit(i32::from(made.is_err()))
}

fn make() -> io::Result<()> {
    // What its maker may have, soft, all members of the namespace may have between
    // them (create_user_ns): each has limits of its own already.
    for shared in [
        Resource::RLIMIT_MEMLOCK,
        Resource::RLIMIT_MSGQUEUE,
        Resource::RLIMIT_SIGPENDING,
    ] {
        setrlimit(shared, RLIM_INFINITY, RLIM_INFINITY)?;
    }
    unshare(CloneFlags::CLONE_NEWUSER)?;
    println!("{MADE}");
    // Until it has its maps.
    io::stdin().read_exact(&mut [0; GO.len()])?;
    // What comes now belongs to its root: the file systems of the IPC namespace, say.
    become_user(0)?;
    unshare(shared_kinds())?;
    println!("{MADE}");
    // Until the agent holds them, or is gone.
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// The calling process, of one thread, becomes root of a user namespace, with every
/// privilege over what that owns and none over anything else.
pub fn enter_user_namespace(namespace: &File) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    Ok(become_user(0)?)
}

/// The calling process, of one thread, becomes a user and group of that id, alone.
pub fn become_user(id: u32) -> nix::Result<()> {
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
