//! One pod on the host: its parts put together, each step written down in the
//! pod's record before it is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use agent_protocol::rtnetlink::Rtnetlink;
use oci_spec::runtime::Hook;
use thiserror::Error;

use super::cgroup::{self, CgroupPath, PodCgroup};
use super::deadline::Deadline;
use super::directory::{self, PodLock, PodPaths};
use super::hooks::{self, Batch, State, Status};
use super::install::{self, Installation, Opened};
use super::loopback::{self, Loopback};
use super::mounts::{self, RootFs};
use super::netns::{self, Network};
use super::network::{self, Scan};
use super::record::{self, Container, Process, Record};
use super::share::{self, Share};
use super::source::{self, News, Source};
use super::stand_in::{self, StandIn};
use super::vm::{self, Vm, VmRequest};
use super::volumes::{self, Followee, Placed, Volumes, Wanted};
use super::{cleanup, uid};

pub use record::ExitRecord;

/// Why a step on the host failed. [`Error::blames_caller`] tells a wrong
/// request from a failing host.
#[derive(Debug, Error)]
#[error(transparent)]
#[expect(
    missing_docs,
    reason = "each variant is the part whose error it carries"
)]
pub enum Error {
    Directory(#[from] directory::Error),
    Record(#[from] record::Error),
    Cgroup(#[from] cgroup::Error),
    Uid(#[from] uid::Error),
    Share(#[from] share::Error),
    Source(#[from] source::Error),
    Volume(#[from] volumes::Error),
    Network(#[from] netns::Error),
    Interfaces(#[from] network::Error),
    Loopback(#[from] loopback::Error),
    StandIn(#[from] stand_in::Error),
    Hook(#[from] hooks::Error),
    Vm(#[from] vm::Error),
    Order(#[from] OrderError),
}

/// A step was asked for before what it needs.
#[derive(Debug, Error)]
pub enum OrderError {
    /// There is no such container in the pod.
    #[error("container {id} is not in the pod")]
    UnknownContainer {
        /// Its id.
        id: String,
    },
    /// A stand-in was asked for before the network namespace.
    #[error("the pod has no network namespace yet")]
    NoNetwork,
}

impl Error {
    /// Whether the request asked for what cannot be (answer `InvalidArgument`),
    /// as opposed to the host failing (`Internal`).
    pub fn blames_caller(&self) -> bool {
        match self {
            Self::Directory(error) => matches!(error, directory::Error::Id { .. }),
            Self::Cgroup(error) => matches!(error, cgroup::Error::Path { .. }),
            Self::Network(error) => matches!(error, netns::Error::HostNetwork),
            Self::Share(error) => match error {
                share::Error::Id(_) | share::Error::Exists { .. } => true,
                share::Error::RootFs(error) => is_refused_mount(error),
                share::Error::Io { .. } => false,
            },
            Self::Source(error) => match error {
                source::Error::Open { .. } | source::Error::Kind { .. } => true,
                source::Error::Mount { .. } | source::Error::Silent { .. } => false,
            },
            Self::Order(_) => true,
            Self::Record(_)
            | Self::Uid(_)
            | Self::Interfaces(_)
            | Self::Loopback(_)
            | Self::StandIn(_)
            | Self::Hook(_)
            | Self::Vm(_)
            | Self::Volume(_) => false,
        }
    }
}

fn is_refused_mount(error: &mounts::Error) -> bool {
    match error {
        mounts::Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        mounts::Error::IdMaps(_) => false,
        mounts::Error::Kind { .. }
        | mounts::Error::Option { .. }
        | mounts::Error::Target { .. }
        | mounts::Error::Source { .. }
        | mounts::Error::TooLong { .. } => true,
    }
}

/// What a container's hooks are told and asked to run.
#[derive(Clone, Debug, Default)]
pub struct ContainerHooks {
    /// `hooks.prestart` and `hooks.createRuntime`, run in this order before
    /// Create returns.
    pub create_runtime: Vec<Hook>,
    /// `hooks.poststart`.
    pub poststart: Vec<Hook>,
    /// `hooks.poststop`.
    pub poststop: Vec<Hook>,
    /// The spec's annotations, for the state on the hooks' stdin.
    pub annotations: BTreeMap<String, String>,
    /// `ociVersion` of the spec.
    pub oci_version: String,
}

/// A container as [`HostPod::add_container`] is asked for it.
#[derive(Clone, Debug)]
pub struct ContainerRequest {
    /// Its id; checked to be one path component.
    pub id: String,
    /// Its bundle: an absolute path.
    pub bundle: PathBuf,
    /// Where its root file system comes from.
    pub rootfs: RootFs,
    /// Its hooks; `poststop` is kept in the record for `delete`.
    pub hooks: ContainerHooks,
}

/// Everything one pod has on the host.
///
/// Dropping it without [`HostPod::destroy`] leaves the pod to
/// [`cleanup::cleanup`], as a kill of the shim would.
#[derive(Debug)]
pub struct HostPod {
    paths: PodPaths,
    /// Held for as long as this shim answers for the pod.
    _lock: PodLock,
    record: Record,
    cgroup: PodCgroup,
    /// The cgroup that the shim was in before.
    former_cgroup: PathBuf,
    uid: u32,
    share: Share,
    volumes: Volumes,
    network: Option<OwnedFd>,
    /// By container: those that a killed shim leaves unrun are lost with it.
    hooks: BTreeMap<String, ContainerHooks>,
}

/// What a pod may take of the host's memory: a bound on what goes wrong, which a
/// guest must not reach by what it may do, or the host would end it.
///
/// That is its RAM; for each inode that it has cached, of which it holds 1 KiB,
/// the host's own, pinned by a descriptor of the file server, with up to 2 KiB;
/// and the processes themselves. The host's page cache is given back in time.
fn memory_limit(size_mib: u32) -> u64 {
    const PROCESSES_MIB: u64 = 256;
    (3 * u64::from(size_mib) + PROCESSES_MIB) << 20
}

/// What [`HostPod::create`] makes.
struct Parts {
    cgroup: PodCgroup,
    former_cgroup: PathBuf,
    uid: u32,
    share: Share,
}

impl HostPod {
    /// Makes the pod's record, cgroup, uid slot and share, and moves this
    /// process into the pod's cgroup. On an error nothing is left, not even
    /// the directory.
    pub fn create(paths: PodPaths, lock: PodLock, cgroup: &CgroupPath) -> Result<Self, Error> {
        Self::create_in(Path::new(cgroup::HIERARCHY), paths, lock, cgroup)
    }

    /// The same with the cgroup hierarchy mounted elsewhere, for tests.
    pub(super) fn create_in(
        hierarchy: &Path,
        paths: PodPaths,
        lock: PodLock,
        cgroup: &CgroupPath,
    ) -> Result<Self, Error> {
        let mut record = Record::new();
        record.shim = Some(Process::of(std::process::id()));
        let made = Self::make_parts(hierarchy, &paths, &mut record, cgroup);
        let parts = made.inspect_err(|_| {
            if let Err(error) = cleanup::undo_pod(&paths, &mut record, Deadline::NONE) {
                tracing::warn!("a pod that could not be made is not removed either: {error}");
            }
        })?;
        Ok(Self {
            paths,
            _lock: lock,
            record,
            cgroup: parts.cgroup,
            former_cgroup: parts.former_cgroup,
            uid: parts.uid,
            volumes: Volumes::new(parts.share.path()),
            share: parts.share,
            network: None,
            hooks: BTreeMap::new(),
        })
    }

    fn make_parts(
        hierarchy: &Path,
        paths: &PodPaths,
        record: &mut Record,
        cgroup: &CgroupPath,
    ) -> Result<Parts, Error> {
        record.cgroup = Some(record::Cgroup {
            path: PodCgroup::path_of(hierarchy, cgroup),
            made: PodCgroup::missing(hierarchy, cgroup)?,
        });
        record.write(&paths.record())?;
        let uid = uid::claim(paths.root(), &cleanup::owner(paths))?;
        let share = Share::create(&paths.share())?;
        let cgroup = PodCgroup::create(hierarchy, cgroup)?;
        // Last: nothing after it can fail and leave the shim in there.
        let former_cgroup = cgroup.adopt_self()?;
        Ok(Parts {
            cgroup,
            former_cgroup,
            uid,
            share,
        })
    }

    fn save(&self) -> Result<(), Error> {
        Ok(self.record.write(&self.paths.record())?)
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, Error> {
        let unknown = || OrderError::UnknownContainer { id: id.to_owned() };
        Ok(self.record.containers.get_mut(id).ok_or_else(unknown)?)
    }

    /// The pod's paths.
    pub fn paths(&self) -> &PodPaths {
        &self.paths
    }

    /// The pod's cgroup directory, for statistics and limits.
    pub fn cgroup_path(&self) -> &Path {
        self.cgroup.path()
    }

    /// The memory that the host grants the pod and whatever is beside it in the
    /// cgroups above its own, in bytes, if that is limited.
    pub fn memory_granted(&self) -> Option<u64> {
        self.cgroup.memory_granted()
    }

    /// Bounds the pod's memory on the host, for a VM of this size.
    pub fn limit_memory(&self, size_mib: u32) {
        if let Err(error) = self.cgroup.limit_memory(memory_limit(size_mib)) {
            // The VM's size bounds nearly all of it in any case.
            tracing::warn!("the pod's memory on the host is not limited: {error}");
        }
    }

    /// Starts the file servers, `remote_shares` of them for a network or user-space
    /// file system each, and the monitor in their jails and sends `Boot`. Returns
    /// when all execute; the guest boots meanwhile.
    pub fn start_vm(
        &mut self,
        installation: &Installation,
        request: VmRequest,
        remote_shares: usize,
    ) -> Result<Vm, Error> {
        for number in 0..remote_shares.min(directory::MAX_REMOTE_SHARES) {
            let share = Share::create(&self.paths.remote_share(number))?;
            self.volumes.add_share(share.path());
        }
        self.limit_memory(request.memory.size_mib);
        let installed = installation.open().map_err(vm::Error::from)?;
        let kvm = install::open_kvm().map_err(vm::Error::from)?;
        self.start_processes(installed, kvm, request)
    }

    pub(super) fn start_processes(
        &mut self,
        installed: Opened,
        kvm: OwnedFd,
        request: VmRequest,
    ) -> Result<Vm, Error> {
        let place = vm::Place {
            directory: &self.paths.directory(),
            share: self.share.path(),
            remote_shares: &self.volumes.remote_shares(),
            cgroup: self.cgroup.vm(),
            uid: self.uid,
        };
        let vm = Vm::start(place, installed, kvm, request)?;
        self.record.monitor = Some(Process::of(vm.monitor.pid()));
        self.record.file_server = Some(Process::of(vm.file_server.pid()));
        let servers = [&vm.file_server].into_iter().chain(&vm.remote_servers);
        let servers: Vec<_> = servers
            .map(|server| server.pidfd().try_clone_to_owned())
            .collect::<Result<_, _>>()
            .map_err(vm::duplicate_failed)?;
        self.volumes.set_servers(servers.into_iter());
        self.save()?;
        Ok(vm)
    }

    /// Gives the pod its network namespace; once, before the first stand-in.
    pub fn set_network(&mut self, network: &Network) -> Result<(), Error> {
        let namespace = match network {
            Network::Existing(path) => netns::open_existing(path)?,
            Network::New => {
                self.record.network_namespace = true;
                self.save()?;
                netns::create(&self.paths.network_namespace())?
            }
        };
        self.network = Some(namespace);
        Ok(())
    }

    /// The pod's network namespace once [`HostPod::set_network`] has run.
    pub fn network_namespace(&self) -> Option<BorrowedFd<'_>> {
        self.network.as_ref().map(AsFd::as_fd)
    }

    /// Reads what the namespace has, and makes taps for those of its interfaces
    /// that are not `connected` to the VM yet.
    pub fn scan_network(&self, connected: &BTreeSet<u32>) -> Result<Scan, Error> {
        Ok(network::scan(self.namespace()?, connected)?)
    }

    /// [`network::disconnect`].
    pub fn disconnect_network(&self, index: u32) -> Result<(), Error> {
        Ok(network::disconnect(self.namespace()?, index)?)
    }

    /// [`network::watch`].
    pub fn watch_network(&self) -> Result<Rtnetlink, Error> {
        Ok(network::watch(self.namespace()?)?)
    }

    /// [`Loopback::listen`].
    pub fn listen_on_loopback(&self) -> Result<Loopback, Error> {
        Ok(Loopback::listen(self.namespace()?)?)
    }

    fn namespace(&self) -> Result<BorrowedFd<'_>, OrderError> {
        self.network_namespace().ok_or(OrderError::NoNetwork)
    }

    /// Mounts a container's root file system into the share and returns its
    /// path relative to the share (`containers/ID/rootfs`). On an error nothing
    /// of it is left.
    pub fn add_container(&mut self, request: ContainerRequest) -> Result<PathBuf, Error> {
        directory::check_id(&request.id)?;
        if self.record.containers.contains_key(&request.id) {
            return Err(share::Error::Exists { id: request.id }.into());
        }
        let container = Container {
            bundle: request.bundle,
            oci_version: request.hooks.oci_version.clone(),
            annotations: request.hooks.annotations.clone(),
            poststop: request.hooks.poststop.clone(),
            poststop_due: false,
            stand_ins: BTreeMap::new(),
            exit: None,
        };
        self.record.containers.insert(request.id.clone(), container);
        self.save()?;
        match self.share.add_container(&request.id, &request.rootfs) {
            Ok(path) => {
                self.hooks.insert(request.id, request.hooks);
                Ok(path)
            }
            Err(error) => {
                self.record.containers.remove(&request.id);
                self.save()?;
                Err(error.into())
            }
        }
    }

    /// Brings a source into the share, once per pod, with what is mounted below
    /// it as `wanted` says, and tells where it is. Volumes live as long as the pod.
    pub fn add_volume(&mut self, source: &Source, wanted: &Wanted) -> Result<Placed, Error> {
        Ok(self.volumes.place(source, wanted)?)
    }

    /// The directories of volumes below which mounts are followed
    /// ([`volumes::Below::Followed`]).
    pub fn followees(&self) -> Vec<Followee> {
        self.volumes.followees()
    }

    /// Passes on to the pod what is mounted below a directory by now; without `news`,
    /// which could not be had, never again.
    pub fn update_mounts(&mut self, followee: &Followee, news: Option<News>) {
        match news {
            Some(news) => self.volumes.update(followee, news),
            None => self.volumes.unfollow(followee),
        }
    }

    /// Starts the host process whose pid the clients see: for a container's
    /// init when `exec_id` is `None`.
    pub fn start_stand_in(
        &mut self,
        container_id: &str,
        exec_id: Option<&str>,
    ) -> Result<StandIn, Error> {
        self.container(container_id)?;
        let stand_in = StandIn::start(&stand_in::Place {
            container_id,
            exec_id,
            rootfs: &self.share.rootfs(container_id),
            network: self.namespace()?,
            cgroup: self.cgroup.vm(),
            uid: self.uid,
        })?;
        let process = Process::of(stand_in.pid());
        let stand_ins = &mut self.container(container_id)?.stand_ins;
        stand_ins.insert(stand_in.exec_id().to_owned(), process);
        self.save()?;
        Ok(stand_in)
    }

    /// Ends a stand-in and reaps it. That of a container's init stays in the
    /// record, for `delete` to report its pid. Idempotent.
    pub fn end_stand_in(&mut self, stand_in: &StandIn) -> Result<(), Error> {
        stand_in.end();
        if stand_in.exec_id().is_empty() {
            return Ok(());
        }
        let container = self.record.containers.get_mut(stand_in.container_id());
        let known = container.and_then(|found| found.stand_ins.remove(stand_in.exec_id()));
        known.map_or(Ok(()), |_| self.save())
    }

    /// `prestart` and `createRuntime` with the stand-in's pid, to be run now:
    /// from here on `poststop` is due. The first that fails fails Create.
    pub fn create_runtime_hooks(&mut self, container_id: &str) -> Result<Batch, Error> {
        self.container(container_id)?.poststop_due = true;
        self.save()?;
        let hooks = self.hooks.get(container_id);
        let hooks = hooks.map_or(&[][..], |hooks| &hooks.create_runtime);
        self.batch(container_id, "createRuntime", hooks, Status::Creating)
    }

    /// `poststart`, to be run now; failures are for the log only (OCI
    /// runtime-spec, runtime.md, "Lifecycle").
    pub fn poststart_hooks(&self, container_id: &str) -> Result<Batch, Error> {
        let hooks = self.hooks.get(container_id);
        let hooks = hooks.map_or(&[][..], |hooks| &hooks.poststart);
        self.batch(container_id, "poststart", hooks, Status::Running)
    }

    fn batch(
        &self,
        container_id: &str,
        kind: &'static str,
        hooks: &[Hook],
        status: Status,
    ) -> Result<Batch, Error> {
        let unknown = || OrderError::UnknownContainer {
            id: container_id.to_owned(),
        };
        let container = self.record.containers.get(container_id);
        let container = container.ok_or_else(unknown)?;
        Ok(Batch {
            kind,
            hooks: hooks.to_vec(),
            state: State {
                oci_version: container.oci_version.clone(),
                id: container_id.to_owned(),
                status,
                pid: container.stand_ins.get("").map(|process| process.pid),
                bundle: container.bundle.clone(),
                annotations: container.annotations.clone(),
            },
        })
    }

    /// Keeps the exit of a container's init for `delete`.
    pub fn record_exit(&mut self, container_id: &str, exit: ExitRecord) -> Result<(), Error> {
        self.container(container_id)?.exit = Some(exit);
        self.save()
    }

    /// Undoes [`HostPod::add_container`] after the guest has let go of it: ends
    /// its stand-ins and unmounts. Returns the `poststop` hooks, to be run
    /// before [`HostPod::forget_container`]; `None` when it is not there.
    pub fn dismantle_container(&mut self, container_id: &str) -> Result<Option<Batch>, Error> {
        self.hooks.remove(container_id);
        cleanup::dismantle_container(&self.paths, &self.record, container_id, Deadline::NONE)
    }

    /// Strikes a container off the record, its `poststop` hooks having run.
    /// Idempotent.
    pub fn forget_container(&mut self, container_id: &str) -> Result<(), Error> {
        cleanup::forget_container(&self.paths, &mut self.record, container_id)
    }

    /// Lets go of the pod as it is: what is left of it, and on record, is for
    /// [`cleanup::cleanup`]. This process returns to its former cgroup.
    pub fn leave(self) -> Result<(), Error> {
        // Or it would be killed with the pod's other processes.
        Ok(self.cgroup.release_self(&self.former_cgroup)?)
    }

    /// Ends what still runs and removes everything of the pod from the host,
    /// the directory included. Containers left are removed first, their
    /// `poststop` hooks run. This process returns to its former cgroup.
    ///
    /// What an error leaves is for [`cleanup::cleanup`] to remove.
    pub fn destroy(mut self) -> Result<Vec<hooks::Error>, Error> {
        self.cgroup.release_self(&self.former_cgroup)?;
        cleanup::undo_pod(&self.paths, &mut self.record, Deadline::NONE)
    }
}
