//! Tries each target with the inputs in `corpus/`, and with random ones: as many
//! and the same in every run.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bulkhead_fuzz::{TARGETS, Target};
use libtest_mimic::{Arguments, Failed, Trial};

/// Random inputs for each target.
const RANDOM_INPUTS: u64 = 2000;
/// Longest of them in bytes.
const RANDOM_BYTES: u64 = 400;

/// Threads of devices: their panics do not reach whoever started them.
const DEVICE_THREADS: [&str; 6] = ["rng", "vsock", "fs-share", "net", "balloon", "mem"];

static DEVICE_PANICKED: AtomicBool = AtomicBool::new(false);

fn watch_device_threads() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        let thread = thread::current();
        if thread
            .name()
            .is_some_and(|name| DEVICE_THREADS.contains(&name))
        {
            DEVICE_PANICKED.store(true, Ordering::SeqCst);
        }
    }));
}

fn main() {
    watch_device_threads();
    let arguments = Arguments::from_args();
    let trials = TARGETS.iter().map(|target| {
        Trial::test(target.name, || {
            try_all(target).map_err(|error| Failed::from(error.to_string()))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn try_all(target: &Target) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut kept = Vec::new();
    for entry in fs::read_dir(folder.join(target.name))? {
        kept.push(entry?.path());
    }
    kept.sort();
    if kept.is_empty() {
        return Err(io::Error::other(format!(
            "no inputs for {}: they show that the target reaches what it is for",
            target.name
        )));
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let kept: Vec<_> = kept.iter().map(fs::read).collect::<Result<_, _>>()?;
    for input in &kept {
        try_one(target, input)?;
    }
    for round in 0..RANDOM_INPUTS {
        let input = if round % 2 == 0 {
            random.bytes()
        } else {
            let base = &kept[random.below(kept.len() as u64) as usize];
            random.change(base)
        };
        try_one(target, &input)?;
    }
    Ok(())
}

/// Leaves the input behind when the target panics, and names it.
fn try_one(target: &Target, input: &[u8]) -> io::Result<()> {
    let tried = std::panic::catch_unwind(|| target.check(input));
    // Blames the wrong one of two targets that run at once, but never none.
    if tried.is_ok() && !DEVICE_PANICKED.swap(false, Ordering::SeqCst) {
        return Ok(());
    }
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("finding-{}", target.name));
    fs::File::create(&path)?.write_all(input)?;
    Err(io::Error::other(format!(
        "an input of {} bytes breaks what must hold; it is in {}",
        input.len(),
        path.display()
    )))
}

/// Numbers that look random (Marsaglia, "Xorshift RNGs", 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(RANDOM_BYTES);
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// An input with a few of its bytes changed, put in or taken out.
    fn change(&mut self, base: &[u8]) -> Vec<u8> {
        let mut input = base.to_vec();
        for _ in 0..=self.below(8) {
            let at = self.below(input.len() as u64 + 1) as usize;
            let byte = self.next() as u8;
            match self.below(3) {
                0 => input.insert(at, byte),
                1 if at < input.len() => drop(input.remove(at)),
                _ if at < input.len() => input[at] = byte,
                _ => {}
            }
        }
        input
    }
}
