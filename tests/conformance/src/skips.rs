//! Lists of specs: those that are not run with Bulkhead, each with its reason (`skips.txt`), and those that an ordinary
//! test run has (`subset.txt`).

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

const OURS: &str = include_str!("../skips.txt");
const SUBSET: &str = include_str!("../subset.txt");

/// Full names of specs, with the reasons.
#[derive(Debug)]
pub struct Skips(BTreeMap<String, String>);

impl Skips {
    /// The list of this project.
    ///
    /// # Errors
    /// When the file is not as it says itself.
    pub fn ours() -> Result<Self> {
        Self::parse(OURS)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut skips = BTreeMap::new();
        for paragraph in text.split("\n\n") {
            let (reason, names): (Vec<_>, Vec<_>) = paragraph
                .lines()
                .filter(|line| !line.is_empty())
                .partition(|line| line.starts_with('#'));
            let reason: Vec<_> = reason
                .iter()
                .map(|line| line.trim_start_matches('#').trim())
                .collect();
            for name in names {
                ensure!(!reason.is_empty(), "skips.txt gives no reason for: {name}");
                if skips.insert(name.to_owned(), reason.join(" ")).is_some() {
                    bail!("skips.txt has this twice: {name}");
                }
            }
        }
        Ok(Self(skips))
    }

    /// Why the spec of this name is not run; `None` when it is.
    pub fn reason(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The full names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The full names of the specs that an ordinary test run has.
pub fn subset() -> impl Iterator<Item = &'static str> {
    SUBSET
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Whether the suite still has all of `names`: one that names nothing would hide that its spec has another name now.
///
/// # Errors
/// Names the ones that it does not have.
pub fn each_is_one_of<'a>(names: impl Iterator<Item = &'a str>, specs: &[String]) -> Result<()> {
    let unknown: Vec<_> = names
        .filter(|name| specs.iter().all(|spec| spec != name))
        .collect();
    ensure!(
        unknown.is_empty(),
        "skips.txt or subset.txt names specs that critest does not have:\n{}",
        unknown.join("\n")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_well_formed() {
        let skips = Skips::ours().unwrap();
        assert_ne!(subset().count(), 0);
        assert!(subset().all(|name| skips.reason(name).is_none()));
    }

    #[test]
    fn parse_reason_holds_for_its_paragraph() {
        let skips =
            Skips::parse("# A heading.\n\n# Two\n# lines.\na b\nc\n\n# Other.\nd\n").unwrap();
        assert_eq!(skips.reason("a b"), Some("Two lines."));
        assert_eq!(skips.reason("c"), Some("Two lines."));
        assert_eq!(skips.reason("d"), Some("Other."));
        assert_eq!(skips.reason("e"), None);
    }

    #[test]
    fn parse_name_without_reason_or_twice_is_refused() {
        assert!(Skips::parse("# Reason.\na\n\nb\n").is_err());
        assert!(Skips::parse("# Reason.\na\na\n").is_err());
    }

    #[test]
    fn each_is_one_of_stale_name_is_told() {
        let skips = Skips::parse("# Reason.\na\nb\n").unwrap();
        let error = each_is_one_of(skips.names(), &["a".to_owned()]).unwrap_err();
        assert!(error.to_string().ends_with("\nb"), "{error}");
    }
}
