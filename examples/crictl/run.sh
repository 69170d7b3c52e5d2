#!/bin/sh
# A pod with one container, as Kubernetes would make it: one VM for the pod.
# The handler "bulkhead" must be in containerd's configuration.
set -eu
here=$(dirname "$0")
pod=$(crictl runp --runtime bulkhead "$here/pod.json")
trap 'crictl rmp --force "$pod" >/dev/null' EXIT
container=$(crictl create "$pod" "$here/container.json" "$here/pod.json")
crictl start "$container" >/dev/null
crictl ps --pod "$pod"
until grep -q hello /tmp/bulkhead-example/hello.log; do sleep 0.2; done
crictl logs "$container"
