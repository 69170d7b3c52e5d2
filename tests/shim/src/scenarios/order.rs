//! The order in which containerd hears of things.

use anyhow::{Context, Result, ensure};

use crate::bundle::Program;
use crate::events::Event;
use crate::process;
use crate::report::Facts;
use crate::shim::{SIGKILL, Settings, Shim, with_shim};
use crate::start::NAMESPACE;
use crate::streams::Streams;

/// Again and again: an exec that ends by itself and, every other time, one that
/// ends with its container.
pub async fn repeated(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let rounds = if settings.soak { 100 } else { 2 };
    for round in 0..rounds {
        let left_running = round % 2 == 1;
        let id = format!("order-{round}");
        // Nothing holds up what ends by itself: the tightest race.
        let program = Program::new(&["sleep", "1000000"]);
        with_shim(settings, &id, &program, async |shim| {
            once(shim, left_running).await
        })
        .await
        .context(id)?;
    }
    facts.insert("rounds".to_owned(), rounds.to_string());
    Ok(())
}

async fn once(shim: &Shim<'_>, left_running: bool) -> Result<()> {
    let client = shim.client();
    let pid = shim.create(&Streams::none()).await?;
    client.start(shim.init()).await?;
    let program = if left_running {
        Program::new(&["sleep", "1000000"])
    } else {
        Program::shell("exit 5")
    };
    let exec_pid = process::start(shim, "exec", &program, &Streams::none()).await?;
    let mut exec_status = 128 + SIGKILL;
    if !left_running {
        exec_status = 5;
        process::wait_and_delete(shim, "exec").await?;
    }
    shim.kill_and_delete().await?;
    let patience = shim.settings().patience();
    let events = shim
        .settings()
        .sink
        .wait_for(shim.id(), "/tasks/delete", patience)
        .await?;
    let event = |topic: &str, process: &str, pid: u32, status: u32| Event {
        topic: format!("/tasks/{topic}"),
        namespace: NAMESPACE.to_owned(),
        container: shim.id().to_owned(),
        process: process.to_owned(),
        pid,
        status,
    };
    let killed = 128 + SIGKILL;
    let wanted = [
        event("create", "", pid, 0),
        event("start", "", pid, 0),
        event("exec-added", "exec", 0, 0),
        event("exec-started", "exec", exec_pid, 0),
        event("exit", "exec", exec_pid, exec_status),
        event("exit", shim.id(), pid, killed),
        event("delete", "", pid, killed),
    ];
    let seen: Vec<_> = events.iter().map(without_id_of_delete).collect();
    ensure!(seen == wanted, "told {seen:#?}, wanted {wanted:#?}");
    Ok(())
}

/// Some shims name the container in `id` of an init's deletion, which is
/// documented as empty.
fn without_id_of_delete(event: &Event) -> Event {
    let mut event = event.clone();
    if event.topic == "/tasks/delete" && event.process == event.container {
        event.process.clear();
    }
    event
}
