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
    refused(
        BOTH,
        "process.args: not found",
        "no such file",
        "there is no program to run",
    ),
    wrong(
        &[Runc],
        "linux.resources.devices: a default one denied",
        "linux.resources.devices: 1:7",
        "it allows the default devices whatever the rules say",
    ),
];

/// Whether a variation is refused by any of the runtimes, so that nothing can be
/// seen of what it is combined with.
pub fn is_refused(variation: &str) -> bool {
    KNOWN
        .iter()
        .any(|known| known.variation == variation && matches!(known.effect, Effect::Refused(_)))
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
