//! The VM's size follows the limits of its containers.

use super::*;

const MIB: u64 = 1 << 20;

fn limited_member(sandbox_pid: u32, mib: u64) -> Value {
    let mut spec = member("box", sandbox_pid, &["sleep"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": mib * MIB}});
    spec
}

fn limit(mib: u64) -> String {
    json!({"memory": {"limit": mib * MIB}}).to_string()
}

impl World {
    /// Waits until the VM was asked to have these sizes, one after the other.
    async fn memory_sizes(&self, wanted: &[u32]) {
        let mut sizes = self.guest.memory_sizes.subscribe();
        let reached = sizes.wait_for(|sizes| sizes == wanted);
        let waited = tokio::time::timeout(Duration::from_secs(20), reached).await;
        let reached = waited.is_ok();
        assert!(reached, "{:?}", *self.guest.memory_sizes.borrow());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_grows_before_its_containers_may_use_more_and_shrinks_after() {
    let world = World::new("box").await;
    let pid = world.create("box", &sandbox()).await.expect("creates");
    // The VM that everybody gets has room for it.
    let small = limited_member(pid, 256);
    world.create("a", &small).await.expect("creates");
    world.memory_sizes(&[]).await;
    let large = limited_member(pid, 512);
    world.create("b", &large).await.expect("creates");
    let both = 768 + 12 + 64;
    world.memory_sizes(&[both]).await;
    world.update("a", &limit(512)).await.expect("updates");
    let more = 1024 + 16 + 64;
    world.memory_sizes(&[both, more]).await;
    world.update("a", &limit(256)).await.expect("updates");
    world.memory_sizes(&[both, more, both]).await;
    world.start("b").await.expect("starts");
    world.kill("b", 9).await.expect("kills");
    world.wait("b").await;
    world.memory_sizes(&[both, more, both, 512]).await;
    world.delete("b").await.expect("deletes");
    assert!(world.guest.fits.load(std::sync::atomic::Ordering::Relaxed) >= 2);
    let journal = world.journal.lock().expect("unpoisoned").clone();
    assert!(
        journal.contains(&format!("limit memory for {more} MiB")),
        "{journal:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vcpus_are_made_before_they_are_started_and_only_stopped_after() {
    if crate::pod::size::Host::this().cpus < 2 {
        // A VM has no more than the host.
        return;
    }
    let world = World::new("box").await;
    let pid = world.create("box", &sandbox()).await.expect("creates");
    let mut spec = member("box", pid, &["sleep"]);
    spec["linux"]["resources"] = json!({"cpu": {"quota": 150_000, "period": 100_000}});
    world.create("a", &spec).await.expect("creates");
    let one = json!({"cpu": {"quota": 50_000, "period": 100_000}}).to_string();
    world.update("a", &one).await.expect("updates");
    let mut done = world.guest.vcpus.subscribe();
    let settled = done.wait_for(|done| done == &["made 2", "online 2", "online 1"]);
    let settled = tokio::time::timeout(Duration::from_secs(20), settled).await;
    let settled = settled.is_ok();
    assert!(settled, "{:?}", *world.guest.vcpus.borrow());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_has_its_size_again_when_an_update_fails() {
    let world = World::new("box").await;
    let pid = world.create("box", &sandbox()).await.expect("creates");
    let small = limited_member(pid, 256);
    world.create("a", &small).await.expect("creates");
    world.guest.programs.lock().expect("unpoisoned").clear();
    let refused = world.update("a", &limit(1024)).await;
    refused.expect_err("the guest has no such container");
    world.memory_sizes(&[1024 + 16 + 64, 512]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_that_does_not_fit_its_pod_is_refused_with_the_overhead_to_set() {
    let world = World::granted("box", Some(100 * MIB)).await;
    let (code, message) = refused(world.create("box", &sandbox()).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("overhead.podFixed.memory"), "{message}");
    let journal = world.journal.lock().expect("unpoisoned").clone();
    assert!(!journal.contains(&"start VM".to_owned()), "{journal:?}");
    assert!(journal.contains(&"destroy".to_owned()), "{journal:?}");
}
