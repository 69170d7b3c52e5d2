//! Pods with a user namespace (`hostUsers: false`).

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[(
    "user_namespace_of_a_pod_maps_files_and_owns_the_pods_others",
    pod,
)];

/// Two containers of one pod, in its PID namespace, with one volume.
const POD: &str = r#"
set -e
rm -rf /tmp/users; mkdir -p /tmp/users/volume; cd /tmp/users
echo of-the-host >volume/there; chown 0:5 volume/there; chmod 640 volume/there
users() { # first id in the pod
    local ids='[{"host_id": 131072, "container_id": '$1', "length": 65536}]'
    echo '"security_context": {"capabilities": {"add_capabilities": ["NET_ADMIN", "SYS_PTRACE"]}, "namespace_options": {"network": 0, "pid": 0, "ipc": 0,
      "userns_options": {"mode": 0, "uids": '$ids', "gids": '$ids'}}}'
}
map='[{"host_id": 131072, "container_id": 0, "length": 65536}]'
pod() { # name, first id in the pod
    echo '{"metadata": {"name": "'$1'", "namespace": "e2e", "uid": "'$1'", "attempt": 0},
      "log_directory": "/tmp/users/logs",
      "linux": {"sysctls": {"kernel.shm_rmid_forced": "1"}, '"$(users $2)"'}}' >$1.json
    crictl runp --runtime bulkhead $1.json
}
pod=$(pod users 0)
container() { # name, program
    echo '{"metadata": {"name": "'$1'", "attempt": 0}, "image": {"image": "docker.io/library/busybox:latest"},
      "command": ["sh", "-c", "'"$2"'"], "log_path": "'$1'.log", "linux": {'"$(users 0)"'},
      "mounts": [{"container_path": "/volume", "host_path": "/tmp/users/volume", "uidMappings": '$map', "gidMappings": '$map'}]}' >$1.json
    local id=$(crictl create $pod $1.json users.json); crictl start $id >/dev/null; echo $id
}
one=$(container one 'exec sleep 2000')
two=$(container two 'exec tail -f /dev/null')
in_one() { crictl exec $one sh -c "$1"; }
echo "maps:" $(in_one 'cat /proc/self/uid_map /proc/self/gid_map')
[ "$(in_one 'readlink /proc/self/ns/user')" = "$(crictl exec $two readlink /proc/self/ns/user)" ] && echo "one namespace"
in_one 'cat /proc/sys/kernel/shm_rmid_forced'
echo "owners:" $(in_one 'stat -c %u:%g / /bin/busybox /etc/hosts /volume/there /dev/mqueue')
in_one 'cat /volume/there; echo of-the-pod >/volume/made; chown 7:8 /volume/made; echo 1.2.3.4 name >>/etc/hosts'
echo "on the host:" $(stat -c %u:%g volume/made)
crictl exec $two cat /volume/made
echo "first: $(in_one 'cat /proc/1/comm')"
in_one 'ls /proc/1/fd' 2>/dev/null || echo "nobody's"
echo "other's root: $(in_one 'readlink /proc/$(pidof tail)/root')"
in_one 'ip link add made type dummy && ip link set made mtu 1400 && ip link show made' | grep -o 'mtu 1400'
in_one 'mount -t tmpfs none /volume' >/dev/null 2>&1 || echo 'may not mount'
crictl rmp -f $pod >/dev/null
pod rootless 1 2>&1 | grep -o 'container id 0[^"]*not mapped' | head -1
crictl rmp -fa >/dev/null
"#;

const WANTED: &str = "\
maps: 0 131072 65536 0 131072 65536
one namespace
1
owners: 0:0 0:0 0:0 0:5 0:0
of-the-host
on the host: 7:8
of-the-pod
first: pod-init
nobody's
other's root: /
mtu 1400
may not mount
container id 0, which sets containers up, is not mapped";

fn pod(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.run(POD)?;
    lab.run("crictl rmp -fa; rm -rf /tmp/users")?;
    ensure!(shown.stdout.trim_end() == WANTED, "{shown:#?}");
    lab.expect_nothing_left(&before)
}
