//! Containers at a terminal, and what a user does from there.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_node::{NodeCommand, Process, ProcessOutput, WindowSize};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("terminal_of_nerdctl_run_follows_its_size", resized),
    ("detached_terminal_logs_what_it_shows", detached),
    ("init_of_nerdctl_is_pid_1", init),
    ("stop_kills_what_ignores_it_with_137", stop),
    ("restart_of_containerd_leaves_the_task_running", restart),
];

/// How long a user waits, on hardware.
const PATIENCE_S: u32 = 60;

fn nerdctl_run() -> String {
    format!("nerdctl run --pull never --runtime {BULKHEAD}")
}

/// Runs `script` and expects that it leaves nothing. The first container makes
/// the bridge, which stays.
fn leaving_nothing(lab: &Lab, script: &str) -> Result<String> {
    lab.succeed(&format!("{} --rm {IMAGE} true", nerdctl_run()))?;
    let before = lab.resources()?;
    let shown = lab.succeed(script)?;
    lab.expect_nothing_left(&before)?;
    Ok(shown)
}

/// A user at a terminal, who loses patience after a while.
struct User {
    process: Process,
    screen: ProcessOutput,
    seen: String,
}

impl User {
    fn run(lab: &Lab, command: &str, size: WindowSize) -> Result<Self> {
        let patience_s = PATIENCE_S * lab.node().time_factor();
        let script = format!("exec timeout --foreground {patience_s} {command}");
        let command = NodeCommand::new("bash").args(["-c", &script]).tty(size);
        let mut process = lab.node().spawn(command)?;
        Ok(Self {
            screen: process.stdout.take().context("no output")?,
            process,
            seen: String::new(),
        })
    }

    fn types(&mut self, text: &str) -> Result<()> {
        let stdin = self.process.stdin.as_mut().context("no input")?;
        stdin.write_all(text.as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Waits until `words` come after what was waited for before.
    fn sees(&mut self, words: &str) -> Result<()> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return Ok(());
            }
            let length = self.screen.read(&mut buffer)?;
            if length == 0 {
                bail!("waited for {words:?}, saw {:?}", self.seen);
            }
            let text = String::from_utf8_lossy(&buffer[..length]);
            self.seen.push_str(&text);
        }
    }
}

fn resized(lab: &Lab) -> Result<()> {
    lab.succeed(&format!("{} --rm {IMAGE} true", nerdctl_run()))?;
    let before = lab.resources()?;
    let run = format!("{} --rm -it {IMAGE} sh", nerdctl_run());
    let size = |rows, columns| WindowSize { rows, columns };
    let mut user = User::run(lab, &run, size(33, 101))?;
    // busybox's prompt.
    user.sees("/ # ")?;
    user.types("stty size\n")?;
    user.sees("33 101")?;
    user.process.resize(size(44, 122))?;
    // The new size takes its way on its own: asked for until it is there.
    user.types("until [ \"$(stty size)\" = '44 122' ]; do :; done; echo it\"\"fits\n")?;
    user.sees("itfits")?;
    user.types("exit 9\n")?;
    let status = user.process.wait()?;
    ensure!(status.code() == Some(9), "it ended with {status}");
    lab.expect_nothing_left(&before)
}

fn detached(lab: &Lab) -> Result<()> {
    let shown = leaving_nothing(
        lab,
        &format!(
            "{} -dt --name shown {IMAGE} sh -c 'tty; exec sleep 999' >/dev/null
             until nerdctl logs shown | grep '^/dev/'; do sleep 0.1; done
             nerdctl rm -f shown >/dev/null",
            nerdctl_run()
        ),
    )?;
    ensure!(shown.contains("/dev/pts/0"), "{shown}");
    Ok(())
}

/// What nerdctl puts before the command is the first process, and ends with the
/// command's code. A script serves as well as tini, which the node lacks.
fn init(lab: &Lab) -> Result<()> {
    let shown = leaving_nothing(
        lab,
        &format!(
            "printf '#!/bin/sh\nshift; \"$@\"\n' >/tmp/little-init; chmod 755 /tmp/little-init
             {} --rm --init --init-binary /tmp/little-init {IMAGE} \\
                 sh -c 'tr \"\\0\" \" \" </proc/1/cmdline; echo; echo pid $$; exit 12' || echo code $?",
            nerdctl_run()
        ),
    )?;
    let lines: Vec<&str> = shown.lines().collect();
    ensure!(
        matches!(lines[..], [first, own, "code 12"]
            if first.contains("/sbin/little-init -- sh -c") && own != "pid 1"),
        "{shown}"
    );
    Ok(())
}

fn stop(lab: &Lab) -> Result<()> {
    let shown = leaving_nothing(
        lab,
        &format!(
            "{} -d --name deaf {IMAGE} sh -c \"trap 'echo told' TERM; echo ready; while :; do sleep 1; done\" >/dev/null
             until nerdctl logs deaf | grep -q ready; do sleep 0.1; done
             nerdctl stop -t 2 deaf >/dev/null
             nerdctl logs deaf | tail -n 1
             nerdctl inspect -f '{{{{.State.ExitCode}}}}' deaf
             nerdctl rm -f deaf >/dev/null",
            nerdctl_run()
        ),
    )?;
    ensure!(shown == "told\n137", "{shown}");
    Ok(())
}

/// The task stays, and so do its log and what one may do with it. Its log is a
/// file here: nerdctl's own logging program ends with its connection to
/// containerd, under any runtime.
fn restart(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        "log=/tmp/lasting.log; rm -f $log
         ctr run --detach --log-uri file://$log --runtime {BULKHEAD} {IMAGE} lasting \\
             sh -c 'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done'
         until grep -q 'line 3$' $log; do sleep 0.1; done
         containerd-use restart >/dev/null
         last=$(wc -l <$log)
         ctr task ls | awk '$1 == \"lasting\" {{ print $3 }}'
         ctr task exec --exec-id after lasting sh -c 'exit 11'; echo code $?
         until [ $(wc -l <$log) -gt $((last + 3)) ]; do sleep 0.1; done
         awk '$2 != NR {{ print \"line \" NR \" is lost\"; exit }}' $log
         {}",
        Lab::remove("lasting")
    ))?;
    ensure!(shown == "RUNNING\ncode 11", "{shown}");
    lab.expect_nothing_left(&before)
}
