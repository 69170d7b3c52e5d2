//! The content-addressed store in which every built artefact lives.
//!
//! ```text
//! ${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}/
//!   KIND/KEY/            a finished entry: never written again
//!   KIND/KEY.building/   an entry in the making, owned by whoever holds the lock
//!   KIND/KEY.lock        flock(2) of the entry; the file itself stays
//!   KIND/KEY.log         the output of the commands of the last build
//! ```
//!
//! An entry appears under its name by one rename of a directory, so whoever sees it sees all of it. What a killed
//! build left behind is swept by the next build of the same kind.

mod key;
mod mounts;

use std::env;
use std::error::Error;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

pub(crate) use key::hex;
pub use key::{Key, KeyError};

const BUILDING: &str = "building";
const LOCK: &str = "lock";

/// How long an entry stays without being used, when making it again is quick and when it is not.
const KEPT_IF_QUICK: Duration = Duration::from_hours(2 * 24);
const KEPT_IF_SLOW: Duration = Duration::from_hours(30 * 24);
/// The longest build that counts as quick.
const QUICK: Duration = Duration::from_mins(2);

/// What can go wrong with the store; each variant names the path concerned.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither `BULKHEAD_CACHE` nor `XDG_CACHE_HOME` nor `HOME` names an absolute directory.
    #[error("no place for the cache: set BULKHEAD_CACHE to an absolute directory, or HOME")]
    NoHome,
    /// A directory of the store cannot be made.
    #[error("create cache directory {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The lock of an entry cannot be taken.
    #[error("lock cache entry {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The left-over of an earlier build cannot be removed.
    #[error("remove the left-over build {path}")]
    Sweep {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something is still mounted below a left-over build, so removing it would reach into another file system.
    #[error("{mount} is still mounted below a left-over build: unmount it, then run again")]
    Mounted {
        /// The mount point.
        mount: PathBuf,
    },
    /// The closure that builds the entry failed.
    #[error("build {what}")]
    Build {
        /// What was being built.
        what: String,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The finished build cannot be renamed to its final name.
    #[error("publish cache entry {path}")]
    Publish {
        /// The entry.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The store. Cheap to open; any number of processes may use it at once.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the user's store, creating its directory when it is not there.
    ///
    /// # Errors
    /// [`CacheError::NoHome`] when the environment names no absolute directory, [`CacheError::Create`].
    pub fn open() -> Result<Self, CacheError> {
        let absolute = |name: &str| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let root = absolute("BULKHEAD_CACHE")
            .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("bulkhead")))
            .or_else(|| absolute("HOME").map(|path| path.join(".cache/bulkhead")))
            .ok_or(CacheError::NoHome)?;
        Self::open_at(root)
    }

    /// Opens the store in the directory `root`.
    ///
    /// # Errors
    /// [`CacheError::Create`].
    pub fn open_at(root: impl Into<PathBuf>) -> Result<Self, CacheError> {
        let root = root.into();
        create_dir(&root)?;
        Ok(Self { root })
    }

    /// The directory of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Names the entry of `kind` (one path component) whose inputs are `key`. Touches nothing yet.
    ///
    /// # Panics
    /// When `kind` is not a plain file name: it is a constant of the caller.
    pub fn entry(&self, kind: &str, key: &Key) -> Entry {
        let plain = !kind.is_empty()
            && kind
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        assert!(plain, "cache kind {kind:?} is not a plain name");
        let kind_dir = self.root.join(kind);
        Entry {
            path: kind_dir.join(key.hex()),
            kind_dir,
            what: kind.to_owned(),
            expected: Duration::ZERO,
        }
    }

    /// Takes the exclusive lock `name` of the store, waiting for whoever holds it: for directories that are updated
    /// in place, such as a compiler's incremental output. Dropping the file releases it.
    ///
    /// # Errors
    /// [`CacheError::Lock`].
    pub fn lock(&self, name: &str) -> Result<File, CacheError> {
        lock_file(
            &self.root.join(name).with_extension(LOCK),
            &format!("the cache's {name}"),
        )
    }
}

/// One entry of the store, there already or still to be built.
#[derive(Debug)]
pub struct Entry {
    kind_dir: PathBuf,
    path: PathBuf,
    what: String,
    expected: Duration,
}

impl Entry {
    /// Says what is built and how long it takes on a small machine (two cores), for the progress line.
    #[must_use]
    pub fn describe(mut self, what: impl Into<String>, expected: Duration) -> Self {
        self.what = what.into();
        self.expected = expected;
        self
    }

    /// The directory that the finished entry has.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that takes the output of the build's commands. It outlives a failed build.
    pub fn log(&self) -> PathBuf {
        self.path.with_extension("log")
    }

    /// The entry's directory if it has been built. Counts as a use of it.
    pub fn existing(&self) -> Option<&Path> {
        if !self.path.is_dir() {
            return None;
        }
        // The lock's time is that of the last use. In a store that is read-only for this user, nothing is removed either.
        let _ = open_lock(&self.path.with_extension(LOCK))
            .and_then(|lock| lock.set_modified(SystemTime::now()));
        Some(&self.path)
    }

    /// The entry's directory, built by `build` when it is not there.
    ///
    /// `build` fills the empty directory that it is given, which is then renamed to [`Self::path`]: so it must not store
    /// that directory's name in what it makes. Of any number of concurrent callers, in any number of processes, one
    /// builds and the others wait. Progress goes to standard error.
    ///
    /// # Errors
    /// [`CacheError::Build`] with the closure's own error; otherwise what concerns the store's files.
    pub fn or_build<E>(
        &self,
        build: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, CacheError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        if let Some(path) = self.existing() {
            return Ok(path.to_owned());
        }
        create_dir(&self.kind_dir)?;
        let _lock = lock_file(&self.path.with_extension(LOCK), &self.what)?;
        // Whoever held the lock before may have built it.
        if let Some(path) = self.existing() {
            return Ok(path.to_owned());
        }
        let building = self.path.with_extension(BUILDING);
        remove_left_over(&building)?;
        sweep(
            &self.kind_dir,
            if self.expected <= QUICK {
                KEPT_IF_QUICK
            } else {
                KEPT_IF_SLOW
            },
        );

        let started = Instant::now();
        eprintln!("building {} ({}) ...", self.what, about(self.expected));
        create_dir(&building)?;
        if let Err(source) = build(&building) {
            // The cause matters more than a directory that the next build sweeps anyway.
            let _ = remove_left_over(&building);
            return Err(CacheError::Build {
                what: self.what.clone(),
                source: source.into(),
            });
        }
        fs::rename(&building, &self.path).map_err(|source| CacheError::Publish {
            path: self.path.clone(),
            source,
        })?;
        eprintln!(
            "building {}: done in {} s",
            self.what,
            started.elapsed().as_secs()
        );
        Ok(self.path.clone())
    }
}

fn about(expected: Duration) -> String {
    match expected.as_secs() {
        0 => "a moment".to_owned(),
        seconds @ 1..90 => format!("about {seconds} s"),
        seconds => format!("about {} min", seconds.div_ceil(60)),
    }
}

fn create_dir(path: &Path) -> Result<(), CacheError> {
    fs::create_dir_all(path).map_err(|source| CacheError::Create {
        path: path.to_owned(),
        source,
    })
}

fn lock_file(path: &Path, what: &str) -> Result<File, CacheError> {
    let failed = |source| CacheError::Lock {
        path: path.to_owned(),
        source,
    };
    let file = open_lock(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {
            eprintln!("waiting for another run, which works on {what} ...");
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    file.lock().map_err(failed)?;
    Ok(file)
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
}

/// Removes what killed builds of this kind left behind, and entries that nobody has used for the time `kept`. Whoever
/// builds or removes holds the entry's lock. Failing to tidy is no reason to fail the build at hand.
fn sweep(kind_dir: &Path, kept: Duration) {
    for entry in fs::read_dir(kind_dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let building = path.with_extension(BUILDING);
        let is_entry = path.extension().is_none();
        if !is_entry && path != building {
            continue;
        }
        let Ok(lock) = open_lock(&path.with_extension(LOCK)) else {
            continue;
        };
        if lock.try_lock().is_err() {
            continue;
        }
        if is_entry {
            let used = lock.metadata().and_then(|metadata| metadata.modified());
            let unused = used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age > kept));
            // It vanishes by one rename, as it appeared.
            if !unused || fs::rename(&path, &building).is_err() {
                continue;
            }
            let _ = fs::remove_file(path.with_extension("log"));
        }
        let _ = remove_left_over(&building);
    }
}

fn remove_left_over(path: &Path) -> Result<(), CacheError> {
    let failed = |source| CacheError::Sweep {
        path: path.to_owned(),
        source,
    };
    if let Some(mount) = mounts::first_below(path).map_err(failed)? {
        return Err(CacheError::Mounted { mount });
    }
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(source)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
