//! What a container wants of a source.

use crate::host::id_maps::IdMaps;
use crate::host::mounts::Access;

/// What of the mounts below a source comes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// None (`bind`).
    Nothing,
    /// Those that are there now (`rbind`).
    Now,
    /// Those that are there at any time (`rbind` with `rslave` or `rshared`).
    Followed,
}

/// How a container has a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it may write to.
    pub access: Access,
    /// What comes with it.
    pub below: Below,
    /// Whose the files are for the guest, if not those who own them.
    pub id_maps: Option<Mapping>,
}

/// How ids are mapped in a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The ids.
    pub maps: IdMaps,
    /// In what is mounted below it as well.
    pub recursive: bool,
}

impl Wanted {
    /// With the ids that its files have.
    pub fn unmapped(access: Access, below: Below) -> Self {
        Self {
            access,
            below,
            id_maps: None,
        }
    }
}
