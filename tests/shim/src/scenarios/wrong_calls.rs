//! Calls at the wrong time, or about what is not there. Only the codes are
//! kept: what they ought to be is what the other shim says.

use anyhow::{Result, ensure};

use crate::bundle::Program;
use crate::client::{Answer, Target, code};
use crate::process;
use crate::report::Facts;
use crate::shim::{SIGKILL, Settings, Shim, with_shim};
use crate::streams::Streams;

/// Longer than any name that a file system takes (`NAME_MAX`).
const HUGE: usize = 4096;

struct Calls<'a> {
    shim: &'a Shim<'a>,
    facts: &'a mut Facts,
    when: &'static str,
}

impl Calls<'_> {
    fn keep<T>(&mut self, what: &str, answer: &Answer<T>) {
        if let Err(refusal) = answer {
            eprintln!("  {}, {what}: {refusal}", self.when);
        }
        let key = format!("{}, {what}", self.when);
        self.facts.insert(key, code(answer));
    }

    /// Every call about a process that is not there.
    async fn all_about(&mut self, whose: &str, target: Target<'_>) {
        let client = self.shim.client();
        let what = |call: &str| format!("{call} {whose}");
        self.keep(&what("State of"), &client.state(target).await);
        self.keep(&what("Start of"), &client.start(target).await);
        self.keep(&what("Wait for"), &client.wait(target).await);
        self.keep(&what("Kill of"), &client.kill(target, SIGKILL, false).await);
        self.keep(&what("ResizePty of"), &client.resize(target, 80, 24).await);
        self.keep(&what("CloseIO of"), &client.close_stdin(target).await);
        self.keep(&what("Delete of"), &client.delete(target).await);
    }

    /// Every call about a task that is not there.
    async fn all_about_task(&mut self, whose: &str, id: &str) {
        self.all_about(whose, Target::init(id)).await;
        let client = self.shim.client();
        let what = |call: &str| format!("{call} {whose}");
        self.keep(&what("Pause of"), &client.pause(id).await);
        self.keep(&what("Resume of"), &client.resume(id).await);
        self.keep(&what("Update of"), &client.update(id, "{}").await);
        self.keep(&what("Stats of"), &client.stats(id).await);
        self.keep(&what("Pids of"), &client.pids(id).await);
        self.keep(&what("Connect to"), &client.connect_task(id).await);
        self.keep(
            &what("Checkpoint of"),
            &client.checkpoint(id, "/nowhere").await,
        );
    }

    async fn create(&mut self, what: &str, id: &str) {
        let mut request = self.shim.create_request(&Streams::none());
        id.clone_into(&mut request.id);
        let answer = self.shim.client().create(&request).await;
        self.keep(what, &answer);
    }

    /// An exec that is not to be; one that came to be all the same is deleted.
    async fn exec(&mut self, what: &str, exec: &str) {
        let added = process::add(self.shim, exec, &Program::new(&["true"]), &Streams::none()).await;
        self.keep(what, &added);
        if added.is_ok() {
            let deleted = self.shim.client().delete(self.shim.exec(exec)).await;
            self.keep(&format!("Delete after {what}"), &deleted);
        }
    }
}

/// One container through its life, with every call that does not fit.
pub async fn through_life(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let program = Program::new(&["sleep", "1000000"]);
    with_shim(settings, "wrong", &program, async |shim| {
        let mut calls = Calls {
            shim,
            facts,
            when: "1 without a task",
        };
        before_create(&mut calls).await;
        shim.create(&Streams::none()).await?;
        calls.when = "2 created";
        created(&mut calls).await;
        shim.client().start(shim.init()).await?;
        calls.when = "3 running";
        running(&mut calls).await?;
        shim.client().pause(shim.id()).await?;
        calls.when = "4 paused";
        paused(&mut calls).await;
        shim.client().resume(shim.id()).await?;
        calls.when = "5 resumed";
        calls.keep("Resume", &shim.client().resume(shim.id()).await);
        shim.client().kill(shim.init(), SIGKILL, false).await?;
        shim.client().wait(shim.init()).await?;
        calls.when = "6 stopped";
        stopped(&mut calls).await;
        let deleted = shim.client().delete(shim.init()).await?;
        ensure!(deleted.exit_status == 128 + SIGKILL, "{deleted}");
        calls.when = "7 deleted";
        calls.all_about_task("the task", shim.id()).await;
        Ok(())
    })
    .await
}

/// Every call that does not fit an exec, in a container that runs.
pub async fn of_execs(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let program = Program::new(&["sleep", "1000000"]);
    with_shim(settings, "wrong-execs", &program, async |shim| {
        shim.create(&Streams::none()).await?;
        shim.client().start(shim.init()).await?;
        let mut calls = Calls {
            shim,
            facts,
            when: "3 running",
        };
        running_execs(&mut calls).await?;
        shim.kill_and_delete().await.map(drop)
    })
    .await
}

async fn before_create(calls: &mut Calls<'_>) {
    calls.all_about_task("an unknown task", "absent").await;
    let unknown = Target {
        id: "absent",
        exec: "absent",
    };
    calls.all_about("an unknown task's exec", unknown).await;
    calls.all_about_task("an empty id", "").await;
    calls.exec("Exec", "early").await;
    calls.create("Create with an empty id", "").await;
    calls.create("Create with a slash in its id", "a/b").await;
    calls.create("Create with dots as its id", "..").await;
    calls
        .create("Create with a huge id", &"x".repeat(HUGE))
        .await;
}

async fn created(calls: &mut Calls<'_>) {
    let (shim, client) = (calls.shim, calls.shim.client());
    calls.create("Create", shim.id()).await;
    calls.keep("Pause", &client.pause(shim.id()).await);
    calls.keep("Resume", &client.resume(shim.id()).await);
    calls.keep(
        "ResizePty without a terminal",
        &client.resize(shim.init(), 80, 24).await,
    );
    calls.keep(
        "CloseIO without input",
        &client.close_stdin(shim.init()).await,
    );
    calls.keep("Stats", &client.stats(shim.id()).await);
    calls.keep("Update", &client.update(shim.id(), "{}").await);
    calls.keep("Pids", &client.pids(shim.id()).await);
    calls.exec("Exec", "early").await;
}

async fn running(calls: &mut Calls<'_>) -> Result<()> {
    let (shim, client) = (calls.shim, calls.shim.client());
    calls.keep("Start", &client.start(shim.init()).await);
    calls.create("Create", shim.id()).await;
    calls.keep("Delete", &client.delete(shim.init()).await);
    calls.keep("Resume", &client.resume(shim.id()).await);
    calls.keep(
        "ResizePty without a terminal",
        &client.resize(shim.init(), 80, 24).await,
    );
    calls.keep(
        "CloseIO without input",
        &client.close_stdin(shim.init()).await,
    );
    calls.keep(
        "Kill with signal 0",
        &client.kill(shim.init(), 0, false).await,
    );
    calls.keep(
        "Kill with signal 999",
        &client.kill(shim.init(), 999, false).await,
    );
    calls.keep("Update with {}", &client.update(shim.id(), "{}").await);
    calls.keep(
        "Update with nonsense",
        &client.update(shim.id(), "nonsense").await,
    );
    calls.keep("Update with a list", &client.update(shim.id(), "[]").await);
    calls.exec("Exec with a slash in its id", "a/b").await;
    calls.exec("Exec with dots as its id", "..").await;
    calls.exec("Exec with a huge id", &"x".repeat(HUGE)).await;
    let nonsense = process::add_raw(shim, "nonsense", b"nonsense", &Streams::none()).await;
    calls.keep("Exec with nonsense", &nonsense);
    let state = client.state(shim.init()).await?;
    let status = format!("{:?}", state.status.enum_value_or_default());
    ensure!(status == "RUNNING", "all of that has made it {status}");
    Ok(())
}

async fn running_execs(calls: &mut Calls<'_>) -> Result<()> {
    let (shim, client) = (calls.shim, calls.shim.client());
    calls
        .all_about("an unknown exec", shim.exec("absent"))
        .await;
    let missing = Program::new(&["/no/such/program"]);
    let added = process::add(shim, "missing", &missing, &Streams::none()).await;
    calls.keep("Exec of a missing program", &added);
    if added.is_ok() {
        let exec = shim.exec("missing");
        calls.keep("Start of a missing program", &client.start(exec).await);
        calls.keep("Delete of a missing program", &client.delete(exec).await);
    }
    let exec = shim.exec("exec");
    let program = Program::new(&["sleep", "1000000"]);
    process::add(shim, "exec", &program, &Streams::none()).await?;
    let again = process::add(shim, "exec", &program, &Streams::none()).await;
    calls.keep("Exec with the id of one that is added", &again);
    calls.keep(
        "Kill of an exec that is added",
        &client.kill(exec, SIGKILL, false).await,
    );
    calls.keep(
        "ResizePty of an exec that is added",
        &client.resize(exec, 80, 24).await,
    );
    calls.keep(
        "CloseIO of an exec that is added",
        &client.close_stdin(exec).await,
    );
    calls.keep("State of an exec that is added", &client.state(exec).await);
    // A shim may have ended it over these: then it is made anew.
    if client.start(exec).await.is_err() {
        client.delete(exec).await?;
        process::start(shim, "exec", &program, &Streams::none()).await?;
    }
    let again = process::add(shim, "exec", &program, &Streams::none()).await;
    calls.keep("Exec with the id of one that runs", &again);
    calls.keep("Start of an exec that runs", &client.start(exec).await);
    calls.keep("Delete of an exec that runs", &client.delete(exec).await);
    calls.keep(
        "ResizePty of an exec without a terminal",
        &client.resize(exec, 80, 24).await,
    );
    calls.keep(
        "CloseIO of an exec without input",
        &client.close_stdin(exec).await,
    );
    client.kill(exec, SIGKILL, false).await?;
    client.wait(exec).await?;
    let again = process::add(shim, "exec", &program, &Streams::none()).await;
    calls.keep("Exec with the id of one that has ended", &again);
    calls.keep("Start of an exec that has ended", &client.start(exec).await);
    calls.keep(
        "Kill of an exec that has ended",
        &client.kill(exec, SIGKILL, false).await,
    );
    calls.keep(
        "ResizePty of an exec that has ended",
        &client.resize(exec, 80, 24).await,
    );
    calls.keep(
        "CloseIO of an exec that has ended",
        &client.close_stdin(exec).await,
    );
    calls.keep("Wait for an exec that has ended", &client.wait(exec).await);
    calls.keep("State of an exec that has ended", &client.state(exec).await);
    client.delete(exec).await?;
    calls.all_about("an exec that is deleted", exec).await;
    // Its id is free again.
    calls
        .exec("Exec with the id of one that is deleted", "exec")
        .await;
    Ok(())
}

async fn paused(calls: &mut Calls<'_>) {
    let (shim, client) = (calls.shim, calls.shim.client());
    calls.keep("Pause", &client.pause(shim.id()).await);
    calls.keep("Start", &client.start(shim.init()).await);
    calls.keep("Delete", &client.delete(shim.init()).await);
    calls.exec("Exec", "frozen").await;
    // Not where it could come to be: an exec without a name is the end of
    // runc's shim once init ends.
    calls.exec("Exec with an empty id", "").await;
    calls.keep(
        "ResizePty without a terminal",
        &client.resize(shim.init(), 80, 24).await,
    );
    calls.keep(
        "CloseIO without input",
        &client.close_stdin(shim.init()).await,
    );
    calls.keep("Stats", &client.stats(shim.id()).await);
    calls.keep("Update", &client.update(shim.id(), "{}").await);
    calls.keep("Pids", &client.pids(shim.id()).await);
}

async fn stopped(calls: &mut Calls<'_>) {
    let (shim, client) = (calls.shim, calls.shim.client());
    calls.keep("Start", &client.start(shim.init()).await);
    calls.create("Create", shim.id()).await;
    calls.exec("Exec", "late").await;
    calls.keep("Pause", &client.pause(shim.id()).await);
    calls.keep("Resume", &client.resume(shim.id()).await);
    calls.keep("Kill", &client.kill(shim.init(), SIGKILL, false).await);
    calls.keep(
        "Kill of all",
        &client.kill(shim.init(), SIGKILL, true).await,
    );
    calls.keep(
        "ResizePty without a terminal",
        &client.resize(shim.init(), 80, 24).await,
    );
    calls.keep(
        "CloseIO without input",
        &client.close_stdin(shim.init()).await,
    );
    calls.keep("Update", &client.update(shim.id(), "{}").await);
    calls.keep("Pids", &client.pids(shim.id()).await);
    calls.keep("Stats", &client.stats(shim.id()).await);
    calls.keep("Wait", &client.wait(shim.init()).await);
    calls.keep("State", &client.state(shim.init()).await);
}

/// A task that was created is deleted as it is.
pub async fn delete_before_start(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let program = Program::new(&["true"]);
    with_shim(settings, "unstarted", &program, async |shim| {
        shim.create(&Streams::none()).await?;
        let deleted = shim.client().delete(shim.init()).await;
        facts.insert("Delete".to_owned(), code(&deleted));
        let status = deleted?.exit_status;
        facts.insert("exit status".to_owned(), status.to_string());
        let state = shim.client().state(shim.init()).await;
        facts.insert("State afterwards".to_owned(), code(&state));
        Ok(())
    })
    .await
}

/// A task that was created is killed, and cannot be started any more.
pub async fn kill_before_start(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let program = Program::new(&["true"]);
    with_shim(settings, "killed", &program, async |shim| {
        shim.create(&Streams::none()).await?;
        let killed = shim.client().kill(shim.init(), SIGKILL, false).await;
        facts.insert("Kill".to_owned(), code(&killed));
        let waited = shim.client().wait(shim.init()).await?;
        facts.insert("exit status".to_owned(), waited.exit_status.to_string());
        let started = shim.client().start(shim.init()).await;
        facts.insert("Start afterwards".to_owned(), code(&started));
        shim.client().delete(shim.init()).await?;
        Ok(())
    })
    .await
}
