//! What to run in a node, and what came of it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use node_agent::wire::{Exec, Exit, WindowSize};

/// Where programs are looked for in the node: the product, the containerd in use, the tools, Debian's.
pub const PATH: &str = "/opt/bulkhead/bin:/run/node/containerd:/opt/node/bin:/opt/node/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment variable that carries [`crate::Mode::time_factor`] to commands.
pub const TIME_FACTOR_VARIABLE: &str = "BULKHEAD_TIME_FACTOR";

/// A command for a node, in the manner of [`std::process::Command`].
///
/// It runs as root in `/root`, with [`PATH`], `HOME`, `LANG=C.UTF-8` and [`TIME_FACTOR_VARIABLE`] in its environment, in a process
/// group of its own.
#[derive(Clone, Debug)]
pub struct NodeCommand {
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: OsString,
    tty: Option<WindowSize>,
    pub(crate) stdin: Vec<u8>,
    pub(crate) timeout: Option<Duration>,
}

impl NodeCommand {
    /// Runs `program`, a path or a name that is looked for in [`PATH`].
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            argv: vec![program.as_ref().to_owned()],
            env: Vec::new(),
            cwd: "/root".into(),
            tty: None,
            stdin: Vec::new(),
            timeout: None,
        }
    }

    /// Runs `script` with bash, which stops at the first command that fails (`-eu -o pipefail`).
    pub fn script(script: impl AsRef<OsStr>) -> Self {
        Self::new("bash")
            .args(["-eu", "-o", "pipefail", "-c"])
            .arg(script)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.argv
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable; the last value of a name counts.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<OsStr>) -> Self {
        directory.as_ref().clone_into(&mut self.cwd);
        self
    }

    /// Runs it on a terminal: one stream for all that it writes, and line discipline, job control and signals by keys.
    #[must_use]
    pub fn tty(mut self, size: WindowSize) -> Self {
        self.tty = Some(size);
        self
    }

    /// For [`crate::Node::run`]: what the command reads from its standard input, instead of nothing.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// For [`crate::Node::run`]: kill the command when it takes longer than this on hardware; multiplied by the time factor.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    pub(crate) fn exec(&self, time_factor: u32) -> Exec {
        let bytes = |text: &OsString| text.as_bytes().to_vec();
        let defaults = [
            ("PATH", PATH),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            (TIME_FACTOR_VARIABLE, &time_factor.to_string()),
        ]
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        let own = self
            .env
            .iter()
            .map(|(name, value)| (bytes(name), bytes(value)));
        Exec {
            argv: self.argv.iter().map(bytes).collect(),
            env: defaults.into_iter().chain(own).collect(),
            cwd: bytes(&self.cwd),
            tty: self.tty,
        }
    }
}

impl fmt::Display for NodeCommand {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self
            .argv
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        formatter.write_str(&words.join(" "))
    }
}

/// How a command in a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeStatus(pub(crate) Exit);

impl NodeStatus {
    /// Whether it returned 0.
    pub fn success(self) -> bool {
        self.0 == Exit::Code(0)
    }

    /// What it returned; `None` when a signal ended it.
    pub fn code(self) -> Option<i32> {
        match self.0 {
            Exit::Code(code) => Some(code),
            Exit::Signal(_) => None,
        }
    }

    /// The signal that ended it, if one did.
    pub fn signal(self) -> Option<i32> {
        match self.0 {
            Exit::Code(_) => None,
            Exit::Signal(signal) => Some(signal),
        }
    }
}

impl fmt::Display for NodeStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Exit::Code(code) => write!(formatter, "exit status {code}"),
            Exit::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

/// A command that ran to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: NodeStatus,
    /// All that it wrote there.
    pub stdout: Vec<u8>,
    /// All that it wrote there.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text without the newline at its end; what is not UTF-8 is replaced.
    pub fn stdout_text(&self) -> String {
        text(&self.stdout)
    }

    /// Standard error, likewise.
    pub fn stderr_text(&self) -> String {
        text(&self.stderr)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\n')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_own_variable_comes_after_the_defaults() {
        let exec = NodeCommand::new("env").env("PATH", "/bin").exec(8);
        let paths: Vec<_> = exec
            .env
            .iter()
            .filter(|(name, _)| name == b"PATH")
            .collect();
        assert_eq!(paths.last().unwrap().1, b"/bin");
        assert!(
            exec.env
                .contains(&(b"BULKHEAD_TIME_FACTOR".to_vec(), b"8".to_vec()))
        );
    }

    #[test]
    fn status_code_and_signal_are_apart() {
        let killed = NodeStatus(Exit::Signal(9));
        assert_eq!(
            (killed.code(), killed.signal(), killed.success()),
            (None, Some(9), false)
        );
        assert_eq!(NodeStatus(Exit::Code(9)).code(), Some(9));
    }
}
