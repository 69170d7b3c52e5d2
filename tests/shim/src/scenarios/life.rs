//! One container from Create to Shutdown, with an exec and a pause.

use anyhow::{Result, ensure};

use crate::bundle::Program;
use crate::client::code;
use crate::process;
use crate::report::Facts;
use crate::shim::{SIGKILL, Settings, Shim, with_shim_of};
use crate::start::Containerd;
use crate::streams::Streams;

/// As the newest containerd.
pub async fn newest(settings: &Settings, facts: &mut Facts) -> Result<()> {
    life(settings, Containerd::V2_3, facts).await
}

/// As one that speaks version 2 of the task service.
pub async fn older(settings: &Settings, facts: &mut Facts) -> Result<()> {
    life(settings, Containerd::V1_7, facts).await
}

async fn life(settings: &Settings, containerd: Containerd, facts: &mut Facts) -> Result<()> {
    let id = format!("life-{}", containerd.name().replace('.', "-"));
    let program = Program::new(&["sleep", "1000000"]);
    with_shim_of(settings, &id, containerd, &program, async |shim| {
        live(shim, facts).await
    })
    .await
}

async fn live(shim: &Shim<'_>, facts: &mut Facts) -> Result<()> {
    let client = shim.client();
    let mut step = async |when: &str| {
        let state = client.state(shim.init()).await?;
        let status = format!("{:?}", state.status.enum_value_or_default());
        facts.insert(format!("state {when}"), status.clone());
        anyhow::Ok((status, state))
    };
    let pid = shim.create(&Streams::none()).await?;
    let (status, state) = step("1 created").await?;
    ensure!(status == "CREATED" && state.pid == pid, "{state}");
    ensure!(
        state.bundle == shim.bundle().path().to_string_lossy(),
        "{state}"
    );
    ensure!(
        pid > 0 && std::fs::exists(format!("/proc/{pid}"))?,
        "pid {pid}"
    );

    let started = client.start(shim.init()).await?.pid;
    ensure!(started == pid, "Start told pid {started}, Create {pid}");
    ensure!(step("2 started").await?.0 == "RUNNING", "is not running");
    ensure!(client.connect_task(shim.id()).await?.task_pid == pid);

    let running = Program::new(&["sleep", "1000000"]);
    let exec_pid = process::start(shim, "beside", &running, &Streams::none()).await?;
    let pids = client.pids(shim.id()).await?.processes;
    let pids: Vec<_> = pids.iter().map(|process| process.pid).collect();
    ensure!(pids.contains(&pid) && pids.contains(&exec_pid), "{pids:?}");
    client.kill(shim.exec("beside"), SIGKILL, false).await?;
    let status = process::wait_and_delete(shim, "beside").await?;
    ensure!(
        status == 128 + SIGKILL,
        "the killed exec ended with {status}"
    );
    let status = process::run(shim, "seven", &Program::shell("exit 7")).await?;
    ensure!(status == 7, "`exit 7` ended with {status}");

    client.pause(shim.id()).await?;
    ensure!(step("3 paused").await?.0 == "PAUSED", "is not paused");
    client.resume(shim.id()).await?;
    ensure!(
        step("4 resumed").await?.0 == "RUNNING",
        "does not run again"
    );
    let stats = client.stats(shim.id()).await?.stats;
    facts.insert("type of the statistics".to_owned(), stats.type_url.clone());

    client.kill(shim.init(), SIGKILL, false).await?;
    let waited = client.wait(shim.init()).await?;
    let mut step = async |when: &str| {
        let state = client.state(shim.init()).await?;
        let status = format!("{:?}", state.status.enum_value_or_default());
        facts.insert(format!("state {when}"), status.clone());
        anyhow::Ok((status, state))
    };
    let (status, state) = step("5 killed").await?;
    ensure!(status == "STOPPED", "{state}");
    ensure!(
        (state.exit_status, &state.exited_at) == (128 + SIGKILL, &waited.exited_at),
        "Wait told {waited}, State {state}"
    );
    // Stopped is for good, and Wait can be asked again.
    ensure!(client.wait(shim.init()).await? == waited, "a second Wait");
    let deleted = client.delete(shim.init()).await?;
    ensure!(
        (deleted.pid, deleted.exit_status, &deleted.exited_at)
            == (pid, 128 + SIGKILL, &waited.exited_at),
        "{deleted}"
    );
    let gone = code(&client.state(shim.init()).await);
    ensure!(gone == "NOT_FOUND", "State after Delete: {gone}");
    let topic = "/tasks/delete";
    let patience = shim.settings().patience();
    let events = shim
        .settings()
        .sink
        .wait_for(shim.id(), topic, patience)
        .await?;
    let paused = events
        .iter()
        .filter(|event| matches!(event.topic.as_str(), "/tasks/paused" | "/tasks/resumed"));
    facts.insert("pauses told".to_owned(), paused.count().to_string());
    Ok(())
}
