//! Volumes: one source is one, whoever has it and how, and is as on the host.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("volume_of_a_pod_is_one_whoever_has_it", shared),
    ("volume_is_as_on_the_host", as_on_the_host),
    ("volume_follows_the_hosts_mounts", follows_mounts),
    ("volumes_as_the_kubelet_makes_them", kubelets),
    ("volume_sources_without_meaning_in_a_vm", refused),
    ("image_of_100_layers_runs", many_layers),
    ("volume_whose_server_hangs_holds_up_nobody_else", hanging),
];

fn follows_mounts(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let printed = lab.succeed(&format!(
        r#"{WORDS}
set -e
rm -rf /tmp/followed; mkdir -p /tmp/followed/early /tmp/followed/late; cd /tmp/followed
mount -t tmpfs early early; echo early >early/file
ctr run --detach --null-io --mount type=bind,src=/tmp/followed,dst=/v,options=rbind:rslave \
    --runtime {BULKHEAD} {IMAGE} follower sleep 100000
count=0
see() {{ count=$((count + 1)); ctr task exec --exec-id see-$count follower cat /v/$1/file 2>&1 </dev/null || true; }}
# The guest may know a name for a second.
until_seen() {{ for n in 1 2 3 4 5; do case $(see $1) in *"$2"*) echo "$1: $2"; return;; esac; moment; done; echo "$1: $(see $1)"; }}
until_seen early early
mount -t tmpfs late late; echo late >late/file; mkdir late/inner
mount -t tmpfs inner late/inner; echo inner >late/inner/file
until_seen late late
until_seen late/inner inner
umount late/inner; umount early
until_seen late/inner 'No such file'
until_seen early 'No such file'
until_seen late late
umount late
ctr task kill --signal KILL follower; ctr task delete --force follower >/dev/null 2>&1 || true; ctr container delete follower"#
    ))?;
    ensure!(
        printed
            == "early: early\nlate: late\nlate/inner: inner\nlate/inner: No such file\n\
                early: No such file\nlate: late",
        "{printed}"
    );
    lab.expect_nothing_left(&before)
}

/// Functions of the scripts.
const WORDS: &str = r#"
# A process of its own would look like something left behind.
moment() { read -rt 0.1 <> <(:) || true; }
# Waits until a file has a line of these words.
until_said() { until grep -q "$2" $1 2>/dev/null; do moment; done; }
"#;

/// Four containers: a `subPath`, then all of the volume read-only, then all of it
/// writable, then another `subPath`. Each `subPath` is a mount of its own on the
/// host, as kubelet makes it.
const POD: &str = r#"
set -e
rm -rf /tmp/vol; mkdir -p /tmp/vol/data/sub /tmp/vol/data/other /tmp/vol/p1 /tmp/vol/p2; cd /tmp/vol
mount --bind data/sub p1; mount --bind data/other p2
echo a >data/sub/map; : >data/sub/lock; : >data/other/lock
echo '{"metadata": {"name": "vol", "namespace": "e2e", "uid": "vol", "attempt": 0},
  "log_directory": "/tmp/vol/logs", "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}}}' >pod.json
pod=$(crictl runp --runtime bulkhead pod.json)
container() {
    echo '{"metadata": {"name": "'$1'", "attempt": 0}, "image": {"image": "docker.io/library/busybox:latest"},
      "command": ["sleep", "100000"], "log_path": "'$1'.log", "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}},
      "mounts": [{"container_path": "/v", "host_path": "/tmp/vol/'$2'", "readonly": '$3'}]}' >$1.json
    local id=$(crictl create $pod $1.json pod.json); crictl start $id >/dev/null; echo $id
}
sub=$(container sub p1 false); ro=$(container ro data true)
crictl exec $ro touch /v/no 2>/dev/null && echo "ro: written"
rw=$(container rw data false); other=$(container other p2 false)
"#;

/// What they do with it.
const SHARED: &str = r#"
crictl exec $ro touch /v/no 2>/dev/null && echo "ro: written"
crictl exec $rw touch /v/yes || echo "rw: not written"
[ -e data/yes ] || echo "not on the host"

meets() { # one's socket, another's path of it
    crictl exec $1 volume-probe listen $2 >heard & listener=$!
    until crictl exec $3 volume-probe connect $4 >answer 2>/dev/null; do moment; done
    wait $listener; echo "$5: $(cat heard answer | xargs)"
}
meets $sub /v/one $ro /v/sub/one "subPath and read-only"
meets $rw /v/sub/two $sub /v/two "writable and subPath"
meets $rw /v/other/three $other /v/three "writable and another subPath"

excludes() { # holder, its lock, another, its path of it
    rm -f held input; mkfifo input
    crictl exec -i $1 volume-probe hold $2 <input >held & holder=$!
    exec 7>input; until_said held held
    echo "fcntl: $(crictl exec $3 volume-probe try $4)"
    exec 7>&-; wait $holder
    echo "fcntl: $(crictl exec $3 volume-probe try $4)"
}
excludes $sub /v/lock $rw /v/sub/lock
excludes $rw /v/other/lock $other /v/lock

rm -f held input; mkfifo input
crictl exec -i $sub flock /v/lock sh -c 'echo held; cat' <input >held & holder=$!
exec 7>input; until_said held held
crictl exec $ro flock -n /v/sub/lock true 2>/dev/null && echo "flock: free" || echo "flock: held"
exec 7>&-; wait $holder
crictl exec $ro flock -n /v/sub/lock true && echo "flock: free"

crictl exec $ro volume-probe watch /v/sub/map b >seen & watcher=$!
until_said seen mapped
crictl exec $sub volume-probe set /v/map b
wait $watcher; echo "map: $(xargs <seen)"
awk '$5 ~ "/share/volumes/" && $4 ~ "/tmp/vol|^/vol|/data" { print "volume: " $4 }' /proc/self/mountinfo | sort
"#;

fn shared(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.run(&format!("{WORDS}{POD}{SHARED}"))?;
    let end = "crictl rmp -fa >/dev/null; umount /tmp/vol/p1 /tmp/vol/p2; rm -rf /tmp/vol";
    let ended = lab.succeed(end);
    let (said, mounts): (Vec<&str>, Vec<&str>) = shown
        .stdout
        .lines()
        .partition(|line| !line.starts_with("volume: "));
    let wanted = [
        "subPath and read-only: ping pong",
        "writable and subPath: ping pong",
        "writable and another subPath: ping pong",
        "fcntl: held",
        "fcntl: free",
        "fcntl: held",
        "fcntl: free",
        "flock: held",
        "flock: free",
        "map: mapped seen",
    ];
    ensure!(said == wanted, "{shown:#?}");
    // The one that was there before what it lies in, and that: nothing twice.
    ensure!(mounts.len() == 2, "{mounts:?}");
    ended?;
    lab.expect_nothing_left(&before)
}

/// On the host, and a container that has all of it.
const KINDS: &str = r"
rm -rf /tmp/kinds; mkdir -p /tmp/kinds/{dir,ro,nested/below}; cd /tmp/kinds
mount -t tmpfs below nested/below; echo below >nested/below/file
echo single >file; echo content >dir/target; ln -s target dir/link; ln -s /etc/passwd dir/outside
chown 1234:5678 dir/target; chmod 4640 dir/target
setfattr -n user.colour -v blue dir/target
echo by acl >dir/acl; chmod 600 dir/acl; setfacl -m u:33:r dir/acl
mknod dir/block b 7 0; mknod dir/null c 1 3; chmod 666 dir/block dir/null
nerdctl run -d --pull never --runtime io.containerd.bulkhead.v2 --name kinds --shm-size 3m --tmpfs /t:size=1m \
    -v /tmp/kinds/dir:/dir -v /tmp/kinds/ro:/ro:ro -v /tmp/kinds/nested:/nested -v /tmp/kinds/file:/file \
    docker.io/library/busybox:latest sh -c '
        until [ -e /dir/late ]; do sleep 0.1; done; echo $EPOCHREALTIME >/dir/seen
        until grep -q new /dir/target; do sleep 0.1; done; echo $EPOCHREALTIME >/dir/read
        sleep 100000' >/dev/null || exit 1
";

/// What the container sees of it: no ACL, as docs/operations.md says.
const SEEN: &str = r#"
nerdctl exec kinds sh -c '
    stat -c "%u:%g %a" /dir/target; readlink /dir/link; cat /dir/link; cat /dir/outside | head -n 1
    getfattr --only-values -n user.colour /dir/target; echo
    getfattr --only-values -n system.posix_acl_access /dir/acl | wc -c
    su -s /bin/sh nobody -c "cat /dir/acl" 2>/dev/null || echo acl keeps out
    cat /file; echo more >>/file; cat /nested/below/file
    echo x 2>/dev/null >/ro/x || echo read-only
    cat /dir/block 2>&1; cat /dir/null 2>&1
    df -k /t /dev/shm | awk "NR > 1 { print \$2 }"
    head -c 2000000 /dev/zero 2>/dev/null >/t/x || echo full
    echo by guest >/dir/guest; chown 42:43 /dir/guest; chmod 4751 /dir/guest
    setfattr -n user.shape -v round /dir/guest
    mkdir /nested/below/made'
cat file; stat -c '%u:%g %a' dir/guest; getfattr --only-values -n user.shape dir/guest; echo
ls nested/below
"#;

const SEEN_WANTED: &str = "\
1234:5678 4640
target
content
root:x:0:0:root:/root:/bin/sh
blue
0
acl keeps out
single
below
read-only
cat: can't open '/dir/block': Permission denied
cat: can't open '/dir/null': Permission denied
1024
3072
full
single
more
42:43 4751
round
file
made";

/// What the host changes is there at the latest after a second, the time for
/// which the guest keeps names and attributes; it must be two.
const CHANGED: &str = r#"
# The guest has looked in vain many times.
late() { awk "BEGIN { print $(cat $2) - $1 }"; }
now=$EPOCHREALTIME; touch dir/late; until [ -s dir/seen ]; do moment; done; late $now dir/seen
now=$EPOCHREALTIME; echo new >>dir/target; until [ -s dir/read ]; do moment; done; late $now dir/read
"#;

fn as_on_the_host(lab: &Lab) -> Result<()> {
    lab.make_bridge()?;
    let before = lab.resources()?;
    let outcome = lab
        .succeed(KINDS)
        .and_then(|_| lab.succeed(&format!("cd /tmp/kinds; {SEEN}")))
        .and_then(|seen| {
            Ok((
                seen,
                lab.succeed(&format!("{WORDS} cd /tmp/kinds; {CHANGED}"))?,
            ))
        });
    let ended = lab.succeed(
        "nerdctl rm -f kinds >/dev/null; umount /tmp/kinds/nested/below; rm -rf /tmp/kinds",
    );
    let (seen, changed) = outcome?;
    ensure!(seen == SEEN_WANTED, "{seen}\nwanted:\n{SEEN_WANTED}");
    println!("changes on the host are seen after: {changed} s");
    let emulation = f64::from(lab.node().time_factor() > 1);
    for seconds in changed.lines() {
        let seconds: f64 = seconds.parse()?;
        // A look takes a busy emulated guest a second and more.
        ensure!(
            seconds < 2.0 + 4.0 * emulation,
            "a change was seen late: {changed}"
        );
    }
    ended?;
    lab.expect_nothing_left(&before)
}

fn refused(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let mount = |source: &str| {
        format!(
            "ctr run --rm --runtime {BULKHEAD} --mount type=bind,src={source},dst=/x,options=rbind {IMAGE} refused true"
        )
    };
    lab.fails_saying("Unix socket", &mount("/run/containerd/containerd.sock"))?;
    lab.fails_saying("block device", &mount("/dev/vda"))?;
    lab.fails_saying("character device", &mount("/dev/null"))?;
    // In a directory, it is there and leads nowhere.
    let shown = lab.run(&format!(
        "{WORDS} mkdir -p /tmp/with-socket; cd /tmp/with-socket
         socat UNIX-LISTEN:/tmp/with-socket/host,unlink-early - </dev/null & listener=$!
         until [ -S host ]; do moment; done
         ctr run --rm --runtime {BULKHEAD} --mount type=bind,src=/tmp/with-socket,dst=/x,options=rbind:ro \\
             {IMAGE} socket volume-probe connect /x/host
         kill $listener; rm -rf /tmp/with-socket"
    ))?;
    ensure!(shown.stderr.contains("Connection refused"), "{shown:#?}");
    lab.expect_nothing_left(&before)
}

/// The test image with 99 layers on top, each with a file.
const LAYERS: &str = r#"
set -e
rm -rf /tmp/layers; mkdir -p /tmp/layers/tree; cd /tmp/layers
# Without --local, ctr can end before all of the archive is written.
ctr images export --local base.tar docker.io/library/busybox:latest
tar xf base.tar
field() { grep -o "\"$1\":[^]}]*" manifest.json | head -n 1 | cut -d: -f2- | tr -d '[]"' ; }
config=$(field Config | cut -d, -f1); layers="\"$(field Layers)\""
for n in $(seq 99); do
    echo $n >tree/layer$n; tar cf layer$n.tar -C tree layer$n; rm tree/layer$n
    ids="$ids,\"sha256:$(sha256sum <layer$n.tar | cut -d' ' -f1)\""; layers="$layers,\"layer$n.tar\""
done
sed "s/\(\"diff_ids\":\[[^]]*\)\]/\1$ids]/" $config >many.json
echo "[{\"Config\":\"many.json\",\"RepoTags\":[\"docker.io/library/many:latest\"],\"Layers\":[$layers]}]" >manifest.json
rm -rf oci-layout index.json
tar cf many.tar *
ctr images import many.tar >/dev/null
"#;

fn many_layers(lab: &Lab) -> Result<()> {
    lab.succeed(LAYERS)?;
    let many = "docker.io/library/many:latest";
    let run = RUN.replace(IMAGE, many);
    let outcome = lab.succeed(&format!(
        "{run} many sh -c 'ls / | grep -c ^layer; cat /layer1 /layer99; echo x >/layer50 && cat /layer50'"
    ));
    lab.succeed(&format!("ctr images rm --sync {many}; rm -rf /tmp/layers"))?;
    let shown = outcome?;
    ensure!(shown == "99\n1\n99\nx", "{shown}");
    Ok(())
}

/// A file system whose server answers nothing but what its root is; and a pod
/// with one container that has it and one that has not.
const HANGING: &str = r#"
set -e
rm -rf /tmp/hang; mkdir -p /tmp/hang/fs /tmp/hang/works; cd /tmp/hang
modprobe fuse || true
mkdir image; ctr images mount docker.io/library/busybox:latest image >/dev/null
cp image/usr/local/bin/hang-fs .
ctr images unmount --rm image >/dev/null
setsid ./hang-fs fs >told 2>&1 </dev/null &
until_said told .; grep -q mounted told || { cat told; exit 1; }
echo '{"metadata": {"name": "hang", "namespace": "e2e", "uid": "hang", "attempt": 0},
  "log_directory": "/tmp/hang/logs", "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}}}' >pod.json
pod=$(crictl runp --runtime bulkhead pod.json)
container() {
    echo '{"metadata": {"name": "'$1'", "attempt": 0}, "image": {"image": "docker.io/library/busybox:latest"},
      "command": ["sleep", "100000"], "log_path": "'$1'.log", "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 1, "ipc": 0}}},
      "mounts": [{"container_path": "/v", "host_path": "/tmp/hang/'$2'"}]}' >$1.json
    local id=$(crictl create $pod $1.json pod.json); crictl start $id >/dev/null; echo $id
}
waits=$(container waits fs); works=$(container works works)
"#;

/// More requests than a file server has threads.
const WAITING: &str = r#"
crictl exec $waits sh -c 'for n in $(seq 40); do cat /v/file$n >/dev/null 2>&1 </dev/null & done; sleep 1; echo waiting'
crictl exec $works sh -c 'echo written >/v/file; cat /v/file; ls /bin | grep -c "^cat$"; dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null; stat -c %s /big'
late=$(container late works); crictl exec $late cat /v/file
crictl rm -f $late >/dev/null && echo "late removed"
crictl rm -f $works >/dev/null && echo "works removed"
"#;

const WAITING_WANTED: &str = "\
waiting
written
1
8388608
written
late removed
works removed";

fn hanging(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let outcome = lab.run(&format!("{WORDS}{HANGING}{WAITING}"));
    // A source that cannot even be looked at fails its container, and says so.
    let silent = lab.run(&format!(
        "ctr run --rm --runtime {BULKHEAD} --mount type=bind,src=/tmp/hang/fs/sub,dst=/x,options=rbind {IMAGE} silent true"
    ));
    let ended = lab.succeed(
        "pkill -x hang-fs; crictl rmp -fa >/dev/null; umount /tmp/hang/fs; rm -rf /tmp/hang",
    );
    let outcome = outcome?;
    ensure!(outcome.stdout == WAITING_WANTED, "{outcome:#?}");
    let silent = silent?;
    ensure!(
        silent.code != 0 && silent.stderr.contains("does not answer"),
        "{silent:#?}"
    );
    ended?;
    lab.expect_nothing_left(&before)
}

/// A `configMap` or `secret` with many entries, swapped as the kubelet's atomic writer
/// does it (kubernetes, `pkg/volume/util/atomic_writer.go`), an `emptyDir` in memory with
/// a size, and one on disk.
const KUBELETS: &str = r#"
set -e
rm -rf /tmp/kubelet; mkdir -p /tmp/kubelet/config /tmp/kubelet/memory /tmp/kubelet/disk /tmp/kubelet/logs; cd /tmp/kubelet
mount -t tmpfs -o size=8m tmpfs memory
trap 'crictl rmp -fa >/dev/null; cd /; umount /tmp/kubelet/memory; rm -rf /tmp/kubelet' EXIT
write() { # a name, a number of entries and their content
    mkdir config/..$1
    for n in $(seq $2); do echo $3 >config/..$1/entry$n; done
    ln -s ..$1 config/..data_tmp
}
swap() { mv -T config/..data_tmp config/..data; }
write one COUNT first; swap
for n in $(seq COUNT); do ln -s ..data/entry$n config/entry$n; done
echo '{"metadata": {"name": "kubelet", "namespace": "e2e", "uid": "kubelet", "attempt": 0}, "log_directory": "/tmp/kubelet/logs", "linux": {}}' >pod.json
echo '{"metadata": {"name": "c"}, "image": {"image": "docker.io/library/busybox:latest"}, "command": ["sleep", "1000"], "log_path": "c.log",
  "mounts": [{"host_path": "/tmp/kubelet/config", "container_path": "/config", "readonly": true},
    {"host_path": "/tmp/kubelet/config/..data/entry1", "container_path": "/entry", "readonly": true},
    {"host_path": "/tmp/kubelet/memory", "container_path": "/memory"}, {"host_path": "/tmp/kubelet/disk", "container_path": "/disk"}],
  "linux": {}}' >c.json
pod=$(crictl runp --runtime bulkhead pod.json)
c=$(crictl create $pod c.json pod.json); crictl start $c >/dev/null
guest() { crictl exec $c sh -c "$1"; }
echo $(guest 'cat /config/entry*' | sort | uniq -c)
guest 'echo no >/config/entry1' 2>/dev/null || echo read-only
# In the guest, without a word of ours: until every entry is the new one.
crictl exec $c sh -c 'until [ "$(cat /config/entry1)" = second ]; do :; done; cut -d" " -f1 /proc/uptime; cat /config/entry* | sort | uniq -c | xargs' >told &
watcher=$!
write two COUNT second
guest 'cut -d" " -f1 /proc/uptime' >swapped; swap
rm -r config/..one
wait $watcher
echo $(sed -n 2p told)
[ "$(awk 'NR == FNR { at = $1; next } FNR == 1 { print ($1 - at < SECONDS) }' swapped told)" = 1 ] && echo in time || cat swapped told
# What was mounted by subPath stays what it was.
guest 'cat /entry'
rm config/entry2; for try in $(seq 100); do guest 'test -e /config/entry2' || break; sleep 0.1; done
guest 'ls -a /config | grep -cF ..one; test -e /config/entry2 || echo gone'
guest 'dd if=/dev/zero of=/memory/x bs=1M count=16 2>&1 | grep -o "No space left"; stat -c %s /memory/x'
guest 'echo kept >/disk/x'; cat disk/x
"#;

fn kubelets(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let count = if lab.soak() { 3000 } else { 200 };
    let script = KUBELETS
        .replace("COUNT", &count.to_string())
        .replace("SECONDS", &(2 * lab.node().time_factor()).to_string());
    let shown = lab.succeed(&script)?;
    let wanted = format!(
        "{count} first\nread-only\n{count} second\nin time\nfirst\n0\ngone\nNo space left\n8388608\nkept"
    );
    ensure!(shown == wanted, "{shown}");
    lab.expect_nothing_left(&before)
}
