//! Bind mounts: what of the host they name, and what the guest makes of them.

mod id_maps;

use std::path::{Path, PathBuf};

use agent_protocol::{POD_DIR, SHARE_DIR};
use serde_json::{Value, json};

use super::{Error, IntoJsonError, text};
use crate::host::id_maps::IdMaps;
use crate::host::mounts::Access;
use crate::host::volumes::{Below, Placed, PlacedBelow, Wanted};

pub(super) use id_maps::of_container as id_maps_of_container;

/// Brings files and directories of the host into the share.
///
/// The pod gives [`crate::host::pod::HostPod::add_volume`]; tests give a map.
pub trait Volumes {
    /// Why a source cannot be shared.
    type Error;
    /// Shares `source` as it is wanted, as far as the pod does not have it yet; tells
    /// where it is.
    fn add(&mut self, source: &Path, wanted: &Wanted) -> Result<Placed, Self::Error>;
}

/// Whether one of `mounts` follows what is mounted on the host below its source.
pub(super) fn follow(mounts: &Value) -> bool {
    let mounts = mounts.as_array().into_iter().flatten();
    mounts
        .filter(|mount| is_bind(mount))
        .any(|mount| wanted_below(mount) == Below::Followed)
}

/// The sources of the host that `mounts` bind, each with its index. `shm_source`
/// is not one: the guest has its own.
pub(super) fn sources(mounts: &Value, shm_source: Option<&Path>) -> Vec<(usize, PathBuf)> {
    let mounts = mounts.as_array().into_iter().flatten().enumerate();
    mounts
        .filter(|(_, mount)| is_bind(mount) && !is_shm(mount, shm_source))
        .filter_map(|(index, mount)| Some((index, text(mount, "/source")?.into())))
        .filter(|(_, source): &(usize, PathBuf)| source.is_absolute())
        .collect()
}

/// What the binds of a container have in common.
#[derive(Clone, Copy)]
pub(super) struct Container<'a> {
    /// The host's `/dev/shm` of the pod, which the guest replaces by its own.
    pub(super) shm_source: Option<&'a Path>,
    /// Of its user namespace.
    pub(super) id_maps: Option<&'a IdMaps>,
}

/// Rewrites `mounts[index]` for the guest, and adds what belongs below it.
pub(super) fn rewrite<V: Volumes>(
    mut mount: Value,
    index: usize,
    container: Container<'_>,
    volumes: &mut V,
    rewritten: &mut Vec<Value>,
) -> Result<(), IntoJsonError<V::Error>> {
    if !is_bind(&mount) {
        rewritten.push(mount);
        return Ok(());
    }
    let source = PathBuf::from(text(&mount, "/source").unwrap_or_default());
    if !source.is_absolute() {
        return Err(Error::field(
            format!("mounts[{index}].source"),
            format!("{} is not an absolute path", source.display()),
        )
        .into());
    }
    if is_shm(&mount, container.shm_source) {
        mount["source"] = json!(format!("{POD_DIR}/shm"));
        rewritten.push(mount);
        return Ok(());
    }
    let wanted = Wanted {
        id_maps: id_maps::take(&mut mount, container.id_maps),
        access: access(&mount),
        below: wanted_below(&mount),
    };
    let placed = volumes
        .add(&source, &wanted)
        .map_err(|error| IntoJsonError::Volume {
            index,
            path: source.clone(),
            source: error,
        })?;
    let below: Vec<_> = placed
        .below
        .iter()
        .map(|below| mount_below(&mount, below))
        .collect();
    mount["source"] = json!(in_share(&placed.path));
    if placed.read_only {
        make_read_only(&mut mount);
    }
    rewritten.push(mount);
    rewritten.extend(below);
    Ok(())
}

/// An absolute path stays what it is.
fn in_share(path: &Path) -> String {
    Path::new(SHARE_DIR).join(path).display().to_string()
}

/// The guest's mount of something that lies below a bind mount's source.
fn mount_below(parent: &Value, below: &PlacedBelow) -> Value {
    let destination = Path::new(text(parent, "/destination").unwrap_or_default());
    let kept = options(parent).filter(|option| {
        // `ro` and the like are for the source's own mount; `rro` is for all, and
        // so is how mounts are passed on.
        !below.is_mount || is_propagation(option) || is_recursive_attribute(option)
    });
    let kept = kept.filter(|option| !matches!(*option, "bind" | "rbind"));
    let options: Vec<_> = ["bind"].into_iter().chain(kept).collect();
    let mut mount = json!({
        "destination": destination.join(&below.at),
        "type": "bind",
        "source": in_share(&below.path),
        "options": options,
    });
    if below.read_only {
        make_read_only(&mut mount);
    }
    mount
}

/// The last word counts.
fn make_read_only(mount: &mut Value) {
    let mut words: Vec<Value> = options(mount).map(Value::from).collect();
    words.push(json!("ro"));
    mount["options"] = Value::Array(words);
}

fn options(mount: &Value) -> impl DoubleEndedIterator<Item = &str> {
    let options = mount.get("options").and_then(Value::as_array);
    options.into_iter().flatten().filter_map(Value::as_str)
}

pub(super) fn is_bind(mount: &Value) -> bool {
    // What is mounted already has its source.
    options(mount).all(|option| option != "remount")
        && (options(mount).any(|option| matches!(option, "bind" | "rbind"))
            || text(mount, "/type") == Some("bind"))
}

fn wanted_below(mount: &Value) -> Below {
    let is_recursive =
        options(mount).rfind(|option| matches!(*option, "bind" | "rbind")) == Some("rbind");
    let propagation = options(mount).rfind(|option| is_propagation(option));
    match (is_recursive, propagation) {
        (false, _) => Below::Nothing,
        // The other way, from the guest to the host, there is none: `rshared` is what
        // it can be.
        (true, Some("rslave" | "slave" | "rshared" | "shared")) => Below::Followed,
        (true, _) => Below::Now,
    }
}

fn is_shm(mount: &Value, shm_source: Option<&Path>) -> bool {
    text(mount, "/destination") == Some("/dev/shm")
        && shm_source.is_some()
        && text(mount, "/source").map(Path::new) == shm_source
}

fn is_propagation(option: &str) -> bool {
    let word = option.strip_prefix('r').unwrap_or(option);
    matches!(word, "private" | "slave" | "shared" | "unbindable")
}

/// `rro` and its kin (mount(8); OCI runtime-spec, config.md, "Linux mount
/// options").
fn is_recursive_attribute(option: &str) -> bool {
    const ATTRIBUTES: [&str; 16] = [
        "ro",
        "rw",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "strictatime",
        "symfollow",
        "nosymfollow",
    ];
    let word = option.strip_prefix('r').unwrap_or_default();
    ATTRIBUTES.contains(&word) || matches!(word, "norelatime" | "nostrictatime")
}

/// What the guest may write to of a bind mount: the last word counts, and a
/// recursive one, which is applied later, more than another (mount(8); OCI
/// runtime-spec, config.md, "Linux mount options").
fn access(mount: &Value) -> Access {
    let last = |words: [&str; 2]| options(mount).rfind(|option| words.contains(option));
    match (last(["rro", "rrw"]), last(["ro", "rw"])) {
        (Some("rro"), _) => Access::ReadOnlyThroughout,
        (None, Some("ro")) => Access::ReadOnly,
        _ => Access::Writable,
    }
}

#[cfg(test)]
mod tests;
