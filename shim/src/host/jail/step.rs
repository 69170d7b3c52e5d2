//! The steps of a process between its birth and its program, so that a failure
//! can be told by name.

use std::fmt;

/// What a new process was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// `setsid`.
    Session,
    /// Entering the pod's network namespace.
    Network,
    /// Cutting its mounts off from the host's.
    Propagation,
    /// Attaching the file system of the new root.
    AttachRoot,
    /// Going into the new root.
    EnterRoot,
    /// Binding the share into the new root.
    BindShare,
    /// Making the share's own directories read-only.
    SealShare,
    /// Mounting procfs in the new root.
    MountProc,
    /// Making the new root read-only.
    SealRoot,
    /// `pivot_root`.
    PivotRoot,
    /// Letting go of the old root.
    DetachOldRoot,
    /// Putting the descriptors at their numbers.
    Descriptors,
    /// Resource limits.
    Limits,
    /// Emptying the bounding and ambient sets.
    Bounding,
    /// Supplementary groups, gid and uid.
    Credentials,
    /// `capset`.
    Capabilities,
    /// `PR_SET_NO_NEW_PRIVS`.
    NoNewPrivileges,
    /// `execveat`.
    Execute,
}

impl Step {
    const ALL: [Self; 18] = [
        Self::Session,
        Self::Network,
        Self::Propagation,
        Self::AttachRoot,
        Self::EnterRoot,
        Self::BindShare,
        Self::SealShare,
        Self::MountProc,
        Self::SealRoot,
        Self::PivotRoot,
        Self::DetachOldRoot,
        Self::Descriptors,
        Self::Limits,
        Self::Bounding,
        Self::Credentials,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::Execute,
    ];

    /// The step with this number, as it came through the pipe.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Session => "make its session",
            Self::Network => "enter the network namespace",
            Self::Propagation => "cut its mounts off from the host's",
            Self::AttachRoot => "attach its root",
            Self::EnterRoot => "enter its root",
            Self::BindShare => "bind the share into its root",
            Self::SealShare => "make the share's directories read-only",
            Self::MountProc => "mount procfs",
            Self::SealRoot => "make its root read-only",
            Self::PivotRoot => "pivot to its root",
            Self::DetachOldRoot => "let go of the host's root",
            Self::Descriptors => "place its descriptors",
            Self::Limits => "set its resource limits",
            Self::Bounding => "empty its capability bounding set",
            Self::Credentials => "set its uid and gid",
            Self::Capabilities => "set its capabilities",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::Execute => {
                "execute its program (is it a static executable that everybody may execute?)"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_number_of_every_step_is_the_step() {
        for (number, step) in Step::ALL.iter().enumerate() {
            assert_eq!(*step as usize, number);
            assert_eq!(Step::from_number(*step as u8), Some(*step));
        }
        assert_eq!(Step::from_number(Step::ALL.len() as u8), None);
    }
}
