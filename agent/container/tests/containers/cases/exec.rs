//! Processes that come later into a container that runs.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;

use agent_container::{Container, ContainerStdio, ExecError, ParseError, parse_process};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::process::profile;
use crate::fixture::{Host, Outcome, pids, read_until, wait};

/// A container that runs until it is killed, and its output.
fn sleeper(host: &Host, spec: &Value) -> (Container, File) {
    let (container, reader) = host.create("a", spec).unwrap();
    container.init().start().unwrap();
    (container, reader)
}

/// Reaps in the order of the ends: an init's waits until the others are reaped.
pub fn end(container: &Container) {
    container.delete().unwrap();
    let init = Pid::from_raw(container.init().pid());
    let killed = WaitStatus::Signaled(init, Signal::SIGKILL, false);
    while waitpid(None, None).unwrap() != killed {}
}

fn error_of(made: Result<impl Sized, ExecError>) -> ExecError {
    made.err().expect("an error")
}

pub fn exec_joins(host: &Host) {
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
    let links = kinds.map(|kind| format!("link /proc/self/ns/{kind}"));
    let mut lines: Vec<_> = links.iter().map(String::as_str).collect();
    let mut spec = host.spec("a", &[lines.as_slice(), &["sleep"]].concat());
    spec["hostname"] = json!("inside");
    let (container, mut reader) = sleeper(host, &spec);
    // The last of what it prints; its own line is complete with the next read.
    let mut output = read_until(&mut reader, "ns/uts\n");
    if !output.ends_with("]\n") {
        output += &read_until(&mut reader, "]\n");
    }
    let of_init = Outcome {
        output,
        status: std::process::ExitStatus::default(),
        warnings: Vec::new(),
    };
    lines.extend([
        "cat /proc/self/cgroup",
        "pid",
        "descriptors",
        "ls /",
        "exit 42",
    ]);
    let process = Host::process(&spec, &lines);
    let (exec, mut reader, _) = Host::exec(&container, &process).unwrap();
    // In the container's cgroup before it is started.
    let mut both = pids(&container, 2);
    both.sort_unstable();
    assert_eq!(both, [container.init().pid(), exec.pid()]);
    // While it waits it is the agent's program: nobody in there may look into it.
    let peeks = ["link /proc/2/exe", "link /proc/2/fd/0"];
    let peeked = Host::run_exec(&container, &Host::process(&spec, &peeks));
    assert_eq!(peeked.of(peeks[0]), format!("error {}", libc::EACCES));
    assert_eq!(peeked.of(peeks[1]), format!("error {}", libc::EACCES));
    exec.start().unwrap();
    let mut output = String::new();
    reader.read_to_string(&mut output).unwrap();
    let status = wait(exec.pid());
    let outcome = Outcome {
        output,
        status,
        warnings: Vec::new(),
    };
    for link in &links {
        assert_eq!(outcome.of(link), of_init.of(link));
        let own = fs::read_link(link.strip_prefix("link ").unwrap()).unwrap();
        assert_ne!(outcome.of(link), own.to_str().unwrap());
    }
    let cgroup = outcome.of("cat /proc/self/cgroup");
    assert!(cgroup.lines().any(|line| line == "0::/"), "{cgroup}");
    assert_eq!(outcome.of("pid"), "2");
    assert_eq!(outcome.of("descriptors"), "3");
    assert!(outcome.of("ls /").contains("payload"));
    assert_eq!(outcome.status.code(), Some(42));
    // Gone, and the container is as before.
    assert_eq!(pids(&container, 1), [container.init().pid()]);
    end(&container);
}

pub fn exec_identity(host: &Host) {
    let mut spec = host.spec("a", &["sleep"]);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]);
    spec["process"]["oomScoreAdj"] = json!(55);
    let (container, _reader) = sleeper(host, &spec);
    let lines = [
        "cat /proc/self/status",
        "cat /proc/self/limits",
        "cat /proc/self/oom_score_adj",
        "env",
        "cwd",
        "umask",
        "session",
        "pid",
    ];
    let files_of = |outcome: &Outcome| {
        let limits = outcome.of("cat /proc/self/limits");
        let files = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let soft = files.unwrap().split_whitespace().nth(3).unwrap();
        soft.to_owned()
    };

    let mut process = Host::process(&spec, &lines);
    process["user"] = json!({"uid": 1000, "gid": 7, "umask": 0o77, "additionalGids": [9, 8]});
    process["capabilities"] = json!({
        "bounding": ["CAP_NET_RAW", "CAP_KILL"],
        "permitted": ["CAP_NET_RAW"], "inheritable": ["CAP_NET_RAW"],
        "effective": ["CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"],
    });
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 44, "hard": 45}]);
    process["oomScoreAdj"] = json!(321);
    process["noNewPrivileges"] = json!(false);
    process["cwd"] = json!("/dev/shm");
    process["env"] = json!(["A=b", "PATH=/bin"]);
    process["selinuxLabel"] = json!("some:label");
    let outcome = Host::run_exec(&container, &process);
    let status = outcome.of("cat /proc/self/status");
    for line in [
        "Uid:\t1000\t1000\t1000\t1000",
        "Gid:\t7\t7\t7\t7",
        "Groups:\t8 9",
        "NoNewPrivs:\t0",
        "CapInh:\t0000000000002000",
        "CapPrm:\t0000000000002000",
        "CapEff:\t0000000000002000",
        "CapBnd:\t0000000000002020",
        "CapAmb:\t0000000000002000",
        "SigBlk:\t0000000000000000",
    ] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert_eq!(files_of(&outcome), "44");
    assert_eq!(outcome.of("cat /proc/self/oom_score_adj"), "321");
    assert_eq!(outcome.of("env"), "A=b HOME=/ PATH=/bin");
    assert_eq!(outcome.of("cwd"), "/dev/shm");
    assert_eq!(outcome.of("umask"), "77");
    assert_eq!(outcome.of("session"), outcome.of("pid"));
    assert_eq!(
        outcome.warnings,
        ["process.selinuxLabel has no effect in the guest"]
    );

    // What it does not say is the container's.
    let mut process = Host::process(&spec, &lines);
    for field in ["capabilities", "rlimits", "oomScoreAdj"] {
        process.as_object_mut().unwrap().remove(field);
    }
    let outcome = Host::run_exec(&container, &process);
    let status = outcome.of("cat /proc/self/status");
    assert!(status.contains("CapEff:\t00000000a80425fb"), "{status}");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert_eq!(files_of(&outcome), "99");
    assert_eq!(outcome.of("cat /proc/self/oom_score_adj"), "55");
    end(&container);
}

pub fn exec_seccomp(host: &Host) {
    let swapoff = format!("syscall {}", libc::SYS_swapoff);
    let lines = [swapoff.as_str(), "syscall 9999", "cat /proc/self/status"];
    let mut spec = host.spec("a", &["sleep"]);
    spec["linux"]["seccomp"] = profile();
    let (container, _reader) = sleeper(host, &spec);
    for no_new_privileges in [true, false] {
        let mut process = Host::process(&spec, &lines);
        process["noNewPrivileges"] = json!(no_new_privileges);
        let outcome = Host::run_exec(&container, &process);
        assert_eq!(outcome.of(&swapoff), format!("error {}", libc::EPERM));
        assert_eq!(
            outcome.of("syscall 9999"),
            format!("error {}", libc::ENOSYS)
        );
        assert!(outcome.of("cat /proc/self/status").contains("Seccomp:\t2"));
    }
    end(&container);
}

pub fn exec_terminal(host: &Host) {
    let spec = host.spec("a", &["sleep"]);
    let (container, _reader) = sleeper(host, &spec);
    let lines = [
        "terminal",
        "write /dev/tty to-the-tty",
        "echo-line",
        "terminal",
        "exit 5",
    ];
    let mut process = Host::process(&spec, &lines);
    process["terminal"] = json!(true);
    process["consoleSize"] = json!({"height": 33, "width": 101});
    process["user"] = json!({"uid": 1000, "gid": 1000});
    let error = error_of(Host::exec(&container, &process));
    assert!(matches!(error, ExecError::Stdio { terminal: true }));

    let asked = parse_process(process.to_string().as_bytes()).unwrap();
    let (exec, _) = container.exec(&asked, ContainerStdio::Terminal).unwrap();
    let mut console = File::from(exec.take_console().unwrap());
    exec.start().unwrap();
    let output = read_until(&mut console, "to-the-tty");
    assert!(output.contains("== terminal\r\n1 33x101\r\n"), "{output}");
    assert_eq!(wait_for_line(&mut console, &exec), "1 44x55");
    assert_eq!(wait(exec.pid()).code(), Some(5));
    end(&container);
}

/// Resizes the terminal while the other side waits for a line; what it then says of it.
fn wait_for_line(console: &mut File, exec: &agent_container::Process) -> String {
    use std::io::Write;
    exec.resize_terminal(44, 55).unwrap();
    console.write_all(b"go\n").unwrap();
    let output = read_until(console, "55\r\n");
    let line = output.lines().rfind(|line| line.contains('x'));
    line.unwrap().trim().to_owned()
}

pub fn exec_refusals(host: &Host) {
    let spec = host.spec("a", &["sleep"]);
    let (container, _reader) = sleeper(host, &spec);
    let good = Host::process(&spec, &["exit 0"]);
    let fails = |field: &str, value: Value, expected: &str| {
        let mut process = good.clone();
        process[field] = value;
        let error = error_of(Host::exec(&container, &process)).to_string();
        assert!(error.contains(expected), "{field}: {error}");
        // Nothing of it is left.
        loop {
            let left = container.pids().unwrap();
            if left == [container.init().pid()] {
                break;
            }
            std::thread::yield_now();
        }
    };
    let missing = "exec: \"no-such\": executable file not found in $PATH";
    fails("args", json!(["no-such"]), missing);
    let missing = "exec: \"/no/such\": stat /no/such: no such file or directory";
    fails("args", json!(["/no/such"]), missing);
    fails("args", json!([]), "process.args");
    fails("cwd", json!("/no/such"), "working directory /no/such");
    fails("cwd", json!("relative"), "process.cwd");
    fails(
        "scheduler",
        json!({"policy": "SCHED_FIFO"}),
        "process.scheduler",
    );
    fails(
        "ioPriority",
        json!({"class": "IOPRIO_CLASS_RT", "priority": 8}),
        "process.ioPriority.priority",
    );
    fails("oomScoreAdj", json!(4000), "process.oomScoreAdj");
    let mut unknown = good.clone();
    unknown["newInTwoYears"] = json!(1);
    match parse_process(unknown.to_string().as_bytes()) {
        Err(ParseError::Unsupported(refused)) => {
            assert_eq!(refused.field, "process.newInTwoYears");
        }
        other => panic!("{other:?}"),
    }
    end(&container);
}

pub fn exec_needs_a_running_container(host: &Host) {
    // As runc: a container that is created and not started yet takes one.
    let spec = host.spec("a", &["exit 0"]);
    let (container, _reader) = host.create("a", &spec).unwrap();
    let process = Host::process(&spec, &["exit 7"]);
    let outcome = Host::run_exec(&container, &process);
    assert_eq!(outcome.status.code(), Some(7));
    container.init().start().unwrap();
    wait(container.init().pid());
    let error = error_of(Host::exec(&container, &process));
    assert!(matches!(error, ExecError::NotRunning), "{error:?}");
    container.delete().unwrap();
    let error = error_of(Host::exec(&container, &process));
    assert!(matches!(error, ExecError::NotRunning), "{error:?}");
}

pub fn exec_ends_with_its_container(host: &Host) {
    let spec = host.spec("a", &["sleep"]);
    for by_delete in [true, false] {
        let (container, _reader) = sleeper(host, &spec);
        let (running, mut output, _) =
            Host::exec(&container, &Host::process(&spec, &["sleep"])).unwrap();
        running.start().unwrap();
        let (waiting, mut other, _) =
            Host::exec(&container, &Host::process(&spec, &["sleep"])).unwrap();
        if by_delete {
            container.delete().unwrap();
        } else {
            container.init().signal(libc::SIGKILL).unwrap();
        }
        // First the execs: the end of the init waits for theirs to be reaped.
        for exec in [&running, &waiting] {
            assert_eq!(wait(exec.pid()).signal(), Some(libc::SIGKILL));
        }
        assert_eq!(wait(container.init().pid()).signal(), Some(libc::SIGKILL));
        assert_eq!(output.read(&mut [0]).unwrap(), 0);
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
        container.delete().unwrap();
    }
    // One that was never started ends with its creator's interest.
    let (container, _reader) = sleeper(host, &spec);
    let (exec, ..) = Host::exec(&container, &Host::process(&spec, &["sleep"])).unwrap();
    let pid = exec.pid();
    drop(exec);
    assert_eq!(wait(pid).code(), Some(1));
    end(&container);
}
