//! The identity that a clone is given.

use std::fs::File;
use std::io::{self, Read};
use std::time::{SystemTime, UNIX_EPOCH};

use node_agent::wire::Claim;

/// A claim with fresh secrets and the present time.
pub(crate) fn fresh(hostname: &str) -> io::Result<Claim> {
    let mut random = File::open("/dev/urandom")?;
    let mut claim = Claim {
        token: [0; 32],
        hostname: hostname.to_owned(),
        unix_nanos: 0,
        seed: [0; 64],
    };
    random.read_exact(&mut claim.token)?;
    random.read_exact(&mut claim.seed)?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    // Fits until 2554.
    claim.unix_nanos = now.as_nanos() as u64;
    Ok(claim)
}
