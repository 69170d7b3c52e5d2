//! Id-mapped binds (runtime-spec, config.md, "Mounts": `uidMappings`, `idmap`): mapped
//! on the host, where the files are.

use oci_spec::runtime::LinuxIdMapping;
use serde_json::Value;

use super::options;
use crate::host::id_maps::IdMaps;
use crate::host::volumes::Mapping;
use crate::spec::text;

/// The maps of a container with a user namespace.
pub(in crate::spec) fn of_container(spec: &Value) -> Option<IdMaps> {
    let namespaces = spec.pointer("/linux/namespaces")?.as_array()?;
    let mut kinds = namespaces.iter().filter_map(|one| text(one, "/type"));
    kinds.find(|kind| *kind == "user")?;
    of_fields(spec.get("linux")?)
}

/// Takes from a bind mount how its ids are mapped, so that the guest does not do it
/// once more. What is no map stays, for the agent to refuse.
pub(super) fn take(mount: &mut Value, container: Option<&IdMaps>) -> Option<Mapping> {
    let own = [UIDS, GIDS].iter().any(|field| {
        let mappings = mount.get(*field).and_then(Value::as_array);
        mappings.is_some_and(|mappings| !mappings.is_empty())
    });
    let word = options(mount).rfind(|option| is_id_map(option));
    let recursive = word == Some("ridmap");
    let maps = match (own, word) {
        (true, _) => of_fields(mount),
        (false, Some(_)) => container.cloned(),
        (false, None) => None,
    }?;
    let kept: Vec<Value> = options(mount)
        .filter(|option| !is_id_map(option))
        .map(Value::from)
        .collect();
    let mount = mount.as_object_mut()?;
    mount.insert("options".to_owned(), Value::Array(kept));
    mount.remove(UIDS);
    mount.remove(GIDS);
    Some(Mapping { maps, recursive })
}

const UIDS: &str = "uidMappings";
const GIDS: &str = "gidMappings";

fn is_id_map(option: &str) -> bool {
    matches!(option, "idmap" | "ridmap")
}

fn of_fields(parent: &Value) -> Option<IdMaps> {
    let mappings = |field: &str| -> Option<Vec<LinuxIdMapping>> {
        serde_json::from_value(parent.get(field)?.clone()).ok()
    };
    IdMaps::of_mappings(&mappings(UIDS)?, &mappings(GIDS)?)
}
