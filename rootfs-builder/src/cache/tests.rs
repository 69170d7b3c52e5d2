use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open_at(dir.path().join("cache")).unwrap();
    (dir, cache)
}

fn key(value: &str) -> Key {
    let mut key = Key::new();
    key.text("value", value);
    key
}

#[test]
fn or_build_second_time_returns_the_same_entry_without_building() {
    let (_dir, cache) = cache();
    let first = cache
        .entry("thing", &key("a"))
        .or_build(|dir| fs::write(dir.join("file"), "bytes"))
        .unwrap();
    let second = cache
        .entry("thing", &key("a"))
        .or_build(|_| -> io::Result<()> { panic!("built twice") })
        .unwrap();
    assert_eq!(first, second);
    assert_eq!(fs::read_to_string(second.join("file")).unwrap(), "bytes");
}

#[test]
fn or_build_failing_closure_leaves_no_entry_and_keeps_the_cause() {
    let (_dir, cache) = cache();
    let entry = cache.entry("thing", &key("a"));
    let error = entry
        .or_build(|dir| {
            fs::write(dir.join("half"), "half")?;
            Err(io::Error::other("out of luck"))
        })
        .unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "out of luck");
    assert!(entry.existing().is_none());
    assert!(!entry.path().with_extension(BUILDING).exists());
    entry
        .or_build(|dir| fs::write(dir.join("file"), "whole"))
        .unwrap();
    assert!(!entry.path().join("half").exists());
}

#[test]
fn or_build_concurrent_callers_build_once() {
    let (_dir, cache) = cache();
    let builds = AtomicUsize::new(0);
    let start = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                let path = cache
                    .entry("thing", &key("a"))
                    .or_build(|dir| {
                        builds.fetch_add(1, Ordering::SeqCst);
                        fs::write(dir.join("file"), "bytes")
                    })
                    .unwrap();
                assert!(path.join("file").exists());
            });
        }
    });
    assert_eq!(builds.load(Ordering::SeqCst), 1);
}

#[test]
fn or_build_sweeps_a_killed_build_but_not_a_running_one() {
    let (_dir, cache) = cache();
    let killed = cache.entry("thing", &key("killed"));
    let running = cache.entry("thing", &key("running"));
    for entry in [&killed, &running] {
        fs::create_dir_all(entry.path().with_extension(BUILDING)).unwrap();
    }
    let _held = lock_file(&running.path().with_extension(LOCK), "running").unwrap();
    cache
        .entry("thing", &key("other"))
        .or_build(|_| Ok::<_, io::Error>(()))
        .unwrap();
    assert!(!killed.path().with_extension(BUILDING).exists());
    assert!(running.path().with_extension(BUILDING).exists());
}

#[test]
fn or_build_removes_entries_of_its_kind_that_were_not_used_for_long() {
    let (_dir, cache) = cache();
    let build = |value: &str, expected: Duration| {
        let entry = cache.entry("thing", &key(value)).describe(value, expected);
        entry
            .or_build(|dir| fs::write(dir.join("file"), value))
            .unwrap()
    };
    let age = |path: &Path, days: u64| {
        let lock = open_lock(&path.with_extension(LOCK)).unwrap();
        lock.set_modified(SystemTime::now() - Duration::from_hours(24 * days))
            .unwrap();
    };
    let (old, fresh, used) = (
        build("old", Duration::ZERO),
        build("fresh", Duration::ZERO),
        build("used", Duration::ZERO),
    );
    age(&old, 3);
    age(&used, 3);
    build("used", Duration::ZERO);

    build("slow", Duration::from_mins(10));
    assert!(old.exists());
    build("other", Duration::ZERO);
    assert!(!old.exists() && fresh.exists() && used.exists());
}

#[test]
fn key_split_of_values_changes_it() {
    let mut joined = Key::new();
    joined.text("a", "bc");
    let mut split = Key::new();
    split.text("ab", "c");
    assert_ne!(joined.hex(), split.hex());
    assert_eq!(joined.hex().len(), 64);
}

#[test]
fn key_tree_changes_with_name_mode_bytes_and_link_but_not_with_time() {
    let dir = tempfile::tempdir().unwrap();
    let tree_key = || {
        let mut key = Key::new();
        key.tree("tree", dir.path()).unwrap();
        key.hex()
    };
    let file = dir.path().join("sub/file");
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(&file, "one").unwrap();
    std::os::unix::fs::symlink("file", dir.path().join("sub/link")).unwrap();
    let mut seen = vec![tree_key()];

    fs::File::open(&file)
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(seen[0], tree_key());

    fs::write(&file, "two").unwrap();
    seen.push(tree_key());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    seen.push(tree_key());
    fs::rename(&file, dir.path().join("sub/other")).unwrap();
    seen.push(tree_key());
    fs::remove_file(dir.path().join("sub/link")).unwrap();
    std::os::unix::fs::symlink("other", dir.path().join("sub/link")).unwrap();
    seen.push(tree_key());
    fs::create_dir(dir.path().join("empty")).unwrap();
    seen.push(tree_key());

    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count);
}

#[test]
fn key_missing_file_names_it() {
    let error = Key::new()
        .file("input", Path::new("/nonexistent/input"))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.to_string(), "read build input /nonexistent/input");
}
