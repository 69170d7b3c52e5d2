//! QEMU's command line for a node.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

/// All that QEMU emulates but five-level paging, which makes every nested walk half as long again, and protection keys.
const EMULATED_CPU: &str = "max,la57=off,pku=off";

/// How a node runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The machine's KVM runs the node, and lets it run guests of its own.
    Nested,
    /// QEMU emulates the node, with AMD SVM in it.
    Emulated,
}

impl Mode {
    /// What timeouts are multiplied by: commands take about so many times as long as on hardware.
    pub fn time_factor(self) -> u32 {
        match self {
            Mode::Nested => 1,
            Mode::Emulated => 8,
        }
    }
}

impl Mode {
    /// The node's CPUs. With two emulated ones, for each of which QEMU has a thread, the node's kernel or a guest in it died of
    /// what no program did (README, "What emulation costs"); with one it has not been seen.
    fn cpus(self) -> &'static str {
        match self {
            Mode::Nested => "2",
            Mode::Emulated => "1",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Mode::Nested => "nested",
            Mode::Emulated => "emulated",
        })
    }
}

/// The node's memory: eight guests of 512 MiB and the tools. Only what is touched is used.
pub const MEMORY_MIB: u32 = 6 * 1024;
/// The size of the disk that carries the product.
pub const PRODUCT_DISK_BYTES: u64 = 1 << 30;
/// The size of the root disk; a sparse file.
pub const ROOT_DISK_BYTES: u64 = 16 << 30;
/// Where the agent listens, inside.
const AGENT_PORT: u16 = 7000;

/// The QEMU of Debian 13's backports, run out of the node's own root directory through that root's dynamic loader: nothing is
/// installed. QEMU 7.2, which Debian 12 has, corrupts an emulated node's kernel; under 10.0 guests crashed.
#[derive(Clone, Debug)]
pub struct Qemu {
    root: PathBuf,
}

impl Qemu {
    /// The QEMU in the Debian root directory `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// `qemu-system-x86_64` with the paths of its firmware.
    pub fn system(&self) -> Command {
        let mut command = self.program("qemu-system-x86_64");
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.root.join(data));
        }
        command
    }

    /// `qemu-img`.
    pub fn image_tool(&self) -> Command {
        self.program("qemu-img")
    }

    fn program(&self, name: &str) -> Command {
        let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
        let mut search = OsString::from(&libraries);
        search.push(":");
        search.push(libraries.join("pulseaudio"));
        let mut command = Command::new(self.root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(search)
            .arg(self.root.join("usr/bin").join(name));
        command
    }
}

/// The node's second network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedNetwork {
    /// Plugged in nowhere.
    None,
    /// Waits at this socket for the other node.
    Listen(PathBuf),
    /// Connects to the other node.
    Connect(PathBuf),
}

/// The files and settings of one QEMU run.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Shown in the process list.
    pub name: &'a str,
    /// How.
    pub mode: Mode,
    /// The kernel.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: &'a Path,
    /// The root disk, from the top overlay (qcow2) to the base image (raw).
    pub disks: &'a [&'a Path],
    /// The read-only disk with tools and configuration.
    pub tools: &'a Path,
    /// The disk with the product (raw), if there is one to be mounted.
    pub product: Option<&'a Path>,
    /// The file that backs RAM.
    pub ram: &'a Path,
    /// Start from a snapshot: RAM is a private copy of `ram`, and the devices' state comes over QMP.
    pub restore: bool,
    /// The second network card.
    pub network: SharedNetwork,
    /// The file for the console.
    pub console: &'a Path,
    /// QEMU's end of a socket pair for QMP, inherited.
    pub qmp: i32,
}

/// Kernel parameters that the node needs, in either mode.
const KERNEL_PARAMETERS: &str = "console=ttyS0 loglevel=5 panic=-1 apparmor=1 security=apparmor net.ifnames=0 \
 rcupdate.rcu_expedited=1";
/// For an emulated CPU: its mitigations cost time and protect nothing, its clock is steady but slow, and a busy machine
/// stalls it for seconds. Huge pages are off until guest/sbin/setup has seen to it that nothing moves pages for them. KVM's waiting for a guest that may go on soon takes the one CPU from whoever would let it.
const EMULATED_PARAMETERS: &str = "transparent_hugepage=never kvm.halt_poll_ns=0 mitigations=off nokaslr tsc=reliable no_timer_check watchdog_thresh=60 \
     rcupdate.rcu_cpu_stall_timeout=180 hung_task_timeout_secs=600";

impl Machine<'_> {
    /// Appends the whole command line. The device model is the same whether the node is booted or restored, whatever its
    /// disks and networks are backed by: a snapshot fits no other.
    pub fn arguments(&self, command: &mut Command) {
        command.args(["-name", self.name]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args([
            "-machine",
            "q35,memory-backend=ram,usb=off,vmport=off",
            "-smp",
            self.mode.cpus(),
        ]);
        command.args(["-m", &MEMORY_MIB.to_string()]);
        match self.mode {
            Mode::Nested => command.args(["-accel", "kvm", "-cpu", "host"]),
            Mode::Emulated => command.args([
                "-accel",
                "tcg,thread=multi,tb-size=1024",
                "-cpu",
                EMULATED_CPU,
            ]),
        };
        self.memory(command);
        self.boot(command);
        self.block_devices(command);
        self.network_devices(command);
        command
            .arg("-chardev")
            .arg(with_path("file,id=console,path=", self.console));
        command.args(["-serial", "chardev:console"]);
        command.args(["-device", "virtio-rng-pci"]);
        command.args(["-chardev", &format!("socket,id=qmp,fd={}", self.qmp)]);
        command.args(["-mon", "chardev=qmp,mode=control"]);
        if self.restore {
            command.args(["-incoming", "defer"]);
        }
    }

    fn memory(&self, command: &mut Command) {
        // Restored nodes map the snapshot's memory copy-on-write: they share what they only read, and start at once.
        let sharing = if self.restore {
            "share=off,readonly=on,rom=off"
        } else {
            "share=on"
        };
        let object = format!("memory-backend-file,id=ram,size={MEMORY_MIB}M,{sharing},mem-path=");
        command.arg("-object").arg(with_path(&object, self.ram));
    }

    fn boot(&self, command: &mut Command) {
        let parameters = match self.mode {
            Mode::Nested => KERNEL_PARAMETERS.to_owned(),
            Mode::Emulated => format!("{KERNEL_PARAMETERS} {EMULATED_PARAMETERS}"),
        };
        command
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd);
        command.args(["-append", &parameters]);
    }

    fn block_devices(&self, command: &mut Command) {
        let mut backing = None;
        for (index, path) in self.disks.iter().enumerate().rev() {
            let format = if backing.is_none() { "raw" } else { "qcow2" };
            let mut node = format!("driver={format},node-name=disk{index}");
            if index > 0 {
                node.push_str(",read-only=on");
            }
            if let Some(backing) = backing {
                node = format!("{node},backing=disk{backing}");
            }
            // No caching mode survives a crash of the host, and none has to.
            node.push_str(",discard=unmap,cache.no-flush=on,file.driver=file,file.filename=");
            command.arg("-blockdev").arg(with_path(&node, path));
            backing = Some(index);
        }
        let tools = "driver=raw,node-name=tools,read-only=on,file.driver=file,file.filename=";
        command.arg("-blockdev").arg(with_path(tools, self.tools));
        command.arg("-blockdev").arg(match self.product {
            Some(path) => with_path(
                "driver=raw,node-name=product,cache.no-flush=on,file.driver=file,file.filename=",
                path,
            ),
            None => {
                format!("driver=null-co,node-name=product,size={PRODUCT_DISK_BYTES},read-zeroes=on")
                    .into()
            }
        });
        for node in ["disk0", "tools", "product"] {
            command.args(["-device", &format!("virtio-blk-pci,drive={node}")]);
        }
    }

    fn network_devices(&self, command: &mut Command) {
        // restrict: the node reaches nothing outside itself. Port 0: the system chooses.
        let user =
            format!("user,id=net0,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:0-:{AGENT_PORT}");
        command.args(["-netdev", &user]);
        command.args([
            "-device",
            "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:00:00:01",
        ]);
        command.arg("-netdev").arg(match &self.network {
            SharedNetwork::None => "hubport,id=net1,hubid=1".into(),
            SharedNetwork::Listen(path) => {
                with_path("stream,id=net1,server=on,addr.type=unix,addr.path=", path)
            }
            SharedNetwork::Connect(path) => with_path(
                "stream,id=net1,server=off,reconnect-ms=1000,addr.type=unix,addr.path=",
                path,
            ),
        });
        command.args([
            "-device",
            "virtio-net-pci,netdev=net1,romfile=,mac=52:54:00:00:00:02",
        ]);
    }
}

/// An option that ends in a path. A comma within a QEMU option value is written twice.
fn with_path(option: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = option.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_path_comma_is_doubled() {
        assert_eq!(with_path("a=", Path::new("/x,y")), "a=/x,,y");
    }

    fn arguments(product: Option<&Path>, network: SharedNetwork, restore: bool) -> Vec<String> {
        let path = Path::new("/f");
        let machine = Machine {
            name: "n",
            mode: Mode::Emulated,
            kernel: path,
            initrd: path,
            disks: &[path, path, path],
            tools: path,
            product,
            ram: path,
            restore,
            network,
            console: path,
            qmp: 7,
        };
        let mut command = Command::new("qemu");
        machine.arguments(&mut command);
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect()
    }

    /// The devices, in the order in which they get their places on the bus.
    fn devices(arguments: &[String]) -> Vec<&String> {
        arguments
            .windows(2)
            .filter(|pair| pair[0] == "-device")
            .map(|pair| &pair[1])
            .collect()
    }

    #[test]
    fn arguments_device_model_is_the_same_booted_and_restored() {
        let booted = arguments(None, SharedNetwork::None, false);
        let restored = arguments(
            Some(Path::new("/p")),
            SharedNetwork::Listen("/s".into()),
            true,
        );
        assert_eq!(devices(&booted), devices(&restored));
    }

    #[test]
    fn arguments_only_the_top_disk_is_writable() {
        let nodes: Vec<_> = arguments(None, SharedNetwork::None, true)
            .into_iter()
            .filter(|argument| argument.contains("node-name=disk"))
            .collect();
        assert_eq!(nodes.len(), 3);
        assert!(nodes[0].contains("driver=raw,node-name=disk2,read-only=on"));
        assert!(nodes[1].contains("node-name=disk1,read-only=on,backing=disk2"));
        assert!(nodes[2].contains("driver=qcow2,node-name=disk0,backing=disk1"));
    }
}
