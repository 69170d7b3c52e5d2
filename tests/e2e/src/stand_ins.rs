//! Every pid that containerd announces is a stand-in's, whatever check is
//! running: a client may open its `/proc` entries.

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;

/// Follows the events of every namespace for as long as the node lives, over
/// each restart of containerd. A pid that is gone already tells nothing.
const WATCHER: &str = r#"
mkdir -p /tmp/stand-ins
: >/tmp/stand-ins/seen; : >/tmp/stand-ins/wrong; : >/tmp/stand-ins/runc
setsid bash -c '
    while :; do
        # Date, time, zone, zone again, namespace, topic, event.
        ctr events 2>/dev/null | while read -r _ _ _ _ namespace topic event; do
            # What a check compares with: of runc, whose pids are no stand-ins.
            if [ $topic = /containers/create ] && grep -q "\"io.containerd.runc.v2\"" <<<"$event"; then
                echo "$namespace/$(grep -o "\"id\":\"[^\"]*" <<<"$event" | head -n 1 | cut -d\" -f4)" >>/tmp/stand-ins/runc
            fi
            case $topic in /tasks/create | /tasks/start | /tasks/exec-started) ;; *) continue ;; esac
            pid=$(grep -o "\"pid\":[0-9]*" <<<"$event" | cut -d: -f2)
            if [ "${pid:-0}" = 0 ]; then
                echo "$namespace $topic has no pid: $event" >>/tmp/stand-ins/wrong
                continue
            fi
            program=$(readlink /proc/$pid/exe) || continue
            case $program in
                /memfd:bulkhead-stand-in*) echo $pid >>/tmp/stand-ins/seen ;;
                *)
                    id=$(grep -o "\"container_id\":\"[^\"]*" <<<"$event" | cut -d\" -f4)
                    grep -qxF "$namespace/$id" /tmp/stand-ins/runc && continue
                    echo "$namespace $topic: $pid is $program: $event" >>/tmp/stand-ins/wrong ;;
            esac
        done
        # A process of its own would look like something left behind.
        read -rt 0.1 <> <(:)
    done' </dev/null >/dev/null 2>&1 &
"#;

/// Starts to watch.
///
/// # Errors
/// When the node cannot be reached.
pub fn watch(lab: &Lab) -> Result<()> {
    lab.succeed(WATCHER).map(drop)
}

/// Fails when a pid was announced that is no stand-in's.
///
/// # Errors
/// Which, and what it is instead.
pub fn expect_no_other(lab: &Lab) -> Result<()> {
    let wrong = lab.succeed("cat /tmp/stand-ins/wrong")?;
    ensure!(wrong.is_empty(), "pids that are no stand-in's:\n{wrong}");
    Ok(())
}

/// How many announced pids were looked at in this node.
///
/// # Errors
/// When the node cannot be reached.
pub fn seen(lab: &Lab) -> Result<u32> {
    let seen = lab.succeed("wc -l </tmp/stand-ins/seen")?;
    seen.trim().parse().context(seen)
}
