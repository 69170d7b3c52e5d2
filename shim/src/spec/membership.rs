//! Which pod a container belongs to.

use serde_json::Value;

use super::{Error, text};

/// CRI's annotation that tells a sandbox from a container of one.
const CONTAINER_TYPE: &str = "/annotations/io.kubernetes.cri.container-type";
/// CRI's annotation that names the sandbox.
const SANDBOX_ID: &str = "/annotations/io.kubernetes.cri.sandbox-id";

/// A container's place in its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// No pod but its own: `ctr`, `nerdctl`, docker.
    Alone,
    /// The sandbox (pause) container that stands for a CRI pod.
    Sandbox,
    /// A container of a CRI pod.
    Member {
        /// The pod's sandbox.
        sandbox_id: String,
    },
}

impl Membership {
    /// Reads the annotations of a container's configuration.
    ///
    /// # Errors
    /// A type that CRI does not have, or a member without its sandbox.
    pub fn of(spec: &Value) -> Result<Self, Error> {
        // A '/' in a key is '~1' in a JSON pointer; these keys have none.
        match text(spec, CONTAINER_TYPE) {
            None => Ok(Self::Alone),
            Some("sandbox") => Ok(Self::Sandbox),
            Some("container") => text(spec, SANDBOX_ID)
                .map(|id| Self::Member {
                    sandbox_id: id.to_owned(),
                })
                .ok_or_else(|| {
                    Error::field(
                        "annotations[\"io.kubernetes.cri.sandbox-id\"]",
                        "missing on a container of a pod",
                    )
                }),
            Some(other) => Err(Error::field(
                "annotations[\"io.kubernetes.cri.container-type\"]",
                format!("{other:?} is neither sandbox nor container"),
            )),
        }
    }

    /// The id of the pod of container `id`.
    pub fn pod_id<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Self::Alone | Self::Sandbox => id,
            Self::Member { sandbox_id } => sandbox_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn of_spec_without_annotations_is_alone() {
        assert_eq!(
            Membership::of(&json!({})).expect("reads"),
            Membership::Alone
        );
    }

    #[test]
    fn of_member_names_its_sandbox() {
        let spec = json!({"annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "box",
        }});
        let membership = Membership::of(&spec).expect("reads");
        assert_eq!(membership.pod_id("c"), "box");
    }

    #[test]
    fn of_member_without_sandbox_is_refused() {
        let spec = json!({"annotations": {"io.kubernetes.cri.container-type": "container"}});
        assert!(Membership::of(&spec).is_err());
    }
}
