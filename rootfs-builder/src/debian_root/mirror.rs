//! Which Debian mirror the host uses, read from its apt sources.

use std::fs;
use std::path::Path;

const DEFAULT_ARCHIVE: &str = "http://deb.debian.org/debian";
const DEFAULT_SECURITY: &str = "http://deb.debian.org/debian-security";

/// The apt source lines of `suite`, with its updates, security updates and backports (of which apt takes only what is asked
/// for by that name), on the host's own mirrors; on
/// deb.debian.org where the host names none.
pub(super) fn sources(suite: &str) -> [String; 4] {
    let hosts = host_sources(Path::new("/etc/apt"));
    let archive = mirror_named(&hosts, "debian").unwrap_or(DEFAULT_ARCHIVE);
    let security = mirror_named(&hosts, "debian-security").unwrap_or(DEFAULT_SECURITY);
    [
        format!("deb {archive} {suite} main"),
        format!("deb {archive} {suite}-updates main"),
        format!("deb {security} {suite}-security main"),
        format!("deb {archive} {suite}-backports main"),
    ]
}

/// The first mirror whose path ends in `name`. A third party's repository, or a snapshot that may predate the suite,
/// ends otherwise.
fn mirror_named<'a>(uris: &'a [String], name: &str) -> Option<&'a str> {
    uris.iter()
        .map(|uri| uri.trim_end_matches('/'))
        .find(|uri| {
            let web = uri.starts_with("http://") || uri.starts_with("https://");
            web && uri.rsplit('/').next() == Some(name)
        })
}

fn host_sources(apt: &Path) -> Vec<String> {
    let mut files = vec![apt.join("sources.list")];
    let parts = fs::read_dir(apt.join("sources.list.d"))
        .into_iter()
        .flatten()
        .flatten();
    let mut parts: Vec<_> = parts.map(|part| part.path()).collect();
    parts.sort();
    files.append(&mut parts);

    let mut uris = Vec::new();
    for file in files {
        // A file that is not there or not readable names no mirror.
        let text = fs::read_to_string(&file).unwrap_or_default();
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => uris.extend(one_line_uris(&text)),
            Some("sources") => uris.extend(deb822_uris(&text)),
            _ => {}
        }
    }
    uris
}

/// `deb [option=value ...] URI SUITE COMPONENT...`, see sources.list(5).
fn one_line_uris(text: &str) -> Vec<String> {
    let uri = |line: &str| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') {
            rest.split_once(']')?.1
        } else {
            rest
        };
        rest.split_whitespace().next().map(str::to_owned)
    };
    text.lines().filter_map(uri).collect()
}

/// Stanzas of fields, `URIs` among them; a stanza may be switched off with `Enabled: no`, see sources.list(5).
fn deb822_uris(text: &str) -> Vec<String> {
    let mut uris = Vec::new();
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |wanted: &str| {
            let value = |line: &&str| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(wanted)
                    .then(|| value.trim().to_owned())
            };
            stanza.iter().find_map(value)
        };
        if field("Enabled").is_some_and(|enabled| enabled.eq_ignore_ascii_case("no")) {
            continue;
        }
        uris.extend(
            field("URIs")
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned),
        );
    }
    uris
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_sources_both_formats_are_read_and_disabled_ones_skipped() {
        let apt = tempfile::tempdir().unwrap();
        fs::create_dir(apt.path().join("sources.list.d")).unwrap();
        let one_line = "# deb http://commented.example/debian x main\n\
            deb [arch=amd64 signed-by=/k.gpg] https://vendor.example/apt trixie main\n\
            deb http://near.example/debian/ trixie main\n";
        fs::write(apt.path().join("sources.list"), one_line).unwrap();
        let deb822 = "Types: deb\nURIs: http://off.example/debian-security\nEnabled: no\n\n\
            Types: deb\n# why\nURIs: http://sec.example/debian-security http://other.example/x\nSuites: x\n";
        fs::write(apt.path().join("sources.list.d/debian.sources"), deb822).unwrap();
        fs::write(
            apt.path().join("sources.list.d/old.save"),
            "deb http://saved.example/debian x main\n",
        )
        .unwrap();

        let uris = host_sources(apt.path());
        assert_eq!(
            mirror_named(&uris, "debian"),
            Some("http://near.example/debian")
        );
        assert_eq!(
            mirror_named(&uris, "debian-security"),
            Some("http://sec.example/debian-security")
        );
    }

    #[test]
    fn mirror_named_local_or_foreign_uris_are_passed_over() {
        let uris = [
            "file:///srv/debian",
            "mirror+file:///etc/apt/mirrors/debian",
            "https://x.example/apt",
        ];
        assert_eq!(mirror_named(&uris.map(str::to_owned), "debian"), None);
    }
}
