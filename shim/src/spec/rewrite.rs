//! From the host's configuration to the guest's.

use std::path::{Path, PathBuf};

use agent_protocol::{POD_DIR, SHARE_DIR};
use serde_json::{Value, json};

use super::binds::{self, Volumes, is_bind};
use super::{Error, Membership, hooks, text};
use crate::host::pod::ContainerHooks;
use crate::pod::size::Limits;

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
    /// What `linux.resources` limits it to.
    pub limits: Limits,
    /// The files and directories that it binds, each with the index of its mount.
    pub bind_sources: Vec<(usize, PathBuf)>,
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
    /// Splits the configuration of `container_id`. `sandbox_pid` is the pid of
    /// the pod's sandbox as clients see it, once there is one.
    ///
    /// # Errors
    /// On what the OCI specification does not allow, and, by name, on what a
    /// pod in a VM does not have.
    pub fn split(
        mut spec: Value,
        container_id: &str,
        sandbox_pid: Option<u32>,
    ) -> Result<(HostView, Self), Error> {
        if !spec.is_object() {
            return Err(Error::field("", "is not an object"));
        }
        let membership = Membership::of(&spec)?;
        let hooks = hooks::take(&mut spec)?;
        let root = text(&spec, "/root/path")
            .ok_or_else(|| Error::field("root.path", "missing"))?
            .into();
        let namespaces = Namespaces::rewrite(&mut spec, &membership, sandbox_pid)?;
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
            limits: Limits::of(&spec),
            bind_sources: binds::sources(&spec["mounts"], shm_source.as_deref()),
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
        if let Some(mounts) = self
            .spec
            .get_mut("mounts")
            .filter(|mounts| !mounts.is_null())
        {
            let Value::Array(asked) = mounts.take() else {
                return Err(Error::field("mounts", "is not a list").into());
            };
            let mut rewritten = Vec::with_capacity(asked.len());
            let shm_source = self.shm_source.as_deref();
            for (index, mount) in asked.into_iter().enumerate() {
                binds::rewrite(mount, index, shm_source, volumes, &mut rewritten)?;
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

#[derive(Debug, Default)]
struct Namespaces {
    network_path: Option<PathBuf>,
    own_pid: bool,
}

impl Namespaces {
    /// Points the pod's shared namespaces to where the guest keeps them.
    fn rewrite(
        spec: &mut Value,
        membership: &Membership,
        sandbox_pid: Option<u32>,
    ) -> Result<Self, Error> {
        let mut found = Self::default();
        let mut shared = [("network", false), ("ipc", false), ("uts", false)];
        let namespaces = spec
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut)
            .ok_or_else(|| Error::field("linux.namespaces", "missing"))?;
        for (index, namespace) in namespaces.iter_mut().enumerate() {
            let field = format!("linux.namespaces[{index}]");
            let kind = text(namespace, "/type")
                .ok_or_else(|| Error::field(format!("{field}.type"), "missing"))?
                .to_owned();
            let path = text(namespace, "/path")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from);
            let place = shared.iter_mut().find(|(name, _)| *name == kind);
            let Some((_, present)) = place else {
                if let Some(path) = path {
                    // The sandbox runs nowhere. Each container gets a user
                    // namespace of its own, in which the same mappings, which
                    // its configuration has too, make it the same users.
                    if kind == "user" && is_of_sandbox(&path, membership, sandbox_pid) {
                        if let Some(namespace) = namespace.as_object_mut() {
                            namespace.remove("path");
                        }
                        continue;
                    }
                    return Err(refuse_path(&format!("{field}.path"), &kind, &path));
                }
                found.own_pid |= kind == "pid";
                continue;
            };
            *present = true;
            if let Some(path) = &path
                && !is_of_sandbox(path, membership, sandbox_pid)
            {
                // Only the network's namespace exists on the host before the
                // pod: CNI made it. A process's is another pod's.
                if kind != "network" || path.starts_with("/proc") {
                    return Err(refuse_path(&format!("{field}.path"), &kind, path));
                }
                found.network_path = Some(path.clone());
            }
            let guest_name = if kind == "network" { "net" } else { &kind };
            namespace["path"] = json!(format!("{POD_DIR}/ns/{guest_name}"));
        }
        for (kind, present) in shared {
            if !present {
                return Err(Error::unsupported(
                    "linux.namespaces",
                    format!(
                        "the host's {kind} namespace was asked for (no {kind} namespace): not supported, a pod's {kind} ends at its VM"
                    ),
                ));
            }
        }
        Ok(found)
    }
}

/// Whether a path names a namespace of the pod's own sandbox. Such a path is
/// mapped, never opened: the namespace behind it is the stand-in's.
fn is_of_sandbox(path: &Path, membership: &Membership, sandbox_pid: Option<u32>) -> bool {
    let (Membership::Member { .. }, Some(pid)) = (membership, sandbox_pid) else {
        return false;
    };
    path.starts_with(format!("/proc/{pid}/ns"))
}

fn refuse_path(field: &str, kind: &str, path: &Path) -> Error {
    let path = path.display();
    let reason = match kind {
        "pid" => format!(
            "{path}: sharing a PID namespace between containers is not supported yet; use the container's own (pid mode CONTAINER)"
        ),
        _ => format!(
            "{path}: joining a {kind} namespace from outside the pod is not supported: it would have to reach into a VM"
        ),
    };
    Error::unsupported(field, reason)
}

#[cfg(test)]
mod tests;
