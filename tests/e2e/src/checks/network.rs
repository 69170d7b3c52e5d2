//! The pod's network, as CNI and nerdctl's hooks set it up, from inside the guest.

use anyhow::{Result, ensure};

use super::Check;
use super::nerdctl::with_detached;
use crate::lab::{BULKHEAD, IMAGE, Lab};

/// See the names.
pub const CHECKS: &[Check] = &[
    (
        "network_of_the_namespace_is_that_of_the_guest",
        same_as_namespace,
    ),
    ("network_published_port_is_reached", published),
    ("network_containers_reach_each_other_in_v4_and_v6", two),
    (
        "network_interface_that_comes_later_does_in_the_guest",
        later,
    ),
    ("network_set_up_between_create_and_start_is_there", ctr_cni),
    (
        "network_port_forward_reaches_the_guests_loopbacks",
        forwarded,
    ),
];

/// Shell functions of the scripts here. `tables` prints what an interface has, the
/// same in a namespace of the node and in a guest's container.
const FUNCTIONS: &str = r#"
wait_for() { for try in $(seq 300); do "$@" && return; sleep 0.1; done; echo "not within time: $*" >&2; return 1; }
tables='echo $(cat /proc/net/route | tail -n +2 | sort | tr -s "\t " " ")
        for kind in link addr; do ip -o $kind show dev eth0 | tr -s " \t\\" "\n" | grep -E "^([0-9a-f:]{17}|[0-9a-f.:]+/[0-9]+)$" | grep -v "^fe80" ; done | sort | tr "\n" " "
        cat /sys/class/net/eth0/mtu'
"#;

/// Runs a script between the start of a detached container and its removal,
/// after which nothing is left. `$pid` is its stand-in's.
fn with_container(lab: &Lab, options: &str, command: &str, script: &str) -> Result<String> {
    with_detached(
        lab,
        "net",
        &format!("{options} {IMAGE} sh -c '{command}'"),
        &format!(
            "{FUNCTIONS}
             pid=$(nerdctl inspect -f '{{{{.State.Pid}}}}' net)
             {script}"
        ),
    )
}

fn same_as_namespace(lab: &Lab) -> Result<()> {
    let shown = with_container(
        lab,
        "",
        "exec sleep 999",
        r#"echo "namespace: $(nsenter -t $pid -n unshare -m sh -c "mount -t sysfs sysfs /sys; $tables" | tr '\n' ' ')"
           echo "guest: $(nerdctl exec net sh -c "$tables" | tr '\n' ' ')"
           address=$(nerdctl inspect -f '{{.NetworkSettings.IPAddress}}' net)
           echo "address: $address"
           nerdctl exec net ping -c 1 -w 30 ${address%.*}.1 >/dev/null && echo "guest to node"
           ping -c 1 -w 30 $address >/dev/null && echo "node to guest"
           nerdctl exec net ping -c 1 -w 30 127.0.0.1 >/dev/null && echo "guest to itself"
           nerdctl exec net ls /sys/class/net"#,
    )?;
    let of = |name: &str| {
        let line = shown.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    ensure!(
        !of("namespace:").is_empty() && of("namespace:") == of("guest:"),
        "not the same: {shown}"
    );
    let address = of("address:");
    ensure!(
        !address.is_empty() && of("guest:").contains(&address),
        "the guest has another address: {shown}"
    );
    for reached in ["guest to node", "node to guest", "guest to itself"] {
        ensure!(shown.contains(reached), "not {reached}: {shown}");
    }
    Ok(())
}

fn published(lab: &Lab) -> Result<()> {
    let shown = with_container(
        lab,
        "-p 8080:80",
        "mkdir /www; echo from the guest >/www/index.html; exec httpd -f -p 80 -h /www",
        r#"fetch() { printf 'GET / HTTP/1.0\r\n\r\n' | timeout 20 socat -t 20 - TCP:$1 | tail -n 1 | grep .; }
           wait_for fetch 127.0.0.1:8080
           fetch $(ip -o -4 addr show dev eth0 | awk '{ sub("/.*", "", $4); print $4 }'):8080"#,
    )?;
    ensure!(shown == "from the guest\nfrom the guest", "{shown}");
    Ok(())
}

/// TCP with more data than the window, both ways, and the bytes are the same.
fn two(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.succeed(&format!(
        r#"{FUNCTIONS}
        run="nerdctl run --pull never --runtime {BULKHEAD} -d --net both"
        clean() {{ nerdctl rm -f one two; nerdctl network rm both; ip link del br-$bridge; }}
        trap 'clean >/dev/null 2>&1' EXIT
        bridge=$(nerdctl network create both --ipv6 --subnet 10.99.0.0/24 --subnet fd99::/64 | cut -c 1-12)
        head -c 3000000 /dev/urandom >/tmp/sent
        $run --name one -v /tmp/sent:/www/sent:ro {IMAGE} httpd -f -p 80 -h /www >/dev/null || exit
        $run --name two {IMAGE} sleep 999 >/dev/null || exit
        for address in $(nerdctl exec one ip -o addr show dev eth0 scope global | awk '{{ sub("/.*", "", $4); print $4 }}'); do
            case $address in *:*) url=http://[$address]/sent ;; *) url=http://$address/sent ;; esac
            nerdctl exec two sh -c "ping -c 3 -w 60 $address >/dev/null && echo pinged; wget -q -O - $url | sha256sum" | cut -d' ' -f1
            busybox wget -q -O - $url | sha256sum | cut -d' ' -f1
        done"#
    ))?;
    let sum = lab.succeed("sha256sum </tmp/sent | cut -d' ' -f1")?;
    let wanted = ["pinged", &sum, &sum].repeat(2).join("\n");
    ensure!(shown == wanted, "wanted {wanted}, got {shown}");
    lab.expect_nothing_left(&before)
}

fn later(lab: &Lab) -> Result<()> {
    let shown = with_container(
        lab,
        "",
        "exec sleep 999",
        r#"in_pod="nsenter -t $pid -n"
           guest() { nerdctl exec net sh -c "$1"; }
           ip link add laterh type veth peer name later0
           ip link set later0 netns $pid && ip link set laterh up && ip addr add 10.77.0.1/24 dev laterh
           $in_pod ip link set later0 mtu 1300 up && $in_pod ip addr add 10.77.0.2/24 dev later0
           wait_for guest 'ip -o -4 addr show dev later0 2>/dev/null | grep -q 10.77.0.2/24' && echo came
           guest 'cat /sys/class/net/later0/mtu'
           ping -c 1 -w 30 10.77.0.2 >/dev/null && echo reached
           $in_pod ip route add 10.78.0.0/24 via 10.77.0.1
           wait_for guest 'ip route | grep -q "10.78.0.0/24 via 10.77.0.1"' && echo routed
           $in_pod ip route del 10.78.0.0/24
           wait_for guest '! ip route | grep -q 10.78' && echo unrouted
           $in_pod ip link set later0 mtu 1400
           wait_for guest 'grep -q 1400 /sys/class/net/later0/mtu' && echo larger
           ip link del laterh
           wait_for guest '! [ -e /sys/class/net/later0 ]' && echo went
           taps() { $in_pod ip -o link | grep -c 'bulkhead[0-9]*:'; }
           one_tap() { [ "$(taps)" = 1 ]; }
           wait_for one_tap && echo one tap
           ping -c 1 -w 30 $(nerdctl inspect -f '{{.NetworkSettings.IPAddress}}' net) >/dev/null && echo still there"#,
    )?;
    let wanted = [
        "came",
        "1300",
        "reached",
        "routed",
        "unrouted",
        "larger",
        "went",
        "one tap",
        "still there",
    ];
    ensure!(shown == wanted.join("\n"), "{shown}");
    Ok(())
}

fn forwarded(lab: &Lab) -> Result<()> {
    let before = lab.resources()?;
    let shown = lab.run(&format!(
        r"{FUNCTIONS}
        fetch() {{ printf 'GET / HTTP/1.0\r\n\r\n' | timeout 20 socat -t 20 - TCP:127.0.0.1:$1 2>/dev/null | tail -n 1 | grep .; }}
        mkdir -p /tmp/forward && cd /tmp/forward && echo '{POD}' >pod.json && echo '{SERVER}' >server.json
        pod=$(crictl runp --runtime bulkhead pod.json) || exit
        trap 'kill $forwarder 2>/dev/null; crictl rmp -f $pod >/dev/null' EXIT
        server=$(crictl create $pod server.json pod.json) && crictl start $server >/dev/null || exit
        # crictl ends with the first connection that it cannot forward.
        wait_for crictl exec $server wget -q -O /dev/null http://127.0.0.1:81/
        wait_for crictl exec $server wget -q -O /dev/null http://[::1]:82/
        crictl port-forward $pod 8081:81 8082:82 8083:83 >/dev/null 2>&1 &
        forwarder=$!
        wait_for fetch 8081
        wait_for fetch 8082
        fetch 8083 || echo nobody"
    ))?;
    ensure!(shown.stdout == "forwarded\nforwarded\nnobody", "{shown:?}");
    lab.expect_nothing_left(&before)
}

const POD: &str = r#"{
  "metadata": { "name": "forward", "namespace": "e2e", "uid": "e2e-forward", "attempt": 0 },
  "log_directory": "/tmp/forward/logs",
  "linux": { "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } } }
}"#;

/// One server on either loopback.
const SERVER: &str = r#"{
  "metadata": { "name": "server", "attempt": 0 },
  "image": { "image": "docker.io/library/busybox:latest" },
  "command": ["sh", "-c",
    "mkdir /www; echo forwarded >/www/index.html; httpd -p 127.0.0.1:81 -h /www; exec httpd -f -p [::1]:82 -h /www"],
  "log_path": "server.log",
  "linux": { "security_context": { "namespace_options": { "network": 0, "pid": 1, "ipc": 0 } } }
}"#;

/// `ctr run --cni` gives the task its network once it is created, by the pid's
/// namespace.
fn ctr_cni(lab: &Lab) -> Result<()> {
    let shown = lab.succeed(&format!(
        "mkdir -p /opt/cni; ln -sfn /opt/node/cni/bin /opt/cni/bin
         ctr run --rm --cni --runtime {BULKHEAD} {IMAGE} cni ip -o -4 addr show dev eth0"
    ))?;
    ensure!(shown.contains("10.88."), "{shown}");
    Ok(())
}
