//! A container that runs while something is measured in it.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A container that does nothing; killed and removed when dropped.
pub struct Running {
    id: String,
}

impl Running {
    /// Starts container `id` of `image` under `runtime`.
    ///
    /// # Errors
    /// When it does not start, with what `ctr` said.
    pub fn start(runtime: &str, image: &str, id: &str) -> Result<Self> {
        let output = Command::new("ctr")
            .args(["run", "--detach", "--null-io", "--runtime", runtime])
            .args([image, id, "sleep", "1000000"])
            .output()
            .context("cannot execute ctr")?;
        ensure!(
            output.status.success(),
            "container {id} does not start: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Self { id: id.to_owned() })
    }

    /// The command that runs `program` in it; `number` is another each time.
    pub fn exec(&self, number: usize, program: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .args(["task", "exec", "--exec-id", &format!("e{number}"), &self.id])
            .args(program);
        command
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for arguments in [["task", "rm", "-f"], ["container", "rm", "--"]] {
            // The node goes away with what could not be removed.
            let _ = Command::new("ctr").args(arguments).arg(&self.id).output();
        }
    }
}
