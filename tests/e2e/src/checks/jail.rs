//! The jail of the monitor and of virtiofsd, as /proc shows it in a running
//! pod.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[("monitor_and_virtiofsd_run_in_their_jails", jails)];

/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`, `CAP_SETGID`,
/// `CAP_SETUID` and `CAP_SETFCAP` (linux/capability.h: 0, 1, 3, 4, 6, 7, 31).
const VIRTIOFSD_CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

struct Process {
    status: BTreeMap<String, String>,
    namespaces: BTreeMap<String, String>,
    root: Vec<String>,
    cgroup: String,
}

fn jails(lab: &Lab) -> Result<()> {
    lab.succeed(&format!(
        "ctr run --detach --runtime {BULKHEAD} {IMAGE} jail sleep 1000"
    ))?;
    let outcome = inspect(lab);
    lab.run(&Lab::remove("jail"))?;
    outcome
}

fn inspect(lab: &Lab) -> Result<()> {
    let host = process(lab, "1")?;
    let vmm = process(lab, "$(pgrep -x bulkhead-vmm)")?;
    let virtiofsd = process(lab, "$(pgrep -x virtiofsd)")?;

    for (name, jailed) in [("bulkhead-vmm", &vmm), ("virtiofsd", &virtiofsd)] {
        ensure!(
            jailed.status["NoNewPrivs"] == "1",
            "{name} may gain privileges"
        );
        for namespace in ["mnt", "pid", "ipc", "uts", "net", "cgroup"] {
            ensure!(
                jailed.namespaces[namespace] != host.namespaces[namespace],
                "{name} is in the host's {namespace} namespace"
            );
        }
        ensure!(
            jailed.cgroup.contains("/jail"),
            "{name} is in cgroup {}, not in the pod's",
            jailed.cgroup
        );
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(
            bits(&vmm, set)? == 0,
            "the monitor has {set} {}",
            vmm.status[set]
        );
        let more = bits(&virtiofsd, set)? & !VIRTIOFSD_CAPABILITIES;
        ensure!(more == 0, "virtiofsd has {set} {more:#x} too many");
    }
    let uid = vmm.status["Uid"].clone();
    ensure!(
        !uid.split_whitespace().any(|id| id == "0"),
        "the monitor's uids are {uid}"
    );
    ensure!(vmm.root.is_empty(), "the monitor sees {:?}", vmm.root);
    ensure!(
        virtiofsd.root == ["containers", "volumes"],
        "virtiofsd sees {:?}",
        virtiofsd.root
    );
    Ok(())
}

fn process(lab: &Lab, pid: &str) -> Result<Process> {
    let shown = lab.succeed(&format!(
        "pid={pid}
         cat /proc/$pid/status; echo ---
         for ns in mnt pid ipc uts net cgroup; do echo \"$ns: $(readlink /proc/$pid/ns/$ns)\"; done; echo ---
         ls -A /proc/$pid/root/; echo ---
         cat /proc/$pid/cgroup"
    ))?;
    let parts: Vec<&str> = shown.split("---\n").collect();
    let [status, namespaces, root, cgroup] = parts[..] else {
        anyhow::bail!("cannot read process {pid}: {shown}");
    };
    let table = |text: &str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect()
    };
    Ok(Process {
        status: table(status),
        namespaces: table(namespaces),
        root: root.lines().map(str::to_owned).collect(),
        cgroup: cgroup.to_owned(),
    })
}

fn bits(process: &Process, set: &str) -> Result<u64> {
    let text = process.status.get(set).context("no such line")?;
    Ok(u64::from_str_radix(text, 16)?)
}
