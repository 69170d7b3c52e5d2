//! The pod's cgroup on the host (cgroup v2).
//!
//! Where it is, `linux.cgroupsPath` says, in either notation; what limits it,
//! limits all that the pod is on the host. Its processes live in two leaves of
//! it, since only a leaf may have processes once a controller is enabled for
//! children (cgroup-v2.rst, "No Internal Process Constraint"), and since the
//! shim must survive the kill of the others:
//!
//! ```text
//! POD/vm      the monitor, the file server, the stand-ins
//! POD/shim    the shim, and what it runs for its clients
//! ```
//!
//! For a CRI pod, POD is a directory of its own in the sandbox's parent: CRI
//! clients that name no parent put all pods into the same one.
//!
//! systemd's notation `slice:prefix:name` is taken for the directory that
//! systemd would make; it is made as a plain directory below the slice, without
//! asking systemd, which leaves directories that it did not make alone as long
//! as the slice exists.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, XattrFlags, getxattr, open, setxattr, statfs};
use thiserror::Error;

/// Where the host mounts its hierarchy.
pub const HIERARCHY: &str = "/sys/fs/cgroup";
/// The leaf of the jailed processes.
const VM_LEAF: &str = "vm";
/// The leaf of the shim.
const SHIM_LEAF: &str = "shim";
/// Marks the directories that Bulkhead has made, so that the last pod to leave
/// one removes it, whichever made it.
const MARK: &str = "trusted.bulkhead";
/// How often a parent may vanish under us, being left by its last pod.
const ATTEMPTS: u32 = 16;
/// Longest path that the kernel takes (`PATH_MAX` of linux/limits.h, with its
/// NUL): systemd's notation grows with the square of its length.
const MAX_PATH_BYTES: usize = 4095;
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// Why the pod's cgroup cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// Neither notation, or with components that lead elsewhere.
    #[error("linux.cgroupsPath {path:?}: {reason}")]
    Path {
        /// As in the spec.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host does not use the unified hierarchy.
    #[error(
        "{hierarchy} is not a cgroup v2 hierarchy, which Bulkhead needs: boot the host with systemd.unified_cgroup_hierarchy=1"
    )]
    NotUnified {
        /// Where it was looked for.
        hierarchy: PathBuf,
    },
    /// An operation on a cgroup failed.
    #[error("{operation} cgroup {path}")]
    Io {
        /// As in "create".
        operation: &'static str,
        /// Its directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Processes were killed and did not go.
    #[error(
        "processes in cgroup {path} are still there {waited:?} after being killed: look for state D in ps"
    )]
    Populated {
        /// Its directory.
        path: PathBuf,
        /// How long they had.
        waited: Duration,
    },
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source: source.into(),
    }
}

/// Which cgroup a pod has, relative to the root of the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupPath(PathBuf);

impl CgroupPath {
    /// The pod's cgroup for `linux.cgroupsPath` of its first container: for a
    /// CRI sandbox `bulkhead-ID` in the parent of it, for a lone container the
    /// path itself, and without one `bulkhead/NAMESPACE/ID`. (OCI runtime-spec, config-linux.md,
    /// "Cgroups Path": a relative path may be put anywhere; ours go below the
    /// root of the hierarchy.)
    pub fn for_pod(
        cgroups_path: Option<&str>,
        is_sandbox: bool,
        namespace: &str,
        id: &str,
    ) -> Result<Self, Error> {
        let Some(text) = cgroups_path.filter(|path| !path.is_empty()) else {
            return Ok(Self(Path::new("bulkhead").join(namespace).join(id)));
        };
        let refuse = |reason| Error::Path {
            path: text.chars().take(MAX_PATH_BYTES).collect(),
            reason,
        };
        if text.len() > MAX_PATH_BYTES {
            return Err(refuse("it is longer than a path can be"));
        }
        let own = match text.split(':').collect::<Vec<_>>()[..] {
            [slice, prefix, name] => systemd_scope(slice, prefix, name).map_err(refuse)?,
            _ => PathBuf::from(text.trim_start_matches('/')),
        };
        let plain = own
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !plain || text.contains('\0') {
            return Err(refuse("it must not contain . or .. components"));
        }
        if own == Path::new("") {
            return Err(refuse(
                "it must name a cgroup below the root of the hierarchy",
            ));
        }
        let parent = own.parent().filter(|_| is_sandbox);
        Ok(Self(match parent {
            Some(parent) => parent.join(format!("bulkhead-{id}")),
            None => own,
        }))
    }

    /// Relative to the root of the hierarchy.
    pub fn relative(&self) -> &Path {
        &self.0
    }
}

/// The directory of scope `prefix-name.scope` in `slice`: a slice `a-b.slice`
/// lies in `a.slice` (systemd.slice(5)). A name that is a slice itself is used
/// as it is, as runc does.
fn systemd_scope(slice: &str, prefix: &str, name: &str) -> Result<PathBuf, &'static str> {
    const BAD_SLICE: &str =
        "its slice must be named like a-b.slice, with no empty part (slice:prefix:name)";
    let component = |text: &str| !text.is_empty() && !text.contains('/');
    let unit = match (prefix, name) {
        (_, name) if name.strip_suffix(".slice").is_some() => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    if !component(name) || prefix.contains('/') {
        return Err("its name must be one path component (slice:prefix:name)");
    }
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let stem = slice.strip_suffix(".slice").ok_or(BAD_SLICE)?;
    let mut path = PathBuf::new();
    // `-.slice` is the root slice.
    if stem != "-" {
        let mut ancestor = String::new();
        for part in stem.split('-') {
            if !component(part) {
                return Err(BAD_SLICE);
            }
            ancestor.push_str(part);
            path.push(format!("{ancestor}.slice"));
            ancestor.push('-');
        }
    }
    Ok(path.join(unit))
}

/// A pod's cgroup. Dropping it removes nothing; see [`remove`].
#[derive(Debug)]
pub struct PodCgroup {
    hierarchy: PathBuf,
    pod: PathBuf,
    vm: OwnedFd,
}

impl PodCgroup {
    /// Where the pod's cgroup is, or will be.
    pub fn path_of(hierarchy: &Path, path: &CgroupPath) -> PathBuf {
        hierarchy.join(&path.0)
    }

    /// Which directories [`PodCgroup::create`] would make, outermost first: to
    /// be written down before.
    pub fn missing(hierarchy: &Path, path: &CgroupPath) -> Result<Vec<PathBuf>, Error> {
        require_unified(hierarchy)?;
        let pod = Self::path_of(hierarchy, path);
        let mut missing: Vec<PathBuf> = [pod.join(VM_LEAF), pod.join(SHIM_LEAF)].into();
        missing.extend(
            pod.ancestors()
                .take_while(|ancestor| *ancestor != hierarchy && !ancestor.exists())
                .map(Path::to_owned),
        );
        missing.reverse();
        Ok(missing)
    }

    /// Makes what is missing and opens it.
    pub fn create(hierarchy: &Path, path: &CgroupPath) -> Result<Self, Error> {
        let mut attempts = 1;
        while let Err(error) = Self::make(hierarchy, path) {
            match error {
                Error::Io { ref source, .. } if gone(source) && attempts < ATTEMPTS => {
                    attempts += 1;
                }
                error => return Err(error),
            }
        }
        let pod = Self::path_of(hierarchy, path);
        let leaf = pod.join(VM_LEAF);
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let vm = open(&leaf, flags, Mode::empty()).map_err(failed("open", &leaf))?;
        Ok(Self {
            hierarchy: hierarchy.to_owned(),
            pod,
            vm,
        })
    }

    fn make(hierarchy: &Path, path: &CgroupPath) -> Result<(), Error> {
        for directory in Self::missing(hierarchy, path)? {
            match fs::create_dir(&directory) {
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(failed("create", &directory))?,
            }
            setxattr(&directory, MARK, b"1", XattrFlags::empty())
                .map_err(failed("mark", &directory))?;
        }
        Ok(())
    }

    /// The pod's cgroup directory: limits and statistics are its.
    pub fn path(&self) -> &Path {
        &self.pod
    }

    /// The cgroup into which the pod's processes are born.
    pub fn vm(&self) -> BorrowedFd<'_> {
        self.vm.as_fd()
    }

    /// Bounds what all of the pod takes of the host's memory. Its leaves share it.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), Error> {
        let relative = self.pod.strip_prefix(&self.hierarchy);
        let mut parent = self.hierarchy.clone();
        // A cgroup has the controllers that its parent enables (cgroup-v2.rst,
        // "Enabling and Disabling").
        for name in relative.unwrap_or(Path::new("")) {
            let control = parent.join("cgroup.subtree_control");
            fs::write(&control, "+memory")
                .map_err(failed("enable the memory controller of", &parent))?;
            parent.push(name);
        }
        let limit = self.pod.join("memory.max");
        fs::write(limit, bytes.to_string()).map_err(failed("limit the memory of", &self.pod))
    }

    /// What the cgroups above the pod's leave it of the host's memory, in bytes: the
    /// least of their `memory.max`, if any of them has one.
    pub fn memory_granted(&self) -> Option<u64> {
        let above = self.pod.ancestors().skip(1);
        above
            .take_while(|cgroup| *cgroup != self.hierarchy)
            .filter_map(|cgroup| {
                let limit = fs::read_to_string(cgroup.join("memory.max")).ok()?;
                // "max" is none.
                limit.trim().parse::<u64>().ok()
            })
            .min()
    }

    /// Moves this process into the pod's cgroup and returns where it was,
    /// relative to the hierarchy.
    pub fn adopt_self(&self) -> Result<PathBuf, Error> {
        let former = own_cgroup();
        move_self(&self.pod.join(SHIM_LEAF))?;
        Ok(former)
    }

    /// Moves this process back to `former`, or, if that is gone or takes no
    /// processes, to the root of the hierarchy.
    pub fn release_self(&self, former: &Path) -> Result<(), Error> {
        let former = former.strip_prefix("/").unwrap_or(former);
        move_self(&self.hierarchy.join(former)).or_else(|_| move_self(&self.hierarchy))
    }
}

/// Kills every process in the pod's leaf and waits until none is left.
pub fn kill_vm(pod: &Path, deadline: Duration) -> Result<(), Error> {
    kill(&pod.join(VM_LEAF), deadline)
}

/// Removes `made` innermost first, as far as it is there and unused, and then
/// the parents of the pod's cgroup that Bulkhead made and no pod uses any more.
pub fn remove(pod: &Path, made: &[PathBuf]) -> Result<(), Error> {
    for directory in made.iter().rev() {
        match fs::remove_dir(directory) {
            Ok(()) => {}
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            // A parent that another pod uses; whether the leaves have processes
            // left, the caller has checked.
            Err(source) if source.raw_os_error() == Some(libc::EBUSY) => {}
            Err(source) => return Err(failed("remove", directory)(source)),
        }
    }
    for parent in pod.ancestors().skip(1) {
        let gone = match getxattr(parent, MARK, &mut [0_u8; 1][..]) {
            Ok(_) => fs::remove_dir(parent).map_or_else(|error| gone(&error), |()| true),
            Err(error) => gone(&error.into()),
        };
        // Another pod's, or not of our making. What is gone already, by our
        // hand or another's, may have a parent for us to remove.
        if !gone {
            break;
        }
    }
    Ok(())
}

/// Waits until the shim's leaf is empty and kills what is still there after
/// `grace`: a logger may be writing its last lines, but what a hook left
/// behind, and `poststop` did not end, must not outlive its pod.
pub fn drain_shim(pod: &Path, grace: Duration, deadline: Duration) -> Result<(), Error> {
    let leaf = pod.join(SHIM_LEAF);
    match wait_until_empty(&leaf, grace) {
        Err(Error::Populated { .. }) => kill(&leaf, deadline),
        other => other,
    }
}

fn kill(cgroup: &Path, deadline: Duration) -> Result<(), Error> {
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        // ENODEV: removed while open.
        Err(source) if gone(&source) => return Ok(()),
        other => other.map_err(failed("kill", cgroup))?,
    }
    wait_until_empty(cgroup, deadline)
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Waits for `populated 0` in cgroup.events, which signals each change with
/// POLLPRI (cgroup-v2.rst, "\[Un\]populated Notification").
fn wait_until_empty(cgroup: &Path, deadline: Duration) -> Result<(), Error> {
    let path = cgroup.join("cgroup.events");
    let end = Instant::now() + deadline;
    let events = match open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Err(source) if gone(&source.into()) => return Ok(()),
        other => other.map_err(failed("watch", cgroup))?,
    };
    let mut text = [0_u8; 256];
    loop {
        let length = match rustix::io::pread(&events, &mut text, 0) {
            Err(source) if gone(&source.into()) => return Ok(()),
            other => other.map_err(failed("watch", cgroup))?,
        };
        if text[..length]
            .split(|byte| *byte == b'\n')
            .any(|line| line == b"populated 0")
        {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)) {
            Ok(0) => {
                return Err(Error::Populated {
                    path: cgroup.to_owned(),
                    waited: deadline,
                });
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(source) => return Err(failed("watch", cgroup)(source)),
        }
    }
}

fn require_unified(hierarchy: &Path) -> Result<(), Error> {
    match statfs(hierarchy) {
        Ok(found) if found.f_type == CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(Error::NotUnified {
            hierarchy: hierarchy.to_owned(),
        }),
    }
}

fn move_self(cgroup: &Path) -> Result<(), Error> {
    fs::write(cgroup.join("cgroup.procs"), "0").map_err(failed("move the shim into", cgroup))
}

/// This process's cgroup in the unified hierarchy, whose line in
/// /proc/self/cgroup begins with `0::` (cgroup-v2.rst, "Processes").
fn own_cgroup() -> PathBuf {
    fs::read_to_string("/proc/self/cgroup")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::host::children;
    use proptest::prelude::*;

    /// A cgroup v2 hierarchy in which a test may make cgroups.
    pub(in crate::host) fn hierarchy() -> Option<PathBuf> {
        let found = [HIERARCHY, "/sys/fs/cgroup/unified"]
            .into_iter()
            .map(PathBuf::from)
            .find(|path| require_unified(path).is_ok());
        let found = found.filter(|_| rustix::process::geteuid().is_root());
        if found.is_none() {
            eprintln!("SKIP: needs root and a cgroup v2 hierarchy");
        }
        found
    }

    fn pod(cgroups_path: &str, is_sandbox: bool) -> Result<PathBuf, Error> {
        CgroupPath::for_pod(Some(cgroups_path), is_sandbox, "default", "c").map(|path| path.0)
    }

    #[test]
    fn for_pod_reads_both_notations() {
        let of = |path, is_sandbox| pod(path, is_sandbox).expect("is a path");
        assert_eq!(
            of("/kubepods/pod1/abc", true),
            Path::new("kubepods/pod1/bulkhead-c")
        );
        assert_eq!(of("/default/abc", false), Path::new("default/abc"));
        assert_eq!(
            of("kubepods-burstable-pod1.slice:cri-containerd:abc", true),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/bulkhead-c"
            )
        );
        assert_eq!(
            of("user.slice:nerdctl:abc", false),
            Path::new("user.slice/nerdctl-abc.scope")
        );
        assert_eq!(
            of(":nerdctl:abc", false),
            Path::new("system.slice/nerdctl-abc.scope")
        );
        assert_eq!(of("-.slice::abc", false), Path::new("abc.scope"));
        let none = CgroupPath::for_pod(None, false, "default", "c").expect("is a path");
        assert_eq!(none.0, Path::new("bulkhead/default/c"));
    }

    #[test]
    fn for_pod_of_a_path_that_no_kernel_takes_is_refused_in_few_words() {
        // As directories these would be gigabytes.
        let slice = format!("{}a.slice:prefix:name", "a-".repeat(50_000));
        let refused = pod(&slice, false).expect_err("is refused").to_string();
        assert!(refused.contains("longer"), "{refused}");
        assert!(refused.len() < 5000);
    }

    #[test]
    fn for_pod_with_what_leads_elsewhere_is_refused() {
        for path in [
            "/a/../../b",
            "..",
            "/",
            "a-.slice:p:n",
            "a:p:n",
            "a.slice:p:",
        ] {
            assert!(
                pod(path, false).is_err() && pod(path, true).is_err(),
                "{path}"
            );
        }
        assert!(pod("a.slice:p:n/../x", false).is_err());
        assert!(pod("a.slice:p/../..:n", false).is_err());
    }

    proptest! {
        #[test]
        fn for_pod_of_any_text_stays_below_the_hierarchy(text in ".{0,40}", is_sandbox: bool) {
            if let Ok(path) = pod(&text, is_sandbox) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
                prop_assert!(path.components().next().is_some());
            }
        }
    }

    #[test]
    fn create_on_a_host_without_the_unified_hierarchy_says_so() {
        let directory = tempfile::tempdir().expect("directory");
        let path = CgroupPath::for_pod(None, false, "default", "c").expect("is a path");
        let error = PodCgroup::create(directory.path(), &path).expect_err("is refused");
        assert!(matches!(error, Error::NotUnified { .. }), "{error:?}");
    }

    #[test]
    fn kill_vm_with_a_process_empties_and_remove_leaves_others_alone() {
        let Some(hierarchy) = hierarchy() else { return };
        let base = format!("bulkhead-test-kill-{}", std::process::id());
        fs::create_dir(hierarchy.join(&base)).expect("makes the parent");
        let path = CgroupPath::for_pod(Some(&format!("/{base}/a/b")), false, "", "").expect("path");
        let made = PodCgroup::missing(&hierarchy, &path).expect("looks");
        assert_eq!(made.len(), 4, "{made:?}");
        let cgroup = PodCgroup::create(&hierarchy, &path).expect("creates");
        let mut command = std::process::Command::new("/bin/sleep");
        let mut child = children::spawn_command(command.arg("1000")).expect("starts");
        fs::write(
            cgroup.path().join(VM_LEAF).join("cgroup.procs"),
            child.id().to_string(),
        )
        .expect("moves");
        kill_vm(cgroup.path(), Duration::from_secs(10)).expect("kills");
        child.wait().expect("is collected");
        children::forget(child.id());
        kill_vm(cgroup.path(), Duration::from_secs(10)).expect("kills what is killed");
        let sibling =
            CgroupPath::for_pod(Some(&format!("/{base}/a/c")), false, "", "").expect("path");
        let siblings = PodCgroup::missing(&hierarchy, &sibling).expect("looks");
        let sibling = PodCgroup::create(&hierarchy, &sibling).expect("creates");
        remove(cgroup.path(), &made).expect("removes");
        assert!(!cgroup.path().exists());
        assert!(sibling.path().join(VM_LEAF).exists());
        remove(sibling.path(), &siblings).expect("removes");
        remove(sibling.path(), &siblings).expect("removes what is not there");
        assert!(
            !hierarchy.join(&base).join("a").exists(),
            "its last pod has left"
        );
        fs::remove_dir(hierarchy.join(&base)).expect("was not ours to remove");
    }

    #[test]
    fn create_and_remove_by_many_pods_in_one_parent_leaves_no_parent() {
        let Some(hierarchy) = hierarchy() else { return };
        let parent = format!("bulkhead-test-many-{}", std::process::id());
        std::thread::scope(|scope| {
            for pod in 0..8 {
                let (parent, hierarchy) = (&parent, &hierarchy);
                scope.spawn(move || {
                    let text = format!("/{parent}/a/{pod}");
                    for _ in 0..20 {
                        let path = CgroupPath::for_pod(Some(&text), false, "", "").expect("path");
                        let made = PodCgroup::missing(hierarchy, &path).expect("looks");
                        let cgroup = PodCgroup::create(hierarchy, &path).expect("creates");
                        remove(cgroup.path(), &made).expect("removes");
                    }
                });
            }
        });
        assert!(!hierarchy.join(parent).exists());
    }
}
