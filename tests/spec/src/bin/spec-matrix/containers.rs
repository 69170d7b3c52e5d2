//! The containers of a matrix, through `ctr`, and their files.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use bulkhead_spec_checker::base::{self, CHECKER, CONFIG, CONTENT, Place};
use bulkhead_spec_checker::matrix::Case;
use bulkhead_spec_checker::report::{Outcome, REPORT_MARK, Report, Runtime};
use serde_json::Value;

/// Seconds that a container may take, the start of its VM included, in an
/// emulated node: a bound for what hangs.
const LONGEST_S: &str = "180";

/// Where the files of all containers are.
pub struct Containers {
    root: PathBuf,
}

/// A pod that containers can be put in; it ends with this value.
pub struct Pod {
    runtime: Runtime,
    id: String,
}

impl Drop for Pod {
    fn drop(&mut self) {
        remove(&self.id);
    }
}

impl Containers {
    /// Makes what all containers share.
    ///
    /// # Errors
    /// When a file or mount cannot be made.
    pub fn prepare(root: &Path, checker: &Path) -> Result<Self> {
        let volume = root.join("volume");
        let below = volume.join("below");
        if !below.exists() {
            fs::create_dir_all(&below).with_context(|| format!("make {}", below.display()))?;
            let mut mount = Command::new("mount");
            succeed(mount.args(["-t", "tmpfs", "below"]).arg(&below))?;
        }
        for directory in [&volume, &below] {
            write(&directory.join("content"), CONTENT)?;
        }
        let copy = root.join("spec-checker");
        fs::copy(checker, &copy).with_context(|| format!("copy {}", checker.display()))?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Starts a pod for the containers of all cases.
    ///
    /// # Errors
    /// When it does not start.
    pub fn pod(&self, runtime: Runtime) -> Result<Pod> {
        let id = format!("spec-{runtime}-pod");
        let place = self.place(&id, None);
        let config = self.files(&id, &place, &base::sandbox(&place, &id))?;
        let mut ctr = ctr(runtime, &config);
        succeed(ctr.args(["--detach", "--null-io", &id]))?;
        Ok(Pod { runtime, id })
    }

    /// Runs a case to its end.
    ///
    /// # Errors
    /// When its files cannot be made or `ctr` cannot be run; what the runtime
    /// does with the container is the outcome.
    pub fn run(&self, pod: &Pod, case: &Case) -> Result<Outcome> {
        let runtime = pod.runtime;
        let id = format!("spec-{runtime}-{}", case.name);
        let sandbox = (!case.own_pod()).then(|| pod.id.clone());
        let place = self.place(&id, sandbox);
        let spec = case.spec(&place);
        let config = self.files(&id, &place, &spec)?;
        let mut ctr = ctr(runtime, &config);
        ctr.arg("--rm");
        if spec["process"]["terminal"] == true {
            ctr.arg("--tty");
        }
        ctr.arg(&id);
        let mut command = if spec["process"]["terminal"] == true {
            with_terminal(&ctr)
        } else {
            ctr
        };
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {command:?}"))?;
        let outcome = outcome(&output)?;
        if matches!(outcome, Outcome::Failed(_)) {
            remove(&id);
        }
        let _ = fs::remove_dir_all(self.root.join(&id));
        Ok(outcome)
    }

    fn place(&self, id: &str, pod: Option<String>) -> Place {
        Place {
            rootfs: self.root.join(id).join("rootfs"),
            volume: self.root.join("volume"),
            checker: self.root.join("spec-checker"),
            cgroup: Path::new("/spec-matrix").join(id),
            pod,
        }
    }

    /// Makes a root file system with the checker and its configuration in it;
    /// returns the configuration's path for `ctr`.
    fn files(&self, id: &str, place: &Place, spec: &Value) -> Result<PathBuf> {
        let root = &place.rootfs;
        // Of a run that was broken off.
        let _ = fs::remove_dir_all(self.root.join(id));
        for directory in [
            "bin",
            "dev",
            "etc",
            "hidden-dir",
            "kept-dir",
            "mnt",
            "proc",
            "readonly-dir",
            "real",
            "run",
            "sys",
            "tmp",
        ] {
            let path = root.join(directory);
            fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        }
        for (file, text) in [
            (
                "etc/passwd",
                "root:x:0:0::/root:/bin/sh\nspec:x:1000:1000::/home/spec:/bin/sh\n",
            ),
            ("hidden-dir/inside", "not to be seen\n"),
            ("hidden-file", "not to be seen\n"),
            ("kept-dir/inside", "kept\n"),
            ("readonly-dir/inside", "kept\n"),
            ("readonly-file", "kept\n"),
        ] {
            write(&root.join(file), text)?;
        }
        symlink("/real", root.join("link")).context("make a link")?;
        let inside = |path: &str| root.join(path.trim_start_matches('/'));
        fs::hard_link(&place.checker, inside(CHECKER)).context("link the checker")?;
        let text = spec.to_string();
        write(&inside(CONFIG), &text)?;
        let config = self.root.join(id).join("config.json");
        write(&config, &text)?;
        Ok(config)
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn ctr(runtime: Runtime, config: &Path) -> Command {
    let mut command = Command::new("timeout");
    // In the foreground, or a terminal would stop what is not in it.
    command.args(["--foreground", "--kill-after=10", LONGEST_S]);
    command.args(["ctr", "run", "--config"]);
    command.arg(config);
    command.args(["--runtime", runtime.containerd_name()]);
    command
}

/// The same command with a terminal, which `ctr` needs to give one.
fn with_terminal(command: &Command) -> Command {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let mut script = Command::new("script");
    // No word has spaces: they are options, ids and paths of ours.
    script.args([
        "--quiet",
        "--return",
        "--command",
        &line.join(" "),
        "/dev/null",
    ]);
    script
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(())
}

fn outcome(output: &Output) -> Result<Outcome> {
    let stdout = String::from_utf8_lossy(&output.stdout);
    // A terminal may have echoed something before it.
    let report = stdout.lines().find_map(|line| line.split_once(REPORT_MARK));
    match report {
        Some((_, json)) => {
            let report: Report = serde_json::from_str(json.trim()).context("read a report")?;
            Ok(Outcome::Report(report))
        }
        None => Ok(Outcome::Failed(format!(
            "{}{}({})",
            stdout,
            String::from_utf8_lossy(&output.stderr),
            output.status
        ))),
    }
}

/// Ends and removes what there is of a container.
fn remove(id: &str) {
    let script = format!(
        "ctr task kill -s KILL {id}
         for try in $(seq 100); do
             ctr task ls | grep -q '^{id} .*RUNNING' || break; sleep 0.1
         done
         ctr task delete --force {id}; ctr container delete {id}"
    );
    let mut bash = Command::new("bash");
    // What is not there cannot be removed.
    let _ = bash.args(["-c", &script]).output();
}
