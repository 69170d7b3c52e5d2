//! Who may use this node, and the identity that a clone takes on.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use node_agent::wire::{Claim, Token};

/// Where the token outlives the agent, which init starts again should it die. On a tmpfs.
const TOKEN_FILE: &str = "/run/node-agent.token";

/// The token of the node's owner, once there is one.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    taking: Mutex<()>,
}

impl Claims {
    /// Whether `token` is the owner's. Nobody owns a node that was never claimed.
    pub(crate) fn permits(&self, token: &Token) -> bool {
        let _guard = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        fs::read(TOKEN_FILE).is_ok_and(|owner| owner == token)
    }

    /// Makes the sender the owner and takes on the new identity. The answer is what went wrong.
    pub(crate) fn take(&self, claim: &Claim) -> Result<(), String> {
        let _guard = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(TOKEN_FILE)
            .map_err(|error| format!("this node has an owner already: {TOKEN_FILE}: {error}"))?;
        file.write_all(&claim.token)
            .map_err(|error| format!("write {TOKEN_FILE}: {error}"))?;

        reseed(&claim.seed)
            .map_err(|error| format!("reseed the random number generator: {error}"))?;
        let now = TimeSpec::from_duration(Duration::from_nanos(claim.unix_nanos));
        clock_settime(ClockId::CLOCK_REALTIME, now)
            .map_err(|error| format!("set the clock: {error}"))?;
        nix::unistd::sethostname(&claim.hostname)
            .map_err(|error| format!("set the host name {}: {error}", claim.hostname))
    }
}

/// Mixes `seed` into the kernel's pool and makes the generator draw from it at once; else clones go on with the same
/// numbers for up to a minute.
fn reseed(seed: &[u8]) -> io::Result<()> {
    let mut device = OpenOptions::new().write(true).open("/dev/urandom")?;
    device.write_all(seed)?;
    ioctl::reseed(device.as_raw_fd())
}

mod ioctl {
    #![expect(
        unsafe_code,
        reason = "ioctl is variadic; the macro makes an unsafe function"
    )]

    use std::io;
    use std::os::fd::RawFd;

    mod raw {
        // RNDRESEEDCRNG of linux/random.h.
        nix::ioctl_none!(rnd_reseed_crng, b'R', 0x07);
    }

    pub(super) fn reseed(random: RawFd) -> io::Result<()> {
        // SAFETY: the request takes no argument, and acts on nothing but the kernel's generator; a wrong descriptor
        // gives an error.
        unsafe { raw::rnd_reseed_crng(random) }?;
        Ok(())
    }
}
