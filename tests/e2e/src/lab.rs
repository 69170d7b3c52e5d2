//! A node with Bulkhead installed, and the words in which the checks speak.

use std::{collections::BTreeSet, env, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_node::{Node, NodeCommand, NodeOptions};

use crate::stand_ins;

/// The runtime under test.
pub const BULKHEAD: &str = "io.containerd.bulkhead.v2";
/// The image that most checks use.
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// Runs one container to its end; its id and command follow.
pub const RUN: &str =
    "ctr run --rm --runtime io.containerd.bulkhead.v2 docker.io/library/busybox:latest";

/// On hardware; a script that hangs fails its check and not the whole run.
const SCRIPT_TIMEOUT: Duration = Duration::from_mins(1);
/// The same for the full counts, which are up to twenty times as large.
const SOAK_SCRIPT_TIMEOUT: Duration = Duration::from_mins(10);

/// A node with Bulkhead installed.
pub struct Lab {
    node: Node,
}

/// What a command left.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code.
    pub code: i32,
    /// Its output, without the last newline.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

impl Lab {
    /// Brings a node up with the installation that `BULKHEAD_PREFIX` names.
    ///
    /// # Errors
    /// When there is no installation or the node does not come up.
    pub fn open() -> Result<Self> {
        let prefix = env::var_os("BULKHEAD_PREFIX")
            .map(PathBuf::from)
            .context("BULKHEAD_PREFIX names no installation: run `make e2e`")?;
        let node = Node::up(NodeOptions::new("e2e").prefix(prefix))?;
        let lab = Self { node };
        stand_ins::watch(&lab)?;
        Ok(lab)
    }

    /// Takes a fresh node in place of this lab's, which may be dead. The old one
    /// ends, whatever it complains of.
    ///
    /// # Errors
    /// When there is none to be had; the old one stays.
    pub fn renew(&mut self) -> Result<()> {
        *self = Self::open()?;
        Ok(())
    }

    /// Whether the full counts are to be run.
    pub fn soak(&self) -> bool {
        env::var_os("BULKHEAD_SOAK").is_some()
    }

    /// Ends the node.
    ///
    /// # Errors
    /// When its kernel complained on the console.
    pub fn close(self) -> Result<()> {
        Ok(self.node.down()?)
    }

    /// The node itself.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Runs a bash script in the node.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub fn run(&self, script: &str) -> Result<Outcome> {
        let command = NodeCommand::new("bash").args(["-c", script]);
        let timeout = if self.soak() {
            SOAK_SCRIPT_TIMEOUT
        } else {
            SCRIPT_TIMEOUT
        };
        let output = self.node.run(command.timeout(timeout))?;
        let code = output
            .status
            .code()
            .with_context(|| format!("{script}\n{}: {output:?}", output.status))?;
        Ok(Outcome {
            code,
            stdout: output.stdout_text(),
            stderr: output.stderr_text(),
        })
    }

    /// Runs a script that must succeed; returns its output.
    ///
    /// # Errors
    /// When it fails, with all that it printed.
    pub fn succeed(&self, script: &str) -> Result<String> {
        let outcome = self.run(script)?;
        ensure!(outcome.code == 0, "{script}\n{outcome:#?}");
        Ok(outcome.stdout)
    }

    /// Runs a script that must end with this code.
    ///
    /// # Errors
    /// When it ends with another.
    pub fn expect_code(&self, code: i32, script: &str) -> Result<()> {
        let outcome = self.run(script)?;
        ensure!(
            outcome.code == code,
            "wanted {code}: {script}\n{outcome:#?}"
        );
        Ok(())
    }

    /// Runs a script that must fail and say `words` on standard error.
    ///
    /// # Errors
    /// When it succeeds, or says something else.
    pub fn fails_saying(&self, words: &str, script: &str) -> Result<()> {
        let outcome = self.run(script)?;
        ensure!(
            outcome.code != 0 && outcome.stderr.contains(words),
            "wanted a failure that says {words:?}: {script}\n{outcome:#?}"
        );
        Ok(())
    }

    /// The script that ends and removes a container of `ctr`.
    pub fn remove(id: &str) -> String {
        format!(
            "{{ ctr task kill -s KILL {id}; \
               for try in $(seq 300); do \
                   ctr task ls | awk '$1 == \"{id}\"' | grep -q RUNNING || break; sleep 0.1; \
               done; \
               ctr task delete {id}; ctr container delete {id}; }} >/dev/null 2>&1"
        )
    }

    /// Has nerdctl make its bridge, which stays, unless it is there: what is left
    /// behind by a container with its default network can be told after this.
    ///
    /// # Errors
    /// When a container of runc's with that network fails.
    pub fn make_bridge(&self) -> Result<()> {
        self.succeed(&format!(
            "ip link show nerdctl0 >/dev/null 2>&1 || nerdctl run --rm --pull never {IMAGE} true"
        ))
        .map(drop)
    }

    /// Everything that a container could leave behind, as it is now.
    ///
    /// # Errors
    /// When the node cannot be asked.
    pub fn resources(&self) -> Result<BTreeSet<String>> {
        let listing = self.succeed(RESOURCES)?;
        Ok(listing.lines().map(str::to_owned).collect())
    }

    /// Fails when something is there that was not before. Ends that take a
    /// moment (a shim's own exit) are waited for.
    ///
    /// # Errors
    /// What was left, a line each.
    pub fn expect_nothing_left(&self, before: &BTreeSet<String>) -> Result<()> {
        let mut left = Vec::new();
        for _ in 0..LEFTOVER_TRIES {
            let now = self.resources()?;
            left = now.difference(before).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            // The loop asks the node again, which takes a fraction of a second.
        }
        bail!("left behind:\n{}", left.join("\n"))
    }
}

const LEFTOVER_TRIES: usize = 20;

/// Processes (with start times, so that a pid is not taken for its
/// predecessor), mounts, named sockets, network interfaces and namespaces,
/// cgroups, and files of ours and containerd's.
const RESOURCES: &str = r#"
for stat in /proc/[0-9]*/stat; do
    { read -r line <"$stat"; } 2>/dev/null || continue
    rest=${line##*) }; set -- $rest
    [ "$2" = 2 ] && continue
    pid=${stat#/proc/}; pid=${pid%/stat}
    [ -e "/proc/$pid/exe" ] || [ "$1" = Z ] || continue
    name=${line#*(}; name=${name%)*}
    case $name in bash | ctr | containerd | awk | find | cut | sort | grep | node-agent*) continue ;; esac
    echo "process $name $pid started ${20}"
done
cut -d' ' -f5 /proc/self/mountinfo | sed 's/^/mount /'
awk '$8 ~ /bulkhead|containerd-shim|^@?.*s\/[0-9a-f]{64}/ { print "socket " $8 }' /proc/net/unix
for link in /sys/class/net/*; do
    # The CNI plugins keep the bridges that they once made.
    case ${link##*/} in cni0 | nerdctl0) ;; *) echo "interface ${link##*/}" ;; esac
done
find /run/netns /var/run/netns -mindepth 1 2>/dev/null | sed 's/^/netns /'
find /sys/fs/cgroup -mindepth 1 -type d | sed 's/^/cgroup /'
find /run/bulkhead -mindepth 1 -path '*/uids' -prune -o -mindepth 1 -print 2>/dev/null | sed 's/^/file /'
find /run/containerd/io.containerd.runtime.v2.task /run/containerd/s /run/containerd/fifo -mindepth 2 2>/dev/null | sed 's/^/file /'
true
"#;
