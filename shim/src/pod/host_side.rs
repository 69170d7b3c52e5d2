//! What a pod needs of its host. [`HostPod`] does it; tests, which have no VM,
//! bring another.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use agent_protocol::api::ProcessId;
use agent_protocol::rtnetlink::Rtnetlink;

use super::machine::Machine;
use super::size::Size;
use super::supervise::supervise;
use crate::bootstrap::socket_path;
use crate::host::cgroup::CgroupPath;
use crate::host::directory::{PodLock, PodPaths};
use crate::host::hooks::{self, Batch};
use crate::host::install::Installation;
use crate::host::loopback::Loopback;
use crate::host::netns::Network;
use crate::host::network::Scan;
use crate::host::pod::{ContainerRequest, Error, ExitRecord, HostPod};
use crate::host::source::{News, Source};
use crate::host::stand_in::StandIn;
use crate::host::vm::VmRequest;
use crate::host::volumes::{Followee, Placed, Wanted};

/// The host's part of a pod. Everything blocks; errors are the host's own.
pub trait HostSide: Send + 'static {
    /// Starts the VM with this many remote shares; the guest boots meanwhile.
    /// Inside a tokio runtime.
    fn start_vm(
        &mut self,
        vsock_listener: OwnedFd,
        size: Size,
        remote_shares: usize,
    ) -> Result<Machine, StartError>;
    /// [`HostPod::memory_granted`].
    fn memory_granted(&mut self) -> Option<u64>;
    /// [`HostPod::limit_memory`].
    fn limit_memory(&mut self, size_mib: u32);
    /// [`HostPod::set_network`].
    fn set_network(&mut self, network: &Network) -> Result<(), Error>;
    /// [`HostPod::scan_network`].
    fn scan_network(&mut self, connected: &BTreeSet<u32>) -> Result<Scan, Error>;
    /// [`HostPod::disconnect_network`].
    fn disconnect_network(&mut self, index: u32) -> Result<(), Error>;
    /// [`HostPod::watch_network`].
    fn watch_network(&mut self) -> Result<Rtnetlink, Error>;
    /// [`HostPod::listen_on_loopback`].
    fn listen_on_loopback(&mut self) -> Result<Loopback, Error>;
    /// [`HostPod::add_container`].
    fn add_container(&mut self, request: ContainerRequest) -> Result<PathBuf, Error>;
    /// [`HostPod::add_volume`].
    fn add_volume(&mut self, source: &Source, wanted: &Wanted) -> Result<Placed, Error>;
    /// [`HostPod::followees`].
    fn followees(&mut self) -> Vec<Followee>;
    /// [`HostPod::update_mounts`].
    fn update_mounts(&mut self, followee: &Followee, news: Option<News>);
    /// [`HostPod::start_stand_in`]; returns its pid.
    fn start_stand_in(&mut self, process: &ProcessId) -> Result<u32, Error>;
    /// [`HostPod::end_stand_in`]. Idempotent.
    fn end_stand_in(&mut self, process: &ProcessId) -> Result<(), Error>;
    /// [`HostPod::create_runtime_hooks`].
    fn create_runtime_hooks(&mut self, container_id: &str) -> Result<Batch, Error>;
    /// [`HostPod::poststart_hooks`].
    fn poststart_hooks(&mut self, container_id: &str) -> Result<Batch, Error>;
    /// [`HostPod::record_exit`].
    fn record_exit(&mut self, container_id: &str, exit: ExitRecord) -> Result<(), Error>;
    /// [`HostPod::dismantle_container`].
    fn dismantle_container(&mut self, container_id: &str) -> Result<Option<Batch>, Error>;
    /// [`HostPod::forget_container`].
    fn forget_container(&mut self, container_id: &str) -> Result<(), Error>;
    /// [`HostPod::leave`], the stand-ins having ended.
    fn leave(self: Box<Self>) -> Result<(), Error>;
    /// [`HostPod::destroy`].
    fn destroy(self: Box<Self>) -> Result<Vec<hooks::Error>, Error>;
}

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its files are not installed.
    #[error(transparent)]
    Install(#[from] crate::host::install::Error),
    /// Its processes could not be started.
    #[error(transparent)]
    Host(#[from] Error),
    /// They run but cannot be watched over.
    #[error("watch over the VM's processes")]
    Watch(#[source] std::io::Error),
}

/// Makes the host's part of the pod, once its cgroup is known.
pub type Maker = Box<dyn FnOnce(CgroupPath) -> Result<Box<dyn HostSide>, StartError> + Send>;

/// The maker of real pods.
pub fn maker(paths: PodPaths, lock: PodLock) -> Maker {
    Box::new(move |cgroup| {
        let installation = Installation::locate()?;
        let pod = HostPod::create(paths, lock, &cgroup)?;
        Ok(Box::new(Real {
            pod,
            installation,
            stand_ins: Vec::new(),
        }))
    })
}

struct Real {
    pod: HostPod,
    installation: Installation,
    stand_ins: Vec<StandIn>,
}

impl HostSide for Real {
    fn start_vm(
        &mut self,
        vsock_listener: OwnedFd,
        size: Size,
        remote_shares: usize,
    ) -> Result<Machine, StartError> {
        let request = VmRequest {
            vcpus: size.vcpus,
            memory: size.memory,
            command_line: String::new(),
            vsock_listener,
            console: None,
        };
        let vm = self
            .pod
            .start_vm(&self.installation, request, remote_shares)?;
        supervise(vm, size.memory).map_err(StartError::Watch)
    }

    fn memory_granted(&mut self) -> Option<u64> {
        self.pod.memory_granted()
    }

    fn limit_memory(&mut self, size_mib: u32) {
        self.pod.limit_memory(size_mib);
    }

    fn set_network(&mut self, network: &Network) -> Result<(), Error> {
        self.pod.set_network(network)
    }

    fn scan_network(&mut self, connected: &BTreeSet<u32>) -> Result<Scan, Error> {
        self.pod.scan_network(connected)
    }

    fn disconnect_network(&mut self, index: u32) -> Result<(), Error> {
        self.pod.disconnect_network(index)
    }

    fn watch_network(&mut self) -> Result<Rtnetlink, Error> {
        self.pod.watch_network()
    }

    fn listen_on_loopback(&mut self) -> Result<Loopback, Error> {
        self.pod.listen_on_loopback()
    }

    fn add_container(&mut self, request: ContainerRequest) -> Result<PathBuf, Error> {
        self.pod.add_container(request)
    }

    fn add_volume(&mut self, source: &Source, wanted: &Wanted) -> Result<Placed, Error> {
        self.pod.add_volume(source, wanted)
    }

    fn followees(&mut self) -> Vec<Followee> {
        self.pod.followees()
    }

    fn update_mounts(&mut self, followee: &Followee, news: Option<News>) {
        self.pod.update_mounts(followee, news);
    }

    fn start_stand_in(&mut self, process: &ProcessId) -> Result<u32, Error> {
        let exec_id = Some(process.exec_id.as_str()).filter(|id| !id.is_empty());
        let stand_in = self.pod.start_stand_in(&process.container_id, exec_id)?;
        let pid = stand_in.pid();
        self.stand_ins.push(stand_in);
        Ok(pid)
    }

    fn end_stand_in(&mut self, process: &ProcessId) -> Result<(), Error> {
        let stands_for_it = |stand_in: &StandIn| {
            stand_in.container_id() == process.container_id && stand_in.exec_id() == process.exec_id
        };
        match self.stand_ins.iter().position(stands_for_it) {
            Some(index) => self.pod.end_stand_in(&self.stand_ins.swap_remove(index)),
            None => Ok(()),
        }
    }

    fn create_runtime_hooks(&mut self, container_id: &str) -> Result<Batch, Error> {
        self.pod.create_runtime_hooks(container_id)
    }

    fn poststart_hooks(&mut self, container_id: &str) -> Result<Batch, Error> {
        self.pod.poststart_hooks(container_id)
    }

    fn record_exit(&mut self, container_id: &str, exit: ExitRecord) -> Result<(), Error> {
        self.pod.record_exit(container_id, exit)
    }

    fn dismantle_container(&mut self, container_id: &str) -> Result<Option<Batch>, Error> {
        let poststop = self.pod.dismantle_container(container_id)?;
        self.stand_ins
            .retain(|stand_in| stand_in.container_id() != container_id);
        Ok(poststop)
    }

    fn forget_container(&mut self, container_id: &str) -> Result<(), Error> {
        self.pod.forget_container(container_id)
    }

    fn leave(self: Box<Self>) -> Result<(), Error> {
        let Self { pod, stand_ins, .. } = *self;
        remove_socket(&pod);
        drop(stand_ins);
        pod.leave()
    }

    fn destroy(self: Box<Self>) -> Result<Vec<hooks::Error>, Error> {
        remove_socket(&self.pod);
        self.pod.destroy()
    }
}

/// While the pod is still ours: once its lock is gone, the name may be that of a
/// new pod's socket.
fn remove_socket(pod: &HostPod) {
    // Gone already is as well.
    let _ = std::fs::remove_file(socket_path(pod.paths()));
}
