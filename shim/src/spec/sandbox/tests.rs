use super::super::cri::{LinuxContainerResources, LinuxPodSandboxConfig, UserNamespace};
use super::super::{GuestSpec, Membership, Peers};
use super::*;
use crate::pod::limits::Limits;
use protobuf::MessageField;

fn config() -> PodSandboxConfig {
    PodSandboxConfig {
        hostname: "podhost".to_owned(),
        dns_config: MessageField::some(DNSConfig {
            servers: vec!["10.0.0.10".to_owned()],
            searches: vec![
                "a.example".to_owned(),
                "b.example\nnameserver 6.6.6.6".to_owned(),
            ],
            options: vec!["ndots:5".to_owned()],
            ..DNSConfig::default()
        }),
        linux: MessageField::some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".to_owned(),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

fn split(config: &PodSandboxConfig) -> Result<super::super::HostView, String> {
    let spec = spec_of("box", config, "/run/netns/cni-1");
    GuestSpec::split(spec, "box", &Peers::default())
        .map(|(host, _)| host)
        .map_err(|error| error.to_string())
}

#[test]
fn spec_of_a_pod_is_that_of_its_pause_container() {
    let mut config = config();
    config.linux.mut_or_insert_default().resources = MessageField::some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 150_000,
        memory_limit_in_bytes: 1 << 30,
        ..LinuxContainerResources::default()
    });
    let host = split(&config).expect("is a pod's");
    assert_eq!(host.membership, Membership::Sandbox);
    assert_eq!(host.hostname, "podhost");
    assert_eq!(host.cgroups_path.as_deref(), Some("/kubepods/pod1/box"));
    assert_eq!(
        host.network_path.as_deref(),
        Some(Path::new("/run/netns/cni-1"))
    );
    assert_eq!(host.pod_limits.memory_bytes, Some(1 << 30));
    assert_eq!(host.pod_limits.millicpus(), Some(1500));
    assert_eq!(host.limits, Limits::default());
    let start = host.pod_sysctls.get("net.ipv4.ip_unprivileged_port_start");
    assert_eq!(start.map(String::as_str), Some("0"));
}

#[test]
fn spec_of_a_pod_in_a_slice_has_systemds_notation() {
    let mut config = config();
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".to_owned();
    linux.sysctls.insert(
        "net.ipv4.ip_unprivileged_port_start".to_owned(),
        "80".to_owned(),
    );
    let spec = spec_of("box", &config, "");
    assert_eq!(
        spec["linux"]["cgroupsPath"],
        "kubepods-pod1.slice:cri-containerd:box"
    );
    assert_eq!(
        spec["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"],
        "80"
    );
}

#[test]
fn spec_of_a_pod_on_the_hosts_network_or_ipc_is_refused_by_name() {
    for kind in ["network", "ipc"] {
        let mut config = config();
        let linux = config.linux.mut_or_insert_default();
        let context = linux.security_context.mut_or_insert_default();
        let options = context.namespace_options.mut_or_insert_default();
        match kind {
            "network" => options.network = NamespaceMode::NODE.into(),
            _ => options.ipc = NamespaceMode::NODE.into(),
        }
        let refused = split(&config).expect_err("is refused");
        assert!(refused.contains(kind), "{refused}");
    }
}

#[test]
fn spec_of_a_pod_with_a_user_namespace_has_its_maps() {
    let mut config = config();
    let map = IDMapping {
        host_id: 65536,
        container_id: 0,
        length: 65536,
        ..IDMapping::default()
    };
    let linux = config.linux.mut_or_insert_default();
    let context = linux.security_context.mut_or_insert_default();
    let options = context.namespace_options.mut_or_insert_default();
    options.userns_options = MessageField::some(UserNamespace {
        uids: vec![map.clone()],
        gids: vec![map],
        ..UserNamespace::default()
    });
    let host = split(&config).expect("is a pod's");
    assert!(host.id_maps.is_some());
}

#[test]
fn resolv_conf_has_each_entry_as_words_of_its_own_line() {
    let text = resolv_conf(&config().dns_config);
    let wanted =
        "search a.example b.example nameserver 6.6.6.6\nnameserver 10.0.0.10\noptions ndots:5\n";
    assert_eq!(text, wanted);
}

#[test]
fn files_are_mounted_where_a_container_has_nothing_else() {
    let bundle = tempfile::tempdir().expect("makes a directory");
    let files = PodFiles::in_bundle(bundle.path(), "box");
    files.write(&config()).expect("writes");
    let directory = bundle.path().join("sandboxes/box");
    let hostname = fs::read_to_string(directory.join("hostname")).expect("is there");
    assert_eq!(hostname, "podhost\n");
    let mut spec = json!({"root": {"readonly": true}, "mounts": [
        {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
    ]});
    files.mount_into(&mut spec);
    let mounts = spec["mounts"].as_array().expect("is a list");
    let found: Vec<_> = mounts
        .iter()
        .map(|mount| (text(mount, "/destination"), text(mount, "/source")))
        .collect();
    let path = |name: &str| directory.join(name).display().to_string();
    let (hostname, resolv_conf, shm) = (path("hostname"), path("resolv.conf"), path("shm"));
    assert_eq!(
        found,
        [
            (Some("/etc/hosts"), Some("/kubelet/hosts")),
            (Some("/etc/hostname"), Some(hostname.as_str())),
            (Some("/etc/resolv.conf"), Some(resolv_conf.as_str())),
            (Some("/dev/shm"), Some(shm.as_str())),
        ]
    );
    assert_eq!(mounts[1]["options"][2], "ro");
    // Without any mounts it is not a container of CRI's.
    let mut none = json!({});
    files.mount_into(&mut none);
    assert_eq!(none["mounts"], Value::Null);
}
