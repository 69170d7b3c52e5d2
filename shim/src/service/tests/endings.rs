//! What becomes of tasks, and of the shim, when something does not go its
//! ordinary way.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_that_was_deleted_meanwhile_leaves_nothing_and_ends_the_shim() {
    let mut world = World::new("c").await;
    world.guest.may_boot.send_replace(false);
    let creating = world.begin_create("c").await;
    assert_eq!(refused(world.delete("c").await).0, Code::NOT_FOUND);
    assert!(!creating.is_finished() && !world.did("destroy"));
    world.guest.may_boot.send_replace(true);
    let (code, message) = refused(creating.await.expect("is no panic"));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("abandoned"), "{message}");
    assert!(world.did("remove c") && world.did("destroy"));
    let programs = world.guest.programs.lock().expect("unpoisoned").len();
    assert_eq!(programs, 0);
    assert!(world.events.try_recv().is_err(), "nobody hears of it");
    let left = world.shim.done(Duration::from_hours(1));
    let left = tokio::time::timeout(Duration::from_secs(20), left);
    left.await.expect("the shim goes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_during_the_only_create_is_fine_at_once_and_ends_the_shim_later() {
    let world = World::new("c").await;
    world.guest.may_boot.send_replace(false);
    let creating = world.begin_create("c").await;
    let request = ShutdownRequest::default();
    let asked = world.client.shutdown(Context::default(), &request);
    asked.await.expect("is always fine");
    assert!(!creating.is_finished());
    // A guest that never comes up is no reason to stay either.
    world.guest.die("it did not boot");
    let (_, message) = refused(creating.await.expect("is no panic"));
    assert!(message.contains("did not boot"), "{message}");
    let left = world.shim.done(Duration::from_hours(1));
    let left = tokio::time::timeout(Duration::from_secs(20), left);
    left.await.expect("the shim goes");
    assert!(world.did("destroy"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_beside_a_task_abandons_nothing() {
    let world = World::new("box").await;
    world.guest.may_boot.send_replace(true);
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    assert!(!world.shim.shutdown().await);
    world.shim.abandon("box");
    let member = member("box", sandbox_pid, &["sleep"]);
    world.create("a", &member).await.expect("creates");
    assert_eq!(world.status("box").await, Status::CREATED);
}

/// A hook that ends when somebody writes to the FIFO `NAME` in the directory.
fn slow_hook(world: &World, name: &str) -> (Value, PathBuf) {
    let path = world.directory.path().join(name);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).expect("makes a FIFO");
    let script = format!("read -r line <{}", path.display());
    (
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]),
        path,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_hook_holds_up_no_sibling() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    let mut slow = member("box", sandbox_pid, &["exit", "0"]);
    let mut release = Vec::new();
    for kind in ["createRuntime", "poststart", "poststop"] {
        let (hook, path) = slow_hook(&world, kind);
        slow["hooks"][kind] = hook;
        release.push(path);
    }
    let mut siblings = 0;
    let request = world.bundle("slow", &slow);
    for (step, path) in release.iter().enumerate() {
        let (client, request) = (world.client.clone(), request.clone());
        let call = tokio::spawn(async move {
            let id = request.id.clone();
            let start = StartRequest {
                id: id.clone(),
                ..StartRequest::default()
            };
            let delete = DeleteRequest {
                id,
                ..DeleteRequest::default()
            };
            match step {
                0 => client.create(Context::default(), &request).await.map(drop),
                1 => client.start(Context::default(), &start).await.map(drop),
                _ => client.delete(Context::default(), &delete).await.map(drop),
            }
        });
        // Opens once the hook reads: it is running.
        let path = path.clone();
        let opened = tokio::task::spawn_blocking(move || {
            std::fs::File::options()
                .write(true)
                .open(path)
                .expect("opens")
        });
        let mut fifo = opened.await.expect("is no panic");
        siblings += 1;
        let id = format!("sibling{siblings}");
        let life = async {
            let spec = member("box", sandbox_pid, &["exit", "3"]);
            world.create(&id, &spec).await.expect("creates");
            world.start(&id).await.expect("starts");
            assert_eq!(world.wait(&id).await.exit_status, 3);
            world.delete(&id).await.expect("deletes");
        };
        tokio::time::timeout(Duration::from_secs(20), life)
            .await
            .expect("is not held up");
        assert!(!call.is_finished(), "the hook still runs");
        std::io::Write::write_all(&mut fifo, b"go\n").expect("writes");
        drop(fifo);
        call.await.expect("is no panic").expect("succeeds");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lone_container_that_the_guest_cannot_delete_goes_with_its_vm() {
    let world = World::new("c").await;
    let spec = spec(&["exit", "3", "undeletable"]);
    world.create("c", &spec).await.expect("creates");
    world.start("c").await.expect("starts");
    world.wait("c").await;
    let (_, message) = refused(world.delete("c").await);
    assert!(message.contains("busy"), "{message}");
    assert!(!world.did("remove c"));
    assert_eq!(world.delete("c").await.expect("goes on").exit_status, 3);
    assert!(world.did("remove c") && world.did("destroy"));
    assert!(world.guest.vm.lock().expect("unpoisoned").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn member_that_the_guest_cannot_delete_goes_without_its_siblings() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    let sibling = member("box", sandbox_pid, &["sleep"]);
    world.create("b", &sibling).await.expect("creates");
    world.start("b").await.expect("starts");
    // Never started: the guest still has its processes at the first Delete.
    let stuck = member("box", sandbox_pid, &["sleep", "undeletable"]);
    world.create("a", &stuck).await.expect("creates");
    refused(world.delete("a").await);
    assert_eq!(world.delete("a").await.expect("goes on").exit_status, 137);
    assert!(world.did("remove a"));
    assert_eq!(world.status("b").await, Status::RUNNING);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn death_of_the_vm_leaves_on_record_how_a_container_had_ended() {
    let world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    let ended = member("box", sandbox_pid, &["exit", "3"]);
    world.create("a", &ended).await.expect("creates");
    world.start("a").await.expect("starts");
    world.wait("a").await;
    world.guest.die("the guest's kernel panicked");
    world.until("record box 255").await;
    assert_eq!(world.delete("a").await.expect("deletes").exit_status, 3);
    assert!(world.did("record a 3") && !world.did("record a 255"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_container_of_a_guest_with_a_wrong_clock_sees_the_right_time() {
    let world = World::new("c").await;
    *world.guest.clock_ahead_ns.lock().expect("unpoisoned") = 3_600_000_000_000;
    world.create("c", &spec(&["sleep"])).await.expect("creates");
    let ahead_ns = *world.guest.ahead_at_create_ns.borrow();
    let ahead_ns = ahead_ns.expect("was created");
    assert!(ahead_ns.abs() < 1_000_000_000, "{ahead_ns}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_shim_leaves_on_record_how_each_task_ended() {
    let mut world = World::new("box").await;
    let sandbox_pid = world.create("box", &sandbox()).await.expect("creates");
    for (id, program) in [("a", ["exit", "3"]), ("b", ["sleep", "1"])] {
        let member = member("box", sandbox_pid, &program);
        world.create(id, &member).await.expect("creates");
        world.start(id).await.expect("starts");
    }
    world.wait("a").await;
    world.shim.terminate().await;
    for id in ["box", "b"] {
        assert!(world.did(&format!("record {id} 255")));
    }
    assert!(world.did("record a 3") && !world.did("record a 255"));
    assert!(world.did("leave") && !world.did("destroy") && !world.did("remove a"));
    let mut exits = 0;
    while exits < 3 {
        exits += usize::from(world.event().await.topic == "/tasks/exit");
    }
    world.shim.done(Duration::from_hours(1)).await;
}
