# A container of the default specification with a hook of each kind that runs
# on the host; prints a line for each hook: kind, id, status, pid.
runtime=$1 image=$2
rm -f /tmp/hooks.log
cat >/tmp/hook <<'END'
#!/bin/bash
state=$(cat)
field() { grep -oE "\"$1\": ?\"?[a-zA-Z0-9-]+" <<<"$state" | head -n 1 | sed 's/.*[:" ]//'; }
echo "$1 $(field id) $(field status) $(field pid)" >>/tmp/hooks.log
END
chmod +x /tmp/hook
hook() { echo "\"$1\": [{\"path\": \"/tmp/hook\", \"args\": [\"hook\", \"$1\"]}]"; }
mkdir -p /tmp/hooks-root
ctr images mount "$image" /tmp/hooks-root >/dev/null || exit
trap 'ctr images unmount --rm /tmp/hooks-root >/dev/null' EXIT
ctr oci spec | sed -e 's|"path": "rootfs"|"path": "/tmp/hooks-root"|' \
    -e 's|"process": {|"process": { "args": ["/bin/true"],|' \
    -e "1s|{|{ \"hooks\": { $(hook createRuntime), $(hook poststart), $(hook poststop) },|" >/tmp/spec.json
ctr run --rm --runtime "$runtime" --config /tmp/spec.json hooks || exit
cat /tmp/hooks.log
