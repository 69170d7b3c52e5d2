#!/bin/sh
# One container in a VM of its own: prints the kernel that it runs on, which is
# not the host's.
set -eu
image=${1:-docker.io/library/busybox:latest}
echo "host:      $(uname -r)"
printf 'container: '
ctr run --rm --runtime io.containerd.bulkhead.v2 "$image" "example-$$" uname -r
