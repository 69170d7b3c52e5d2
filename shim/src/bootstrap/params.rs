//! What containerd says on standard input, and how it wants to be answered.
//!
//! containerd up to 2.2 (and CRI-O) gives nothing, or its runtime options as a
//! `google.protobuf.Any`; from 2.3 on it is always `BootstrapParams`. The two
//! cannot be told apart by form (both begin with two length-delimited fields),
//! only by the identity in them: that of the command line.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use thiserror::Error;

use crate::args::Invocation;

/// Most that is read of standard input.
pub const MAX_STDIN_BYTES: u64 = 4 * 1024 * 1024;
/// `LOG_LEVEL_DEBUG` of the bootstrap protocol; lower says more.
const LOG_LEVEL_DEBUG: i32 = -4;
/// The shim protocol in which the task service is v3.
const BOOTSTRAP_VERSION: i32 = 3;
/// Where containerd serves ttrpc, relative to its gRPC socket.
const TTRPC_SUFFIX: &str = ".ttrpc";

/// Why standard input cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// Longer than any containerd writes.
    #[error("more than {MAX_STDIN_BYTES} bytes on standard input")]
    TooLong,
}

/// How containerd wants the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The plain address, which means version 2: all that 1.6, 1.7 and CRI-O
    /// understand, and 2.0 to 2.2 still do.
    Address,
    /// A `BootstrapResult` of version 3.
    Result,
}

/// What `start` needs to know of its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// How to answer.
    pub reply: Reply,
    /// Where to send events.
    pub ttrpc_address: String,
    /// Whether to log details.
    pub debug: bool,
}

impl Params {
    /// Reads `stdin`, with `TTRPC_ADDRESS` of the environment and the command
    /// line for what older containerds say there.
    pub fn parse(
        stdin: &[u8],
        environment: Option<String>,
        invocation: &Invocation,
    ) -> Result<Self, Error> {
        if stdin.len() as u64 > MAX_STDIN_BYTES {
            return Err(Error::TooLong);
        }
        let bootstrap = BootstrapParams::parse_from_bytes(stdin)
            .ok()
            .filter(|params| {
                params.instance_id == invocation.id && params.namespace == invocation.namespace
            });
        let told = bootstrap
            .as_ref()
            .map(|params| params.containerd_ttrpc_address.clone());
        let ttrpc_address = [told, environment]
            .into_iter()
            .flatten()
            .find(|address| !address.is_empty())
            .unwrap_or_else(|| format!("{}{TTRPC_SUFFIX}", invocation.address));
        let verbose = bootstrap
            .as_ref()
            .is_some_and(|params| params.log_level.value() <= LOG_LEVEL_DEBUG);
        Ok(Self {
            reply: if bootstrap.is_some() {
                Reply::Result
            } else {
                Reply::Address
            },
            ttrpc_address,
            debug: invocation.debug || verbose,
        })
    }

    /// The bytes for standard output.
    ///
    /// # Panics
    /// Never: encoding to memory cannot fail.
    pub fn reply(&self, address: &str) -> Vec<u8> {
        match self.reply {
            Reply::Address => address.as_bytes().to_vec(),
            Reply::Result => BootstrapResult {
                version: BOOTSTRAP_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            }
            .write_to_bytes()
            .expect("a message without required fields encodes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::EnumOrUnknown;
    use protobuf::well_known_types::any::Any;

    const ADDRESS: &str = "unix:///run/bulkhead/default/c/shim.sock";

    fn invocation() -> Invocation {
        Invocation {
            namespace: "default".to_owned(),
            id: "c".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            ..Invocation::default()
        }
    }

    fn bootstrap(level: i32) -> Vec<u8> {
        BootstrapParams {
            instance_id: "c".to_owned(),
            namespace: "default".to_owned(),
            log_level: EnumOrUnknown::from_i32(level),
            containerd_ttrpc_address: "/run/containerd/other.ttrpc".to_owned(),
            ..BootstrapParams::default()
        }
        .write_to_bytes()
        .expect("encodes")
    }

    /// containerd 1.6: nothing but `-address` to go by.
    #[test]
    fn parse_empty_stdin_is_answered_with_the_plain_address() {
        let params = Params::parse(b"", None, &invocation()).expect("parses");
        assert_eq!(
            params.ttrpc_address,
            "/run/containerd/containerd.sock.ttrpc"
        );
        assert_eq!(params.reply(ADDRESS), ADDRESS.as_bytes());
    }

    /// containerd 1.7 to 2.2: `TTRPC_ADDRESS`, options as an `Any`.
    #[test]
    fn parse_options_are_not_taken_for_the_new_protocol() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: b"\x0a\x03abc".to_vec(),
            ..Any::default()
        };
        let stdin = any.write_to_bytes().expect("encodes");
        let params = Params::parse(&stdin, Some("/t".to_owned()), &invocation()).expect("parses");
        assert_eq!(params.reply, Reply::Address);
        assert_eq!(params.ttrpc_address, "/t");
    }

    /// containerd 2.3 and later.
    #[test]
    fn parse_bootstrap_params_are_answered_with_version_3() {
        let params =
            Params::parse(&bootstrap(0), Some("/t".to_owned()), &invocation()).expect("parses");
        assert_eq!(params.ttrpc_address, "/run/containerd/other.ttrpc");
        assert!(!params.debug);
        let result = BootstrapResult::parse_from_bytes(&params.reply(ADDRESS)).expect("decodes");
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, ADDRESS, "ttrpc")
        );
    }

    #[test]
    fn parse_bootstrap_params_below_debug_level_log_details() {
        assert!(
            Params::parse(&bootstrap(-8), None, &invocation())
                .expect("parses")
                .debug
        );
    }

    #[test]
    fn parse_bootstrap_params_of_another_container_are_not_believed() {
        let mut other = invocation();
        other.id = "d".to_owned();
        assert_eq!(
            Params::parse(&bootstrap(0), None, &other)
                .expect("parses")
                .reply,
            Reply::Address
        );
    }

    /// The plain address must not happen to be a protobuf message, or
    /// containerd 2.3 would not read it as an address.
    #[test]
    fn reply_plain_address_is_no_protobuf() {
        assert!(BootstrapResult::parse_from_bytes(ADDRESS.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn parse_any_stdin_never_panics(stdin in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = Params::parse(&stdin, None, &invocation());
        }
    }
}
