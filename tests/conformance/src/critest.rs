//! critest's command line.

use bulkhead_node::NodeCommand;

use crate::Runtime;

/// Where critest leaves its report in the node.
pub const REPORT: &str = "/tmp/critest.json";
/// Ginkgo matches the suite's description together with a spec's name.
const SUITE: &str = "CRI validation";

/// Writes a report of all specs without running one.
pub fn list() -> NodeCommand {
    base().arg("-ginkgo.dry-run")
}

/// Runs the specs of these names, and no others.
pub fn run(runtime: Runtime, names: &[String]) -> NodeCommand {
    base()
        .args(["-runtime-handler", runtime.handler()])
        .args(["-ginkgo.focus", &exactly(names)])
        // One spec that hangs must not take the others with it.
        .args(["-ginkgo.timeout", "3h"])
}

fn base() -> NodeCommand {
    NodeCommand::new("critest")
        .args([
            "-ginkgo.v",
            "-ginkgo.no-color",
            "-ginkgo.json-report",
            REPORT,
        ])
        // Go's own limit for a test binary.
        .args(["-test.timeout", "0"])
}

/// The expression that matches these names and nothing else.
fn exactly(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| escape(name)).collect();
    format!("^{SUITE} (?:{})$", names.join("|"))
}

/// Go's regular expressions take a backslash before any punctuation (RE2 syntax).
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii_punctuation() {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_punctuation_means_itself() {
        let names = ["[k8s.io] a (b)".to_owned(), "c".to_owned()];
        assert_eq!(
            exactly(&names),
            r"^CRI validation (?:\[k8s\.io\] a \(b\)|c)$"
        );
    }
}
