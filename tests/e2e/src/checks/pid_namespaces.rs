//! PID namespaces that a pod's containers share.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::Lab;

/// See the names.
pub const CHECKS: &[Check] = &[("pid_namespaces_are_shared_as_a_pod_asks", shared)];

/// Containers of one pod, whose PID namespace is the pod's (0), their own (1), the
/// host's (2) or another's (3).
const POD: &str = r#"
set -e
rm -rf /tmp/pids; mkdir /tmp/pids; cd /tmp/pids
echo '{"metadata": {"name": "pids", "namespace": "e2e", "uid": "pids", "attempt": 0}, "log_directory": "/tmp/pids/logs",
  "linux": {"security_context": {"namespace_options": {"network": 0, "pid": 0, "ipc": 0}}}}' >pod.json
pod=$(crictl runp --runtime bulkhead pod.json)
container() { # name, PID namespace, program
    echo '{"metadata": {"name": "'$1'", "attempt": 0}, "image": {"image": "docker.io/library/busybox:latest"},
      "command": ["sh", "-c", "'"$3"'"], "log_path": "'$1'.log",
      "linux": {"security_context": {"namespace_options": {"network": 0, "pid": '"$2"', "ipc": 0}}}}' >$1.json
    local id=$(crictl create $pod $1.json pod.json); crictl start $id >/dev/null; echo $id
}
processes() { # as a container sees them, those that sleep
    crictl exec $1 ps -o args | grep -E '^(pod-init|sleep)' | sort | xargs
}
one=$(container one 0 'sleep 4000 & sleep 3000 & exec sleep 2000')
two=$(container two 0 'exec sleep 1000')
own=$(container own 1 'exec sleep 500')
host=$(container host 2 'exec sleep 600')
echo "shared: $(processes $two)"
echo "first: $(crictl exec $two cat /proc/1/comm)"
crictl exec $two ls /proc/1/root/ 2>/dev/null || echo "its root is nobody's"
crictl exec $two sh -c 'sleep 0.1 & sleep 0.1 &'
crictl exec $two sh -c 'while ps -o args | grep -q "^sleep 0.1"; do sleep 0.2; done; ps -o stat,args | grep "^Z" || echo "no zombie"'
echo "own: $(processes $own)"
target=$(container target "3, \"target_id\": \"$own\"" 'exec sleep 700')
echo "target: $(processes $target)"
crictl stop -t 0 $one >/dev/null
echo "one stopped: $(processes $two)"
crictl rm -f $own >/dev/null
crictl inspect $target | grep -o CONTAINER_EXITED
crictl rmp -f $pod >/dev/null
"#;

const WANTED: &str = "\
shared: pod-init sleep 1000 sleep 2000 sleep 3000 sleep 4000 sleep 600
first: pod-init
its root is nobody's
no zombie
own: sleep 500
target: sleep 500 sleep 700
one stopped: pod-init sleep 1000 sleep 600
CONTAINER_EXITED";

fn shared(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.run(POD)?;
    lab.run("crictl rmp -fa; rm -rf /tmp/pids")?;
    ensure!(shown.stdout == WANTED, "{shown:#?}");
    lab.expect_nothing_left(&before)
}
