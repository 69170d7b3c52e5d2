//! What a container uses, as the files of its cgroup tell it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::{CgroupError, gone};

/// The files of keys and numbers, `cpu.stat` and the like. What the kernel does
/// not tell is 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keyed(HashMap<String, u64>);

impl Keyed {
    /// A figure by the kernel's name for it.
    pub fn of(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }

    /// Lines of a key and a number.
    fn parse(text: &str) -> Self {
        let lines = text.lines().map(|line| line.split_once(' '));
        let pairs = lines.filter_map(|pair| {
            let (key, value) = pair?;
            Some((key.to_owned(), number(value)?))
        });
        Self(pairs.collect())
    }

    /// Words of a key, `=` and a number.
    fn parse_words(text: &str) -> Self {
        let words = text.split(' ').map(|word| word.split_once('='));
        let pairs = words.filter_map(|pair| {
            let (key, value) = pair?;
            Some((key.to_owned(), number(value)?))
        });
        Self(pairs.collect())
    }
}

/// What one block device did for the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFigures {
    /// Of the device.
    pub major: u64,
    /// Of the device.
    pub minor: u64,
    /// `rbytes`, `wbytes`, `rios`, `wios` and others.
    pub counts: Keyed,
}

/// Huge pages of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugePages {
    /// As the kernel spells it: `2MB`.
    pub page_size: String,
    /// In bytes.
    pub current: u64,
    /// In bytes; `u64::MAX` without a limit.
    pub max: u64,
    /// How often the limit refused one.
    pub failures: u64,
}

/// How long processes have waited (PSI), in one of two degrees.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Waiting {
    /// In percent of the last 10 seconds.
    pub avg10: f64,
    /// In percent of the last minute.
    pub avg60: f64,
    /// In percent of the last 5 minutes.
    pub avg300: f64,
    /// In microseconds.
    pub total: u64,
}

/// Waiting of some of the processes, and of all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// At least one waits.
    pub some: Waiting,
    /// None works.
    pub full: Waiting,
}

/// The figures of a container. Those of a controller that the guest does not
/// have are 0 or empty; a limit that is none is `u64::MAX`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// `pids.current`.
    pub pids: u64,
    /// `pids.max`.
    pub pids_limit: u64,
    /// `cpu.stat`.
    pub cpu: Keyed,
    /// `memory.stat`.
    pub memory: Keyed,
    /// `memory.current`, in bytes.
    pub memory_usage: u64,
    /// `memory.max`, in bytes.
    pub memory_limit: u64,
    /// `memory.peak`, in bytes.
    pub memory_peak: u64,
    /// `memory.swap.current`, in bytes.
    pub swap_usage: u64,
    /// `memory.swap.max`, in bytes.
    pub swap_limit: u64,
    /// `memory.swap.peak`, in bytes.
    pub swap_peak: u64,
    /// `memory.events`.
    pub memory_events: Keyed,
    /// `io.stat`, by device.
    pub devices: Vec<DeviceFigures>,
    /// `hugetlb.*`, by size.
    pub huge_pages: Vec<HugePages>,
    /// `cpu.pressure`; `None` when the guest's kernel does not tell, as the others.
    pub cpu_pressure: Option<Pressure>,
    /// `memory.pressure`.
    pub memory_pressure: Option<Pressure>,
    /// `io.pressure`.
    pub io_pressure: Option<Pressure>,
}

impl Figures {
    /// Of the cgroup in `directory`.
    pub fn read(directory: &Path) -> Result<Self, CgroupError> {
        let text = |file: &str| read_if_there(directory, file);
        let single = |file: &str| Ok(text(file)?.and_then(|text| number(&text)).unwrap_or(0));
        let keyed = |file: &str| Ok(Keyed::parse(&text(file)?.unwrap_or_default()));
        let pressure = |file: &str| Ok(text(file)?.as_deref().and_then(parse_pressure));
        Ok(Self {
            pids: single("pids.current")?,
            pids_limit: single("pids.max")?,
            cpu: keyed("cpu.stat")?,
            memory: keyed("memory.stat")?,
            memory_usage: single("memory.current")?,
            memory_limit: single("memory.max")?,
            memory_peak: single("memory.peak")?,
            swap_usage: single("memory.swap.current")?,
            swap_limit: single("memory.swap.max")?,
            swap_peak: single("memory.swap.peak")?,
            memory_events: keyed("memory.events")?,
            devices: parse_devices(&text("io.stat")?.unwrap_or_default()),
            huge_pages: huge_pages(directory)?,
            cpu_pressure: pressure("cpu.pressure")?,
            memory_pressure: pressure("memory.pressure")?,
            io_pressure: pressure("io.pressure")?,
        })
    }
}

/// How many processes of the cgroup and those below the OOM killer has ended.
pub fn oom_kills(directory: &Path) -> Result<u64, CgroupError> {
    let events = read_if_there(directory, "memory.events")?;
    Ok(Keyed::parse(&events.unwrap_or_default()).of("oom_kill"))
}

/// `None` without the file, which is how a controller that is not there shows,
/// and without what it should tell: pressure that is switched off is EOPNOTSUPP.
fn read_if_there(directory: &Path, file: &str) -> Result<Option<String>, CgroupError> {
    let path = directory.join(file);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if gone(&source) || source.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(source) => Err(CgroupError::Read { path, source }),
    }
}

fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// `8:0 rbytes=1 wbytes=2`; a device that did nothing may have no word at all.
fn parse_devices(text: &str) -> Vec<DeviceFigures> {
    let lines = text.lines().filter_map(|line| {
        let (device, words) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        Some(DeviceFigures {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            counts: Keyed::parse_words(words),
        })
    });
    lines.collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same of `full`.
fn parse_pressure(text: &str) -> Option<Pressure> {
    let line_of = |degree: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(degree))?;
        let words = line.split_whitespace();
        let words: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        let percent = |key: &str| words.get(key)?.parse::<f64>().ok();
        Some(Waiting {
            avg10: percent("avg10")?,
            avg60: percent("avg60")?,
            avg300: percent("avg300")?,
            total: words.get("total")?.parse().ok()?,
        })
    };
    Some(Pressure {
        some: line_of("some ")?,
        // Of the CPU it came later, with Linux 5.13.
        full: line_of("full ").unwrap_or_default(),
    })
}

/// Each size that the kernel has, by `hugetlb.<size>.current`.
fn huge_pages(directory: &Path) -> Result<Vec<HugePages>, CgroupError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(source) if gone(&source) => return Ok(Vec::new()),
        Err(source) => {
            let path = directory.to_owned();
            return Err(CgroupError::Read { path, source });
        }
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut sizes: Vec<String> = names
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // hugetlb.2MB.rsvd.current is another figure.
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    let read = |page_size: String| {
        let text = |kind: &str| read_if_there(directory, &format!("hugetlb.{page_size}.{kind}"));
        let events = Keyed::parse(&text("events")?.unwrap_or_default());
        Ok(HugePages {
            current: text("current")?.and_then(|text| number(&text)).unwrap_or(0),
            max: text("max")?.and_then(|text| number(&text)).unwrap_or(0),
            failures: events.of("max"),
            page_size,
        })
    };
    sizes.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn read_files_of_every_controller_are_told() {
        let pressure = "some avg10=1.50 avg60=0.25 avg300=0.00 total=123\n\
                        full avg10=0.50 avg60=0.00 avg300=0.00 total=45\n";
        let directory = directory(&[
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 7\nuser_usec 4\nnr_throttled 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "8192\n"),
            ("memory.peak", "5000\n"),
            ("memory.swap.max", "max\n"),
            ("memory.stat", "anon 11\nfile 12\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n254:1 \n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 9\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("memory.pressure", pressure),
        ]);
        let figures = Figures::read(directory.path()).unwrap();
        assert_eq!((figures.pids, figures.pids_limit), (3, u64::MAX));
        assert_eq!(figures.cpu.of("usage_usec"), 7);
        assert_eq!(figures.cpu.of("nr_throttled"), 2);
        assert_eq!(figures.cpu.of("no such"), 0);
        assert_eq!(
            (
                figures.memory_usage,
                figures.memory_limit,
                figures.memory_peak
            ),
            (4096, 8192, 5000)
        );
        assert_eq!((figures.swap_usage, figures.swap_limit), (0, u64::MAX));
        assert_eq!(figures.memory.of("file"), 12);
        assert_eq!(figures.memory_events.of("oom_kill"), 1);
        assert_eq!(oom_kills(directory.path()).unwrap(), 1);
        let [busy, idle] = figures.devices.as_slice() else {
            panic!("{:?}", figures.devices);
        };
        assert_eq!((busy.major, busy.minor, busy.counts.of("wios")), (8, 0, 4));
        assert_eq!(
            (idle.major, idle.minor, idle.counts.of("wios")),
            (254, 1, 0)
        );
        assert_eq!(
            figures.huge_pages,
            [HugePages {
                page_size: "2MB".into(),
                current: 2_097_152,
                max: u64::MAX,
                failures: 9,
            }]
        );
        let waited = figures.memory_pressure.unwrap();
        assert!((waited.some.avg10 - 1.5).abs() < 1e-9);
        assert_eq!((waited.some.total, waited.full.total), (123, 45));
        assert_eq!(figures.cpu_pressure, None);
    }

    #[test]
    fn read_cgroup_without_controllers_or_gone_is_empty() {
        let directory = directory(&[]);
        let figures = Figures::read(directory.path()).unwrap();
        assert_eq!(figures, Figures::default());
        let gone = directory.path().join("gone");
        assert_eq!(Figures::read(&gone).unwrap(), Figures::default());
        assert_eq!(oom_kills(&gone).unwrap(), 0);
    }

    proptest! {
        #[test]
        fn parse_any_text_never_panics(text in "\\PC{0,40}( |=|\n|:)\\PC{0,40}") {
            let _ = (Keyed::parse(&text), Keyed::parse_words(&text));
            let _ = (parse_devices(&text), parse_pressure(&text));
        }
    }
}
