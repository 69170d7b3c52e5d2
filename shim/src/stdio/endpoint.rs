//! Where a client wants a task's standard streams, read from the strings of
//! its request.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use thiserror::Error;

/// Why a stream cannot be where the client wants it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// Neither a path nor a scheme that is known.
    #[error(
        "{stream} {value:?}: scheme {scheme:?} is not supported: need an absolute path, file://, binary:// or binary-v2://"
    )]
    Scheme {
        /// As in "stdout".
        stream: &'static str,
        /// As given.
        value: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// A path that depends on a working directory.
    #[error("{stream} {value:?}: need an absolute path")]
    Relative {
        /// As in "stdout".
        stream: &'static str,
        /// As given.
        value: String,
    },
    /// A URI that is not one.
    #[error("{stream} {value:?}: malformed percent-encoding or NUL byte")]
    Malformed {
        /// As in "stdout".
        stream: &'static str,
        /// As given.
        value: String,
    },
    /// stdout and stderr of one logging program differ.
    #[error(
        "stderr {stderr:?} is a logging program other than stdout's {stdout:?}: they must be the same"
    )]
    TwoLoggers {
        /// As given.
        stdout: String,
        /// As given.
        stderr: String,
    },
    /// stdin from something that is no FIFO.
    #[error("stdin {value:?}: need the absolute path of a FIFO")]
    Stdin {
        /// As given.
        value: String,
    },
}

/// How a logging program says that it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// `binary://`: by closing its descriptor 5.
    Close,
    /// `binary-v2://` (containerd 2.3): by a byte on it first.
    Byte,
}

/// A logging program (`binary://PATH?KEY=VALUE`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggerCommand {
    /// What to execute.
    pub path: PathBuf,
    /// The query: each key, then its value.
    pub arguments: Vec<OsString>,
    /// How it says that it listens.
    pub ready: Ready,
}

/// Where an output stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/dev/null`, in the guest.
    Null,
    /// A FIFO, or a file to append to.
    Path(PathBuf),
    /// A file to append to, made with its directories.
    File(PathBuf),
    /// A logging program.
    Logger(LoggerCommand),
}

/// The strings of a request for standard streams.
#[derive(Clone, Debug, Default)]
pub struct Io {
    /// FIFO of standard input.
    pub stdin: String,
    /// FIFO or URI of standard output.
    pub stdout: String,
    /// FIFO or URI of standard error.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

impl Io {
    /// Reads them.
    pub fn plan(&self) -> Result<Plan, PlanError> {
        Plan::parse(&self.stdin, &self.stdout, &self.stderr, self.terminal)
    }
}

/// Where all streams of a task go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// A FIFO, or `/dev/null` in the guest.
    pub stdin: Option<PathBuf>,
    /// Standard output, or both with a terminal.
    pub stdout: Target,
    /// Standard error; [`Target::Null`] with a terminal.
    pub stderr: Target,
    /// Whether the guest's end is a pseudo terminal.
    pub terminal: bool,
}

impl Plan {
    /// Reads the strings of a request; empty ones mean `/dev/null`.
    pub fn parse(
        stdin: &str,
        stdout: &str,
        stderr: &str,
        terminal: bool,
    ) -> Result<Self, PlanError> {
        let stdin = match stdin {
            "" => None,
            path if path.starts_with('/') && !path.contains('\0') => Some(PathBuf::from(path)),
            value => {
                return Err(PlanError::Stdin {
                    value: value.to_owned(),
                });
            }
        };
        let plan = Self {
            stdin,
            stdout: target("stdout", stdout)?,
            stderr: if terminal {
                Target::Null
            } else {
                target("stderr", stderr)?
            },
            terminal,
        };
        if let Target::Logger(logger) = &plan.stderr
            && plan.stdout != Target::Logger(logger.clone())
        {
            return Err(PlanError::TwoLoggers {
                stdout: stdout.to_owned(),
                stderr: stderr.to_owned(),
            });
        }
        Ok(plan)
    }

    /// The logging program, if there is one.
    pub fn logger(&self) -> Option<&LoggerCommand> {
        match &self.stdout {
            Target::Logger(logger) => Some(logger),
            Target::Null | Target::Path(_) | Target::File(_) => None,
        }
    }
}

fn target(stream: &'static str, value: &str) -> Result<Target, PlanError> {
    let malformed = || PlanError::Malformed {
        stream,
        value: value.to_owned(),
    };
    if value.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = value.split_once("://") else {
        return match value {
            path if path.contains('\0') => Err(malformed()),
            path if path.starts_with('/') => Ok(Target::Path(path.into())),
            _ => Err(PlanError::Relative {
                stream,
                value: value.to_owned(),
            }),
        };
    };
    if !matches!(scheme, "fifo" | "file" | "binary" | "binary-v2") {
        return Err(PlanError::Scheme {
            stream,
            value: value.to_owned(),
            scheme: scheme.to_owned(),
        });
    }
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(unescape(path, false).ok_or_else(malformed)?);
    if !path.is_absolute() {
        return Err(PlanError::Relative {
            stream,
            value: value.to_owned(),
        });
    }
    let ready = match scheme {
        "fifo" => return Ok(Target::Path(path)),
        "file" => return Ok(Target::File(path)),
        "binary" => Ready::Close,
        _ => Ready::Byte,
    };
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(unescape(key, true).ok_or_else(malformed)?);
        arguments.push(unescape(value, true).ok_or_else(malformed)?);
    }
    Ok(Target::Logger(LoggerCommand {
        path,
        arguments,
        ready,
    }))
}

/// Undoes percent-encoding (RFC 3986 section 2.1); in a query a `+` is a space,
/// as Go's `url.Values` writes it. A NUL is refused: no path or argument has
/// one.
fn unescape(text: &str, query: bool) -> Option<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        };
        if byte == 0 {
            return None;
        }
        bytes.push(byte);
    }
    Some(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parse_empty_strings_is_all_dev_null() {
        let plan = Plan::parse("", "", "", false).expect("parses");
        assert_eq!(
            (plan.stdin, plan.stdout, plan.stderr),
            (None, Target::Null, Target::Null)
        );
    }

    #[test]
    fn parse_uri_of_nerdctl_is_a_logging_program_for_both() {
        let uri =
            "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl%2F1935db59";
        let plan = Plan::parse("", uri, uri, false).expect("parses");
        let logger = plan.logger().expect("is a logger");
        assert_eq!(logger.path, PathBuf::from("/usr/bin/nerdctl"));
        assert_eq!(
            logger.arguments,
            ["_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl/1935db59"]
        );
        assert_eq!(plan.stderr, plan.stdout);
    }

    #[test]
    fn parse_unknown_scheme_is_refused_by_name() {
        let refused = Plan::parse("", "npipe:///x", "", false).expect_err("is refused");
        assert!(refused.to_string().contains("npipe"), "{refused}");
    }

    #[test]
    fn parse_terminal_has_no_stderr() {
        let plan = Plan::parse("/in", "/out", "/err", true).expect("parses");
        assert_eq!(plan.stderr, Target::Null);
    }

    #[test]
    fn parse_two_logging_programs_are_refused() {
        assert!(Plan::parse("", "binary:///a", "binary:///b", false).is_err());
    }

    proptest! {
        #[test]
        fn parse_any_strings_never_panics_and_never_yields_a_relative_path(
            stdin in ".{0,20}", stdout in "((file|binary|fifo)://)?[/%?a-f0-9&=+]{0,20}", terminal: bool
        ) {
            if let Ok(plan) = Plan::parse(&stdin, &stdout, &stdout, terminal) {
                match plan.stdout {
                    Target::Path(path) | Target::File(path) | Target::Logger(LoggerCommand { path, .. }) =>
                        prop_assert!(path.is_absolute()),
                    Target::Null => prop_assert!(stdout.is_empty()),
                }
            }
        }
    }
}
