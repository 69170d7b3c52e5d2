//! Running other programs: their output goes to a log, and what fails says which command, how, and its last lines.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};

/// Lines of a failed command's output that its error carries.
const TAIL_LINES: usize = 30;

/// A command that did not do what it was run for.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error(
        "{program} is not installed: the packages that are needed are listed in rootfs-builder/host-packages.txt"
    )]
    Missing {
        /// The program.
        program: String,
    },
    /// The program cannot be started.
    #[error("start {program}")]
    Start {
        /// The program.
        program: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The program ended with anything but status 0.
    #[error("{command}: {status}\n{tail}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its output.
        tail: String,
    },
    /// The log that takes the output cannot be opened.
    #[error("open log {path}")]
    Log {
        /// The log.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The output is not text.
    #[error("{command} printed something that is not UTF-8")]
    Output {
        /// The command line.
        command: String,
    },
}

/// Runs `command` to its end, its output appended to the file `log`.
///
/// # Errors
/// Any [`CommandError`] but `Output`.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<(), CommandError> {
    let failed = |source| CommandError::Log {
        path: log.to_owned(),
        source,
    };
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .map_err(failed)?;
    let from = file.metadata().map_err(failed)?.len();
    let errors = file.try_clone().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    let status = command
        .status()
        .map_err(|source| start_error(command, source))?;
    if status.success() {
        return Ok(());
    }
    let written = fs::read(log).map_err(failed)?;
    let own = written.get(from as usize..).unwrap_or_default();
    Err(CommandError::Failed {
        command: command_line(command),
        status,
        tail: format!("{}\n(all of it: {})", tail(own), log.display()),
    })
}

/// Runs `command` to its end, its output on this process's standard error: for programs that show their own progress.
///
/// # Errors
/// `Missing`, `Start` and `Failed`, the last without a tail.
pub fn run_attached(command: &mut Command) -> Result<(), CommandError> {
    let status = command
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .map_err(|source| start_error(command, source))?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed {
        command: command_line(command),
        status,
        tail: "its output is above".to_owned(),
    })
}

/// Runs `command` to its end and returns what it wrote to standard output, without the last newline.
///
/// # Errors
/// Any [`CommandError`] but `Log`.
pub fn read_output(command: &mut Command) -> Result<String, CommandError> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| start_error(command, source))?;
    if !status.success() {
        return Err(CommandError::Failed {
            command: command_line(command),
            status,
            tail: tail(&stderr),
        });
    }
    let text = String::from_utf8(stdout).map_err(|_| CommandError::Output {
        command: command_line(command),
    })?;
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn start_error(command: &Command, source: io::Error) -> CommandError {
    let program = command.get_program().to_string_lossy().into_owned();
    match source.kind() {
        io::ErrorKind::NotFound => CommandError::Missing { program },
        _ => CommandError::Start { program, source },
    }
}

fn command_line(command: &Command) -> String {
    let mut words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .collect();
    // How the sandbox is set up says nothing about why its command failed.
    if words[0] == "bwrap"
        && let Some(end) = words.iter().position(|word| *word == "--")
    {
        words.drain(1..end);
    }
    words
        .into_iter()
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

fn tail(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_logged_failure_carries_command_status_and_its_own_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        run_logged(Command::new("echo").arg("earlier"), &log).unwrap();
        let error = run_logged(
            Command::new("sh").args(["-c", "echo first; echo last >&2; exit 3"]),
            &log,
        )
        .unwrap_err();
        let message = error.to_string();
        assert!(
            message.starts_with(
                "sh -c echo first; echo last >&2; exit 3: exit status: 3\nfirst\nlast\n"
            ),
            "{message}"
        );
        assert_eq!(fs::read_to_string(&log).unwrap(), "earlier\nfirst\nlast\n");
    }

    #[test]
    fn read_output_missing_program_says_what_to_install() {
        let error = read_output(&mut Command::new("no-such-program")).unwrap_err();
        assert!(error.to_string().contains("host-packages.txt"));
    }

    #[test]
    fn tail_long_output_is_cut_at_the_front() {
        let output = (0..100)
            .map(|line| line.to_string())
            .collect::<Vec<_>>()
            .join("\n");
        assert!(tail(output.as_bytes()).starts_with("70\n"));
    }
}
