//! The container's root file system, from detached mounts to `pivot_root`.
//!
//! Mounts are made with the descriptor-based calls (`fsopen`, `open_tree`,
//! `move_mount`, `mount_setattr`): a mount has all its attributes before it can be
//! reached, and no path is looked up twice.

mod copy_up;
mod devices;
mod masks;
mod mounts;
mod options;
mod root;
mod sources;
mod tree;

use std::io;
use std::path::PathBuf;

pub use devices::check as check_devices;
pub use mounts::{made_outside, new_procfs, own_cgroup_namespace};
pub use options::{Kind, check_id_maps, parse as parse_options, rootfs_propagation};
pub use root::{Root, enter, leave_mounts_of_guest};
pub use sources::Sources;
pub use tree::{Tree, open_below_as};

/// What failed with the root file system. Paths are the container's, unless they say otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("cannot open root file system {path} of the guest")]
    Root {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot open {path} of the guest, to be mounted at {destination}")]
    Source {
        path: PathBuf,
        destination: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make mount point {destination}")]
    Target {
        destination: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot mount at {destination}: it is inside /proc")]
    InsideProc { destination: PathBuf },
    #[error("cannot mount {what} at {destination}")]
    Mount {
        what: String,
        destination: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot remount {destination}")]
    Remount {
        destination: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make device {path}")]
    Device {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("device {path} exists and is something else")]
    DeviceTaken { path: PathBuf },
    #[error("cannot make link {path}")]
    Link {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot mask {path}")]
    Mask {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make {path} read-only")]
    Readonly {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot {step}")]
    Enter {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}
