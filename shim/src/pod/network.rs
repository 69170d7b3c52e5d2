//! The pod's network in its VM: kept as it is in the pod's namespace on the host.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::api::{NetworkInterface, SetNetworkRequest};
use agent_protocol::rtnetlink::Rtnetlink;
use tracing::{info, warn};

use super::host_side::HostSide;
use super::{Error, Pod, chain};
use crate::host::network::{Interface, Scan, Tables};
use crate::readiness::readable;

/// The largest MTU of an IP interface: what an interface may be given later.
const MAX_MTU: u16 = u16::MAX;

/// What the VM has been given.
#[derive(Debug, Default)]
pub struct Network {
    /// The virtio slot of each interface, by its index in the namespace.
    slots: BTreeMap<u32, u32>,
    /// What the guest was last told.
    told: SetNetworkRequest,
    /// Changes of the namespace are listened to.
    is_watched: bool,
}

impl Pod {
    /// Sees to it that the guest has the interfaces, addresses and routes that the
    /// pod's namespace has now. Later changes follow by themselves.
    pub async fn connect_network(&self) -> Result<(), Error> {
        let mut network = self.network.lock().await;
        // Before the tables are read: nothing is missed between the two.
        if !network.is_watched {
            if let Some(watch) = self.on_host(HostSide::watch_network).await? {
                follow(self, watch?)?;
            }
            network.is_watched = true;
        }
        network.update(self).await
    }
}

impl Network {
    async fn update(&mut self, pod: &Pod) -> Result<(), Error> {
        let connected: BTreeSet<u32> = self.slots.keys().copied().collect();
        let scanned = pod.on_host(move |host| host.scan_network(&connected));
        let Some(Scan { tables, taps }) = scanned.await?.transpose()? else {
            return Ok(());
        };
        let mut taps = taps.into_iter();
        while let Some((index, tap)) = taps.next() {
            let interface = tables.interfaces.iter().find(|found| found.index == index);
            let Some(interface) = interface else { continue };
            if let Err(error) = self.add(pod, interface, tap).await {
                // Or what is redirected to a tap that is gone stays so.
                for (index, _) in taps {
                    disconnect(pod, index).await;
                }
                return Err(error);
            }
        }
        let request = self.describe(&tables);
        if request != self.told {
            let agent = pod.agent().await?;
            pod.explain(agent.set_network(&request).await).await?;
            self.told = request;
        }
        self.remove_gone(pod, &tables).await;
        Ok(())
    }

    /// Puts a device for an interface into the VM. It is no use to the guest before
    /// that is told of it.
    async fn add(&mut self, pod: &Pod, interface: &Interface, tap: OwnedFd) -> Result<(), Error> {
        let added = pod.machine.add_network(interface.mac, MAX_MTU, tap).await;
        match added {
            Ok(slot) => {
                info!(interface = interface.name, slot, "connected to the VM");
                self.slots.insert(interface.index, slot);
                Ok(())
            }
            Err(reason) => {
                disconnect(pod, interface.index).await;
                Err(Error::Network {
                    interface: interface.name.clone(),
                    reason,
                })
            }
        }
    }

    /// Takes the devices from the VM whose interfaces have gone; the guest has been
    /// told, and has let go of them.
    async fn remove_gone(&mut self, pod: &Pod, tables: &Tables) {
        let has = |index| tables.interfaces.iter().any(|found| found.index == index);
        let gone: Vec<_> = self.slots.keys().copied().filter(|i| !has(*i)).collect();
        for index in gone {
            let Some(slot) = self.slots.remove(&index) else {
                continue;
            };
            if let Err(reason) = pod.machine.remove_network(slot).await {
                warn!(slot, "a network device stays in the VM: {reason}");
            }
            disconnect(pod, index).await;
            info!(slot, "an interface has gone");
        }
    }

    fn describe(&self, tables: &Tables) -> SetNetworkRequest {
        let interfaces = tables.interfaces.iter().filter_map(|interface| {
            Some(NetworkInterface {
                slot: *self.slots.get(&interface.index)?,
                host_index: interface.index,
                name: interface.name.clone(),
                mac: interface.mac.to_vec(),
                mtu: interface.mtu,
                ..NetworkInterface::default()
            })
        });
        SetNetworkRequest {
            interfaces: interfaces.collect(),
            messages: tables.messages.clone(),
            ..SetNetworkRequest::default()
        }
    }
}

/// Gives an interface back to the namespace's own stack, as far as that goes.
async fn disconnect(pod: &Pod, index: u32) {
    let disconnected = pod.on_host(move |host| host.disconnect_network(index));
    match disconnected.await {
        Ok(None | Some(Ok(()))) => {}
        Ok(Some(Err(error))) => warn!("{}", chain(&error)),
        Err(error) => warn!("{}", chain(&error)),
    }
}

/// Listens for changes of the pod's namespace until its VM has ended.
fn follow(pod: &Pod, watch: Rtnetlink) -> Result<(), Error> {
    let unwatched = |source| Error::WatchNetwork { source };
    let descriptor = watch.as_fd().try_clone_to_owned().map_err(unwatched)?;
    let news = readable(descriptor).map_err(unwatched)?;
    let pod = pod.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = pod.machine.ended() => return,
                ready = news.readable() => match ready {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(error) => {
                        warn!("changes of the pod's network are not followed: {error}");
                        return;
                    }
                }
            }
            if let Err(error) = watch.discard_news() {
                warn!(
                    "changes of the pod's network are not followed: {}",
                    chain(&error)
                );
                return;
            }
            let mut network = pod.network.lock().await;
            if let Err(error) = network.update(&pod).await
                && pod.machine.end().is_none()
            {
                warn!(
                    "a change of the pod's network does not reach the guest: {}",
                    chain(&error)
                );
            }
        }
    });
    Ok(())
}
