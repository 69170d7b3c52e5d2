//! A pod by its CRI configuration alone, where no pause container comes with it: the
//! OCI configuration that CRI would give that container, and the files that it would
//! mount into the others.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protobuf::Message;
use serde_json::{Value, json};

use super::cri::{DNSConfig, IDMapping, NamespaceMode, PodSandboxConfig};
use super::text;

/// `linux.sysctl` of a pod that does not set them itself: containerd's default since
/// 2.0 (`enable_unprivileged_ports`, `enable_unprivileged_icmp`).
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Reads what CRI says of a pod.
///
/// # Errors
/// When it is no such message.
pub fn parse(bytes: &[u8]) -> Result<PodSandboxConfig, protobuf::Error> {
    PodSandboxConfig::parse_from_bytes(bytes)
}

/// The configuration of the container that stands for the pod.
pub fn spec_of(id: &str, config: &PodSandboxConfig, network_path: &str) -> Value {
    let linux = &config.linux;
    let options = &linux.security_context.namespace_options;
    let is_nodes =
        |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode.enum_value() == Ok(NamespaceMode::NODE);
    let mut namespaces = vec![json!({"type": "mount"})];
    // One that is not there is the host's, which is refused by its name.
    if !is_nodes(options.network) {
        namespaces.push(json!({"type": "network", "path": network_path}));
        namespaces.push(json!({"type": "uts"}));
    }
    if !is_nodes(options.ipc) {
        namespaces.push(json!({"type": "ipc"}));
    }
    if !is_nodes(options.pid) {
        namespaces.push(json!({"type": "pid"}));
    }
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "hostname": config.hostname,
        "root": {"path": "rootfs", "readonly": true},
        "annotations": annotations(id, config),
        "linux": {},
    });
    if let Some(user) = options.userns_options.as_ref()
        && !is_nodes(user.mode)
    {
        namespaces.push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = id_mappings(&user.uids);
        spec["linux"]["gidMappings"] = id_mappings(&user.gids);
    }
    spec["linux"]["namespaces"] = json!(namespaces);
    spec["linux"]["sysctl"] = sysctls(config);
    if !linux.cgroup_parent.is_empty() {
        spec["linux"]["cgroupsPath"] = json!(cgroups_path(&linux.cgroup_parent, id));
    }
    spec
}

/// As CRI annotates a sandbox (containerd, `internal/cri/annotations`).
fn annotations(id: &str, config: &PodSandboxConfig) -> Value {
    let mut annotations = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": id,
    });
    if let Some(resources) = config.linux.resources.as_ref() {
        for (name, figure) in [
            ("cpu-period", resources.cpu_period),
            ("cpu-quota", resources.cpu_quota),
            ("memory", resources.memory_limit_in_bytes),
        ] {
            let name = format!("io.kubernetes.cri.sandbox-{name}");
            annotations[name] = json!(figure.to_string());
        }
    }
    annotations
}

fn id_mappings(mappings: &[IDMapping]) -> Value {
    let mappings = mappings.iter().map(|mapping| {
        json!({
            "hostID": mapping.host_id,
            "containerID": mapping.container_id,
            "size": mapping.length,
        })
    });
    mappings.collect()
}

fn sysctls(config: &PodSandboxConfig) -> Value {
    let mut sysctls = json!(config.linux.sysctls);
    for (name, value) in SYSCTLS {
        if !config.linux.sysctls.contains_key(name) {
            sysctls[name] = json!(value);
        }
    }
    sysctls
}

/// As CRI does it: systemd's notation below a slice.
fn cgroups_path(parent: &str, id: &str) -> String {
    let base = parent.rsplit('/').next().unwrap_or_default();
    if base.strip_suffix(".slice").is_some() {
        format!("{base}:cri-containerd:{id}")
    } else {
        format!("{}/{id}", parent.trim_end_matches('/'))
    }
}

/// The files of a pod that its containers share, where its sandbox's bundle has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFiles {
    directory: PathBuf,
}

/// Each with its place in a container.
const FILES: [(&str, &str); 3] = [
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
];

impl PodFiles {
    /// Those of the pod in this bundle, laid out as CRI does, and so recognised.
    pub fn in_bundle(bundle: &Path, id: &str) -> Self {
        Self {
            directory: bundle.join("sandboxes").join(id),
        }
    }

    /// Writes them: what the configuration says, and what it leaves out as the host
    /// has it.
    ///
    /// # Errors
    /// What the kernel says, with the file.
    pub fn write(&self, config: &PodSandboxConfig) -> io::Result<()> {
        // Stands for the pod's /dev/shm, which is the guest's.
        fs::create_dir_all(self.directory.join("shm"))?;
        let hostname = if config.hostname.is_empty() {
            fs::read_to_string("/proc/sys/kernel/hostname")?
        } else {
            format!("{}\n", config.hostname)
        };
        fs::write(self.directory.join("hostname"), hostname)?;
        fs::write(self.directory.join("hosts"), host_file("/etc/hosts")?)?;
        let resolv_conf = match config.dns_config.as_ref().map(resolv_conf) {
            Some(text) if !text.is_empty() => text.into_bytes(),
            _ => host_file("/etc/resolv.conf")?,
        };
        fs::write(self.directory.join("resolv.conf"), resolv_conf)
    }

    /// Mounts them into a container of the pod, where its configuration has nothing
    /// else.
    pub fn mount_into(&self, spec: &mut Value) {
        let read_only = spec.pointer("/root/readonly") == Some(&json!(true));
        let mut bind = json!({
            "type": "bind",
            "options": ["rbind", "rprivate", if read_only { "ro" } else { "rw" }],
        });
        for ids in ["uidMappings", "gidMappings"] {
            if let Some(mappings) = spec.pointer(&format!("/linux/{ids}")) {
                bind[ids] = mappings.clone();
            }
        }
        let Some(mounts) = spec["mounts"].as_array_mut() else {
            return;
        };
        // The default one, which would be the container's own.
        let is_own_shm = |mount: &Value| {
            text(mount, "/destination") == Some("/dev/shm") && text(mount, "/type") == Some("tmpfs")
        };
        mounts.retain(|mount| !is_own_shm(mount));
        let shm = json!({"type": "bind", "options": ["rbind", "rprivate", "rw"]});
        let files = FILES.map(|(name, place)| (name, place, &bind));
        for (name, place, like) in files.into_iter().chain([("shm", "/dev/shm", &shm)]) {
            let is_there = |mount: &Value| text(mount, "/destination") == Some(place);
            if !mounts.iter().any(is_there) {
                let mut mount = like.clone();
                mount["destination"] = json!(place);
                mount["source"] = json!(self.directory.join(name));
                mounts.push(mount);
            }
        }
    }
}

/// A host without it has nothing to say there.
fn host_file(path: &str) -> io::Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// resolv.conf(5), as CRI writes it.
fn resolv_conf(dns: &DNSConfig) -> String {
    // A word is no line: nobody adds a line by an entry of the list.
    let words = |list: &[String]| {
        let words = list.iter().flat_map(|entry| entry.split_whitespace());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut lines = Vec::new();
    let searches = words(&dns.searches);
    if !searches.is_empty() {
        lines.push(format!("search {}\n", searches.join(" ")));
    }
    for server in words(&dns.servers) {
        lines.push(format!("nameserver {server}\n"));
    }
    let options = words(&dns.options);
    if !options.is_empty() {
        lines.push(format!("options {}\n", options.join(" ")));
    }
    lines.concat()
}

#[cfg(test)]
mod tests;
