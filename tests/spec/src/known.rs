//! The differences that are known, each with its reason: the only ones that a
//! run of the matrix lets pass. One that is no longer seen fails the run.

use crate::report::Runtime::{self, Bulkhead, Runc};

/// What a runtime does otherwise than the specification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It refuses the container, and says this.
    Refused(&'static str),
    /// The container sees something else in the fields that begin so.
    Wrong(&'static str),
}

/// One known difference.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// By whom.
    pub runtimes: &'static [Runtime],
    /// The variation that shows it; empty for every container.
    pub variation: &'static str,
    /// What happens.
    pub effect: Effect,
    /// Why it is so.
    pub reason: &'static str,
}

impl Known {
    /// Whether it says what a container of `variations` under `runtime` may do.
    pub fn is_about(&self, runtime: Runtime, variations: &[String]) -> bool {
        self.runtimes.contains(&runtime)
            && (self.variation.is_empty() || variations.iter().any(|name| name == self.variation))
    }
}

const BOTH: &[Runtime] = &[Runc, Bulkhead];

const fn refused(
    runtimes: &'static [Runtime],
    variation: &'static str,
    error: &'static str,
    reason: &'static str,
) -> Known {
    Known {
        runtimes,
        variation,
        effect: Effect::Refused(error),
        reason,
    }
}

const fn wrong(
    runtimes: &'static [Runtime],
    variation: &'static str,
    field: &'static str,
    reason: &'static str,
) -> Known {
    Known {
        runtimes,
        variation,
        effect: Effect::Wrong(field),
        reason,
    }
}

/// All that are known.
pub const KNOWN: &[Known] = &[
    wrong(
        &[Bulkhead],
        "linux.namespaces: no cgroup",
        "linux.cgroupsPath",
        "the guest has a hierarchy of its own, in which the container's place is its id's",
    ),
    wrong(
        &[Runc],
        "",
        "linux.resources.devices: 10:200",
        "runc lets every container use /dev/net/tun, which no field asks for",
    ),
    wrong(
        &[Runc],
        "process.capabilities: absent",
        "process.capabilities",
        "without the field runc leaves all that it has itself, Bulkhead none",
    ),
    refused(
        &[Runc],
        "linux.namespaces: no mount",
        "without a private MNT namespace",
        "masked paths would be the host's",
    ),
    refused(
        BOTH,
        "process.args: not found",
        "no such file",
        "there is no program to run",
    ),
    refused(
        &[Runc],
        "process.cwd: relative",
        "Cwd must be an absolute path",
        "the specification asks for one",
    ),
    refused(
        &[Bulkhead],
        "process.cwd: relative",
        "process.cwd",
        "the specification asks for an absolute path",
    ),
    refused(
        &[Runc],
        "mounts: relative source",
        "failed to fulfil mount request",
        "it is taken as relative to the bundle, where there is none",
    ),
    refused(
        &[Bulkhead],
        "mounts: relative source",
        "is not an absolute path",
        "the guest has no bundle that it could be relative to",
    ),
    refused(
        &[Bulkhead],
        "mounts: overlay",
        "file system type \"overlay\" is not supported in the guest",
        "its layers would be the host's paths: an overlay is mounted on the host and bound",
    ),
    refused(
        BOTH,
        "mounts: source that is not there",
        "/no/such/source",
        "there is nothing to bind",
    ),
    refused(
        &[Bulkhead],
        "linux.devices: outside of /dev",
        "is not below /dev, where alone devices work",
        "the root file system is shared with the host and never has devices",
    ),
    refused(
        &[Bulkhead],
        "linux.devices: a disk of the host",
        "of the host, which the guest does not have",
        "the number means another device in the guest",
    ),
    refused(
        &[Bulkhead],
        "hooks.createContainer",
        "hooks.createContainer",
        "its program is the host's, its namespaces are the guest's",
    ),
    refused(
        &[Bulkhead],
        "linux.namespaces: no mount",
        "linux.namespaces: mount",
        "a container has one of its own, apart from the agent's",
    ),
    refused(
        &[Bulkhead],
        "linux.namespaces: no ipc",
        "the host's ipc namespace was asked for",
        "the host's ends at the VM",
    ),
    refused(
        &[Bulkhead],
        "linux.namespaces: no uts",
        "the host's uts namespace was asked for",
        "the host's ends at the VM",
    ),
    refused(
        &[Bulkhead],
        "linux.namespaces: no network",
        "the host's network namespace was asked for",
        "the host's ends at the VM",
    ),
    refused(
        BOTH,
        "linux.sysctl: of the whole kernel",
        "vm.swappiness",
        "it is not of a namespace of the container",
    ),
    refused(
        BOTH,
        "linux.seccomp: listenerPath",
        "listener",
        "nobody listens there; under Bulkhead nobody could, from the host",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.memory.kernel",
        "linux.resources.memory.kernel",
        "cgroup version 2 has no such setting; runc drops it silently",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.memory.kernelTCP",
        "linux.resources.memory.kernelTCP",
        "cgroup version 2 has no such setting; runc drops it silently",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.memory.swappiness",
        "linux.resources.memory.swappiness",
        "cgroup version 2 has no such setting; runc drops it silently",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.memory.disableOOMKiller",
        "linux.resources.memory.disableOOMKiller",
        "cgroup version 2 has no such setting; runc drops it silently",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.memory.useHierarchy: false",
        "linux.resources.memory.useHierarchy",
        "cgroup version 2 has no such setting; runc drops it silently",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.cpu.realtimeRuntime",
        "linux.resources.cpu.realtimeRuntime",
        "cgroup version 2 has no real-time limits",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.blockIO.throttleReadBpsDevice",
        "linux.resources.blockIO",
        "the container's files are not on a block device of the guest",
    ),
    refused(
        &[Bulkhead],
        "linux.resources.network.classID",
        "linux.resources.network",
        "cgroup version 2 has no network controller; runc drops it silently",
    ),
    refused(
        BOTH,
        "linux.resources.unified: no such file",
        "nothing.max",
        "the cgroup has no such file",
    ),
    refused(
        BOTH,
        "linux.intelRdt",
        "ntelRdt",
        "the node's processor has none; under Bulkhead it would be the host's",
    ),
    wrong(
        BOTH,
        "linux.resources.devices: a default one denied",
        "linux.resources.devices: 1:7",
        "the default devices are allowed whatever the rules say, which programs have come to rely on",
    ),
];

/// Whether a variation is refused by any of the runtimes, so that nothing can be
/// seen of what it is combined with.
pub fn is_refused(variation: &str) -> bool {
    KNOWN
        .iter()
        .any(|known| known.variation == variation && matches!(known.effect, Effect::Refused(_)))
}

/// Whether a variation is refused by one of the runtimes, and not by the other.
pub fn is_refused_by_one(variation: &str) -> bool {
    let by = |runtime| {
        KNOWN.iter().any(|known| {
            known.variation == variation
                && known.runtimes.contains(&runtime)
                && matches!(known.effect, Effect::Refused(_))
        })
    };
    by(Runc) != by(Bulkhead)
}

/// The known differences as the table of `docs/oci-differences.md`.
pub fn document() -> String {
    let mut lines = vec![
        "| field, value | runtime | what happens | why |".to_owned(),
        "|---|---|---|---|".to_owned(),
    ];
    for known in KNOWN {
        let runtimes: Vec<_> = known.runtimes.iter().map(ToString::to_string).collect();
        let variation = match known.variation {
            "" => "every container".to_owned(),
            name => format!("`{name}`"),
        };
        let effect = match known.effect {
            Effect::Refused(error) => format!("refused: `{error}`"),
            Effect::Wrong(field) => format!("`{field}` differs"),
        };
        lines.push(format!(
            "| {variation} | {} | {effect} | {} |",
            runtimes.join(", "),
            known.reason
        ));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::variations;

    #[test]
    fn known_differences_are_of_variations_that_are_run() {
        let names: Vec<_> = variations::all().iter().map(|one| one.name).collect();
        for known in KNOWN {
            assert!(
                known.variation.is_empty() || names.contains(&known.variation),
                "{} is no variation",
                known.variation
            );
            assert!(
                !known.reason.is_empty(),
                "{} has no reason",
                known.variation
            );
        }
    }

    #[test]
    fn document_of_the_differences_is_theirs() {
        let written = include_str!("../../../docs/oci-differences.md");
        assert!(
            written.contains(&document()),
            "docs/oci-differences.md lacks the table that `spec-matrix --document` prints"
        );
    }
}
