//! The user's program: found, then executed. Errors read as those of other OCI
//! runtimes, since clients and their users know them.

use std::collections::HashSet;
use std::convert::Infallible;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::stat;
use nix::unistd::{AccessFlags, execve, faccessat};
use oci_spec::runtime::Process;

use crate::credentials::home_directory;

/// Why the program cannot be executed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    #[error("exec: {program:?}: executable file not found in $PATH")]
    NotFound { program: String },
    #[error("exec: {program:?}: stat {program}: {}", in_words(*errno))]
    Stat { program: String, errno: Errno },
    #[error("exec: {program:?}: is a directory")]
    Directory { program: String },
    #[error("exec: {program:?}: {}", in_words(*errno))]
    Access { program: String, errno: Errno },
    #[error("exec {}: {}", path.display(), in_words(*errno))]
    Execute { path: PathBuf, errno: Errno },
    #[error("process.{field} contains a NUL byte")]
    Nul { field: &'static str },
}

/// The errno's description, spelled as Go programs print it.
fn in_words(errno: Errno) -> String {
    let description = errno.desc();
    let mut characters = description.chars();
    match characters.next() {
        Some(first) => first.to_lowercase().chain(characters).collect(),
        None => String::new(),
    }
}

/// A program with its arguments and environment, ready to be executed.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    path_bytes: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// The program at `path`, which [`locate`] found, with the process's
    /// arguments and environment.
    pub fn try_new(path: PathBuf, process: &Process) -> Result<Self, ProgramError> {
        let asked = process.args().as_deref().unwrap_or_default();
        let mut environment = last_of_each(process.env().as_deref().unwrap_or_default());
        if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
            environment.push(format!("HOME={}", home_directory(process.user().uid())));
        }
        let path_bytes = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| ProgramError::Nul { field: "args" })?;
        Ok(Self {
            path_bytes,
            path,
            arguments: c_strings(asked, "args")?,
            environment: c_strings(&environment, "env")?,
        })
    }

    /// Executes it; returns only if that failed.
    pub fn execute(&self) -> Result<Infallible, ProgramError> {
        execve(&self.path_bytes, &self.arguments, &self.environment).map_err(|errno| {
            ProgramError::Execute {
                path: self.path.clone(),
                errno,
            }
        })
    }
}

/// Finds the program for the calling thread: with its user, effective
/// capabilities, root and working directory.
pub fn locate(process: &Process) -> Result<PathBuf, ProgramError> {
    let asked = process.args().as_deref().unwrap_or_default();
    let environment = process.env().as_deref().unwrap_or_default();
    let name = asked.first().map(String::as_str).unwrap_or_default();
    find(name, search_path(environment))
}

fn c_strings(texts: &[String], field: &'static str) -> Result<Vec<CString>, ProgramError> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()).map_err(|_| ProgramError::Nul { field }))
        .collect()
}

/// What is set twice is set to the last: programs differ in which they would take.
fn last_of_each(environment: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut kept: Vec<_> = environment
        .iter()
        .rev()
        .filter(|entry| seen.insert(entry.split('=').next()))
        .cloned()
        .collect();
    kept.reverse();
    kept
}

/// `PATH` of the container's environment; the last one counts, as in Go's environment.
fn search_path(environment: &[String]) -> &str {
    environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default()
}

fn find(program: &str, search_path: &str) -> Result<PathBuf, ProgramError> {
    if program.contains('/') {
        return check(Path::new(program), program).map(|()| program.into());
    }
    search_path
        .split(':')
        .map(|directory| Path::new(directory).join(program))
        // An entry that is empty or relative would run what lies in the working directory.
        .find(|path| !program.is_empty() && path.is_absolute() && check(path, program).is_ok())
        .ok_or_else(|| ProgramError::NotFound {
            program: program.to_owned(),
        })
}

fn check(path: &Path, program: &str) -> Result<(), ProgramError> {
    let program = || program.to_owned();
    let status = stat(path).map_err(|errno| ProgramError::Stat {
        program: program(),
        errno,
    })?;
    if status.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(ProgramError::Directory { program: program() });
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS).map_err(|errno| {
        ProgramError::Access {
            program: program(),
            errno,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_missing_program_reads_as_clients_expect() {
        assert_eq!(
            find("no-such", "/bin:/usr/bin").unwrap_err().to_string(),
            "exec: \"no-such\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/no/such", "").unwrap_err().to_string(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            find("/etc/passwd", "").unwrap_err().to_string(),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(
            find("/etc", "").unwrap_err().to_string(),
            "exec: \"/etc\": is a directory"
        );
        assert!(find("", "/bin").is_err());
    }

    #[test]
    fn find_relative_search_path_entry_is_skipped() {
        assert!(find("sh", ":.:bin").is_err());
        assert_eq!(find("sh", ":/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn last_of_each_keeps_the_last_in_its_place() {
        let environment = ["A=1", "B=", "A=2=3", "C"].map(str::to_owned);
        assert_eq!(last_of_each(&environment), ["B=", "A=2=3", "C"]);
    }

    #[test]
    fn search_path_last_entry_counts() {
        let environment = ["PATH=/a", "HOME=/", "PATH=/b"].map(str::to_owned);
        assert_eq!(search_path(&environment), "/b");
    }
}
