//! The kernel command line.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_config::{MAX_COMMAND_LINE_BYTES, VmConfig};

use crate::layout::{COMMAND_LINE, RAMOOPS, RAMOOPS_SIZE};

/// A command line that does not fit.
#[derive(Debug, Error)]
pub enum CommandLineError {
    /// Too long with the words that the monitor adds.
    #[error(
        "kernel command line of {bytes} bytes with the monitor's own words: at most {}; shorten the configured one",
        MAX_COMMAND_LINE_BYTES - 1
    )]
    TooLong {
        /// Its length without the NUL.
        bytes: usize,
    },
    /// Memory that must be there is not.
    #[error("cannot write the kernel command line to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// The words that the guest's kernel is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// What this machine needs, then what the configuration adds: of two words
    /// for the same thing Linux takes the last.
    ///
    /// # Errors
    /// When both together are too long.
    pub fn try_new(config: &VmConfig) -> Result<Self, CommandLineError> {
        let mut words = vec![
            // A panic resets at once, so that the VM ends and its reason is told.
            "panic=-1".to_owned(),
            // The tests of ciphers at boot find faults of hardware drivers; here are none.
            "cryptomgr.notests".to_owned(),
            // No device needs bounce buffers; with memory above 4 GiB they would take 64 MiB.
            "swiotlb=noforce".to_owned(),
            // The console of pstore keeps the last messages where the monitor reads them. It has all
            // of the area: the other zones have sizes unless told otherwise, and would not fit.
            format!("ramoops.mem_address={RAMOOPS:#x}"),
            format!("ramoops.mem_size={RAMOOPS_SIZE:#x}"),
            format!("ramoops.console_size={RAMOOPS_SIZE:#x}"),
            "ramoops.record_size=0".to_owned(),
            "ramoops.ftrace_size=0".to_owned(),
            "ramoops.pmsg_size=0".to_owned(),
        ];
        if config.vcpus.max > config.vcpus.boot {
            // All possible vCPUs are described as present; those that do not run yet must not be
            // waited for.
            words.push(format!("maxcpus={}", config.vcpus.boot));
        }
        if config.memory.max_mib > config.memory.size_mib {
            // As much of what is plugged as the kernel's own needs allow is for pages that can be moved
            // out of the way, so that it can be unplugged.
            words.push("memory_hotplug.online_policy=auto-movable".to_owned());
        }
        if config.console.is_some() {
            // The driver's console takes over from the early one, which shows what fails before it.
            words.push("earlycon=uart8250,io,0x3f8".to_owned());
            words.push("console=ttyS0".to_owned());
        } else {
            // There is no UART: do not look for one.
            words.push("8250.nr_uarts=0".to_owned());
        }
        if !config.boot.command_line.is_empty() {
            words.push(config.boot.command_line.clone());
        }
        let line = words.join(" ");
        if line.len() < MAX_COMMAND_LINE_BYTES {
            Ok(Self(line))
        } else {
            Err(CommandLineError::TooLong { bytes: line.len() })
        }
    }

    /// Writes it, with its NUL, where the guest is told to find it.
    ///
    /// # Errors
    /// When the VM has no memory there.
    pub fn write(&self, memory: &GuestMemoryMmap) -> Result<(), CommandLineError> {
        let mut bytes = self.0.clone().into_bytes();
        bytes.push(0);
        memory
            .write_slice(&bytes, GuestAddress(COMMAND_LINE))
            .map_err(CommandLineError::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_config::{Boot, Console, FdIndex, Memory, Vcpus};

    fn config(command_line: &str) -> VmConfig {
        VmConfig {
            kvm: FdIndex(0),
            vcpus: Vcpus { boot: 1, max: 1 },
            memory: Memory {
                size_mib: 64,
                max_mib: 64,
            },
            boot: Boot {
                kernel: FdIndex(1),
                initramfs: None,
                command_line: command_line.to_owned(),
            },
            console: None,
            vsock: None,
            file_systems: Vec::new(),
        }
    }

    fn words(config: &VmConfig) -> Vec<String> {
        let CommandLine(line) = CommandLine::try_new(config).expect("fits");
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn command_line_without_console_has_no_uart() {
        let words = words(&config(""));
        assert!(words.contains(&"8250.nr_uarts=0".to_owned()));
        assert!(!words.iter().any(|word| word.starts_with("console=")));
    }

    #[test]
    fn command_line_with_console_names_the_serial_line() {
        let mut config = config("");
        config.console = Some(Console { output: FdIndex(2) });
        let words = words(&config);
        assert!(words.contains(&"console=ttyS0".to_owned()));
        assert!(!words.contains(&"8250.nr_uarts=0".to_owned()));
    }

    #[test]
    fn command_line_of_the_configuration_comes_last() {
        let words = words(&config("panic=0 quiet"));
        assert_eq!(words[words.len() - 2..], ["panic=0", "quiet"]);
    }

    #[test]
    fn command_line_with_late_vcpus_limits_those_that_are_waited_for() {
        let mut config = config("");
        config.vcpus = Vcpus { boot: 2, max: 8 };
        assert!(words(&config).contains(&"maxcpus=2".to_owned()));
    }

    #[test]
    fn command_line_too_long_with_our_words_is_refused() {
        let long = "x".repeat(MAX_COMMAND_LINE_BYTES - 1);
        assert!(matches!(
            CommandLine::try_new(&config(&long)),
            Err(CommandLineError::TooLong { .. })
        ));
    }
}
