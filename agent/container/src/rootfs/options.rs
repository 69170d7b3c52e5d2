//! Options of `mounts[]` in the words of mount(8).

use nix::mount::MsFlags;
use oci_spec::runtime::{Mount, Spec};

use crate::Unsupported;
use crate::kernel_calls::{MountAttributes, mount_attr};
use crate::user_namespace::{self, IdMaps};

/// What a mount is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A part of the pod's files, with what is mounted below it if `recursive`.
    Bind { recursive: bool },
    /// A new file system of the kernel's.
    New(FileSystem),
    /// Nothing new: what is mounted there is changed.
    Remount,
}

/// File systems that a container may have of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    Proc,
    Sysfs,
    Tmpfs,
    Devpts,
    Mqueue,
    Cgroup,
}

/// Whether ids are mapped in what is mounted below as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idmap {
    Mount,
    Recursive,
}

/// A mount's options, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub kind: Kind,
    /// Of the mount itself.
    pub attributes: MountAttributes,
    /// Of it and everything below, when asked for (`rro` and the like).
    pub recursive_attributes: MountAttributes,
    /// In the order given, with whether it is recursive.
    pub propagation: Vec<(MsFlags, bool)>,
    /// For the file system: `key` or `key=value`.
    pub parameters: Vec<(String, Option<String>)>,
    pub idmap: Option<Idmap>,
    /// Of a tmpfs: what it covers is copied into it.
    pub copy_up: bool,
}

enum Word {
    Set(u64),
    Clear(u64),
    Atime(u64),
}

/// Attribute words; with a leading `r` (`rro`) they hold for the whole tree.
fn attribute(word: &str) -> Option<Word> {
    Some(match word {
        "ro" => Word::Set(mount_attr::RDONLY),
        "rw" => Word::Clear(mount_attr::RDONLY),
        "nosuid" => Word::Set(mount_attr::NOSUID),
        "suid" => Word::Clear(mount_attr::NOSUID),
        "nodev" => Word::Set(mount_attr::NODEV),
        "dev" => Word::Clear(mount_attr::NODEV),
        "noexec" => Word::Set(mount_attr::NOEXEC),
        "exec" => Word::Clear(mount_attr::NOEXEC),
        "nodiratime" => Word::Set(mount_attr::NODIRATIME),
        "diratime" => Word::Clear(mount_attr::NODIRATIME),
        "nosymfollow" => Word::Set(mount_attr::NOSYMFOLLOW),
        "symfollow" => Word::Clear(mount_attr::NOSYMFOLLOW),
        "relatime" | "atime" | "nostrictatime" => Word::Atime(mount_attr::RELATIME),
        "noatime" => Word::Atime(mount_attr::NOATIME),
        "strictatime" | "norelatime" => Word::Atime(mount_attr::STRICTATIME),
        _ => return None,
    })
}

fn propagation(word: &str) -> Option<(MsFlags, bool)> {
    Some(match word {
        "private" => (MsFlags::MS_PRIVATE, false),
        "rprivate" => (MsFlags::MS_PRIVATE, true),
        "slave" => (MsFlags::MS_SLAVE, false),
        "rslave" => (MsFlags::MS_SLAVE, true),
        "shared" => (MsFlags::MS_SHARED, false),
        "rshared" => (MsFlags::MS_SHARED, true),
        "unbindable" => (MsFlags::MS_UNBINDABLE, false),
        "runbindable" => (MsFlags::MS_UNBINDABLE, true),
        _ => return None,
    })
}

fn apply(attributes: &mut MountAttributes, word: &Word) {
    match word {
        Word::Set(bit) => {
            attributes.set |= bit;
            attributes.clear &= !bit;
        }
        Word::Clear(bit) => {
            attributes.clear |= bit;
            attributes.set &= !bit;
        }
        // The three exclude each other: the kernel wants the whole mask cleared.
        Word::Atime(value) => {
            attributes.set = (attributes.set & !mount_attr::ATIME) | value;
            attributes.clear |= mount_attr::ATIME;
        }
    }
}

fn file_system(name: &str) -> Option<FileSystem> {
    Some(match name {
        "proc" => FileSystem::Proc,
        "sysfs" => FileSystem::Sysfs,
        "tmpfs" => FileSystem::Tmpfs,
        "devpts" => FileSystem::Devpts,
        "mqueue" => FileSystem::Mqueue,
        "cgroup" | "cgroup2" => FileSystem::Cgroup,
        _ => return None,
    })
}

/// The rootfs's propagation, by its word.
pub fn rootfs_propagation(word: &str) -> Result<(MsFlags, bool), Unsupported> {
    propagation(word).ok_or_else(|| {
        Unsupported::new(
            "linux.rootfsPropagation",
            format!("{word:?} is not a propagation type"),
        )
    })
}

fn has_mappings(mount: &Mount) -> bool {
    [mount.uid_mappings(), mount.gid_mappings()]
        .into_iter()
        .any(|mappings| mappings.iter().flatten().next().is_some())
}

/// The maps of an id-mapped mount: its own, or the container's.
pub fn id_maps<'a>(options: &Options, mount: &'a Mount, spec: &'a Spec) -> Option<IdMaps<'a>> {
    options.idmap?;
    if has_mappings(mount) {
        let map = |mappings: &'a Option<Vec<_>>| mappings.as_deref().unwrap_or_default();
        let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
        return Some(IdMaps::new(map(uids), map(gids)));
    }
    user_namespace::of_spec(spec)
}

/// Refuses an id-mapped mount without maps, or with maps that the kernel would not take.
pub fn check_id_maps(
    index: usize,
    options: &Options,
    mount: &Mount,
    spec: &Spec,
) -> Result<(), Unsupported> {
    match (options.idmap, id_maps(options, mount, spec)) {
        (None, _) => Ok(()),
        (Some(_), Some(maps)) => maps.check(&format!("mounts[{index}]")),
        (Some(_), None) => Err(Unsupported::new(
            format!("mounts[{index}].options"),
            "idmap needs uidMappings and gidMappings, or a user namespace of the container",
        )),
    }
}

/// Takes `mounts[index]` apart.
pub fn parse(index: usize, mount: &Mount) -> Result<Options, Unsupported> {
    let refuse = |field: &str, reason: String| {
        Err(Unsupported::new(format!("mounts[{index}].{field}"), reason))
    };
    let words = mount.options().as_deref().unwrap_or_default();
    let bind = words
        .iter()
        .rev()
        .find(|word| matches!(word.as_str(), "bind" | "rbind"));
    let fstype = mount.typ().as_deref().unwrap_or_default();
    let remount = words.iter().any(|word| word == "remount");
    let kind = match (bind, fstype) {
        _ if remount => Kind::Remount,
        (Some(word), _) => Kind::Bind {
            recursive: word == "rbind",
        },
        (None, "bind") => Kind::Bind { recursive: false },
        (None, fstype) => match file_system(fstype) {
            Some(file_system) => Kind::New(file_system),
            None => {
                return refuse(
                    "type",
                    format!("file system type {fstype:?} is not supported in the guest"),
                );
            }
        },
    };
    let mut options = Options {
        kind,
        attributes: MountAttributes::default(),
        recursive_attributes: MountAttributes::default(),
        propagation: Vec::new(),
        parameters: Vec::new(),
        // Mappings mean it (config.md, "Mounts").
        idmap: has_mappings(mount).then_some(Idmap::Mount),
        copy_up: false,
    };
    for word in words {
        if let Some(found) = propagation(word) {
            options.propagation.push(found);
        } else if let Some(found) = attribute(word) {
            apply(&mut options.attributes, &found);
        } else if let Some(found) = word.strip_prefix('r').and_then(attribute) {
            apply(&mut options.recursive_attributes, &found);
        } else {
            match word.as_str() {
                // What is there anyway.
                "bind" | "rbind" | "defaults" | "async" | "nolazytime" | "nomand" | "loud"
                | "noiversion" | "silent" | "remount" => {}
                "idmap" => options.idmap = Some(Idmap::Mount),
                "ridmap" => options.idmap = Some(Idmap::Recursive),
                "mand" => {
                    return refuse(
                        "options",
                        "mand: Linux has no mandatory locks any more".into(),
                    );
                }
                "tmpcopyup" if kind == Kind::New(FileSystem::Tmpfs) => options.copy_up = true,
                "tmpcopyup" => return refuse("options", "tmpcopyup needs a tmpfs".into()),
                _ if matches!(kind, Kind::Bind { .. }) => {
                    return refuse(
                        "options",
                        format!("{word:?} has no meaning for a bind mount"),
                    );
                }
                _ => options.parameters.push(match word.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (word.clone(), None),
                }),
            }
        }
    }
    if kind == Kind::Remount && options.idmap.is_some() {
        return refuse(
            "options",
            "idmap: a mount that is in use cannot be mapped".into(),
        );
    }
    let cleared = options.attributes.clear | options.recursive_attributes.clear;
    if matches!(kind, Kind::Bind { .. } | Kind::Remount) && cleared & mount_attr::NODEV != 0 {
        // A device node on the share would be the guest's device of that number.
        return refuse(
            "options",
            "dev on a bind mount: the pod's files never are devices".into(),
        );
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parsed(value: Value) -> Result<Options, Unsupported> {
        parse(3, &serde_json::from_value(value).unwrap())
    }

    #[test]
    fn parse_tmpfs_separates_attributes_from_parameters() {
        let options = parsed(
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        )
        .unwrap();
        assert_eq!(options.kind, Kind::New(FileSystem::Tmpfs));
        assert_eq!(
            options.attributes.set,
            mount_attr::NOSUID | mount_attr::STRICTATIME
        );
        assert_eq!(
            options.parameters,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned())),
            ]
        );
    }

    #[test]
    fn parse_later_word_wins() {
        let options = parsed(json!({"destination": "/d", "type": "bind", "source": "/s",
            "options": ["rbind", "ro", "noatime", "rw", "relatime"]}))
        .unwrap();
        assert_eq!(options.kind, Kind::Bind { recursive: true });
        assert_eq!(options.attributes.set, 0);
        assert_eq!(
            options.attributes.clear,
            mount_attr::RDONLY | mount_attr::ATIME
        );
    }

    #[test]
    fn parse_recursive_words_are_kept_apart() {
        let options = parsed(json!({"destination": "/d", "source": "/s",
            "options": ["rbind", "rro", "rnosuid", "rprivate", "rshared"]}))
        .unwrap();
        assert_eq!(options.attributes, MountAttributes::default());
        assert_eq!(
            options.recursive_attributes.set,
            mount_attr::RDONLY | mount_attr::NOSUID
        );
        assert_eq!(
            options.propagation,
            [(MsFlags::MS_PRIVATE, true), (MsFlags::MS_SHARED, true)]
        );
    }

    #[test]
    fn parse_unsupported_is_refused_by_name() {
        for (mount, field) in [
            (
                json!({"destination": "/d", "type": "ext4", "source": "/dev/vda"}),
                "type",
            ),
            (json!({"destination": "/d", "source": "/s"}), "type"),
            (
                json!({"destination": "/d", "type": "tmpfs", "options": ["mand"]}),
                "options",
            ),
            (
                json!({"destination": "/d", "type": "bind", "options": ["rbind", "size=1"]}),
                "options",
            ),
            (
                json!({"destination": "/d", "type": "bind", "options": ["rbind", "dev"]}),
                "options",
            ),
            (
                json!({"destination": "/d", "type": "bind", "options": ["rbind", "rdev"]}),
                "options",
            ),
            (
                json!({"destination": "/d", "type": "proc", "options": ["tmpcopyup"]}),
                "options",
            ),
        ] {
            assert_eq!(
                parsed(mount).unwrap_err().field,
                format!("mounts[3].{field}")
            );
        }
    }
}
