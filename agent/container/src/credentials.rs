//! The credentials and limits of the user's program: `process` but for its
//! arguments.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, fstat, umask};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};
use oci_spec::runtime::{LinuxCapabilities, PosixRlimitType, Process, User};

/// What the kernel refused of the process's credentials or limits.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("cannot set the limit {limit}")]
    Limit {
        limit: String,
        #[source]
        source: Errno,
    },
    #[error("cannot become user {uid}:{gid}")]
    User {
        uid: u32,
        gid: u32,
        #[source]
        source: Errno,
    },
    #[error("cannot set the {set} capabilities")]
    Capabilities {
        set: &'static str,
        #[source]
        source: caps::errors::CapsError,
    },
    #[error("cannot set no_new_privs")]
    NoNewPrivileges(#[source] Errno),
    #[error("cannot give the standard streams to user {uid}")]
    Streams {
        uid: u32,
        #[source]
        source: Errno,
    },
}

/// Sets `process.rlimits`. What they do not name is the agent's own: for
/// `RLIMIT_NOFILE` 1048576, soft and hard; for the others the kernel's default
/// for PID 1.
pub fn set_limits(process: &Process) -> Result<(), CredentialsError> {
    for limit in process.rlimits().iter().flatten() {
        setrlimit(resource(limit.typ()), limit.soft(), limit.hard()).map_err(|source| {
            CredentialsError::Limit {
                limit: format!("{:?} to {}:{}", limit.typ(), limit.soft(), limit.hard()),
                source,
            }
        })?;
    }
    Ok(())
}

fn resource(limit: PosixRlimitType) -> Resource {
    match limit {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

/// Lets the hard limits be as high as `process.rlimits` asks for: in a user
/// namespace of its own a process cannot raise them.
pub fn raise_limits(process: &Process) -> Result<(), CredentialsError> {
    for limit in process.rlimits().iter().flatten() {
        let failed = |source| CredentialsError::Limit {
            limit: format!("{:?} up to {}", limit.typ(), limit.hard()),
            source,
        };
        let resource = resource(limit.typ());
        let (soft, hard) = getrlimit(resource).map_err(failed)?;
        if limit.hard() > hard {
            setrlimit(resource, soft, limit.hard()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Gives descriptors 0 to 2 to the user, so that it may open `/dev/stdout` and
/// the like again. Not the guest's `/dev/null`, which is everybody's.
pub fn give_streams(user: &User) -> Result<(), CredentialsError> {
    let uid = user.uid();
    let failed = |source| CredentialsError::Streams { uid, source };
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let status = fstat(stream).map_err(failed)?;
        let is_device = status.st_rdev != 0 && nix::unistd::isatty(stream) != Ok(true);
        if is_device || status.st_uid == uid {
            continue;
        }
        match fchown(stream, Some(Uid::from_raw(uid)), None) {
            // Streams that cannot have an owner work without.
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(())
}

/// Becomes the user but keeps every capability, for what is left to do: see [`CapabilitySets::apply`].
pub fn become_user(user: &User) -> Result<(), CredentialsError> {
    let failed = |source| CredentialsError::User {
        uid: user.uid(),
        gid: user.gid(),
        source,
    };
    let groups: Vec<_> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
    prctl::set_keepcaps(true).map_err(failed)?;
    setgroups(&groups).map_err(failed)?;
    setresgid(gid, gid, gid).map_err(failed)?;
    setresuid(uid, uid, uid).map_err(failed)?;
    // Leaving uid 0 emptied the effective set; the permitted one was kept.
    caps::read(None, CapSet::Permitted)
        .and_then(|permitted| caps::set(None, CapSet::Effective, &permitted))
        .map_err(capabilities_failed("effective"))?;
    prctl::set_keepcaps(false).map_err(failed)
}

fn capabilities_failed(
    set: &'static str,
) -> impl FnOnce(caps::errors::CapsError) -> CredentialsError {
    move |source| CredentialsError::Capabilities { set, source }
}

/// The five sets, as this kernel knows them.
#[derive(Debug)]
pub struct CapabilitySets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    inheritable: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

impl CapabilitySets {
    /// Of the specification, with a warning for each capability that is left
    /// out because it cannot be had. No specification means none.
    pub fn new(asked: Option<&LinuxCapabilities>) -> (Self, Vec<String>) {
        let known = caps::runtime::thread_all_supported();
        let mut unknown = HashSet::new();
        let mut convert = |set: Option<&oci_spec::runtime::Capabilities>| {
            let mut converted = CapsHashSet::new();
            for capability in set.into_iter().flatten() {
                let name = format!("CAP_{capability}");
                match name.parse::<Capability>() {
                    Ok(capability) if known.contains(&capability) => {
                        converted.insert(capability);
                    }
                    _ => {
                        unknown.insert(name);
                    }
                }
            }
            converted
        };
        let of = |set: fn(&LinuxCapabilities) -> &Option<oci_spec::runtime::Capabilities>| {
            asked.and_then(|asked| set(asked).as_ref())
        };
        let mut sets = Self {
            bounding: convert(of(LinuxCapabilities::bounding)),
            effective: convert(of(LinuxCapabilities::effective)),
            inheritable: convert(of(LinuxCapabilities::inheritable)),
            permitted: convert(of(LinuxCapabilities::permitted)),
            ambient: convert(of(LinuxCapabilities::ambient)),
        };
        let mut left_out: Vec<_> = unknown
            .into_iter()
            .map(|name| format!("process.capabilities: the guest's kernel has no {name}"))
            .collect();
        // capabilities(7): only what is permitted and inheritable can be ambient.
        let Self {
            permitted,
            inheritable,
            ambient,
            ..
        } = &mut sets;
        ambient.retain(|capability| {
            let possible = permitted.contains(capability) && inheritable.contains(capability);
            if !possible {
                left_out.push(format!(
                    "process.capabilities.ambient: {capability} is not both permitted and inheritable"
                ));
            }
            possible
        });
        left_out.sort();
        (sets, left_out)
    }

    /// Shrinks the bounding set. Needs `CAP_SETPCAP`, so it comes first.
    pub fn drop_bounding(&self) -> Result<(), CredentialsError> {
        for capability in caps::runtime::thread_all_supported() {
            if !self.bounding.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(capabilities_failed("bounding"))?;
            }
        }
        Ok(())
    }

    /// Does something with no more than the effective set of the specification,
    /// then takes all that is permitted into effect again.
    pub fn with_effective<T>(&self, action: impl FnOnce() -> T) -> Result<T, CredentialsError> {
        let permitted = caps::read(None, CapSet::Permitted);
        let permitted = permitted.map_err(capabilities_failed("permitted"))?;
        let set = |capabilities| {
            caps::set(None, CapSet::Effective, capabilities)
                .map_err(capabilities_failed("effective"))
        };
        set(&self.effective)?;
        let result = action();
        set(&permitted)?;
        Ok(result)
    }

    /// Sets the other four, with capget, capset and prctl alone: a seccomp
    /// filter may be in force.
    pub fn apply(&self) -> Result<(), CredentialsError> {
        // Inheritable while everything is still permitted; permitted last,
        // since it must contain the effective set at each moment.
        for (name, set, capabilities) in [
            ("inheritable", CapSet::Inheritable, &self.inheritable),
            ("effective", CapSet::Effective, &self.effective),
            ("permitted", CapSet::Permitted, &self.permitted),
        ] {
            caps::set(None, set, capabilities).map_err(capabilities_failed(name))?;
        }
        caps::clear(None, CapSet::Ambient).map_err(capabilities_failed("ambient"))?;
        for capability in &self.ambient {
            caps::raise(None, CapSet::Ambient, *capability)
                .map_err(capabilities_failed("ambient"))?;
        }
        Ok(())
    }
}

/// Sets `process.noNewPrivileges`.
pub fn set_no_new_privileges() -> Result<(), CredentialsError> {
    prctl::set_no_new_privs().map_err(CredentialsError::NoNewPrivileges)
}

/// The user's home directory by the container's `/etc/passwd`; `/` when it has none.
pub fn home_directory(uid: u32) -> String {
    // The image's file: bounded, since it may be of any size or kind.
    const MAX_PASSWD_BYTES: u64 = 1 << 20;
    let readable = fs::metadata("/etc/passwd")
        .is_ok_and(|status| status.is_file() && status.len() <= MAX_PASSWD_BYTES);
    let text = if readable {
        fs::read("/etc/passwd").unwrap_or_default()
    } else {
        Vec::new()
    };
    home_in(&String::from_utf8_lossy(&text), uid).unwrap_or_else(|| "/".to_owned())
}

/// passwd(5): name, password, uid, gid, comment, home, shell.
fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let matches = fields.nth(2)?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_in_finds_the_first_entry_of_the_uid() {
        let passwd = "broken\nroot:x:0:0:root:/root:/bin/sh\n\
                      a:x:1000:100::/home/a:/bin/sh\nb:x:1000:100::/home/b:\n";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 1000).as_deref(), Some("/home/a"));
        assert_eq!(home_in(passwd, 7), None);
    }

    #[test]
    fn capability_sets_none_asked_is_none_kept() {
        let (sets, unknown) = CapabilitySets::new(None);
        assert!(sets.bounding.is_empty() && sets.permitted.is_empty());
        assert!(unknown.is_empty());
    }

    #[test]
    fn capability_sets_names_are_converted() {
        let asked = serde_json::from_value(serde_json::json!({
            "bounding": ["CAP_SYS_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_SYSLOG"],
        }))
        .unwrap();
        let (sets, _) = CapabilitySets::new(Some(&asked));
        assert!(sets.bounding.contains(&Capability::CAP_NET_BIND_SERVICE));
        assert!(sets.bounding.contains(&Capability::CAP_SYSLOG));
    }
}
