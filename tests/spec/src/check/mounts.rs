//! `mounts`, `root` and `linux.rootfsPropagation`, by `/proc/self/mountinfo`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use serde_json::Value;

use super::{has_namespace, list, text, texts};
use crate::base::CONTENT;
use crate::report::Report;

/// A line of `proc_pid_mountinfo(5)`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    pub point: PathBuf,
    options: Vec<String>,
    propagation: Vec<String>,
    kind: String,
    super_options: Vec<String>,
}

impl Mounted {
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(4);
        let point = mount.next()?.replace("\\040", " ").into();
        let split = |text: &str| text.split(',').map(str::to_owned).collect();
        let options = split(mount.next()?);
        let propagation = mount.map(str::to_owned).collect();
        let mut file_system = file_system.split(' ');
        Some(Self {
            point,
            options,
            propagation,
            kind: file_system.next()?.to_owned(),
            super_options: file_system.nth(1).map(split).unwrap_or_default(),
        })
    }

    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|known| known == option)
    }

    fn propagates(&self, kind: &str) -> bool {
        self.propagation.iter().any(|field| field.starts_with(kind))
    }

    /// What can be told of its propagation: a slave of nothing is private.
    fn propagation(&self) -> &'static str {
        if self.propagates("shared:") {
            "shared"
        } else if self.propagates("unbindable") {
            "unbindable"
        } else {
            "private or slave"
        }
    }
}

pub(super) fn mounted() -> Vec<Mounted> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(Mounted::parse).collect()
}

/// What is mounted at a path on top.
pub(super) fn at<'a>(mounted: &'a [Mounted], path: &Path) -> Option<&'a Mounted> {
    mounted.iter().rfind(|mount| mount.point == path)
}

/// A path of the configuration, without the image's links.
fn resolved(path: &str) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path))
}

pub fn check(spec: &Value, report: &mut Report) {
    let mounts = list(spec, "/mounts");
    for mount in mounts {
        // A mount that a file server announces comes with the first look at it.
        let _ = fs::read_dir(Path::new(text(mount, "/destination")).join("below"));
    }
    let mounted = mounted();
    root(spec, &mounted, report);
    for (index, mount) in mounts.iter().enumerate() {
        let destination = text(mount, "/destination");
        let covered = mounts[index + 1..]
            .iter()
            .any(|later| text(later, "/destination") == destination);
        if covered {
            report.unchecked(format!("mounts: {destination}"), "a later one covers it");
        } else {
            one(mount, &mounted, report);
        }
    }
    others(spec, &mounted, report);
}

fn root(spec: &Value, mounted: &[Mounted], report: &mut Report) {
    let Some(root) = at(mounted, Path::new("/")) else {
        return report.compare("root", "mounted", "absent");
    };
    let word = |read_only: bool| if read_only { "ro" } else { "rw" };
    report.compare(
        "root.readonly",
        word(spec["root"]["readonly"] == true),
        word(root.has("ro")),
    );
    let propagation = text(spec, "/linux/rootfsPropagation");
    if !propagation.is_empty() {
        report.compare(
            "linux.rootfsPropagation",
            expected_propagation(propagation),
            root.propagation(),
        );
    }
}

fn expected_propagation(word: &str) -> &'static str {
    match word.strip_prefix('r').unwrap_or(word) {
        "shared" => "shared",
        "unbindable" => "unbindable",
        _ => "private or slave",
    }
}

fn is_bind(mount: &Value) -> bool {
    let options = texts(mount, "/options");
    options.contains(&"bind") || options.contains(&"rbind") || text(mount, "/type") == "bind"
}

fn one(mount: &Value, mounted: &[Mounted], report: &mut Report) {
    let destination = text(mount, "/destination");
    let field = |what: &str| format!("mounts: {destination}: {what}");
    let path = resolved(destination);
    let Some(seen) = at(mounted, &path) else {
        return report.compare(field("mounted"), "yes", "no");
    };
    if !is_bind(mount) {
        let kind = match text(mount, "/type") {
            "cgroup" => "cgroup2",
            other => other,
        };
        report.compare(field("type"), kind, &seen.kind);
    }
    options(mount, seen, mounted, report);
    content(mount, &path, mounted, report);
}

/// The words of an option's group, which exclude each other, in `mountinfo`.
const OPPOSITES: [(&str, &str); 6] = [
    ("ro", "rw"),
    ("nosuid", "suid"),
    ("nodev", "dev"),
    ("noexec", "exec"),
    ("nodiratime", "diratime"),
    ("nosymfollow", "symfollow"),
];

fn options(mount: &Value, seen: &Mounted, mounted: &[Mounted], report: &mut Report) {
    let destination = text(mount, "/destination");
    let field = |what: &str| format!("mounts: {destination}: {what}");
    let words = texts(mount, "/options");
    for (set, clear) in OPPOSITES {
        let asked = words.iter().rfind(|word| **word == set || **word == clear);
        // What a bind mount does not name is its source's.
        let expected = match asked {
            Some(word) => *word == set,
            None if is_bind(mount) => continue,
            None => false,
        };
        report.compare(field(set), expected, seen.has(set));
    }
    let times = ["noatime", "relatime", "strictatime", "atime"];
    if let Some(word) = words.iter().rfind(|word| times.contains(word)) {
        let shown = ["noatime", "relatime"]
            .into_iter()
            .find(|word| seen.has(word));
        let expected = if *word == "atime" { "relatime" } else { word };
        report.compare(field("atime"), expected, shown.unwrap_or("strictatime"));
    }
    for word in &words {
        if matches!(
            word.strip_prefix('r').unwrap_or(word),
            "private" | "slave" | "shared" | "unbindable"
        ) {
            let expected = expected_propagation(word);
            report.compare(field("propagation"), expected, seen.propagation());
        }
        // `rro` and the like: of everything below, too.
        let recursive = word.strip_prefix('r').unwrap_or_default();
        if OPPOSITES.iter().any(|(set, _)| *set == recursive) {
            let missing: Vec<_> = mounted
                .iter()
                .filter(|other| other.point.starts_with(&seen.point) && !other.has(recursive))
                .map(|other| other.point.display().to_string())
                .collect();
            report.compare(field(word), "everywhere", absent_at(&missing));
        }
        if let Some((key, value)) = word.split_once('=') {
            parameter(mount, key, value, seen, report);
        }
    }
}

fn absent_at(missing: &[String]) -> String {
    if missing.is_empty() {
        "everywhere".to_owned()
    } else {
        format!("not at {}", missing.join(" "))
    }
}

/// A file system's own option: by what it does where it can be seen, else by its text.
fn parameter(mount: &Value, key: &str, value: &str, seen: &Mounted, report: &mut Report) {
    let field = format!("mounts: {}: {key}", text(mount, "/destination"));
    let metadata = fs::metadata(&seen.point);
    let number = |bits: &str| u64::from_str_radix(bits, 8).unwrap_or_default();
    match (seen.kind.as_str(), key) {
        ("tmpfs", "size") => {
            let size = statvfs(&seen.point).map(|fs| fs.blocks() * fs.fragment_size());
            report.compare_read(field, bytes(value), size);
        }
        ("tmpfs", "nr_inodes") => {
            let files = statvfs(&seen.point).map(|fs| fs.files());
            report.compare_read(field, value, files);
        }
        ("tmpfs", "mode") => {
            let mode = metadata.map(|status| format!("{:o}", status.mode() & 0o7777));
            report.compare_read(field, format!("{:o}", number(value)), mode);
        }
        ("tmpfs", "uid") => report.compare_read(field, value, metadata.map(|status| status.uid())),
        ("tmpfs", "gid") => report.compare_read(field, value, metadata.map(|status| status.gid())),
        _ => {
            let value = if key == "gid" {
                outside(value)
            } else {
                value.to_owned()
            };
            let shown = seen
                .super_options
                .iter()
                .find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
            let plain = |text: &str| text.trim_start_matches('0').to_owned();
            report.compare(field, plain(&value), plain(shown.unwrap_or("absent")));
        }
    }
}

/// A group as the kernel's own user namespace knows it, which is the one that
/// devpts shows.
fn outside(gid: &str) -> String {
    let map = fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    let ranges = map.lines().map(|line| {
        let mut numbers = line.split_whitespace().flat_map(str::parse::<u64>);
        [0; 3].map(|_| numbers.next().unwrap_or_default())
    });
    let gid = gid.parse().unwrap_or_default();
    let found = ranges
        .into_iter()
        .find(|[inside, _, count]| (*inside..inside + count).contains(&gid));
    found
        .map_or(gid, |[inside, outside, _]| gid - inside + outside)
        .to_string()
}

/// A size with a suffix, as tmpfs takes it.
fn bytes(text: &str) -> u64 {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k')) => (&text[..at], 1 << 10),
        Some((at, 'm')) => (&text[..at], 1 << 20),
        Some((at, 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().unwrap_or_default() * unit
}

/// What a bind mount of the volume shows.
fn content(mount: &Value, path: &Path, mounted: &[Mounted], report: &mut Report) {
    if !is_bind(mount) {
        return;
    }
    let field = |what: &str| format!("mounts: {}: {what}", text(mount, "/destination"));
    let is_directory = fs::metadata(path).is_ok_and(|status| status.is_dir());
    let file = if is_directory {
        path.join("content")
    } else {
        path.to_owned()
    };
    let quoted = |text: String| format!("{text:?}");
    let read = fs::read_to_string(&file).map(quoted);
    report.compare_read(field("content"), format!("{CONTENT:?}"), read);
    for (kind, id) in [("uid", "uidMappings"), ("gid", "gidMappings")] {
        // Of a file of uid and gid 0, which the mapping gives to another.
        if let Some(mapped) = mount[id][0]["hostID"].as_u64() {
            let owner = fs::metadata(&file).map(|status| match kind {
                "uid" => u64::from(status.uid()),
                _ => u64::from(status.gid()),
            });
            report.compare_read(field(id), mapped, owner);
        }
    }
    if is_directory {
        let recursive = texts(mount, "/options").contains(&"rbind");
        let below = at(mounted, &path.join("below"));
        report.compare(field("below: mounted"), recursive, below.is_some());
        let seen = fs::metadata(path.join("below/content")).is_ok();
        report.compare(field("below: content"), recursive, seen);
    }
}

/// Mounts that nothing in the configuration asks for.
fn others(spec: &Value, mounted: &[Mounted], report: &mut Report) {
    let mut asked = BTreeSet::from([PathBuf::from("/")]);
    let destinations = list(spec, "/mounts")
        .iter()
        .map(|mount| text(mount, "/destination"));
    let covered = ["maskedPaths", "readonlyPaths"]
        .map(|field| texts(spec, &format!("/linux/{field}")))
        .concat();
    asked.extend(destinations.chain(covered).map(resolved));
    if spec["process"]["terminal"] == true {
        asked.insert("/dev/console".into());
    }
    let below_bind = |mount: &Mounted| {
        list(spec, "/mounts").iter().any(|asked| {
            texts(asked, "/options").contains(&"rbind")
                && mount
                    .point
                    .starts_with(resolved(text(asked, "/destination")))
        })
    };
    let below_masked = |mount: &Mounted| {
        // A read-only path is bound with all that is mounted below it.
        texts(spec, "/linux/readonlyPaths")
            .iter()
            .any(|path| mount.point.starts_with(resolved(path)))
    };
    // Device nodes cannot be made in a user namespace, and are bound instead.
    let own_nodes =
        |mount: &Mounted| has_namespace(spec, "user") && mount.point.starts_with("/dev");
    let found: BTreeSet<_> = mounted
        .iter()
        .filter(|mount| !asked.contains(&mount.point))
        .filter(|mount| !below_bind(mount) && !below_masked(mount) && !own_nodes(mount))
        .map(|mount| mount.point.display().to_string())
        .collect();
    let found: Vec<_> = found.into_iter().collect();
    report.compare("mounts: others", "", found.join(" "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_reads_a_line_of_the_manual() {
        let line =
            "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = Mounted::parse(line).expect("is a line");
        assert_eq!(mount.point, Path::new("/mnt 2"));
        assert!(mount.has("noatime") && !mount.has("ro"));
        assert_eq!(mount.propagation(), "private or slave");
        assert_eq!(mount.kind, "ext3");
        assert_eq!(mount.super_options, ["rw", "errors=continue"]);
    }

    #[test]
    fn bytes_with_suffix_are_multiplied() {
        assert_eq!(bytes("65536k"), 65536 << 10);
        assert_eq!(bytes("1m"), 1 << 20);
        assert_eq!(bytes("7"), 7);
    }

    #[test]
    fn expected_propagation_is_the_same_for_recursive_words() {
        for (word, expected) in [
            ("rshared", "shared"),
            ("unbindable", "unbindable"),
            ("rprivate", "private or slave"),
            ("slave", "private or slave"),
        ] {
            assert_eq!(expected_propagation(word), expected);
        }
    }
}
