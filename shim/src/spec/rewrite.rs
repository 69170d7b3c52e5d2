//! From the host's configuration to the guest's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use agent_protocol::SHARE_DIR;
use serde_json::{Value, json};

use super::binds::{self, Volumes, is_bind};
use super::namespaces::{Namespaces, Peers};
use super::{Error, Membership, hooks, text};
use crate::host::id_maps::IdMaps;
use crate::host::pod::ContainerHooks;
use crate::pod::apparmor;
use crate::pod::limits::Limits;

/// What the host does with a configuration.
#[derive(Debug)]
pub struct HostView {
    /// Where the container stands.
    pub membership: Membership,
    /// Its hooks, run on the host.
    pub hooks: ContainerHooks,
    /// `hostname`; empty when there is none.
    pub hostname: String,
    /// `root.path` as given.
    pub root: PathBuf,
    /// `linux.cgroupsPath` as given.
    pub cgroups_path: Option<String>,
    /// `linux.namespaces`: the network's, if it is the host's to join.
    pub network_path: Option<PathBuf>,
    /// The CRI's `/dev/shm` on the host, whose size the pod's gets.
    pub shm_source: Option<PathBuf>,
    /// Of the pod's own container: `linux.sysctl`, which is then the pod's.
    pub pod_sysctls: BTreeMap<String, String>,
    /// Of the pod's user namespace, if it has one and this is its first container.
    pub id_maps: Option<IdMaps>,
    /// What it limits its pod to, if it is the pod's first.
    pub pod_limits: Limits,
    /// What it is limited to itself.
    pub limits: Limits,
    /// The files and directories that it binds, each with the index of its mount.
    pub bind_sources: Vec<(usize, PathBuf)>,
    /// Whether it follows what is mounted below them.
    pub follows_mounts: bool,
    /// The AppArmor profile of its program.
    pub apparmor_profile: Option<String>,
    /// Whether the container has a PID namespace of its own, with which all its
    /// processes end.
    pub own_pid_namespace: bool,
}

/// A configuration on its way to the guest.
#[derive(Debug)]
pub struct GuestSpec {
    spec: Value,
    container_id: String,
    shm_source: Option<PathBuf>,
}

impl GuestSpec {
    /// Splits the configuration of `container_id`, in a pod of `peers`.
    ///
    /// # Errors
    /// On what the OCI specification does not allow, and, by name, on what a
    /// pod in a VM does not have.
    pub fn split(
        mut spec: Value,
        container_id: &str,
        peers: &Peers,
    ) -> Result<(HostView, Self), Error> {
        if !spec.is_object() {
            return Err(Error::field("", "is not an object"));
        }
        let membership = Membership::of(&spec)?;
        let hooks = hooks::take(&mut spec)?;
        let root = text(&spec, "/root/path")
            .ok_or_else(|| Error::field("root.path", "missing"))?
            .into();
        let namespaces = Namespaces::rewrite(&mut spec, &membership, peers)?;
        let shm_source = cri_shm(&spec, membership.pod_id(container_id));
        let host = HostView {
            hooks,
            hostname: text(&spec, "/hostname").unwrap_or_default().to_owned(),
            root,
            cgroups_path: text(&spec, "/linux/cgroupsPath")
                .filter(|path| !path.is_empty())
                .map(str::to_owned),
            network_path: namespaces.network_path,
            shm_source: shm_source.clone(),
            pod_sysctls: pod_sysctls(&spec, &membership)?,
            id_maps: namespaces.id_maps,
            pod_limits: Limits::of_pod(&spec, &membership),
            limits: Limits::of_container(&spec),
            bind_sources: binds::sources(&spec["mounts"], shm_source.as_deref()),
            follows_mounts: binds::follow(&spec["mounts"]),
            apparmor_profile: apparmor::profile_of(&spec["process"]),
            own_pid_namespace: namespaces.own_pid,
            membership,
        };
        let guest = Self {
            spec,
            container_id: container_id.to_owned(),
            shm_source,
        };
        Ok((host, guest))
    }

    /// Replaces every path of the host by its path in the guest, and returns
    /// the configuration as JSON for the agent.
    pub fn into_json<V: Volumes>(
        mut self,
        volumes: &mut V,
    ) -> Result<Vec<u8>, IntoJsonError<V::Error>> {
        self.spec["root"]["path"] = json!(format!(
            "{SHARE_DIR}/containers/{}/rootfs",
            self.container_id
        ));
        // Relative to the parent of all containers in the guest.
        if let Some(linux) = self.spec.get_mut("linux").and_then(Value::as_object_mut) {
            linux.insert("cgroupsPath".to_owned(), json!(self.container_id));
        }
        let id_maps = binds::id_maps_of_container(&self.spec);
        if let Some(mounts) = self
            .spec
            .get_mut("mounts")
            .filter(|mounts| !mounts.is_null())
        {
            let Value::Array(asked) = mounts.take() else {
                return Err(Error::field("mounts", "is not a list").into());
            };
            let mut rewritten = Vec::with_capacity(asked.len());
            let container = binds::Container {
                shm_source: self.shm_source.as_deref(),
                id_maps: id_maps.as_ref(),
            };
            for (index, mount) in asked.into_iter().enumerate() {
                binds::rewrite(mount, index, container, volumes, &mut rewritten)?;
            }
            *mounts = Value::Array(rewritten);
        }
        Ok(self.spec.to_string().into_bytes())
    }
}

/// Why [`GuestSpec::into_json`] failed.
#[derive(Debug, thiserror::Error)]
pub enum IntoJsonError<E> {
    /// The configuration is wrong.
    #[error(transparent)]
    Spec(#[from] Error),
    /// A source cannot be shared.
    #[error("config.json: mounts[{index}].source {path}")]
    Volume {
        /// Which mount.
        index: usize,
        /// Its source on the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: E,
    },
}

/// The kernel parameters that a pod asks for, as CRI has them: by its own container.
fn pod_sysctls(spec: &Value, membership: &Membership) -> Result<BTreeMap<String, String>, Error> {
    match spec.pointer("/linux/sysctl") {
        Some(asked) if *membership == Membership::Sandbox && !asked.is_null() => {
            serde_json::from_value(asked.clone())
                .map_err(|error| Error::field("linux.sysctl", error.to_string()))
        }
        _ => Ok(BTreeMap::new()),
    }
}

/// The tmpfs that CRI mounts on the host as its pods' `/dev/shm`
/// (`STATE/sandboxes/SANDBOX_ID/shm`): memory of the host that the guest
/// replaces by its own.
fn cri_shm(spec: &Value, pod_id: &str) -> Option<PathBuf> {
    let tail = Path::new("sandboxes").join(pod_id).join("shm");
    spec.get("mounts")?
        .as_array()?
        .iter()
        .filter(|mount| is_bind(mount) && text(mount, "/destination") == Some("/dev/shm"))
        .filter_map(|mount| text(mount, "/source").map(PathBuf::from))
        .find(|source| source.ends_with(&tail))
}

#[cfg(test)]
mod tests;
