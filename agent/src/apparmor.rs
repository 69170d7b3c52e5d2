//! AppArmor policy of the host's, for the guest's kernel to enforce.

use std::{
    fs::OpenOptions,
    io::{self, Write},
};

/// Adds profiles, or replaces those of the same name (Linux,
/// security/apparmor/apparmorfs.c).
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// Why the policy was not loaded.
#[derive(Debug, thiserror::Error)]
#[error("the guest's kernel does not take the host's AppArmor policy")]
pub struct AppArmorError(#[from] io::Error);

/// Loads `policy`, as a kernel gives it out. What is loaded already costs nothing.
///
/// # Errors
/// When the kernel cannot use it: `EPROTO` and `EPROTONOSUPPORT` mean that it is
/// malformed or of a version that this kernel does not know.
pub fn load(policy: &[u8]) -> Result<(), AppArmorError> {
    let mut file = OpenOptions::new().write(true).open(REPLACE)?;
    // The whole of it in one write, or none: the kernel reads no second part.
    if file.write(policy)? != policy.len() {
        return Err(io::Error::from(io::ErrorKind::WriteZero).into());
    }
    Ok(())
}
