//! What is mounted on the host below the pod's volumes, for those that follow it.

use std::fs::File;

use tokio::io::Interest;
use tokio::time::timeout;
use tracing::warn;

use super::host_side::HostSide;
use super::volumes::SOURCE_TIMEOUT;
use super::{Error, Pod, chain};
use crate::host::source::{self, News};
use crate::host::volumes::Followee;
use crate::readiness::changed;

/// The host's table of mounts, as this process sees it.
const TABLE: &str = "/proc/self/mountinfo";

impl Pod {
    /// From now on the pod's volumes that follow the host's mounts are given them as
    /// they come, and lose them as they go.
    pub async fn follow_mounts(&self) -> Result<(), Error> {
        let started = self.mounts.get_or_try_init(|| async {
            let table = File::open(TABLE).and_then(|table| changed(table.into()));
            let table = table.map_err(Error::WatchMounts)?;
            let pod = self.clone();
            tokio::spawn(async move {
                loop {
                    tokio::select! {
                        _ = pod.machine.ended() => return,
                        ready = table.ready(Interest::PRIORITY) => match ready {
                            Ok(mut ready) => ready.clear_ready(),
                            Err(error) => {
                                warn!("mounts of the host are no longer followed: {error}");
                                return;
                            }
                        }
                    }
                    if let Err(error) = pod.update_mounts().await {
                        warn!("mounts of the host are not passed on: {}", chain(&error));
                    }
                }
            });
            Ok::<_, Error>(())
        });
        started.await?;
        // What has changed since its volumes were looked at.
        self.update_mounts().await
    }

    async fn update_mounts(&self) -> Result<(), Error> {
        let followees = self.on_host(HostSide::followees).await?;
        for followee in followees.unwrap_or_default() {
            let news = look_at(followee.clone()).await;
            if news.is_none() {
                warn!(
                    "what is mounted below {} is no longer passed on: the host does not tell what is",
                    followee.directory().display()
                );
            }
            self.on_host(move |host| host.update_mounts(&followee, news))
                .await?;
        }
        Ok(())
    }
}

/// Looks with nothing held that others wait for. `None` when the kernel does not tell,
/// or the server of a file system that is on the way does not answer.
async fn look_at(followee: Followee) -> Option<News> {
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread that nobody joins: it may wait for a server for ever.
    std::thread::spawn(move || tell.send(source::news_of(&followee)));
    match timeout(SOURCE_TIMEOUT, told).await {
        Ok(Ok(news)) => news.ok(),
        _ => None,
    }
}
