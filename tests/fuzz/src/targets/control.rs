//! The messages of the monitor's control socket, both ways, and the bounds of the
//! configuration in them.

use vmm_config::control::{Event, MAX_MESSAGE_BYTES, Request, decode, encode};
use vmm_config::{
    FdIndex, MAX_FILE_SYSTEMS, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, MIN_MTU, VmConfig,
};

/// Tries one input.
pub fn run(data: &[u8]) {
    let Some((&choice, packet)) = data.split_first() else {
        return;
    };
    match decode::<Request>(packet) {
        Ok(request) => {
            assert!(packet.len() <= MAX_MESSAGE_BYTES);
            let valid = request.validate(usize::from(choice)).is_ok();
            match &request {
                Request::Boot(config) => validate(config, usize::from(choice)),
                Request::AddNetwork(network) if valid => {
                    assert!(network.mac != [0; 6] && network.mac[0] & 1 == 0);
                    assert!(network.mtu >= MIN_MTU);
                    assert_eq!((choice, network.tap), (1, FdIndex(0)));
                }
                Request::RemoveNetwork { .. }
                | Request::ResizeMemory { .. }
                | Request::ResizeVcpus { .. } => {
                    assert_eq!(valid, choice == 0);
                }
                Request::AddNetwork(_) | Request::Stop => {}
            }
            let again = decode::<Request>(&encode(&request));
            // Encoded anew it may be longer.
            assert!(again.is_err() || again.is_ok_and(|again| again == request));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(event) = decode::<Event>(packet) {
        let again = decode::<Event>(&encode(&event));
        assert!(again.is_err() || again.is_ok_and(|again| again == event));
    }
}

/// What passes is within its bounds, and names each descriptor once.
fn validate(config: &VmConfig, descriptors: usize) {
    if config.validate(descriptors).is_err() {
        return;
    }
    assert!(config.vcpus.boot >= 1 && config.vcpus.boot <= config.vcpus.max);
    assert!(config.vcpus.max <= MAX_VCPUS);
    let memory = config.memory;
    assert!(MIN_MEMORY_MIB <= memory.size_mib && memory.size_mib <= memory.max_mib);
    assert!(memory.max_mib <= MAX_MEMORY_MIB);
    assert!(config.file_systems.len() <= MAX_FILE_SYSTEMS);
    let mut named = vec![config.kvm, config.boot.kernel];
    named.extend(config.boot.initramfs);
    named.extend(config.console.map(|console| console.output));
    named.extend(config.vsock.map(|vsock| vsock.listener));
    named.extend(config.file_systems.iter().map(|share| share.socket));
    named.sort();
    let all: Vec<_> = (0..descriptors).collect();
    let named: Vec<_> = named.into_iter().map(|index| index.0 as usize).collect();
    assert_eq!(named, all, "each descriptor once");
}
