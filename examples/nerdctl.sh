#!/bin/sh
# The same through nerdctl, with its default network and a command that fails:
# the exit code is the container's.
set -eu
image=${1:-docker.io/library/busybox:latest}
# The container expands it, not this shell.
# shellcheck disable=SC2016
nerdctl run --rm --runtime io.containerd.bulkhead.v2 --pull never "$image" \
    sh -c 'echo "hello from $(uname -sr)"'
code=0
nerdctl run --rm --runtime io.containerd.bulkhead.v2 --pull never "$image" \
    sh -c 'exit 42' || code=$?
echo "exit code: $code"
[ "$code" -eq 42 ]
