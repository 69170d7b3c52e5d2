//! A container's OCI configuration: read from its bundle, split into what the
//! host does and what the guest gets.

mod binds;
mod hooks;
mod membership;
mod namespaces;
mod rewrite;
mod sandbox;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

pub use binds::Volumes;
pub use membership::Membership;
pub use namespaces::Peers;
pub use rewrite::{GuestSpec, HostView, IntoJsonError};
pub use sandbox::{PodFiles, parse as parse_pod, spec_of as sandbox_spec};

/// What CRI says of a pod.
mod generated {
    #![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/cri_module.rs"));
}
pub use generated::cri;

/// Largest `config.json` that is read: far above any real one (the default
/// specs have 10 KiB), and bounded because a client wrote it.
pub const MAX_CONFIG_BYTES: u64 = 16 * 1024 * 1024;

/// Why a container's configuration cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be read at all.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is none.
    #[error("the bundle has no {path}")]
    Absent {
        /// Where it should be.
        path: PathBuf,
    },
    /// It is longer than [`MAX_CONFIG_BYTES`].
    #[error("{path} is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is not JSON.
    #[error("{path} is not a container configuration")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
    /// A field has a type or value that the OCI specification does not allow.
    #[error("config.json: {field}: {reason}")]
    Field {
        /// As in `linux.namespaces[2].path`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field asks for what a pod in a VM does not have.
    #[error("config.json: {field}: {reason}")]
    Unsupported {
        /// As in `linux.namespaces[2].path`.
        field: String,
        /// Why, and what to do instead.
        reason: String,
    },
}

impl Error {
    fn field(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            reason: reason.into(),
        }
    }

    fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// Reads a bundle's `config.json`, as JSON: fields that this release does not
/// know stay in it, so that the agent refuses them by name.
pub fn read(bundle: &Path) -> Result<Value, Error> {
    let path = bundle.join("config.json");
    let io_error = |source: io::Error| {
        if source.kind() == io::ErrorKind::NotFound {
            Error::Absent { path: path.clone() }
        } else {
            Error::Read {
                path: path.clone(),
                source,
            }
        }
    };
    let file = File::open(&path).map_err(io_error)?;
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error)?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(Error::TooLong { path });
    }
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })
}

/// The text at `pointer`, if there is any.
pub fn text<'a>(spec: &'a Value, pointer: &str) -> Option<&'a str> {
    spec.pointer(pointer).and_then(Value::as_str)
}
