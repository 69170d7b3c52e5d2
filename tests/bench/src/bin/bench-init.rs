//! The init of the boot benchmark: it resets the machine at once, which every
//! monitor understands.

use nix::sys::reboot::{RebootMode, reboot};

fn main() -> nix::Result<()> {
    reboot(RebootMode::RB_AUTOBOOT).map(|never| match never {})
}
