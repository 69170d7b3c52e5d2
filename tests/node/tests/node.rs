//! Nodes, really booted. Ignored by a plain `cargo test`, since the cache must be filled: `make node-test` runs them.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_node::{Node, NodeCommand, NodeError, NodeOptions, WindowSize};

fn up(name: &str) -> Node {
    Node::up(NodeOptions::new(name)).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn text(node: &Node, script: &str) -> String {
    let output = node.run(NodeCommand::script(script)).unwrap();
    assert!(
        output.status.success(),
        "{script}: {}\n{}",
        output.status,
        output.stderr_text()
    );
    output.stdout_text()
}

/// One node for all that does not harm it: starting one costs seconds.
#[test]
#[ignore = "boots nodes"]
fn node_commands_and_files() {
    let node = up("commands");
    streams_status_and_signal_are_apart(&node);
    bytes_arrive_whole(&node);
    full_stdout_does_not_hold_back_stderr(&node);
    reader_that_leaves_breaks_the_pipe(&node);
    dropped_process_is_killed(&node);
    timeout_kills_and_tells(&node);
    terminal_has_size_and_keys(&node);
    files_and_modes_survive_the_round_trip(&node);
    node_is_a_containerd_host(&node);
    node.down().unwrap();
}

fn streams_status_and_signal_are_apart(node: &Node) {
    let output = node
        .run(NodeCommand::script("echo out; echo err >&2; exit 42"))
        .unwrap();
    assert_eq!(
        (output.stdout_text().as_str(), output.stderr_text().as_str()),
        ("out", "err")
    );
    assert_eq!(
        (output.status.code(), output.status.signal()),
        (Some(42), None)
    );
    let output = node.run(NodeCommand::script("kill -KILL $$")).unwrap();
    assert_eq!(
        (output.status.code(), output.status.signal()),
        (None, Some(9))
    );

    let process = node.spawn(NodeCommand::new("sleep").arg("1000")).unwrap();
    process.signal(15).unwrap();
    assert_eq!(process.wait().unwrap().signal(), Some(15));

    let error = node.run(NodeCommand::new("no-such-program")).unwrap_err();
    assert!(
        chain(&error).contains("no-such-program"),
        "{}",
        chain(&error)
    );
}

fn bytes_arrive_whole(node: &Node) {
    let bytes: Vec<u8> = (0..3_000_000u32)
        .map(|number| (number * 7 + number / 256) as u8)
        .collect();
    let output = node
        .run(NodeCommand::new("cat").stdin(bytes.clone()))
        .unwrap();
    assert!(
        output.stdout == bytes,
        "{} bytes came back",
        output.stdout.len()
    );
}

fn full_stdout_does_not_hold_back_stderr(node: &Node) {
    let script = "head -c 5000000 /dev/zero & sleep 1; echo here >&2; wait";
    let mut process = node.spawn(NodeCommand::script(script)).unwrap();
    let mut line = [0; 5];
    process
        .stderr
        .take()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    assert_eq!(&line, b"here\n");
    let mut all = Vec::new();
    process
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut all)
        .unwrap();
    assert_eq!(all.len(), 5_000_000);
    assert!(process.wait().unwrap().success());
}

fn reader_that_leaves_breaks_the_pipe(node: &Node) {
    let mut process = node.spawn(NodeCommand::new("yes")).unwrap();
    drop(process.stdout.take());
    assert_eq!(process.wait().unwrap().signal(), Some(13));

    let mut process = node
        .spawn(NodeCommand::script("exec <&-; sleep 1000"))
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    let error = std::iter::repeat_with(|| stdin.write_all(&[0; 4096]))
        .find_map(Result::err)
        .unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

fn dropped_process_is_killed(node: &Node) {
    let process = node
        .spawn(NodeCommand::script("sleep 54321 & wait"))
        .unwrap();
    let pid = process.pid();
    drop(process);
    // Its end is an event in the node; `tail --pid` waits for it.
    text(
        node,
        &format!("timeout 60 tail --pid={pid} -f /dev/null; ! pgrep -f '[s]leep 54321'"),
    );
}

fn timeout_kills_and_tells(node: &Node) {
    let command = NodeCommand::script("echo so far; sleep 1000").timeout(Duration::from_secs(1));
    match node.run(command).unwrap_err() {
        NodeError::TimedOut { stdout, .. } => assert_eq!(stdout, "so far"),
        other => panic!("{other}"),
    }
}

fn terminal_has_size_and_keys(node: &Node) {
    let size = WindowSize {
        rows: 33,
        columns: 101,
    };
    let command =
        NodeCommand::script("tty; stty size; read x; stty size; echo ready; exec sleep 1000")
            .tty(size);
    let mut process = node.spawn(command).unwrap();
    let (mut stdin, mut stdout) = (
        process.stdin.take().unwrap(),
        process.stdout.take().unwrap(),
    );
    let mut seen = String::new();
    let mut until = |wanted: &str| {
        let mut byte = [0];
        while !seen.contains(wanted) {
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{seen}");
            seen.push(char::from(byte[0]));
        }
    };
    until("/dev/pts/");
    until("33 101");
    process
        .resize(WindowSize {
            rows: 10,
            columns: 20,
        })
        .unwrap();
    stdin.write_all(b"\n").unwrap();
    until("10 20");
    until("ready");
    // Ctrl-C.
    stdin.write_all(&[3]).unwrap();
    let status = process.wait().unwrap();
    assert_eq!(
        status.signal().or(status.code().map(|code| code - 128)),
        Some(2)
    );
}

fn files_and_modes_survive_the_round_trip(node: &Node) {
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/run"), b"#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("sub/run"), PermissionsExt::from_mode(0o750)).unwrap();
    std::os::unix::fs::symlink("sub/run", tree.join("link")).unwrap();
    node.push(&tree, "/srv/a/b".as_ref()).unwrap();
    assert_eq!(
        text(node, "stat -c %U:%a /srv/a/b/sub/run; /srv/a/b/link"),
        "root:750\nran"
    );
    let back = scratch.path().join("back");
    node.pull("/srv/a/b".as_ref(), &back).unwrap();
    assert_eq!(
        fs::read(back.join("link")).unwrap(),
        b"#!/bin/sh\necho ran\n"
    );
    assert_eq!(
        fs::metadata(back.join("sub/run"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o750
    );
    let error = node
        .pull("/nothing".as_ref(), &scratch.path().join("none"))
        .unwrap_err();
    assert!(
        error.to_string().contains("/nothing") || chain(&error).contains("nothing"),
        "{}",
        chain(&error)
    );
}

fn node_is_a_containerd_host(node: &Node) {
    assert_eq!(text(node, "hostname"), node.name());
    assert_eq!(
        text(node, "cat /sys/module/apparmor/parameters/enabled"),
        "Y"
    );
    assert_eq!(
        text(node, "test -c /dev/kvm && stat -f -c %T /sys/fs/cgroup"),
        "cgroup2fs"
    );
    assert!(text(node, "ctr version").contains("2.4.2"));
    assert!(text(node, "runc --version").starts_with("runc version 1.5.2\n"));
    let node_time: f64 = text(node, "date +%s.%N").parse().unwrap();
    let own = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    assert!((node_time - own).abs() < 30.0, "{node_time} {own}");
}

#[test]
#[ignore = "boots nodes"]
fn node_two_on_a_network_reach_each_other_and_differ() {
    let network = format!("test-{}", std::process::id());
    let options = |name| NodeOptions::new(name).network(&network);
    let (one, two) = (
        Node::up(options("one")).unwrap(),
        Node::up(options("two")).unwrap(),
    );
    let third = Node::up(options("three")).unwrap_err();
    assert!(
        chain(&third).contains("two nodes already"),
        "{}",
        chain(&third)
    );

    let address = one.shared_address().unwrap();
    text(&two, &format!("ping -c 1 -W 30 {address}"));
    let different = |script: &str| assert_ne!(text(&one, script), text(&two, script), "{script}");
    different("cat /sys/class/net/eth1/address");
    different("hostname");
    different("head -c 16 /dev/urandom | od -An -tx1");
    one.down().unwrap();
    two.down().unwrap();
}

#[test]
#[ignore = "boots nodes"]
fn node_product_is_mounted_and_a_clone_keeps_its_changes_to_itself() {
    let prefix = tempfile::tempdir().unwrap();
    fs::create_dir(prefix.path().join("bin")).unwrap();
    let tool = prefix.path().join("bin/hello");
    fs::write(&tool, "#!/bin/sh\necho hello\n").unwrap();
    fs::set_permissions(&tool, PermissionsExt::from_mode(0o755)).unwrap();
    let node = Node::up(NodeOptions::new("product").prefix(prefix.path())).unwrap();
    assert_eq!(
        text(
            &node,
            "hello; rm /opt/bulkhead/bin/hello; touch /opt/bulkhead/new"
        ),
        "hello"
    );
    node.down().unwrap();
    assert!(tool.exists() && !prefix.path().join("new").exists());
}

#[test]
#[ignore = "boots nodes"]
fn node_that_panics_is_told_with_its_console() {
    let node = up("panics");
    let before = Instant::now();
    let error = node
        .run(NodeCommand::script(
            "echo c >/proc/sysrq-trigger; sleep 1000",
        ))
        .unwrap_err();
    assert!(
        before.elapsed() < Duration::from_secs(5) * node.time_factor(),
        "{:?}",
        before.elapsed()
    );
    assert!(
        matches!(error, NodeError::Failed { .. }),
        "{}",
        chain(&error)
    );
    assert!(
        error.to_string().contains("sysrq triggered crash"),
        "{error}"
    );
    let verdict = node.down().unwrap_err();
    assert!(verdict.to_string().contains("panic"), "{verdict}");
}

#[test]
#[ignore = "boots nodes"]
fn node_kernel_complaint_fails_the_run() {
    let node = up("complains");
    let script = "echo '<4>WARNING: CPU: 0 PID: 1 at a test' >/dev/kmsg";
    // The watch may notice before the command has ended.
    let _ = node.run(NodeCommand::script(script));
    let verdict = node.down().unwrap_err();
    assert!(verdict.to_string().contains("WARNING: CPU: 0"), "{verdict}");
}

const HELPER: &str = "BULKHEAD_NODE_TEST_HELPER";

/// Not a test of its own: what `node_of_a_killed_process_ends` runs and kills.
#[test]
#[ignore = "boots nodes"]
fn helper_holds_a_node() {
    if std::env::var_os(HELPER).is_some() {
        let node = up("orphan");
        println!("holding {}", node.name());
        std::thread::sleep(Duration::from_secs(1000));
    }
}

#[test]
#[ignore = "boots nodes"]
fn node_of_a_killed_process_ends() {
    let mut helper = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "helper_holds_a_node", "--nocapture"])
        .env(HELPER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(helper.stdout.take().unwrap()).lines();
    let name = lines
        .find_map(|line| {
            line.unwrap()
                .split_once("holding ")
                .map(|(_, name)| name.to_owned())
        })
        .unwrap();
    let is_up = || {
        bulkhead_node::running()
            .unwrap()
            .iter()
            .any(|record| record.name == name)
    };
    assert!(is_up());
    helper.kill().unwrap();
    helper.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while is_up() {
        assert!(Instant::now() < deadline, "{name} is still up");
        std::thread::sleep(Duration::from_millis(50));
    }
}
