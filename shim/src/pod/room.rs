//! How a pod's VM grows and shrinks with the limits of its containers.
//!
//! It grows before a container may use more, and shrinks after it may no longer,
//! while nobody waits. It is never smaller than it has booted. A guest takes and
//! gives memory as it can: what it cannot give yet, it gives later. vCPUs are made when
//! they are first asked for; one that is no longer wanted the guest stops, and it sleeps.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::agent::Agent;
use super::host_side::HostSide;
use super::limits::Limits;
use super::size::{Host, Size, UNLIMITED_POD_BYTES, memory_mib, vcpus, within_grant};
use super::{Pod, chain};

/// How long a container waits for its memory. Usually it takes milliseconds; one
/// that has less may run all the same.
const GROW_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an update that takes memory away waits until the guest has given it: the
/// kubelet takes it from the pod's cgroup next.
const SHRINK_TIMEOUT: Duration = Duration::from_secs(10);

/// In which a VM's memory is plugged and unplugged (`vmm_devices::Mem`).
const UNIT_MIB: u32 = 4;

/// What the containers of a pod are limited to, by their ids.
#[derive(Debug, Default)]
struct Demands(BTreeMap<String, Limits>);

impl Demands {
    /// Memory that a VM has with room for all of them, in MiB.
    fn memory_mib(&self, host: Host) -> u32 {
        let limited = self.0.values().filter_map(|limits| limits.memory_bytes);
        let limited = limited.fold(0_u64, u64::saturating_add);
        let any_unlimited = self.0.values().any(|limits| limits.memory_bytes.is_none());
        let bytes = match (limited, any_unlimited) {
            (0, _) => None,
            (bytes, false) => Some(bytes),
            (bytes, true) => Some(bytes.saturating_add(UNLIMITED_POD_BYTES)),
        };
        memory_mib(bytes, host.memory_bytes)
    }

    /// vCPUs for all that they may use at once, and that they are pinned to.
    fn vcpus(&self, host: Host) -> u8 {
        let limited = self.0.values().filter_map(|limits| limits.millicpus());
        let millis = limited.fold(0_u64, u64::saturating_add);
        let last = self.0.values().filter_map(|limits| limits.last_cpu).max();
        vcpus(Some(millis), last, host)
    }
}

/// What the VM was asked to have last.
#[derive(Clone, Copy, Debug)]
struct Asked {
    memory_mib: u32,
    vcpus: u8,
}

/// The size of a pod's VM, and what it is for.
#[derive(Debug)]
pub struct Room {
    booted: Size,
    demands: Mutex<Demands>,
    /// Held while it changes.
    asked: tokio::sync::Mutex<Asked>,
}

/// Which way a VM may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Both,
}

impl Room {
    /// Of a VM that boots with this size.
    pub fn new(booted: Size) -> Self {
        Self {
            booted,
            demands: Mutex::default(),
            asked: tokio::sync::Mutex::new(Asked {
                memory_mib: booted.memory.size_mib,
                vcpus: booted.vcpus.boot,
            }),
        }
    }

    fn demands(&self) -> MutexGuard<'_, Demands> {
        self.demands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted_vcpus(&self) -> u8 {
        let booted = self.booted.vcpus;
        let wanted = self.demands().vcpus(Host::this());
        wanted.clamp(booted.boot, booted.max)
    }

    fn wanted_mib(&self, granted_bytes: Option<u64>) -> u32 {
        let wanted = self.demands().memory_mib(Host::this());
        let granted = granted_bytes.map_or(Ok(wanted), |bytes| within_grant(wanted, bytes));
        let memory = self.booted.memory;
        granted
            .unwrap_or(memory.size_mib)
            .clamp(memory.size_mib, memory.max_mib)
    }
}

impl Pod {
    /// Makes room for a container that is limited so, before it is there. It may be
    /// less than wanted, which is logged.
    pub async fn make_room(&self, id: &str, limits: Limits) {
        self.room.demands().0.insert(id.to_owned(), limits);
        self.resize(Direction::Up).await;
    }

    /// Makes room for what a container may use after an update with these
    /// `linux.resources`, and returns what it was limited to before.
    pub async fn change_room(&self, id: &str, resources: &Value) -> Limits {
        let before = self.room.demands().0.get(id).copied().unwrap_or_default();
        self.make_room(id, before.changed_by(resources)).await;
        before
    }

    /// A container has ended, and needs its room no more. Idempotent.
    pub fn give_up_room(&self, id: &str) {
        if self.room.demands().0.remove(id).is_some() {
            self.settle_room();
        }
    }

    /// A container is limited as it was before [`Pod::change_room`], whose update has
    /// failed.
    pub fn restore_room(&self, id: &str, before: Limits) {
        if let Some(limits) = self.room.demands().0.get_mut(id) {
            *limits = before;
        }
        self.settle_room();
    }

    /// Lets the VM shrink to what is wanted, in its own time.
    pub fn settle_room(&self) {
        let pod = self.clone();
        tokio::spawn(async move { pod.resize(Direction::Both).await });
    }

    /// The same, and waits for a while until it has.
    pub async fn settled_room(&self) {
        self.resize(Direction::Both).await;
        let asked_mib = self.room.asked.lock().await.memory_mib;
        let mut memory = self.machine().memory_mib();
        // A unit more at the most: what was asked for was rounded up.
        let shrunk = memory.wait_for(|now| *now < asked_mib.saturating_add(UNIT_MIB));
        if timeout(SHRINK_TIMEOUT, shrunk).await.is_err() {
            debug!(asked_mib, "the guest has not given all of its memory yet");
        }
    }

    async fn resize(&self, direction: Direction) {
        let mut asked = self.room.asked.lock().await;
        self.resize_vcpus(&mut asked.vcpus, direction).await;
        self.resize_memory(&mut asked.memory_mib, direction).await;
    }

    async fn resize_vcpus(&self, asked: &mut u8, direction: Direction) {
        let (before, wanted) = (*asked, self.room.wanted_vcpus());
        if wanted == before || (wanted < before && direction == Direction::Up) {
            return;
        }
        // There is none before the guest is ready, and it has booted with what it needs by then.
        let Some(agent) = self.agent_now() else {
            return;
        };
        let made = if wanted > before {
            self.machine().resize_vcpus(wanted).await
        } else {
            // Those that the guest stops stay, asleep.
            Ok(())
        };
        let changed = match made {
            Ok(()) => agent.set_cpus(wanted).await.map_err(|error| chain(&error)),
            Err(reason) => Err(reason),
        };
        match changed {
            Ok(()) => *asked = wanted,
            Err(reason) if self.machine().end().is_some() => {
                debug!("the VM's vCPUs are not changed: {reason}");
            }
            Err(reason) => {
                warn!("the VM keeps {before} vCPUs instead of {wanted}: {reason}");
            }
        }
    }

    async fn resize_memory(&self, asked_mib: &mut u32, direction: Direction) {
        let before = *asked_mib;
        let mut wanted = self.room.wanted_mib(None);
        if wanted > before {
            // The kubelet may have changed it since.
            let Ok(Some(granted)) = self.on_host(HostSide::memory_granted).await else {
                // The pod has ended.
                return;
            };
            wanted = self.room.wanted_mib(granted);
        }
        if wanted == before || (wanted < before && direction == Direction::Up) {
            return;
        }
        if wanted > before {
            self.limit_on_host(wanted).await;
        }
        match self.machine().resize_memory(wanted).await {
            Ok(rounded) => {
                *asked_mib = wanted;
                debug!(before, wanted, rounded, "resizing the VM's memory");
                if wanted > before {
                    self.await_memory(rounded).await;
                }
            }
            Err(reason) if self.machine().end().is_some() => {
                debug!("the VM's memory is not resized: {reason}");
            }
            Err(reason) => {
                warn!("the VM keeps {before} MiB of memory instead of {wanted}: {reason}");
            }
        }
    }

    /// Bounds what the pod takes of the host's memory, for a VM of this size.
    async fn limit_on_host(&self, size_mib: u32) {
        // The pod may have ended.
        let _ = self.on_host(move |host| host.limit_memory(size_mib)).await;
    }

    async fn await_memory(&self, size_mib: u32) {
        let mut memory = self.machine().memory_mib();
        let grown = async { memory.wait_for(|now| *now >= size_mib).await.is_ok() };
        match timeout(GROW_TIMEOUT, grown).await {
            Ok(true) => {
                if let Some(agent) = self.agent_now() {
                    fit(agent).await;
                }
            }
            // The VM has ended.
            Ok(false) => {}
            Err(_) => warn!(
                "the guest has not taken the memory it was given within {GROW_TIMEOUT:?}: the VM is to have {size_mib} MiB"
            ),
        }
    }
}

/// Keeps what bounds the containers in the guest, and the pod on the host, what the
/// VM's memory allows, as long as the VM lives.
pub async fn keep(pod: Pod, agent: Agent) {
    let mut memory = pod.machine().memory_mib();
    while memory.changed().await.is_ok() {
        let now = *memory.borrow_and_update();
        fit(&agent).await;
        // While it is held, the VM grows, and has been given its bound.
        let asked = pod.room.asked.try_lock().map(|asked| asked.memory_mib);
        if let Ok(asked_mib) = asked {
            pod.limit_on_host(now.max(asked_mib)).await;
        }
    }
}

async fn fit(agent: &Agent) {
    match agent.fit_memory().await {
        Ok(bytes) => debug!(bytes, "the guest has fitted its containers to its memory"),
        // Also when the VM ends meanwhile.
        Err(error) => debug!("the guest does not fit its containers to its memory: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use vmm_config::{Memory, Vcpus};

    const HOST: Host = Host {
        cpus: 4,
        memory_bytes: 8 << 30,
    };

    fn limited(mib: u64) -> Limits {
        Limits::default().changed_by(&json!({"memory": {"limit": mib << 20}}))
    }

    fn demands<const N: usize>(limits: [Limits; N]) -> Demands {
        let named = limits.into_iter().enumerate();
        Demands(named.map(|(id, limits)| (id.to_string(), limits)).collect())
    }

    #[test]
    fn memory_has_room_for_all_limits_and_what_is_beside_them() {
        let of = |demands: Demands| demands.memory_mib(HOST);
        assert_eq!(of(Demands::default()), 512);
        assert_eq!(of(demands([Limits::default()])), 512);
        assert_eq!(of(demands([limited(256)])), 256 + 4 + 64);
        assert_eq!(of(demands([limited(256), limited(512)])), 768 + 12 + 64);
        // One without a limit has what it would have in a pod of its own.
        let mixed = of(demands([limited(256), Limits::default()]));
        assert_eq!(mixed, 256 + 448 + 11 + 64);
        let more = of(demands([
            limited(256),
            Limits::default(),
            Limits::default(),
        ]));
        assert_eq!(more, mixed);
        assert_eq!(of(demands([limited(1 << 40), limited(1 << 43)])), 8192);
    }

    #[test]
    fn vcpus_are_for_all_that_is_used_at_once_and_pinned_to() {
        let cpu = |cpu: serde_json::Value| Limits::default().changed_by(&json!({ "cpu": cpu }));
        let of = |demands: Demands| demands.vcpus(HOST);
        assert_eq!(of(Demands::default()), 1);
        let half = cpu(json!({"quota": 50_000, "period": 100_000}));
        assert_eq!(of(demands([half, half])), 1);
        assert_eq!(of(demands([half, half, half, Limits::default()])), 2);
        assert_eq!(of(demands([half, cpu(json!({"cpus": "2"}))])), 3);
        assert_eq!(of(demands([cpu(json!({"quota": 900_000}))])), 4);
    }

    #[test]
    fn wanted_is_between_what_has_booted_and_what_is_granted() {
        let room = Room::new(Size {
            vcpus: Vcpus { boot: 1, max: 1 },
            memory: Memory {
                size_mib: 512,
                max_mib: 1024,
            },
        });
        assert_eq!(room.wanted_mib(None), 512);
        room.demands().0.insert("a".to_owned(), limited(64));
        assert_eq!(room.wanted_mib(None), 512);
        room.demands().0.insert("b".to_owned(), limited(4096));
        let host_mib = Host::this().memory_bytes >> 20;
        assert!(host_mib >= 1024, "{host_mib}");
        assert_eq!(room.wanted_mib(None), 1024);
        assert_eq!(room.wanted_mib(Some(800 << 20)), 800 - 64);
        assert_eq!(room.wanted_mib(Some(1 << 20)), 512);
    }
}
