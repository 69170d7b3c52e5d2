//! Namespaces, `linux.sysctl`, `linux.seccomp`.

use serde_json::{Value, json};

use super::{add, any, own_pod, put, single};
use crate::matrix::Variation;

fn namespace(spec: &mut Value, kind: &str) {
    add(spec, "linux/namespaces", json!({"type": kind}));
}

fn without_namespace(spec: &mut Value, kind: &str) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.expect("the base has namespaces");
    namespaces.retain(|namespace| namespace["type"] != kind);
}

fn user_namespace(spec: &mut Value, mappings: &Value) {
    namespace(spec, "user");
    put(spec, "linux/uidMappings", mappings.clone());
    put(spec, "linux/gidMappings", mappings.clone());
}

fn sysctl(spec: &mut Value, key: &str, value: &str) {
    put(spec, &format!("linux/sysctl/{key}"), json!(value));
}

/// A profile that allows all but what `rules` say.
fn seccomp(spec: &mut Value, rules: &Value) {
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules});
    put(spec, "linux/seccomp", profile);
}

/// What programs and their set-up need, without some of the calls that the
/// checker tries. runc gives up where `getppid` is not among them.
const ALLOWED: &str = "access arch_prctl bind brk capget capset chdir chmod chown clock_getres \
    clock_gettime clock_nanosleep clone clone3 close close_range connect dup dup2 dup3 \
    epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 execve execveat exit exit_group \
    faccessat faccessat2 fchdir fchmod fchmodat fchown fchownat fcntl flock fork fstat fstatfs \
    fsync ftruncate futex get_mempolicy getcwd getdents getdents64 getegid geteuid getgid \
    getgroups getpgrp getpid getppid getrandom getresgid getresuid getrlimit getrusage getsockname \
    getsockopt gettid gettimeofday getuid getxattr ioctl ioprio_get kill lgetxattr link linkat \
    listen lseek lstat madvise memfd_create mkdir mkdirat mknod mknodat mmap mprotect mremap \
    munmap nanosleep newfstatat open openat openat2 personality pidfd_open pidfd_send_signal \
    pipe pipe2 poll ppoll prctl pread64 preadv prlimit64 pselect6 pwrite64 read readlink \
    readlinkat readv recvfrom recvmsg rename renameat renameat2 restart_syscall rmdir rseq \
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_setaffinity \
    sched_yield seccomp \
    select sendfile sendmsg sendto set_robust_list set_tid_address setgid setgroups setpgid \
    setresgid setresuid setrlimit setsid setsockopt setuid shutdown sigaltstack socket \
    socketpair stat statfs statx symlink symlinkat sysinfo tgkill umask uname unlink unlinkat \
    utimensat vfork wait4 waitid write writev";

pub const VARIATIONS: &[Variation] = &[
    single("linux.namespaces: no cgroup", |spec, _| {
        without_namespace(spec, "cgroup");
    }),
    single("linux.namespaces: no pid", |spec, _| {
        without_namespace(spec, "pid");
    }),
    single("linux.namespaces: no ipc", |spec, _| {
        without_namespace(spec, "ipc");
    }),
    single("linux.namespaces: no uts", |spec, _| {
        without_namespace(spec, "uts");
    }),
    single("linux.namespaces: no network", |spec, _| {
        without_namespace(spec, "network");
    }),
    single("linux.namespaces: no mount", |spec, _| {
        without_namespace(spec, "mount");
    }),
    own_pod("linux.namespaces: user", |spec, _| {
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        user_namespace(spec, &mappings);
    }),
    own_pod("linux.namespaces: user, in pieces", |spec, _| {
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 1000},
            {"containerID": 1000, "hostID": 200_000, "size": 70000}]);
        user_namespace(spec, &mappings);
        put(spec, "process/user/uid", json!(1000));
        put(spec, "process/user/gid", json!(1000));
    }),
    any("linux.timeOffsets", "time", |spec, _| {
        namespace(spec, "time");
        let offsets = json!({"monotonic": {"secs": 86400, "nanosecs": 5},
            "boottime": {"secs": 172_800}});
        put(spec, "linux/timeOffsets", offsets);
    }),
    any("linux.sysctl: network", "sysctl", |spec, _| {
        sysctl(spec, "net.ipv4.ip_unprivileged_port_start", "80");
        sysctl(spec, "net.ipv4.ping_group_range", "0 2147483647");
    }),
    any("linux.sysctl: ipc", "sysctl", |spec, _| {
        sysctl(spec, "kernel.shmmax", "1048576");
        sysctl(spec, "kernel.sem", "100 200 30 40");
        sysctl(spec, "fs.mqueue.msg_max", "20");
    }),
    single("linux.sysctl: of the whole kernel", |spec, _| {
        sysctl(spec, "vm.swappiness", "10");
    }),
    any("linux.seccomp: SCMP_ACT_ERRNO", "seccomp", |spec, _| {
        let rules = json!([{"names": ["getpgid"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["getsid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]);
        seccomp(spec, &rules);
    }),
    any("linux.seccomp: SCMP_ACT_KILL", "seccomp", |spec, _| {
        let rules = json!([{"names": ["getpgid"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["getsid"], "action": "SCMP_ACT_KILL_THREAD"},
            {"names": ["getppid"], "action": "SCMP_ACT_KILL"},
            {"names": ["sched_yield"], "action": "SCMP_ACT_TRAP"}]);
        seccomp(spec, &rules);
    }),
    any(
        "linux.seccomp: SCMP_ACT_TRACE and LOG",
        "seccomp",
        |spec, _| {
            let rules = json!([{"names": ["getpgid"], "action": "SCMP_ACT_TRACE"},
            {"names": ["getsid"], "action": "SCMP_ACT_LOG"}]);
            seccomp(spec, &rules);
        },
    ),
    any("linux.seccomp: an argument", "seccomp", |spec, _| {
        let rules = json!([{"names": ["sched_get_priority_max"], "action": "SCMP_ACT_ERRNO",
            "errnoRet": 5, "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]);
        seccomp(spec, &rules);
    }),
    any(
        "linux.seccomp: names what it allows",
        "seccomp",
        |spec, _| {
            let names: Vec<_> = ALLOWED.split_whitespace().collect();
            let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"},
                {"names": ["no_such_call"], "action": "SCMP_ACT_ALLOW"}]});
            put(spec, "linux/seccomp", profile);
        },
    ),
    any("linux.seccomp: flags", "seccomp", |spec, _| {
        let rules = json!([{"names": ["getpgid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7}]);
        seccomp(spec, &rules);
        let flags = json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]);
        put(spec, "linux/seccomp/flags", flags);
    }),
    single("linux.seccomp: listenerPath", |spec, _| {
        seccomp(
            spec,
            &json!([{"names": ["getpgid"], "action": "SCMP_ACT_NOTIFY"}]),
        );
        put(
            spec,
            "linux/seccomp/listenerPath",
            json!("/run/no-such-listener"),
        );
    }),
];
