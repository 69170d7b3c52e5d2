//! A copy of the workspace's sources that stays still while it is compiled.
//!
//! Cargo decides by modification times what to compile again. Over one target directory shared by several checkouts, or
//! for a file that was replaced by an older one, that is wrong. So the sources are copied by content: a file of the copy
//! changes, and gets a new time, exactly when its bytes differ. What is hashed for the key is this copy too, hence what
//! is compiled, whatever an editor does meanwhile.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::cache::{Cache, CacheError, Key, KeyError};
use crate::command::{CommandError, read_output};

/// Files of the workspace itself.
const MANIFESTS: [&str; 2] = ["Cargo.toml", "Cargo.lock"];

/// What can go wrong in reading or copying a workspace.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Cargo does not find or understand the workspace.
    #[error("read the workspace of {dir}")]
    Metadata {
        /// Where it was looked for.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: CommandError,
    },
    /// Cargo's description of the workspace is not what is expected.
    #[error("understand what cargo metadata says about {dir}")]
    Parse {
        /// Where it was looked for.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// No member of the workspace has that name.
    #[error("the workspace has no package {name}")]
    NoPackage {
        /// The package.
        name: String,
    },
    /// A file cannot be copied.
    #[error("copy {path} for the build")]
    Copy {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The copy is in use and cannot be locked.
    #[error("lock the copy of the sources")]
    Lock(#[from] CacheError),
    /// The copy cannot be hashed.
    #[error("hash the sources")]
    Key(#[from] KeyError),
}

/// The cargo workspace of a checkout.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    workspace_root: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    path: Option<PathBuf>,
}

impl Workspace {
    /// Reads the workspace that the directory `dir` is in.
    ///
    /// # Errors
    /// [`SourceError::Metadata`] when there is none, [`SourceError::Parse`].
    pub fn open(dir: &Path) -> Result<Self, SourceError> {
        let mut cargo = Command::new("cargo");
        cargo
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(dir);
        let text = read_output(&mut cargo).map_err(|source| SourceError::Metadata {
            dir: dir.to_owned(),
            source,
        })?;
        let metadata: Metadata =
            serde_json::from_str(&text).map_err(|source| SourceError::Parse {
                dir: dir.to_owned(),
                source,
            })?;
        Ok(Self {
            root: metadata.workspace_root,
            packages: metadata.packages,
        })
    }

    /// The directory of the workspace's Cargo.toml.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Brings the copy in `cache` up to date and holds it until the result is dropped.
    ///
    /// # Errors
    /// [`SourceError::Lock`], [`SourceError::Copy`].
    pub fn stage(&self, cache: &Cache) -> Result<StagedWorkspace<'_>, SourceError> {
        let lock = cache.lock("source")?;
        let dir = cache.root().join("source");
        let mut wanted = BTreeSet::from(MANIFESTS.map(PathBuf::from));
        for package in &self.packages {
            list_files(&self.root, &self.package_dir(package), &mut wanted)?;
        }
        for file in &wanted {
            copy_if_different(&self.root.join(file), &dir.join(file))?;
        }
        let mut present = BTreeSet::new();
        list_files(&dir, Path::new(""), &mut present)?;
        for stale in present.difference(&wanted) {
            let path = dir.join(stale);
            fs::remove_file(&path).map_err(|source| SourceError::Copy { path, source })?;
        }
        Ok(StagedWorkspace {
            workspace: self,
            dir,
            _lock: lock,
        })
    }

    /// Adds to `key` the sources that the package `name` is built from, with the workspace's manifest and lock, as they
    /// are in the checkout now.
    ///
    /// # Errors
    /// [`SourceError::NoPackage`], [`SourceError::Key`], [`SourceError::Copy`].
    pub fn add_to(&self, key: &mut Key, name: &str) -> Result<(), SourceError> {
        self.add_from(&self.root, key, name)
    }

    fn add_from(&self, root: &Path, key: &mut Key, name: &str) -> Result<(), SourceError> {
        let mut files = BTreeSet::from(MANIFESTS.map(PathBuf::from));
        for package in self.closure(name)? {
            list_files(root, &self.package_dir(package), &mut files)?;
        }
        for file in files {
            let path = root.join(&file);
            let executable = is_executable(&path).map_err(|source| SourceError::Copy {
                path: path.clone(),
                source,
            })?;
            key.bytes("name", file.as_os_str().as_bytes())
                .bytes("executable", &[executable.into()]);
            key.file("content", &path)?;
        }
        Ok(())
    }

    /// The packages that `name` is built from: itself and the members that it depends on, not for tests.
    fn closure(&self, name: &str) -> Result<Vec<&Package>, SourceError> {
        let find = |name: &str| {
            let found = self.packages.iter().find(|package| package.name == name);
            found.ok_or_else(|| SourceError::NoPackage {
                name: name.to_owned(),
            })
        };
        let mut closure: Vec<&Package> = Vec::new();
        let mut pending = vec![find(name)?];
        while let Some(package) = pending.pop() {
            if closure.iter().any(|known| known.name == package.name) {
                continue;
            }
            closure.push(package);
            let members = package
                .dependencies
                .iter()
                .filter(|dependency| dependency.path.is_some());
            for member in members.filter(|dependency| dependency.kind.as_deref() != Some("dev")) {
                pending.push(find(&member.name)?);
            }
        }
        closure.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(closure)
    }

    fn package_dir(&self, package: &Package) -> PathBuf {
        let dir = package.manifest_path.parent().unwrap_or(&self.root);
        dir.strip_prefix(&self.root).unwrap_or(dir).to_owned()
    }
}

/// The copy, locked.
#[derive(Debug)]
pub struct StagedWorkspace<'a> {
    workspace: &'a Workspace,
    dir: PathBuf,
    _lock: File,
}

impl StagedWorkspace<'_> {
    /// The directory of the copy.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Like [`Workspace::add_to`], for the copy.
    ///
    /// # Errors
    /// As there.
    pub fn add_to(&self, key: &mut Key, name: &str) -> Result<(), SourceError> {
        self.workspace.add_from(&self.dir, key, name)
    }
}

/// Adds the files below `root/below`, relative to `root`. What is hidden is an editor's or git's, `target` is cargo's.
fn list_files(root: &Path, below: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), SourceError> {
    let dir = root.join(below);
    let failed = |source| SourceError::Copy {
        path: dir.clone(),
        source,
    };
    for entry in fs::read_dir(&dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let kind = entry.file_type().map_err(failed)?;
        if name.as_encoded_bytes().starts_with(b".")
            || (kind.is_dir() && name == OsStr::new("target"))
        {
            continue;
        }
        if kind.is_dir() {
            list_files(root, &below.join(name), files)?;
        } else if kind.is_file() {
            files.insert(below.join(name));
        }
    }
    Ok(())
}

fn copy_if_different(from: &Path, to: &Path) -> Result<(), SourceError> {
    let failed = |source| SourceError::Copy {
        path: from.to_owned(),
        source,
    };
    let bytes = fs::read(from).map_err(failed)?;
    let mode = if is_executable(from).map_err(failed)? {
        0o755
    } else {
        0o644
    };
    if fs::read(to).ok().as_deref() != Some(bytes.as_slice()) {
        fs::create_dir_all(to.parent().unwrap_or(to)).map_err(failed)?;
        fs::write(to, bytes).map_err(failed)?;
    }
    fs::set_permissions(to, Permissions::from_mode(mode)).map_err(failed)
}

/// The one bit of a file's mode that counts, as in git: the rest is the user's umask.
fn is_executable(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o100 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> (tempfile::TempDir, Cache, Workspace) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("checkout");
        let write = |name: &str, text: &str| {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), text).unwrap();
        };
        write(
            "Cargo.toml",
            "[workspace]\nresolver = \"3\"\nmembers = [\"app\", \"app/part\", \"checks\"]\n",
        );
        write("Cargo.lock", "version = 4\n");
        for (name, dir, dependencies) in [
            (
                "app",
                "app",
                "[dependencies]\npart = { path = \"part\" }\n[dev-dependencies]\nchecks = { path = \"../checks\" }\n",
            ),
            ("part", "app/part", ""),
            ("checks", "checks", ""),
        ] {
            write(
                &format!("{dir}/Cargo.toml"),
                &format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\n{dependencies}"),
            );
            write(&format!("{dir}/src/lib.rs"), "");
        }
        let cache = Cache::open_at(dir.path().join("cache")).unwrap();
        let workspace = Workspace::open(&root.join("app")).unwrap();
        (dir, cache, workspace)
    }

    fn key_of(workspace: &Workspace, cache: &Cache) -> String {
        let mut key = Key::new();
        workspace
            .stage(cache)
            .unwrap()
            .add_to(&mut key, "app")
            .unwrap();
        key.hex()
    }

    #[test]
    fn key_changes_with_a_dependency_but_not_with_what_only_tests_need() {
        let (_dir, cache, workspace) = fixture();
        let first = key_of(&workspace, &cache);
        fs::write(workspace.root().join("checks/src/lib.rs"), "// changed").unwrap();
        fs::create_dir(workspace.root().join("app/target")).unwrap();
        fs::write(workspace.root().join("app/target/output"), "").unwrap();
        assert_eq!(key_of(&workspace, &cache), first);
        fs::write(workspace.root().join("app/part/src/lib.rs"), "// changed").unwrap();
        assert_ne!(key_of(&workspace, &cache), first);
    }

    #[test]
    fn key_of_checkout_is_that_of_its_copy_also_after_files_came_and_went() {
        let (_dir, cache, workspace) = fixture();
        let extra = workspace.root().join("app/more/extra.rs");
        fs::create_dir(extra.parent().unwrap()).unwrap();
        fs::write(&extra, "").unwrap();
        let before = key_of(&workspace, &cache);
        fs::remove_dir_all(extra.parent().unwrap()).unwrap();
        fs::set_permissions(
            workspace.root().join("Cargo.toml"),
            Permissions::from_mode(0o600),
        )
        .unwrap();

        let after = key_of(&workspace, &cache);
        let mut of_checkout = Key::new();
        workspace.add_to(&mut of_checkout, "app").unwrap();
        assert_ne!(before, after);
        assert_eq!(of_checkout.hex(), after);
    }

    #[test]
    fn stage_replaced_by_an_older_file_gets_a_new_time_and_others_keep_theirs() {
        let (_dir, cache, workspace) = fixture();
        let copy = workspace.stage(&cache).unwrap().dir().to_owned();
        let time = |name: &str| fs::metadata(copy.join(name)).unwrap().modified().unwrap();
        let (changed, kept) = (time("app/src/lib.rs"), time("checks/src/lib.rs"));

        let source = workspace.root().join("app/src/lib.rs");
        fs::write(&source, "// older").unwrap();
        File::open(&source)
            .unwrap()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        drop(workspace.stage(&cache).unwrap());
        assert!(time("app/src/lib.rs") > changed);
        assert_eq!(time("checks/src/lib.rs"), kept);
    }

    #[test]
    fn stage_removed_file_is_removed_from_the_copy() {
        let (_dir, cache, workspace) = fixture();
        let extra = workspace.root().join("app/src/extra.rs");
        fs::write(&extra, "").unwrap();
        let copy = workspace.stage(&cache).unwrap().dir().to_owned();
        assert!(copy.join("app/src/extra.rs").exists());
        fs::remove_file(&extra).unwrap();
        drop(workspace.stage(&cache).unwrap());
        assert!(!copy.join("app/src/extra.rs").exists());
    }

    #[test]
    fn closure_unknown_package_is_named() {
        let (_dir, _cache, workspace) = fixture();
        assert_eq!(
            workspace.closure("nothing").unwrap_err().to_string(),
            "the workspace has no package nothing"
        );
    }
}
