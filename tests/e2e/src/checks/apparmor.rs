//! AppArmor profiles of the host are enforced in the guest.

use anyhow::{Result, ensure};

use super::Check;
use crate::lab::{BULKHEAD, IMAGE, Lab, RUN};

/// See the names.
pub const CHECKS: &[Check] = &[
    ("apparmor_profile_of_the_host_confines", confines),
    ("apparmor_profile_that_is_not_loaded_is_refused", refused),
];

/// Loads the profile on the host, or replaces it: everything but writes to `denied`.
fn load(lab: &Lab, denied: &str) -> Result<()> {
    lab.succeed(&format!(
        "apparmor_parser --replace <<'END'
profile bulkhead-e2e flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  deny {denied}/** w,
}}
END"
    ))
    .map(drop)
}

fn confines(lab: &Lab) -> Result<()> {
    load(lab, "/tmp")?;
    lab.succeed(&format!(
        "ctr run --detach --null-io --apparmor-profile bulkhead-e2e --runtime {BULKHEAD} {IMAGE} confined \\
             sh -c 'cat /proc/self/attr/current >/run/profile
                    touch /tmp/a; echo $? >/run/code; exec sleep 1000'"
    ))?;
    let exec = |id: &str, command: &str| {
        lab.run(&format!(
            "ctr task exec --exec-id {id} confined {command} </dev/null"
        ))
    };
    let told = exec(
        "told",
        "sh -c 'until [ -s /run/code ]; do sleep 0.1; done; cat /run/profile /run/code /proc/self/attr/current'",
    )?;
    ensure!(
        told.stdout == "bulkhead-e2e (enforce)\n1\nbulkhead-e2e (enforce)",
        "{told:#?}"
    );
    let denied = exec("denied", "touch /tmp/b")?;
    ensure!(
        denied.code == 1 && denied.stderr.contains("Permission denied"),
        "{denied:#?}"
    );

    // What the host's administrator changes counts from the next process on.
    load(lab, "/run")?;
    let allowed = exec("allowed", "touch /tmp/c")?;
    ensure!(allowed.code == 0, "{allowed:#?}");
    let denied = exec("denied-now", "touch /run/d")?;
    ensure!(denied.code == 1, "{denied:#?}");
    lab.succeed(
        "ctr task kill --signal KILL confined; ctr task delete --force confined; ctr container delete confined
         apparmor_parser --remove <<<'profile bulkhead-e2e { }'",
    )?;
    Ok(())
}

fn refused(lab: &Lab) -> Result<()> {
    let run = RUN.replace(
        "ctr run",
        "ctr run --apparmor-profile nobody-has-loaded-this",
    );
    let outcome = lab.run(&format!("{run} unloaded true"))?;
    ensure!(
        outcome.code != 0
            && outcome
                .stderr
                .contains("AppArmor profile nobody-has-loaded-this is not loaded on this host"),
        "{outcome:#?}"
    );
    lab.succeed("! ctr container info unloaded 2>/dev/null || ctr container delete unloaded")?;
    Ok(())
}
