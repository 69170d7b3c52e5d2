//! `-info`: what the runtime can do, for containerd and CRI.

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};

/// The name by which clients ask for this runtime.
pub const RUNTIME_NAME: &str = "io.containerd.bulkhead.v2";
/// Under which containerd registers the OCI features structure.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Writes the `RuntimeInfo` message that containerd expects on standard output.
pub fn print(output: &mut impl Write) -> io::Result<()> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    output.write_all(&info.write_to_bytes()?)
}

/// The OCI features structure (runtime-spec, features.md). It claims what the
/// agent does and nothing else: what is missing here CRI does not ask for.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        // The words that agent/container/src/rootfs/options.rs knows.
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "exec", "idmap", "noatime", "nodev",
            "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "nosymfollow",
            "private", "ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec", "ridmap", "rnoatime",
            "rnodev", "rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime", "rnosuid",
            "rnosymfollow", "remount", "ro", "rprivate", "rrelatime", "rro", "rrw", "rshared", "rslave",
            "rstrictatime", "rsuid", "rsymfollow", "runbindable", "rw", "shared", "slave",
            "strictatime", "suid", "symfollow", "tmpcopyup", "unbindable",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": true},
            "selinux": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn print_is_a_runtime_info_with_oci_features() {
        let mut output = Vec::new();
        print(&mut output).expect("prints");
        let info = RuntimeInfo::parse_from_bytes(&output).expect("decodes");
        assert_eq!(info.name, RUNTIME_NAME);
        let features: oci_spec::runtime::Features =
            serde_json::from_slice(&info.features.value).expect("is the features structure");
        assert_eq!(features.oci_version_max(), "1.3.0");
    }
}
