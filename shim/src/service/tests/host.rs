//! A host without anything on it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use agent_protocol::api::ProcessId;
use agent_protocol::rtnetlink::Rtnetlink;

use super::guest::{Guest, name};
use crate::host::hooks::{self, Batch, State, Status};
use crate::host::loopback::Loopback;
use crate::host::netns::Network;
use crate::host::network::{Scan, Tables};
use crate::host::pod::{
    ContainerHooks, ContainerRequest, Error as HostError, ExitRecord, OrderError,
};
use crate::host::source::{News, Source};
use crate::host::volumes::{Followee, Placed, Wanted};
use crate::pod::host_side::{HostSide, StartError};
use crate::pod::machine::Machine;
use crate::pod::size::Size;

/// What the host did, in order.
pub type Journal = Arc<Mutex<Vec<String>>>;

/// A host on which everything works, and which writes down what it did.
pub struct FakeHost {
    journal: Journal,
    guest: Arc<Guest>,
    directory: PathBuf,
    stand_ins: u32,
    /// [`HostSide::memory_granted`].
    pub granted_bytes: Option<u64>,
    hooks: BTreeMap<String, ContainerHooks>,
}

impl FakeHost {
    pub fn new(journal: &Journal, guest: &Arc<Guest>, directory: &Path) -> Self {
        Self {
            journal: Arc::clone(journal),
            guest: Arc::clone(guest),
            directory: directory.to_owned(),
            stand_ins: 0,
            granted_bytes: None,
            hooks: BTreeMap::new(),
        }
    }

    /// What the containers' specs ask for, with no state to speak of.
    fn batch(&self, kind: &'static str, container_id: &str) -> Batch {
        let hooks = self.hooks.get(container_id).cloned().unwrap_or_default();
        Batch {
            kind,
            hooks: match kind {
                "createRuntime" => hooks.create_runtime,
                "poststart" => hooks.poststart,
                _ => hooks.poststop,
            },
            state: State {
                oci_version: hooks.oci_version,
                id: container_id.to_owned(),
                status: Status::Created,
                pid: None,
                bundle: self.directory.clone(),
                annotations: hooks.annotations,
            },
        }
    }

    fn note(&self, what: impl Into<String>) {
        self.journal.lock().expect("unpoisoned").push(what.into());
    }
}

impl HostSide for FakeHost {
    fn start_vm(
        &mut self,
        vsock_listener: OwnedFd,
        size: Size,
        _: usize,
    ) -> Result<Machine, StartError> {
        self.note("start VM");
        let (machine, watcher) = Machine::new(size.memory.size_mib);
        self.guest
            .boot(vsock_listener, watcher, self.directory.clone());
        Ok(machine)
    }

    fn memory_granted(&mut self) -> Option<u64> {
        self.granted_bytes
    }

    fn limit_memory(&mut self, size_mib: u32) {
        self.note(format!("limit memory for {size_mib} MiB"));
    }

    fn set_network(&mut self, network: &Network) -> Result<(), HostError> {
        self.note(format!("network {network:?}"));
        Ok(())
    }

    fn scan_network(&mut self, _: &BTreeSet<u32>) -> Result<Scan, HostError> {
        let tables = Tables {
            interfaces: Vec::new(),
            messages: Vec::new(),
        };
        Ok(Scan {
            tables,
            taps: Vec::new(),
        })
    }

    fn disconnect_network(&mut self, _: u32) -> Result<(), HostError> {
        Ok(())
    }

    fn watch_network(&mut self) -> Result<Rtnetlink, HostError> {
        let watch = Rtnetlink::open().expect("opens");
        watch.set_nonblocking().expect("is a socket");
        Ok(watch)
    }

    fn listen_on_loopback(&mut self) -> Result<Loopback, HostError> {
        Err(OrderError::NoNetwork.into())
    }

    fn add_container(&mut self, request: ContainerRequest) -> Result<PathBuf, HostError> {
        self.note(format!("add {}", request.id));
        self.hooks.insert(request.id.clone(), request.hooks);
        Ok(format!("containers/{}/rootfs", request.id).into())
    }

    fn followees(&mut self) -> Vec<Followee> {
        Vec::new()
    }

    fn update_mounts(&mut self, _: &Followee, _: Option<News>) {}

    fn add_volume(&mut self, _: &Source, _: &Wanted) -> Result<Placed, HostError> {
        self.note("volume");
        Ok(Placed {
            path: "volumes/0".into(),
            read_only: false,
            below: Vec::new(),
        })
    }

    fn start_stand_in(&mut self, process: &ProcessId) -> Result<u32, HostError> {
        self.stand_ins += 1;
        self.note(format!("stand-in of {} starts", name(process)));
        Ok(4000 + self.stand_ins)
    }

    fn end_stand_in(&mut self, process: &ProcessId) -> Result<(), HostError> {
        self.note(format!("stand-in of {} ends", name(process)));
        Ok(())
    }

    fn create_runtime_hooks(&mut self, container_id: &str) -> Result<Batch, HostError> {
        self.note(format!("hooks of {container_id}"));
        Ok(self.batch("createRuntime", container_id))
    }

    fn poststart_hooks(&mut self, container_id: &str) -> Result<Batch, HostError> {
        Ok(self.batch("poststart", container_id))
    }

    fn record_exit(&mut self, container_id: &str, exit: ExitRecord) -> Result<(), HostError> {
        self.note(format!("record {container_id} {}", exit.status));
        Ok(())
    }

    fn dismantle_container(&mut self, container_id: &str) -> Result<Option<Batch>, HostError> {
        self.note(format!("remove {container_id}"));
        Ok(Some(self.batch("poststop", container_id)))
    }

    fn forget_container(&mut self, container_id: &str) -> Result<(), HostError> {
        self.hooks.remove(container_id);
        Ok(())
    }

    fn leave(self: Box<Self>) -> Result<(), HostError> {
        self.note("leave");
        Ok(())
    }

    fn destroy(self: Box<Self>) -> Result<Vec<hooks::Error>, HostError> {
        self.note("destroy");
        Ok(Vec::new())
    }
}
