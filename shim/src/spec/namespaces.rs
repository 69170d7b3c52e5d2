//! `linux.namespaces`: the host's and the pod's become the guest's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use agent_protocol::{PID_NAMESPACES_DIR, POD_DIR, POD_PID_NAMESPACE, POD_USER_NAMESPACE};
use serde_json::{Value, json};

use super::binds::id_maps_of_container;
use super::{Error, Membership, text};
use crate::host::id_maps::IdMaps;

/// The pod's tasks by their pids as clients see them.
#[derive(Debug, Default)]
pub struct Peers {
    /// The pid of the sandbox, once there is one.
    pub sandbox: Option<u32>,
    /// The containers' ids by the pids of their inits.
    pub containers: BTreeMap<u32, String>,
    /// Of the pod's user namespace, if it has one.
    pub id_maps: Option<IdMaps>,
}

/// What the host has to know of them.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// The network namespace on the host, if there is one to join.
    pub network_path: Option<PathBuf>,
    /// Whether the container has a PID namespace of its own.
    pub own_pid: bool,
    /// Of the pod's user namespace, which its first container makes.
    pub id_maps: Option<IdMaps>,
}

/// Of the pod, whatever a container asks for, and never the host's.
const SHARED: [&str; 3] = ["network", "ipc", "uts"];

impl Namespaces {
    /// Points the pod's shared namespaces to where the guest keeps them.
    pub fn rewrite(
        spec: &mut Value,
        membership: &Membership,
        peers: &Peers,
    ) -> Result<Self, Error> {
        let mut found = Self::default();
        let own_maps = id_maps_of_container(spec);
        let mut present = Vec::new();
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
            let field = format!("{field}.path");
            let place = Place { membership, peers };
            match (kind.as_str(), path) {
                ("network" | "ipc" | "uts", path) => {
                    if let Some(path) = place.of_shared(&kind, path, &field)? {
                        found.network_path = Some(path);
                    }
                    let guest_name = if kind == "network" { "net" } else { &kind };
                    namespace["path"] = json!(format!("{POD_DIR}/ns/{guest_name}"));
                }
                ("pid", Some(path)) => namespace["path"] = json!(place.of_pid(&path, &field)?),
                ("pid", None) => found.own_pid = true,
                ("user", path) => {
                    if place.is_in_the_pods(path, own_maps.as_ref(), &field)? {
                        namespace["path"] = json!(POD_USER_NAMESPACE);
                    }
                    found.id_maps = own_maps.clone().filter(|_| !place.is_member());
                }
                (_, Some(path)) => return Err(refuse_path(&field, &kind, &path)),
                (_, None) => {}
            }
            present.push(kind);
        }
        let asks_for = |kind: &str| present.iter().any(|present| present == kind);
        if let Some(kind) = SHARED.into_iter().find(|kind| !asks_for(kind)) {
            return Err(Error::unsupported(
                "linux.namespaces",
                format!(
                    "the host's {kind} namespace was asked for (no {kind} namespace): not supported, a pod's {kind} ends at its VM"
                ),
            ));
        }
        if !asks_for("pid") {
            // The host's: as far as a pod sees, that is its VM.
            namespaces.push(json!({"type": "pid", "path": POD_PID_NAMESPACE}));
        }
        Ok(found)
    }
}

/// Where a container stands.
struct Place<'a> {
    membership: &'a Membership,
    peers: &'a Peers,
}

impl Place<'_> {
    /// The namespace on the host behind one that a pod's containers share, if
    /// there is one to join.
    fn of_shared(
        &self,
        kind: &str,
        path: Option<PathBuf>,
        field: &str,
    ) -> Result<Option<PathBuf>, Error> {
        match path {
            // Only the network's namespace exists on the host before the
            // pod: CNI made it. A process's is another pod's.
            Some(path) if !self.is_sandbox(&path) => {
                if kind == "network" && !path.starts_with("/proc") {
                    return Ok(Some(path));
                }
                Err(refuse_path(field, kind, &path))
            }
            _ => Ok(None),
        }
    }

    /// Whether a container's user namespace is the pod's, which owns what the pod's
    /// containers share. The first container's is; a sandbox's, whatever namespace CRI
    /// has made for it: it lives in the guest.
    fn is_in_the_pods(
        &self,
        path: Option<PathBuf>,
        maps: Option<&IdMaps>,
        field: &str,
    ) -> Result<bool, Error> {
        if !self.is_member() {
            if let (Some(path), Membership::Alone) = (&path, self.membership) {
                return Err(refuse_path(field, "user", path));
            }
            return match maps {
                Some(maps) if maps.has_root() => Ok(true),
                Some(_) => Err(Error::unsupported(
                    "linux.uidMappings, linux.gidMappings",
                    "container id 0, which sets containers up, is not mapped",
                )),
                None => Err(Error::field(
                    "linux.uidMappings, linux.gidMappings",
                    "a user namespace needs both, with ranges that the kernel takes",
                )),
            };
        }
        match path {
            None => Ok(false),
            Some(path) if !self.is_sandbox(&path) => Err(refuse_path(field, "user", &path)),
            Some(_) if self.peers.id_maps.is_some() && self.peers.id_maps.as_ref() == maps => {
                Ok(true)
            }
            Some(path) => Err(Error::unsupported(
                field,
                format!(
                    "{} is the pod's, whose ids are mapped in another way than the container's or not at all",
                    path.display()
                ),
            )),
        }
    }

    /// The guest's path of the PID namespace of a task of the pod.
    fn of_pid(&self, path: &Path, field: &str) -> Result<String, Error> {
        if self.is_sandbox(path) {
            return Ok(POD_PID_NAMESPACE.to_owned());
        }
        let peers = self.peers.containers.iter();
        let mut peers = peers.filter(|(pid, _)| self.is_member() && is_of(path, **pid));
        match peers.next() {
            Some((_, id)) => Ok(format!("{PID_NAMESPACES_DIR}/{id}")),
            None => Err(refuse_path(field, "pid", path)),
        }
    }

    /// Whether a path names a namespace of the pod's own sandbox.
    fn is_sandbox(&self, path: &Path) -> bool {
        let sandbox = self.peers.sandbox;
        self.is_member() && sandbox.is_some_and(|pid| is_of(path, pid))
    }

    fn is_member(&self) -> bool {
        matches!(self.membership, Membership::Member { .. })
    }
}

/// Whether a path names a namespace of the process. Such a path is mapped, never
/// opened: the namespace behind it is the stand-in's.
fn is_of(path: &Path, pid: u32) -> bool {
    path.starts_with(format!("/proc/{pid}/ns"))
}

fn refuse_path(field: &str, kind: &str, path: &Path) -> Error {
    let path = path.display();
    Error::unsupported(
        field,
        format!(
            "{path}: joining a {kind} namespace from outside the pod is not supported: it would have to reach into a VM"
        ),
    )
}
