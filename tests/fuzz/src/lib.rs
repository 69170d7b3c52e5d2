//! Fuzz targets: one function for each parser that a guest or a client can
//! reach. A target takes any bytes, and panics when something does not hold that
//! must hold whatever they are.
//!
//! The same functions are called by `tests/corpus.rs`, which every run of the
//! tests includes, with the inputs in `corpus/` and a number of random ones; and
//! by the binary `bulkhead-fuzz`, in which libFuzzer looks for inputs that reach
//! code that none has reached before.

mod driver;
mod json;
mod memory;
mod targets;

/// A target.
pub struct Target {
    /// Names it on the command line, and its folder in `corpus/`.
    pub name: &'static str,
    /// Most memory that its thread may hold at a time, in bytes, whatever the
    /// input. Guest memory and what other threads hold are not counted.
    pub memory_bytes: usize,
    run: fn(&[u8]),
}

impl Target {
    /// The one of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Tries one input.
    ///
    /// # Panics
    /// When it finds a bug.
    pub fn check(&self, input: &[u8]) {
        let peak = memory::peak_of(|| (self.run)(input));
        let (name, most) = (self.name, self.memory_bytes);
        assert!(
            peak <= most,
            "{name}: {peak} bytes held at a time for an input of {}, at most {most} are right",
            input.len()
        );
    }
}

const MIB: usize = 1024 * 1024;
/// The protobuf crate believes a length of up to 10 MB before it looks for the
/// bytes (its `READ_RAW_BYTES_MAX_ALLOC`).
const PROTOBUF_BYTES: usize = 10 * MIB;

/// Every target.
pub static TARGETS: &[Target] = &[
    Target {
        name: "fs_relay",
        // Copies of descriptors, a megabyte of scratch.
        memory_bytes: 4 * MIB,
        run: targets::fs_relay::run,
    },
    Target {
        name: "fs_handshake",
        memory_bytes: MIB,
        run: targets::fs_handshake::run,
    },
    Target {
        name: "vsock",
        // 64 KiB for each of its clients.
        memory_bytes: 4 * MIB,
        run: targets::vsock::run,
    },
    Target {
        name: "net",
        // A list of pieces and a frame for each side.
        memory_bytes: 4 * MIB,
        run: targets::net::run,
    },
    Target {
        name: "mmio",
        memory_bytes: 4 * MIB,
        run: targets::mmio::run,
    },
    Target {
        name: "saved_state",
        memory_bytes: 4 * MIB,
        run: targets::saved_state::run,
    },
    Target {
        name: "legacy",
        memory_bytes: MIB,
        run: targets::legacy::run,
    },
    Target {
        name: "ramoops",
        // Copies of a zone.
        memory_bytes: 4 * MIB,
        run: targets::ramoops::run,
    },
    Target {
        name: "control",
        memory_bytes: MIB,
        run: targets::control::run,
    },
    Target {
        name: "agent_spec",
        memory_bytes: 16 * MIB,
        run: targets::agent_spec::run,
    },
    Target {
        name: "agent_stream",
        memory_bytes: PROTOBUF_BYTES + MIB,
        run: targets::agent_stream::run,
    },
    Target {
        name: "shim_spec",
        memory_bytes: 16 * MIB,
        run: targets::shim_spec::run,
    },
    Target {
        name: "shim_start",
        // A path of systemd's grows with the square of its length.
        memory_bytes: PROTOBUF_BYTES + 16 * MIB,
        run: targets::shim_start::run,
    },
    Target {
        name: "shim_answers",
        memory_bytes: PROTOBUF_BYTES + 16 * MIB,
        run: targets::shim_answers::run,
    },
];
