//! AppArmor profiles of the host: the policy that holds one, as the kernel has it,
//! so that the guest's kernel can enforce it (Linux, security/apparmor/apparmorfs.c).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A directory for each profile that is loaded.
const PROFILES: &str = "/sys/kernel/security/apparmor/policy/profiles";
/// A profile that needs no policy: the absence of one.
const UNCONFINED: &str = "unconfined";
/// Largest policy that is carried into a guest: far above any real one (a
/// container's has 20 KiB), and within a message to the agent.
const MAX_POLICY_BYTES: u64 = 2 * 1024 * 1024;

/// Why a profile cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The host has no AppArmor.
    #[error(
        "AppArmor profile {profile}: this host has no AppArmor, or {PROFILES} is not mounted; leave the profile out"
    )]
    NotEnabled {
        /// As asked for.
        profile: String,
    },
    /// No profile of that name is loaded.
    #[error("AppArmor profile {profile} is not loaded on this host: load it with apparmor_parser")]
    NotLoaded {
        /// As asked for.
        profile: String,
    },
    /// Its policy cannot be read.
    #[error("read the policy of AppArmor profile {profile} from {path}")]
    Read {
        /// As asked for.
        profile: String,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The host's kernel does not give policy out.
    #[error(
        "AppArmor profile {profile}: this host's kernel does not keep the policy that was loaded, which the pod needs \
         (CONFIG_SECURITY_APPARMOR_EXPORT_BINARY, /sys/module/apparmor/parameters/export_binary): run the container unconfined"
    )]
    NotKept {
        /// As asked for.
        profile: String,
    },
    /// Its policy is too large.
    #[error(
        "the policy that AppArmor profile {profile} was loaded with has more than {MAX_POLICY_BYTES} bytes: \
         load the profile from a file of its own"
    )]
    TooLong {
        /// As asked for.
        profile: String,
    },
}

impl Error {
    /// Whether it is for the client to put right.
    pub fn blames_caller(&self) -> bool {
        !matches!(self, Self::Read { .. })
    }
}

/// The policy that `profile` was loaded with, which may hold other profiles too.
/// `None` for `unconfined`.
///
/// # Errors
/// When there is no such profile, or it cannot be read.
pub fn policy(profile: &str) -> Result<Option<Vec<u8>>, Error> {
    policy_below(Path::new(PROFILES), profile)
}

fn policy_below(profiles: &Path, profile: &str) -> Result<Option<Vec<u8>>, Error> {
    if profile == UNCONFINED {
        return Ok(None);
    }
    let Ok(loaded) = fs::read_dir(profiles) else {
        return Err(Error::NotEnabled {
            profile: profile.to_owned(),
        });
    };
    // One that goes meanwhile is not the one that is asked for.
    let directory = loaded
        .flatten()
        .map(|entry| entry.path())
        .find(|directory| {
            fs::read_to_string(directory.join("name"))
                .is_ok_and(|name| name.trim_end_matches('\n') == profile)
        })
        .ok_or_else(|| Error::NotLoaded {
            profile: profile.to_owned(),
        })?;
    let path = directory.join("raw_data");
    let mut policy = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_POLICY_BYTES + 1).read_to_end(&mut policy))
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NotKept {
                profile: profile.to_owned(),
            },
            _ => Error::Read {
                profile: profile.to_owned(),
                path,
                source,
            },
        })?;
    if policy.len() as u64 > MAX_POLICY_BYTES {
        return Err(Error::TooLong {
            profile: profile.to_owned(),
        });
    }
    Ok(Some(policy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profiles() -> tempfile::TempDir {
        let profiles = tempfile::tempdir().unwrap();
        for (directory, name) in [("one.1", "one"), ("usr.bin.two.2", "/usr/bin/two")] {
            let directory = profiles.path().join(directory);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("name"), format!("{name}\n")).unwrap();
            fs::write(directory.join("raw_data"), format!("policy of {name}")).unwrap();
        }
        profiles
    }

    #[test]
    fn policy_is_found_by_the_profiles_name() {
        let profiles = profiles();
        let policy = policy_below(profiles.path(), "/usr/bin/two").unwrap();
        assert_eq!(policy.unwrap(), b"policy of /usr/bin/two");
        assert_eq!(policy_below(profiles.path(), "unconfined").unwrap(), None);
    }

    #[test]
    fn policy_of_a_profile_that_is_not_loaded_is_refused_by_name() {
        let profiles = profiles();
        for absent in ["on", "one.1", "../one.1", ""] {
            let error = policy_below(profiles.path(), absent).unwrap_err();
            assert!(matches!(&error, Error::NotLoaded { profile } if profile == absent));
            assert!(error.blames_caller());
        }
        fs::remove_file(profiles.path().join("one.1/raw_data")).unwrap();
        let error = policy_below(profiles.path(), "one").unwrap_err();
        assert!(matches!(error, Error::NotKept { .. }));
        let error = policy_below(&profiles.path().join("nothing"), "one").unwrap_err();
        assert!(matches!(error, Error::NotEnabled { .. }));
    }

    #[test]
    fn policy_that_is_too_large_is_refused() {
        let profiles = profiles();
        let file = profiles.path().join("one.1/raw_data");
        fs::write(&file, vec![0; MAX_POLICY_BYTES as usize]).unwrap();
        assert!(policy_below(profiles.path(), "one").is_ok());
        fs::write(&file, vec![0; MAX_POLICY_BYTES as usize + 1]).unwrap();
        let error = policy_below(profiles.path(), "one").unwrap_err();
        assert!(matches!(error, Error::TooLong { .. }));
    }
}
