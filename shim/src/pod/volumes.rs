//! The files and directories of the host that a container binds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use super::Error;
use super::host_side::HostSide;
use crate::host;
use crate::host::source::{self, Source};
use crate::host::volumes::{Placed, Wanted};
use crate::spec::{IntoJsonError, Volumes};

/// How long the server of a volume's file system may take to show the volume.
pub(super) const SOURCE_TIMEOUT: Duration = Duration::from_secs(20);

/// The sources that a container binds, looked at with nobody waiting for it.
pub(super) async fn open_sources(
    sources: &[(usize, PathBuf)],
) -> Result<BTreeMap<PathBuf, Source>, Error> {
    let mut opened = BTreeMap::new();
    for (index, path) in sources {
        let index = *index;
        let refused = |source: source::Error| IntoJsonError::Volume {
            index,
            path: path.clone(),
            source: host::pod::Error::from(source),
        };
        if opened.contains_key(path) {
            continue;
        }
        let (tell, told) = tokio::sync::oneshot::channel();
        let wanted = path.clone();
        // A thread that nobody joins: it may wait for a server for ever.
        std::thread::spawn(move || tell.send(Source::open(&wanted)));
        let source = match timeout(SOURCE_TIMEOUT, told).await {
            Ok(Ok(source)) => source.map_err(refused)?,
            _ => return Err(refused(source::Error::Silent { path: path.clone() }).into()),
        };
        opened.insert(path.clone(), source);
    }
    Ok(opened)
}

/// Where a container's volumes come into the pod's share, from sources that have been
/// opened.
pub(super) struct PodVolumes<'a> {
    pub(super) host: &'a mut dyn HostSide,
    pub(super) opened: &'a BTreeMap<PathBuf, Source>,
}

impl Volumes for PodVolumes<'_> {
    type Error = host::pod::Error;

    fn add(&mut self, source: &Path, wanted: &Wanted) -> Result<Placed, Self::Error> {
        let Some(opened) = self.opened.get(source) else {
            let path = source.to_owned();
            return Err(source::Error::Silent { path }.into());
        };
        self.host.add_volume(opened, wanted)
    }
}
