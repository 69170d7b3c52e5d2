//! Fields of the OCI runtime specification, seen from inside a real guest.
//! docs/oci-support.md says which test is for which field; these are for what
//! the guest's kernel, the file server and the shim have a say in.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("oci_fields_of_a_process_have_their_effect", process),
    (
        "oci_user_namespace_works_on_the_hosts_files",
        user_namespace,
    ),
    ("oci_start_container_hooks_run_in_the_guest", hooks),
    ("oci_fields_that_cannot_work_are_refused_by_name", refusals),
];

/// The first id that the mapped container has.
const BASE: u32 = 100_000;

/// Makes the root file system that the specifications name, unless it is there,
/// and runs what follows.
fn with_rootfs(script: &str) -> String {
    format!(
        "root=/var/tmp/oci; if [ ! -d $root/plain ]; then
             mkdir -p $root/mounted
             ctr images mount {IMAGE} $root/mounted >/dev/null
             cp -a $root/mounted $root/plain; mkdir -p $root/plain/made $root/plain/copied; echo text >$root/plain/copied/f
             ctr images unmount --rm $root/mounted >/dev/null 2>&1 || umount $root/mounted
             cp -a $root/plain $root/mapped; chown -R {BASE}:{BASE} $root/mapped
         fi
         {script}"
    )
}

/// ctr's default specification with a root file system and a command.
fn specification(lab: &Lab, root: &str, command: &str) -> Result<Value> {
    let mut spec: Value = serde_json::from_str(&lab.succeed("ctr oci spec")?)?;
    spec["root"] = json!({"path": format!("/var/tmp/oci/{root}")});
    spec["process"]["args"] = json!(["sh", "-c", command]);
    spec["process"]["env"] = json!(["PATH=/usr/bin:/bin:/usr/sbin:/sbin"]);
    Ok(spec)
}

/// The script that runs a specification to its end as container `id`.
fn run(id: &str, spec: &Value) -> String {
    with_rootfs(&format!(
        "cat >$root/{id}.json <<'END'\n{spec}\nEND\n\
         ctr run --rm --runtime {BULKHEAD} --config $root/{id}.json {id}"
    ))
}

/// Runs it; each command of the container prints a line `name=value`.
fn values(lab: &Lab, id: &str, spec: &Value) -> Result<Value> {
    let before = lab.resources()?;
    let shown = lab.succeed(&run(id, spec))?;
    lab.expect_nothing_left(&before)?;
    let pairs = shown.lines().filter_map(|line| line.split_once('='));
    let pairs = pairs.map(|(name, value)| (name.to_owned(), Value::from(value.trim())));
    Ok(Value::Object(pairs.collect()))
}

fn expect(found: &Value, name: &str, wanted: &str) -> Result<()> {
    ensure!(found[name] == wanted, "{name} is not {wanted:?}: {found:#}");
    Ok(())
}

fn process(lab: &Lab) -> Result<()> {
    let mut spec = specification(
        lab,
        "plain",
        "stat=$(cat /proc/self/stat); set -- ${stat##*) }
         echo policy=$(shift 38; echo $1)
         echo machine=$(uname -m)
         echo domain=$(cat /proc/sys/kernel/domainname)
         echo umask=$(umask)
         echo groups=$(grep Groups /proc/self/status | cut -f2)
         echo offsets=$(grep -c 1000000 /proc/self/timens_offsets)
         echo uptime=$(test $(cut -d. -f1 /proc/uptime) -ge 2000000 && echo late)
         echo policy_nodes=$(grep -c 'bind' /proc/self/numa_maps)
         echo limit=$(sed -n 's/Max msgqueue size *//p' /proc/self/limits | awk '{print $2}')
         echo io=$(cat /sys/fs/cgroup/io.bfq.weight)
         echo copied=$(echo more >>/copied/f; cat /copied/f)
         echo remounted=$(grep -c ' /dev/shm .*size=8192k' /proc/self/mounts)
         echo shared=$(grep -c ' / / .*shared:' /proc/self/mountinfo)",
    )?;
    let process = &mut spec["process"];
    process["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    process["user"] = json!({"uid": 0, "gid": 0, "umask": 0o27, "additionalGids": [7, 8]});
    process["rlimits"] = json!([{"type": "RLIMIT_MSGQUEUE", "soft": 1_000_000, "hard": 2_000_000}]);
    spec["domainname"] = json!("example.org");
    let linux = &mut spec["linux"];
    linux["personality"] = json!({"domain": "LINUX32"});
    linux["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0"});
    linux["rootfsPropagation"] = json!("shared");
    linux["timeOffsets"] =
        json!({"monotonic": {"secs": 1_000_000}, "boottime": {"secs": 2_000_000}});
    linux["resources"]["cpu"] = json!({"shares": 2048});
    linux["resources"]["blockIO"] = json!({"weight": 500});
    let namespaces = linux["namespaces"].as_array_mut().context("namespaces")?;
    namespaces.push(json!({"type": "time"}));
    let mounts = spec["mounts"].as_array_mut().context("mounts")?;
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    mounts.push(json!({"destination": "/copied", "type": "tmpfs", "options": ["tmpcopyup"]}));
    mounts.push(
        json!({"destination": "/dev/shm", "type": "tmpfs", "options": ["remount", "size=8m"]}),
    );
    let found = values(lab, "oci-process", &spec)?;
    for (name, wanted) in [
        ("policy", "3"),
        ("machine", "i686"),
        ("domain", "example.org"),
        ("umask", "0027"),
        ("groups", "7 8"),
        ("offsets", "1"),
        ("uptime", "late"),
        ("limit", "2000000"),
        ("io", "default 500"),
        ("copied", "text more"),
        ("remounted", "1"),
        ("shared", "1"),
    ] {
        expect(&found, name, wanted)?;
    }
    let nodes = found["policy_nodes"].as_str().unwrap_or_default();
    ensure!(
        nodes != "0" && !nodes.is_empty(),
        "no memory policy: {found:#}"
    );
    Ok(())
}

fn user_namespace(lab: &Lab) -> Result<()> {
    let mut spec = specification(
        lab,
        "mapped",
        "echo map=$(cat /proc/self/uid_map)
         echo id=$(id -u):$(id -g)
         echo root=$(stat -c %u /bin)
         echo x >/made/f && echo file=$(stat -c %u:%g /made/f)
         echo null=$(echo x >/dev/null && echo works)
         echo proc=$(ls /proc/1/comm) sys=$(ls -d /sys/class)
         echo host=$(cat /proc/sys/kernel/hostname)
         echo port=$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)
         echo stdout=$(echo x >/dev/stderr 2>&1 && echo opens)
         echo node=$(mknod /made/n c 1 5 2>/dev/null || echo denied)
         echo cgroup=$(mkdir /sys/fs/cgroup/below && echo made)",
    )?;
    let maps = json!([{"containerID": 0, "hostID": BASE, "size": 65536}]);
    let linux = &mut spec["linux"];
    linux["uidMappings"] = maps.clone();
    linux["gidMappings"] = maps;
    linux["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "17"});
    let namespaces = linux["namespaces"].as_array_mut().context("namespaces")?;
    namespaces.push(json!({"type": "user"}));
    // What a cgroup needs to be the container's own to divide.
    if !namespaces.contains(&json!({"type": "cgroup"})) {
        namespaces.push(json!({"type": "cgroup"}));
    }
    spec["hostname"] = json!("mapped");
    let mounts = spec["mounts"].as_array_mut().context("mounts")?;
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    let found = values(lab, "oci-mapped", &spec)?;
    for (name, wanted) in [
        ("map", "0 100000 65536"),
        ("id", "0:0"),
        ("root", "0"),
        ("file", "0:0"),
        ("null", "works"),
        ("proc", "/proc/1/comm sys=/sys/class"),
        ("host", "mapped"),
        ("port", "17"),
        ("stdout", "opens"),
        ("node", "denied"),
        ("cgroup", "made"),
    ] {
        expect(&found, name, wanted)?;
    }
    let owner = lab.succeed("stat -c %u:%g /var/tmp/oci/mapped/made/f")?;
    ensure!(owner == format!("{BASE}:{BASE}"), "{owner}");
    Ok(())
}

fn hooks(lab: &Lab) -> Result<()> {
    let mut spec = specification(lab, "plain", "cat /made/state; echo; cat /made/kernel")?;
    let script = "cat >/made/state; uname -r >/made/kernel";
    spec["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 60},
    ]});
    let shown = lab.succeed(&run("oci-hooks", &spec))?;
    let (state, kernel) = shown.split_once('\n').context("two lines")?;
    let state: Value = serde_json::from_str(state).with_context(|| shown.clone())?;
    expect(&state, "id", "oci-hooks")?;
    expect(&state, "status", "created")?;
    let bundle = state["bundle"].as_str().unwrap_or_default();
    ensure!(bundle.ends_with("/default/oci-hooks"), "{state}");
    ensure!(kernel.ends_with("-bulkhead"), "{kernel}");

    spec["hooks"]["startContainer"][0]["args"][2] = json!("echo no; exit 7");
    let words = "startContainer hook /bin/sh ended with 7";
    lab.fails_saying(words, &run("oci-hooks", &spec))?;
    lab.succeed("ctr task delete -f oci-hooks; ctr container delete oci-hooks; true")?;
    Ok(())
}

/// Each in one VM's time, since the shim starts one before the guest is asked.
fn refusals(lab: &Lab) -> Result<()> {
    let device = json!([{"major": 8, "minor": 0, "rate": 1}]);
    let whole = specification(lab, "plain", "true")?;
    let changed = |pointer: &str, value: Value| -> Result<Value> {
        let mut spec = whole.clone();
        let (place, key) = pointer.rsplit_once('/').context("a pointer")?;
        let place = spec.pointer_mut(place).context("a place")?;
        place[key] = value;
        Ok(spec)
    };
    for (pointer, value, words) in [
        (
            "/linux/resources/blockIO",
            json!({"throttleReadBpsDevice": device}),
            "linux.resources.blockIO.throttleReadBpsDevice[0]: 8:0 is no block device of the guest",
        ),
        (
            "/linux/intelRdt",
            json!({"closID": "c"}),
            "linux.intelRdt: caches and memory bandwidth are the host's to divide",
        ),
    ] {
        lab.fails_saying(words, &run("oci-refused", &changed(pointer, value)?))?;
        lab.succeed("ctr container delete oci-refused; true")?;
    }
    Ok(())
}
