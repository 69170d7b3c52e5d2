//! What the launcher asks of a VM that runs.

use std::sync::Arc;

use thiserror::Error;
use vmm_config::control::{Event, Request};
use vmm_config::{ConfigError, Network};
use vmm_devices::{Net, NetConfig, NetError};

use crate::control::Descriptors;
use crate::log::{describe, log};
use crate::machine::{Machine, ResizeError};
use crate::slots::SlotError;

/// Why a network cannot be added or removed.
#[derive(Debug, Error)]
enum NetworkError {
    /// The request.
    #[error("the request is not valid")]
    Request(#[from] ConfigError),
    /// The tap.
    #[error(transparent)]
    Device(#[from] NetError),
    /// The slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// Does what a request asks for, other than to end the VM, and returns the
/// answer. Descriptors that nobody takes are closed.
pub fn answer(machine: &mut Machine, request: &Request, descriptors: Descriptors) -> Option<Event> {
    let valid = request.validate(descriptors.count());
    let answered = match *request {
        Request::ResizeMemory { size_mib } => {
            return Some(resized(valid, || {
                let size_mib = machine.resize_memory(size_mib)?;
                Ok(Event::MemoryRequested { size_mib })
            }));
        }
        Request::ResizeVcpus { count } => {
            return Some(resized(valid, || {
                let count = machine.resize_vcpus(count)?;
                Ok(Event::VcpusResized { count })
            }));
        }
        Request::AddNetwork(network) => valid
            .map_err(NetworkError::from)
            .and_then(|()| add_network(machine, network, descriptors)),
        Request::RemoveNetwork { slot } => valid
            .map_err(NetworkError::from)
            .and_then(|()| remove_network(machine, slot)),
        Request::Boot(_) => {
            log("ignored a second request to boot");
            return None;
        }
        Request::Stop => return None,
    };
    Some(answered.unwrap_or_else(|error| Event::NetworkRefused {
        error: describe(&error),
    }))
}

fn resized(
    valid: Result<(), ConfigError>,
    resize: impl FnOnce() -> Result<Event, ResizeError>,
) -> Event {
    let resized = valid.map_err(|error| describe(&error));
    let resized = resized.and_then(|()| resize().map_err(|error| describe(&error)));
    resized.unwrap_or_else(|error| Event::ResizeRefused { error })
}

fn add_network(
    machine: &mut Machine,
    network: Network,
    mut descriptors: Descriptors,
) -> Result<Event, NetworkError> {
    let name = format!(
        "network {}",
        network.mac.map(|byte| format!("{byte:02x}")).join(":")
    );
    let lost = name.clone();
    let device = Net::try_new(NetConfig {
        mac: network.mac,
        mtu: network.mtu,
        tap: descriptors.take(network.tap),
        // The pod's containers live on without it, as they would if a cable were pulled.
        lost: Arc::new(move |error| log(&format!("{lost} is down: {}", describe(&error)))),
    })?;
    let slot = machine.add_network(&name, device)?;
    Ok(Event::NetworkAdded { slot })
}

fn remove_network(machine: &mut Machine, slot: u32) -> Result<Event, NetworkError> {
    machine.remove_network(slot)?;
    Ok(Event::NetworkRemoved { slot })
}
