//! The configuration of one VM.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Largest number of vCPUs of one VM, within the guest kernel's `CONFIG_NR_CPUS`.
pub const MAX_VCPUS: u8 = 64;
/// Least memory, in MiB, with which the guest kernel and the agent start.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Most memory, in MiB: 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// `COMMAND_LINE_SIZE` of x86 Linux, with its terminating NUL.
pub const MAX_COMMAND_LINE_BYTES: usize = 2048;
/// Room for the tag in the device's configuration space (virtio 1.2 section
/// 5.11.4).
pub const MAX_TAG_BYTES: usize = 36;
/// File systems of one VM: bounded by the virtio slots of the machine.
pub const MAX_FILE_SYSTEMS: usize = 8;
/// Least MTU of a network: what every IPv4 network carries (RFC 791).
pub const MIN_MTU: u16 = 68;
/// Context identifiers 0 to 2 are reserved (virtio 1.2 section 5.10.4).
pub const MIN_GUEST_CID: u32 = 3;

/// Which of the descriptors that came with the message is meant, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// One VM: what its monitor needs to boot it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// `/dev/kvm`, open for reading and writing. A VM belongs to the process
    /// that creates it, so the monitor is handed the device, not a VM.
    pub kvm: FdIndex,
    /// Virtual processors.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Memory,
    /// What the guest boots.
    pub boot: Boot,
    /// Serial console; without it the guest has no UART.
    pub console: Option<Console>,
    /// Socket device.
    pub vsock: Option<Vsock>,
    /// Shared file systems.
    pub file_systems: Vec<FileSystem>,
}

/// Virtual processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vcpus {
    /// Running from the start: 1 to `max`.
    pub boot: u8,
    /// Described to the guest, so that the rest can be started later: at most
    /// [`MAX_VCPUS`].
    pub max: u8,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Size at the start in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub size_mib: u32,
    /// What it can grow to while the VM runs, in MiB: `size_mib`, and then it never
    /// does, to [`MAX_MEMORY_MIB`].
    pub max_mib: u32,
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Uncompressed ELF kernel with a PVH entry note, open for reading.
    pub kernel: FdIndex,
    /// Initial RAM file system (newc cpio), open for reading.
    pub initramfs: Option<FdIndex>,
    /// Appended to the command line that the monitor itself needs.
    pub command_line: String,
}

/// Serial console (16550A at 0x3f8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Where the guest's output goes, open for writing.
    pub output: FdIndex,
}

/// Socket device (virtio 1.2 section 5.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context identifier, at least [`MIN_GUEST_CID`]. The host
    /// side is in user space, so every VM may have the same.
    pub guest_cid: u32,
    /// A listening Unix stream socket. A client connects, writes
    /// `CONNECT <port>\n` and reads `OK <port>\n` once the guest has accepted.
    pub listener: FdIndex,
}

/// Shared file system (virtio 1.2 section 5.11) whose server speaks
/// vhost-user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSystem {
    /// Name by which the guest mounts it: 1 to [`MAX_TAG_BYTES`] bytes.
    pub tag: String,
    /// Unix stream socket, connected to the file server.
    pub socket: FdIndex,
}

/// Network (virtio 1.2 section 5.1) of a VM that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The guest's address on it: unicast, not all zeros.
    pub mac: [u8; 6],
    /// Longest packet that the guest may send: [`MIN_MTU`] to 65535, and not
    /// less than the tap's, whose longer frames would be dropped.
    pub mtu: u16,
    /// `/dev/net/tun`, attached to an interface by `TUNSETIFF` with exactly
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. The monitor makes it non-blocking,
    /// and sets the length of the header and the offloads; the interface's
    /// address, MTU and state are the launcher's.
    pub tap: FdIndex,
}

/// Why a configuration cannot be a VM, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Boot vCPUs outside 1 to max, or max above the limit.
    #[error("{boot} vCPUs at start and {max} at most: need 1 <= start <= most <= {MAX_VCPUS}")]
    Vcpus {
        /// As configured.
        boot: u8,
        /// As configured.
        max: u8,
    },
    /// Memory outside its bounds.
    #[error(
        "{size_mib} MiB of memory at the start and {max_mib} at most: need {MIN_MEMORY_MIB} <= start <= most <= {MAX_MEMORY_MIB} MiB"
    )]
    Memory {
        /// As configured.
        size_mib: u32,
        /// As configured.
        max_mib: u32,
    },
    /// Command line too long or with a byte that ends it.
    #[error(
        "kernel command line of {bytes} bytes: need less than {MAX_COMMAND_LINE_BYTES}, printable ASCII only"
    )]
    CommandLine {
        /// Its length.
        bytes: usize,
    },
    /// Reserved context identifier.
    #[error("vsock context identifier {guest_cid}: 0 to 2 and 4294967295 are reserved")]
    GuestCid {
        /// As configured.
        guest_cid: u32,
    },
    /// Too many file systems.
    #[error("{count} file systems: at most {MAX_FILE_SYSTEMS}")]
    FileSystems {
        /// As configured.
        count: usize,
    },
    /// Empty, overlong, repeated or unprintable tag.
    #[error(
        "file system tag {tag:?}: need 1 to {MAX_TAG_BYTES} bytes of printable ASCII, each tag once"
    )]
    Tag {
        /// As configured.
        tag: String,
    },
    /// An address that no single interface can have.
    #[error("network address {mac:02x?}: need a unicast address that is not all zeros")]
    Mac {
        /// As configured.
        mac: [u8; 6],
    },
    /// MTU below the least.
    #[error("network MTU {mtu}: need {MIN_MTU} to {}", u16::MAX)]
    Mtu {
        /// As configured.
        mtu: u16,
    },
    /// A descriptor that did not come with the message.
    #[error("descriptor {index} is named, but only {count} came with the message")]
    MissingDescriptor {
        /// As configured.
        index: u32,
        /// How many came.
        count: usize,
    },
    /// One descriptor named for two purposes.
    #[error("descriptor {index} is named twice")]
    SharedDescriptor {
        /// As configured.
        index: u32,
    },
    /// A descriptor that came and that nothing names.
    #[error("{count} descriptors came with the message, but only {named} are named")]
    UnusedDescriptor {
        /// How many came.
        count: usize,
        /// How many are named.
        named: usize,
    },
}

impl VmConfig {
    /// Checks every bound, given how many descriptors came with the message.
    ///
    /// # Errors
    /// The first bound that does not hold. Each descriptor must be named
    /// exactly once, so that none leaks and none serves two masters.
    pub fn validate(&self, descriptors: usize) -> Result<(), ConfigError> {
        let Vcpus { boot, max } = self.vcpus;
        if boot == 0 || boot > max || max > MAX_VCPUS {
            return Err(ConfigError::Vcpus { boot, max });
        }
        let Memory { size_mib, max_mib } = self.memory;
        if size_mib < MIN_MEMORY_MIB || size_mib > max_mib || max_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::Memory { size_mib, max_mib });
        }
        let line = &self.boot.command_line;
        if line.len() >= MAX_COMMAND_LINE_BYTES || !is_printable(line) {
            return Err(ConfigError::CommandLine { bytes: line.len() });
        }
        if let Some(Vsock { guest_cid, .. }) = self.vsock
            && (guest_cid < MIN_GUEST_CID || guest_cid == u32::MAX)
        {
            return Err(ConfigError::GuestCid { guest_cid });
        }
        self.validate_file_systems()?;
        validate_descriptors(self.descriptors(), descriptors)
    }

    fn validate_file_systems(&self) -> Result<(), ConfigError> {
        let count = self.file_systems.len();
        if count > MAX_FILE_SYSTEMS {
            return Err(ConfigError::FileSystems { count });
        }
        let mut seen = BTreeSet::new();
        for FileSystem { tag, .. } in &self.file_systems {
            let fits = (1..=MAX_TAG_BYTES).contains(&tag.len());
            if !fits || !is_printable(tag) || !seen.insert(tag) {
                return Err(ConfigError::Tag { tag: tag.clone() });
            }
        }
        Ok(())
    }

    /// Every descriptor that the configuration names.
    fn descriptors(&self) -> impl Iterator<Item = FdIndex> + '_ {
        [self.kvm, self.boot.kernel]
            .into_iter()
            .chain(self.boot.initramfs)
            .chain(self.console.map(|console| console.output))
            .chain(self.vsock.map(|vsock| vsock.listener))
            .chain(self.file_systems.iter().map(|fs| fs.socket))
    }
}

impl Network {
    /// Checks every bound, given how many descriptors came with the message.
    ///
    /// # Errors
    /// The first bound that does not hold.
    pub fn validate(&self, descriptors: usize) -> Result<(), ConfigError> {
        let mac = self.mac;
        // IEEE 802: the lowest bit of the first byte is that of group addresses.
        if mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(ConfigError::Mac { mac });
        }
        if self.mtu < MIN_MTU {
            return Err(ConfigError::Mtu { mtu: self.mtu });
        }
        validate_descriptors([self.tap], descriptors)
    }
}

/// Each of the `count` descriptors must be named exactly once.
pub(crate) fn validate_descriptors(
    indices: impl IntoIterator<Item = FdIndex>,
    count: usize,
) -> Result<(), ConfigError> {
    let mut named = BTreeSet::new();
    for FdIndex(index) in indices {
        if index as usize >= count {
            return Err(ConfigError::MissingDescriptor { index, count });
        }
        if !named.insert(index) {
            return Err(ConfigError::SharedDescriptor { index });
        }
    }
    if named.len() == count {
        Ok(())
    } else {
        Err(ConfigError::UnusedDescriptor {
            count,
            named: named.len(),
        })
    }
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn smallest() -> VmConfig {
        VmConfig {
            kvm: FdIndex(0),
            vcpus: Vcpus { boot: 1, max: 1 },
            memory: Memory {
                size_mib: 512,
                max_mib: 512,
            },
            boot: Boot {
                kernel: FdIndex(1),
                initramfs: None,
                command_line: String::new(),
            },
            console: None,
            vsock: None,
            file_systems: Vec::new(),
        }
    }

    fn file_system(tag: &str, socket: u32) -> FileSystem {
        FileSystem {
            tag: tag.to_owned(),
            socket: FdIndex(socket),
        }
    }

    #[test]
    fn validate_smallest_config_passes() {
        assert_eq!(smallest().validate(2), Ok(()));
    }

    #[test]
    fn validate_more_boot_than_max_vcpus_is_refused() {
        let mut config = smallest();
        config.vcpus = Vcpus { boot: 3, max: 2 };
        assert_eq!(
            config.validate(2),
            Err(ConfigError::Vcpus { boot: 3, max: 2 })
        );
    }

    #[test]
    fn validate_descriptor_named_twice_is_refused() {
        let mut config = smallest();
        config.boot.kernel = FdIndex(0);
        assert_eq!(
            config.validate(2),
            Err(ConfigError::SharedDescriptor { index: 0 })
        );
    }

    #[test]
    fn validate_descriptor_nobody_names_is_refused() {
        assert_eq!(
            smallest().validate(3),
            Err(ConfigError::UnusedDescriptor { count: 3, named: 2 })
        );
    }

    #[test]
    fn validate_command_line_with_newline_is_refused() {
        let mut config = smallest();
        config.boot.command_line = "quiet\ninit=/bin/sh".to_owned();
        assert!(matches!(
            config.validate(2),
            Err(ConfigError::CommandLine { .. })
        ));
    }

    #[test]
    fn validate_repeated_tag_is_refused() {
        let mut config = smallest();
        config.file_systems = vec![file_system("share", 2), file_system("share", 3)];
        assert!(matches!(config.validate(4), Err(ConfigError::Tag { .. })));
    }

    #[test]
    fn validate_reserved_cid_is_refused() {
        let mut config = smallest();
        config.vsock = Some(Vsock {
            guest_cid: 2,
            listener: FdIndex(2),
        });
        assert_eq!(
            config.validate(3),
            Err(ConfigError::GuestCid { guest_cid: 2 })
        );
    }

    fn network(mac: [u8; 6], mtu: u16) -> Network {
        Network {
            mac,
            mtu,
            tap: FdIndex(0),
        }
    }

    #[test]
    fn validate_network_with_anything_but_its_one_descriptor_is_refused() {
        let mut network = network([2, 0, 0, 0, 0, 1], 1500);
        assert_eq!(network.validate(1), Ok(()));
        let missing = ConfigError::MissingDescriptor { index: 0, count: 0 };
        assert_eq!(network.validate(0), Err(missing));
        let unused = ConfigError::UnusedDescriptor { count: 2, named: 1 };
        assert_eq!(network.validate(2), Err(unused));
        network.tap = FdIndex(1);
        let missing = ConfigError::MissingDescriptor { index: 1, count: 1 };
        assert_eq!(network.validate(1), Err(missing));
    }

    proptest! {
        #[test]
        fn validate_network_passes_with_a_unicast_address_and_an_mtu_in_bounds(
            mac in prop_oneof![any::<[u8; 6]>(), Just([0; 6]), Just([0xff; 6])],
            mtu: u16,
        ) {
            let fits = mac != [0; 6] && mac[0].is_multiple_of(2) && mtu >= 68;
            prop_assert_eq!(network(mac, mtu).validate(1).is_ok(), fits);
        }

        #[test]
        fn validate_any_descriptor_beyond_the_count_is_refused(index in 2u32.., count in 2usize..64) {
            let mut config = smallest();
            config.boot.initramfs = Some(FdIndex(index));
            let passes = config.validate(count).is_ok();
            prop_assert_eq!(passes, index == 2 && count == 3);
        }

        #[test]
        fn validate_memory_in_bounds_passes_and_only_then(
            size_mib in prop_oneof![any::<u32>(), 0..=MAX_MEMORY_MIB],
            max_mib in prop_oneof![any::<u32>(), 0..=MAX_MEMORY_MIB],
        ) {
            let mut config = smallest();
            config.memory = Memory { size_mib, max_mib };
            let fits = MIN_MEMORY_MIB <= size_mib && size_mib <= max_mib && max_mib <= MAX_MEMORY_MIB;
            prop_assert_eq!(config.validate(2).is_ok(), fits);
        }
    }
}
