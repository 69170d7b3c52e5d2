//! What of the OCI runtime specification (1.2, config.md and config-linux.md) is supported.
//!
//! Everything that is not is refused here, by its name in `config.json`.

use std::path::{Component, Path};

use oci_spec::runtime::{Hooks, Linux, LinuxResources, Process, Spec};
use serde::de::DeserializeOwned;

use crate::{
    cgroup, execution_domain, hooks, namespaces, rootfs, scheduling, seccomp, sysctl,
    user_namespace,
};

/// A field, or a value of it, that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Unsupported {
    /// Path of the field, as in `config.json`.
    pub field: String,
    /// Why, and where it helps what to do instead.
    pub reason: String,
}

impl Unsupported {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// Why a configuration was not understood.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Not a valid runtime configuration.
    #[error("the container's configuration is not a valid OCI runtime specification")]
    Json(#[source] serde_json::Error),
    /// A field that no supported version of the specification has.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
}

/// Reads an OCI runtime configuration.
///
/// # Errors
/// Also for a field that nobody here knows: it may be one of a newer
/// specification, and skipping it would drop what the caller relies on.
pub fn parse(json: &[u8]) -> Result<Spec, ParseError> {
    parse_below("", json)
}

/// Reads `process` of an OCI runtime configuration.
///
/// # Errors
/// As [`parse`].
pub fn parse_process(json: &[u8]) -> Result<Process, ParseError> {
    parse_below("process.", json)
}

/// Reads `linux.resources` of an OCI runtime configuration.
///
/// # Errors
/// As [`parse`].
pub fn parse_resources(json: &[u8]) -> Result<LinuxResources, ParseError> {
    parse_below("linux.resources.", json)
}

/// The specification's spelling of flags of `process.scheduler`, each with that of
/// the crate whose types are read here (oci-spec 0.10).
const SPELLINGS: [[&str; 2]; 2] = [
    ["SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"],
    ["SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"],
];

/// Spells as the types do; `None` for what spells so anyway, as all but those flags do.
fn respelled(place: &str, json: &[u8]) -> Option<Vec<u8>> {
    let start = b"\"SCHED_FLAG_";
    json.windows(start.len()).find(|window| window == start)?;
    let mut value: serde_json::Value = serde_json::from_slice(json).ok()?;
    let pointer = if place.is_empty() {
        "/process/scheduler/flags"
    } else {
        "/scheduler/flags"
    };
    let flags = value.pointer_mut(pointer)?.as_array_mut()?;
    for flag in flags {
        if let Some([_, types]) = SPELLINGS.iter().find(|[spec, _]| flag == spec) {
            *flag = (*types).into();
        }
    }
    Some(value.to_string().into_bytes())
}

/// Reads what `place` in the configuration holds.
fn parse_below<T: DeserializeOwned>(place: &str, json: &[u8]) -> Result<T, ParseError> {
    let respelled = respelled(place, json);
    let json = respelled.as_deref().unwrap_or(json);
    let mut unknown = None;
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = serde_ignored::deserialize(&mut deserializer, |path| {
        unknown.get_or_insert_with(|| path.to_string());
    })
    .map_err(ParseError::Json)?;
    deserializer.end().map_err(ParseError::Json)?;
    match unknown {
        Some(field) => {
            let field = format!("{place}{}", field.replace(".?", ""));
            Err(Unsupported::new(field, "is not known").into())
        }
        None => Ok(value),
    }
}

/// Accepted without effect: there is no such mechanism in the guest, and
/// clients set them without being asked.
pub fn warnings(spec: &Spec) -> Vec<String> {
    let mut warnings = spec.process().as_ref().map_or(Vec::new(), process_warnings);
    let label = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.mount_label().as_ref());
    warnings.extend(no_effect("linux.mountLabel", label));
    if let Ok(Some(warning)) = rootfs::check_devices(spec) {
        warnings.push(warning);
    }
    warnings
}

/// As [`warnings`], of `process` alone.
pub fn process_warnings(process: &Process) -> Vec<String> {
    let label = process.selinux_label().as_ref();
    no_effect("process.selinuxLabel", label)
        .into_iter()
        .collect()
}

fn no_effect(field: &str, value: Option<&String>) -> Option<String> {
    value
        .filter(|value| !value.is_empty())
        .map(|_| format!("{field} has no effect in the guest"))
}

/// The first of `fields` that is set.
fn refuse_first(
    fields: impl IntoIterator<Item = (&'static str, bool, &'static str)>,
) -> Result<(), Unsupported> {
    match fields.into_iter().find(|(_, set, _)| *set) {
        Some((field, _, reason)) => Err(Unsupported::new(field, reason)),
        None => Ok(()),
    }
}

/// Checks, before anything is made, that every field of the specification is supported.
pub fn validate(spec: &Spec) -> Result<(), Unsupported> {
    if !spec.version().starts_with("1.") {
        return Err(Unsupported::new(
            "ociVersion",
            format!("{:?} is not a version 1 specification", spec.version()),
        ));
    }
    refuse_first([
        ("solaris", spec.solaris().is_some(), "the guest is Linux"),
        ("windows", spec.windows().is_some(), "the guest is Linux"),
        ("zos", spec.zos().is_some(), "the guest is Linux"),
        (
            "vm",
            spec.vm().is_some(),
            "the VM is configured on the host",
        ),
        (
            "uidMappings",
            spec.uid_mappings().is_some(),
            "is no field of the specification: use linux.uidMappings",
        ),
        (
            "gidMappings",
            spec.gid_mappings().is_some(),
            "is no field of the specification: use linux.gidMappings",
        ),
    ])?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Unsupported::new("root", "is missing"))?;
    absolute("root.path", root.path())?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Unsupported::new("process", "is missing"))?;
    validate_process(process)?;
    if let Some(hooks) = spec.hooks() {
        validate_hooks(hooks)?;
        hooks::check(hooks)?;
    }
    namespaces::check(spec)?;
    namespaces::check_time_offsets(spec)?;
    user_namespace::check(spec)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let field = |name: &str| format!("mounts[{index}].{name}");
        absolute(&field("destination"), mount.destination())?;
        let options = rootfs::parse_options(index, mount)?;
        if matches!(options.kind, rootfs::Kind::Bind { .. }) {
            absolute(
                &field("source"),
                mount.source().as_deref().unwrap_or(Path::new("")),
            )?;
        }
        rootfs::check_id_maps(index, &options, mount, spec)?;
    }
    rootfs::check_devices(spec)?;
    spec.linux().as_ref().map_or(Ok(()), validate_linux)
}

fn absolute(field: &str, path: &Path) -> Result<(), Unsupported> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Unsupported::new(
        field,
        format!("{:?} is not an absolute path", path.display().to_string()),
    ))
}

/// Checks, as [`validate`], `process` alone.
pub fn validate_process(process: &Process) -> Result<(), Unsupported> {
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    refuse_first([
        (
            "process.args",
            process.args().iter().flatten().next().is_none(),
            "is empty: there is no program to run",
        ),
        (
            "process.commandLine",
            set(process.command_line()),
            "the guest is Linux: use args",
        ),
        (
            "process.user.username",
            set(process.user().username()),
            "the guest is Linux: use uid and gid",
        ),
    ])?;
    absolute("process.cwd", process.cwd())?;
    scheduling::check(process)?;
    match process
        .oom_score_adj()
        .filter(|score| !(-1000..=1000).contains(score))
    {
        Some(score) => Err(Unsupported::new(
            "process.oomScoreAdj",
            format!("{score} is not between -1000 and 1000"),
        )),
        None => Ok(()),
    }
}

fn validate_hooks(hooks: &Hooks) -> Result<(), Unsupported> {
    const HOST: &str = "runs on the host, not in the guest";
    let any = |hooks: &Option<Vec<_>>| hooks.iter().flatten().next().is_some();
    refuse_first([
        (
            "hooks.createContainer",
            any(hooks.create_container()),
            "its program is the host's and its namespaces are the guest's: use createRuntime or startContainer",
        ),
        ("hooks.prestart", any(hooks.prestart()), HOST),
        ("hooks.createRuntime", any(hooks.create_runtime()), HOST),
        ("hooks.poststart", any(hooks.poststart()), HOST),
        ("hooks.poststop", any(hooks.poststop()), HOST),
    ])
}

fn validate_linux(linux: &Linux) -> Result<(), Unsupported> {
    refuse_first([
        (
            "linux.netDevices",
            linux.net_devices().iter().flatten().next().is_some(),
            "network devices of the host are not in the guest",
        ),
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "caches and memory bandwidth are the host's to divide",
        ),
    ])?;
    if let Some(personality) = linux.personality() {
        execution_domain::check_personality(personality)?;
    }
    if let Some(policy) = linux.memory_policy() {
        execution_domain::check_memory_policy(policy)?;
    }
    if let Some(path) = linux.cgroups_path() {
        let inside = path
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
        if !inside {
            return Err(Unsupported::new(
                "linux.cgroupsPath",
                format!(
                    "{} does not lie below the containers' cgroup",
                    path.display()
                ),
            ));
        }
    }
    for key in linux.sysctl().iter().flatten().map(|(key, _)| key) {
        sysctl::check(key)?;
    }
    if let Some(resources) = linux.resources() {
        cgroup::check_resources(resources)?;
    }
    if let Some(profile) = linux.seccomp() {
        seccomp::check(profile)?;
    }
    if let Some(word) = linux
        .rootfs_propagation()
        .as_ref()
        .filter(|word| !word.is_empty())
    {
        rootfs::rootfs_propagation(word)?;
    }
    for (field, paths) in [
        ("linux.maskedPaths", linux.masked_paths()),
        ("linux.readonlyPaths", linux.readonly_paths()),
    ] {
        for path in paths.iter().flatten() {
            absolute(field, Path::new(path))?;
        }
    }
    Ok(())
}
