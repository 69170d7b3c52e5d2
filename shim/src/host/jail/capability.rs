//! Sets of capabilities (`capabilities(7)`), as bit masks.

/// A set of capabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u64);

/// One capability by its number in `linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(
    missing_docs,
    reason = "capabilities(7) documents each under this name"
)]
pub enum Capability {
    Chown = 0,
    DacOverride = 1,
    Fowner = 3,
    Fsetid = 4,
    Setgid = 6,
    Setuid = 7,
    Setpcap = 8,
    SysChroot = 18,
    Setfcap = 31,
}

impl Capabilities {
    /// No capability.
    pub const NONE: Self = Self(0);

    /// The set of `capabilities`.
    pub const fn of(capabilities: &[Capability]) -> Self {
        let mut bits = 0;
        let mut at = 0;
        while at < capabilities.len() {
            bits |= 1 << capabilities[at] as u8;
            at += 1;
        }
        Self(bits)
    }

    /// The set as `/proc/PID/status` shows it.
    pub const fn bits(self) -> u64 {
        self.0
    }
}
