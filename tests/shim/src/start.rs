//! A shim's `start` and `delete`, as each generation of containerd runs them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// A containerd, by what it tells a shim and how it wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// 1.6: nothing but arguments and `TTRPC_ADDRESS`; a plain address.
    V1_6,
    /// 1.7: also `MAX_SHIM_VERSION`; JSON, or a plain address.
    V1_7,
    /// 2.0 to 2.2: as 1.7, and version 3 is taken.
    V2_0,
    /// 2.3 and later: `BootstrapParams` on standard input.
    V2_3,
}

impl Containerd {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V1_6, Self::V1_7, Self::V2_0, Self::V2_3];

    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_0 => "2.0",
            Self::V2_3 => "2.3",
        }
    }

    /// The newest version of the task service that it speaks.
    fn newest(self) -> i32 {
        match self {
            Self::V1_6 | Self::V1_7 => 2,
            Self::V2_0 | Self::V2_3 => 3,
        }
    }
}

/// What a shim is run with.
#[derive(Clone, Debug)]
pub struct Invocation<'a> {
    /// Its binary.
    pub shim: &'a Path,
    /// The container.
    pub id: &'a str,
    /// The bundle.
    pub bundle: PathBuf,
    /// Socket of containerd's gRPC services; that of its ttrpc services is the
    /// same with `.ttrpc`.
    pub address: &'a Path,
    /// Who runs it.
    pub containerd: Containerd,
    /// How long it may take.
    pub patience: Duration,
}

/// The namespace of all containers here.
pub const NAMESPACE: &str = "harness";

/// Where a shim is to be reached.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Address {
    /// The version of its task service.
    pub version: i32,
    /// `unix://` and a path.
    pub address: String,
    /// `ttrpc` or `grpc`.
    pub protocol: String,
}

impl Address {
    /// Reads what `start` wrote, as every containerd from 1.7 on does: JSON, a
    /// plain address, or protobuf.
    fn parse(stdout: &[u8]) -> Result<Self> {
        let parsed = match stdout.first() {
            Some(b'{') => serde_json::from_slice(stdout).context("read the JSON of `start`")?,
            Some(b'u') => Self {
                version: 2,
                address: String::from_utf8(stdout.to_vec())?.trim().to_owned(),
                protocol: "ttrpc".to_owned(),
            },
            _ => {
                let result = BootstrapResult::parse_from_bytes(stdout)
                    .with_context(|| format!("read the answer of `start`: {stdout:?}"))?;
                Self {
                    version: result.version,
                    address: result.address,
                    protocol: result.protocol,
                }
            }
        };
        ensure!(parsed.protocol == "ttrpc", "protocol {}", parsed.protocol);
        Ok(parsed)
    }
}

impl Invocation<'_> {
    fn ttrpc_address(&self) -> String {
        format!("{}.ttrpc", self.address.display())
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(self.shim);
        command
            .args(["-namespace", NAMESPACE])
            .args([OsStr::new("-address"), self.address.as_os_str()])
            .args(["-publish-binary", "/bin/false", "-id", self.id])
            .env("TTRPC_ADDRESS", self.ttrpc_address())
            .current_dir(&self.bundle)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if self.containerd != Containerd::V1_6 {
            command
                .env("GRPC_ADDRESS", self.address)
                .env("NAMESPACE", NAMESPACE)
                .env("MAX_SHIM_VERSION", self.containerd.newest().to_string());
        }
        if action == "delete" {
            command.args([OsStr::new("-bundle"), self.bundle.as_os_str()]);
        }
        command.arg(action);
        command
    }

    /// `start`.
    ///
    /// # Errors
    /// With the shim's words when it fails; also when it does not let go of
    /// its output, or says something on standard error, which containerd would
    /// take for the address.
    pub async fn start(&self) -> Result<Address> {
        let stdin = match self.containerd {
            Containerd::V2_3 => BootstrapParams {
                instance_id: self.id.to_owned(),
                namespace: NAMESPACE.to_owned(),
                containerd_version: "v2.4.2".to_owned(),
                containerd_ttrpc_address: self.ttrpc_address(),
                containerd_grpc_address: self.address.display().to_string(),
                containerd_binary: "/bin/false".to_owned(),
                ..BootstrapParams::default()
            }
            .write_to_bytes()?,
            Containerd::V1_6 | Containerd::V1_7 | Containerd::V2_0 => Vec::new(),
        };
        let output = self.run("start", &stdin).await?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(words.is_empty(), "`start` wrote to standard error: {words}");
        Address::parse(&output.stdout)
    }

    /// `delete`.
    ///
    /// # Errors
    /// With the shim's words when it fails.
    pub async fn delete(&self) -> Result<DeleteResponse> {
        let output = self.run("delete", &[]).await?;
        DeleteResponse::parse_from_bytes(&output.stdout).context("read the answer of `delete`")
    }

    async fn run(&self, action: &str, stdin: &[u8]) -> Result<Output> {
        let mut child = self
            .command(action)
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("execute {}", self.shim.display()))?;
        if let Some(mut pipe) = child.stdin.take() {
            // One that reads none of it may have closed it.
            let _ = pipe.write_all(stdin).await;
        }
        let output = tokio::time::timeout(self.patience, child.wait_with_output()).await;
        let output = output.with_context(|| format!("`{action}` does not end"))??;
        if !output.status.success() {
            bail!(
                "`{action}` of {} for containerd {} ended with {}: {}{}",
                self.shim.display(),
                self.containerd.name(),
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_each_form_is_the_same_address() {
        let plain = Address::parse(b"unix:///s\n").expect("parses");
        let json = br#"{"version":2,"address":"unix:///s","protocol":"ttrpc"}"#;
        assert_eq!(Address::parse(json).expect("parses"), plain);
        let protobuf = BootstrapResult {
            version: 2,
            address: "unix:///s".to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        let bytes = protobuf.write_to_bytes().expect("encodes");
        assert_eq!(Address::parse(&bytes).expect("parses"), plain);
    }

    fn invocation(directory: &Path, script: &str) -> Result<Address> {
        use std::os::unix::fs::PermissionsExt;
        let shim = directory.join("shim");
        std::fs::write(&shim, format!("#!/bin/sh\n{script}\n"))?;
        std::fs::set_permissions(&shim, std::fs::Permissions::from_mode(0o755))?;
        let invocation = Invocation {
            shim: &shim,
            id: "c",
            bundle: directory.to_owned(),
            address: Path::new("/sink"),
            containerd: Containerd::V1_7,
            patience: Duration::from_secs(10),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(invocation.start())
    }

    #[test]
    fn start_that_speaks_on_standard_error_is_refused() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let started = invocation(directory.path(), "echo oops >&2; echo unix:///s");
        assert!(
            started
                .expect_err("is refused")
                .to_string()
                .contains("oops")
        );
    }

    #[test]
    fn start_is_told_the_address_and_namespace() {
        let directory = tempfile::tempdir().expect("makes a directory");
        let script = r#"echo "unix://$TTRPC_ADDRESS-$NAMESPACE-$MAX_SHIM_VERSION-$2-$4""#;
        let started = invocation(directory.path(), script).expect("starts");
        assert_eq!(
            started.address,
            "unix:///sink.ttrpc-harness-2-harness-/sink"
        );
    }
}
