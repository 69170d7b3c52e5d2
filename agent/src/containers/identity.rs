//! What names a container or a process, and where its root file system may be.

use std::path::Component;

use agent_protocol::{SHARE_DIR, api::ProcessId};
use oci_spec::runtime::Spec;

use super::error::{ContainerError, MAX_ID_BYTES};

/// Names the init of a container.
pub fn init_of(container_id: &str) -> ProcessId {
    ProcessId {
        container_id: container_id.to_owned(),
        ..ProcessId::default()
    }
}

/// An identity becomes a directory and a cgroup: it must be one plain name.
pub fn check_id(id: &str) -> Result<(), ContainerError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=MAX_ID_BYTES).contains(&id.len());
    if fits && !id.starts_with('.') && id.bytes().all(plain) {
        Ok(())
    } else {
        Err(ContainerError::Id { id: id.to_owned() })
    }
}

/// Root file systems are where the host puts them.
pub fn check_rootfs(spec: &Spec) -> Result<(), ContainerError> {
    let path = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .unwrap_or_default();
    let inside = path.strip_prefix(SHARE_DIR).is_ok_and(|rest| {
        rest.components()
            .all(|part| matches!(part, Component::Normal(_)))
    });
    if inside {
        Ok(())
    } else {
        Err(ContainerError::Rootfs { path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{RootBuilder, SpecBuilder};
    use proptest::prelude::*;
    use std::path::Path;

    fn spec_with_root(path: &str) -> Spec {
        let root = RootBuilder::default().path(path).build().expect("root");
        SpecBuilder::default().root(root).build().expect("spec")
    }

    #[test]
    fn check_rootfs_path_below_the_share_is_taken() {
        let path = format!("{SHARE_DIR}/containers/a/rootfs");
        assert!(check_rootfs(&spec_with_root(&path)).is_ok());
    }

    #[test]
    fn check_rootfs_path_that_climbs_out_of_the_share_is_refused() {
        let spec = spec_with_root(&format!("{SHARE_DIR}/../../../etc"));
        assert!(matches!(
            check_rootfs(&spec),
            Err(ContainerError::Rootfs { .. })
        ));
    }

    proptest! {
        #[test]
        fn check_id_what_passes_is_one_path_component(id in "\\PC{0,90}") {
            if check_id(&id).is_ok() {
                let parts: Vec<_> = Path::new(&id).components().collect();
                prop_assert_eq!(parts.len(), 1);
                prop_assert!(matches!(parts[0], Component::Normal(_)));
            }
        }
    }
}
