//! Several nodes that share the specs of a run.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bulkhead_e2e::lab::Lab;
use bulkhead_node::{NodeCommand, NodeError};

use crate::report::{self, Spec, State};
use crate::{Runtime, critest};

/// Nodes, each with a registry that serves critest's images.
pub struct Nodes(Vec<Lab>);

impl Nodes {
    /// Brings them up.
    ///
    /// # Errors
    /// When one does not come up, or its registry does not.
    pub fn up(count: usize) -> Result<Self> {
        let labs = (0..count.max(1)).map(|_| {
            let lab = Lab::open()?;
            // The golden node's CRI has asked what the shims can do before ours was there.
            lab.succeed("registry-serve && containerd-use restart")?;
            Ok(lab)
        });
        Ok(Self(labs.collect::<Result<_>>()?))
    }

    /// The full names of all specs that the suite runs by default.
    ///
    /// # Errors
    /// When critest does not tell.
    pub fn list(&self) -> Result<Vec<String>> {
        let lab = &self.0[0];
        let output = lab
            .node()
            .run(critest::list().timeout(Duration::from_mins(2)))?;
        ensure!(
            output.status.success(),
            "critest does not list its specs: {}\n{}",
            output.stdout_text(),
            output.stderr_text()
        );
        let mut names: Vec<_> = report::parse(&self::report(lab)?)?
            .into_iter()
            .filter(|spec| spec.state == State::Passed)
            .map(|spec| spec.name)
            .collect();
        // The suite shuffles them.
        names.sort();
        Ok(names)
    }

    /// Runs the specs of these names, spread over the nodes. Bulkhead must leave nothing behind.
    ///
    /// # Errors
    /// When a node dies, critest gives no report, or something is left.
    pub fn run(&self, runtime: Runtime, names: &[String], out: &Path) -> Result<Vec<Spec>> {
        let shares = shares(names, self.0.len());
        let results: Vec<Result<Vec<Spec>>> = thread::scope(|scope| {
            let running: Vec<_> = std::iter::zip(&self.0, &shares)
                .enumerate()
                .filter(|(_, (_, share))| !share.is_empty())
                .map(|(index, (lab, share))| {
                    let title = format!("{}-{}", runtime.handler(), index + 1);
                    scope.spawn(move || run_in(lab, runtime, share, &title, out))
                })
                .collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("panicked"))))
                .collect()
        });
        let mut specs = Vec::new();
        for result in results {
            specs.extend(result?);
        }
        specs.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(specs)
    }

    /// Ends them.
    ///
    /// # Errors
    /// When the kernel of one complained.
    pub fn down(self) -> Result<()> {
        self.0.into_iter().try_for_each(Lab::close)
    }
}

/// Each name once, neighbours in different shares: those of one group take about as long as each other.
fn shares(names: &[String], count: usize) -> Vec<Vec<String>> {
    let mut shares = vec![Vec::new(); count];
    for (index, name) in names.iter().enumerate() {
        shares[index % count].push(name.clone());
    }
    shares
}

fn run_in(
    lab: &Lab,
    runtime: Runtime,
    names: &[String],
    title: &str,
    out: &Path,
) -> Result<Vec<Spec>> {
    let before = lab.resources()?;
    let log = out.join(format!("{title}.log"));
    let succeeded = follow(lab, &critest::run(runtime, names), names.len(), title, &log)?;
    let specs: Vec<_> = report::parse(&report(lab)?)?
        .into_iter()
        .filter(|spec| spec.state != State::Skipped || names.contains(&spec.name))
        .collect();
    ensure!(
        specs.len() >= names.len(),
        "{title}: critest reports {} specs of {}, see {}",
        specs.len(),
        names.len(),
        log.display()
    );
    // One that skips itself says why; others were not run, as after a limit of the suite's own.
    let not_run = |spec: &&Spec| spec.state == State::Skipped && spec.message.is_empty();
    if let Some(spec) = specs.iter().find(not_run) {
        bail!("{title}: {} was not run, see {}", spec.name, log.display());
    }
    let is_explained = succeeded || specs.iter().any(|spec| spec.state == State::Failed);
    ensure!(
        is_explained,
        "{title}: critest failed and no spec did, see {}",
        log.display()
    );
    // What failed specs leave is theirs; what the runtime leaves when it is told to remove that is not.
    lab.succeed("crictl rmp --all --force >/dev/null")?;
    if runtime == Runtime::Bulkhead {
        lab.expect_nothing_left(&before)?;
    }
    Ok(specs)
}

/// Runs critest to its end, its output in `log`, with a line for every tenth spec. Returns whether it succeeded.
fn follow(lab: &Lab, command: &NodeCommand, count: usize, title: &str, log: &Path) -> Result<bool> {
    let node = lab.node();
    let lost = |source| -> NodeError { node.explain(source) };
    let mut process = node.spawn(command)?;
    drop(process.stdin.take());
    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let mut file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    thread::scope(|scope| {
        let errors = scope.spawn(move || {
            let mut text = String::new();
            for line in stderr
                .into_iter()
                .flat_map(|stream| BufReader::new(stream).lines())
            {
                text.push_str(&line?);
                text.push('\n');
            }
            std::io::Result::Ok(text)
        });
        let mut done = 0;
        for line in stdout
            .into_iter()
            .flat_map(|stream| BufReader::new(stream).lines())
        {
            let line = line?;
            writeln!(file, "{line}")?;
            // Ginkgo's mark of a spec that has ended.
            if line.starts_with('•') || line.starts_with("S [SKIPPED]") {
                done += 1;
                if done % 10 == 0 {
                    eprintln!("{title}: {done} of {count}");
                }
            }
        }
        let errors = errors.join().unwrap_or_else(|_| Ok(String::new()))?;
        file.write_all(errors.as_bytes())?;
        anyhow::Ok(())
    })
    .with_context(|| format!("follow critest, {title}"))?;
    Ok(process.wait().map_err(lost)?.success())
}

fn report(lab: &Lab) -> Result<String> {
    lab.succeed(&format!("cat {0} && rm {0}", critest::REPORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_every_name_is_in_one() {
        let names: Vec<_> = ["a", "b", "c"].map(str::to_owned).to_vec();
        assert_eq!(shares(&names, 2), [vec!["a", "c"], vec!["b"]]);
        assert_eq!(shares(&names, 1), [names]);
    }
}
