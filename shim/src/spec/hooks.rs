//! The hooks that run on the host, taken out of the guest's configuration.

use std::collections::BTreeMap;

use oci_spec::runtime::Hook;
use serde_json::Value;

use super::{Error, text};
use crate::host::pod::ContainerHooks;

/// Takes `prestart`, `createRuntime`, `poststart` and `poststop` out of the
/// configuration: they run in the runtime's namespaces, on the host (OCI
/// runtime-spec, config.md, POSIX-platform Hooks). What is left is for the
/// agent to refuse by name.
pub fn take(spec: &mut Value) -> Result<ContainerHooks, Error> {
    let annotations = match spec.get("annotations") {
        None | Some(Value::Null) => BTreeMap::new(),
        Some(annotations) => serde_json::from_value(annotations.clone())
            .map_err(|error| Error::field("annotations", error.to_string()))?,
    };
    let oci_version = text(spec, "/ociVersion").unwrap_or_default().to_owned();
    let mut taken = |kind: &str| -> Result<Vec<Hook>, Error> {
        let Some(hooks) = spec.get_mut("hooks").and_then(Value::as_object_mut) else {
            return Ok(Vec::new());
        };
        match hooks.remove(kind) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list)
                .map_err(|error| Error::field(format!("hooks.{kind}"), error.to_string())),
        }
    };
    let mut create_runtime = taken("prestart")?;
    create_runtime.extend(taken("createRuntime")?);
    let hooks = ContainerHooks {
        create_runtime,
        poststart: taken("poststart")?,
        poststop: taken("poststop")?,
        annotations,
        oci_version,
    };
    let empty = |hooks: &Value| hooks.as_object().is_some_and(serde_json::Map::is_empty);
    if let Some(object) = spec.as_object_mut()
        && object.get("hooks").is_some_and(empty)
    {
        object.remove("hooks");
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn take_host_hooks_leaves_those_of_the_container() {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "annotations": {"nerdctl/x": "y"},
            "hooks": {
                "prestart": [{"path": "/first"}],
                "createRuntime": [{"path": "/second", "args": ["second", "up"]}],
                "createContainer": [{"path": "/inside"}],
                "poststop": [{"path": "/last"}],
            },
        });
        let hooks = take(&mut spec).expect("takes");
        let paths: Vec<_> = hooks
            .create_runtime
            .iter()
            .map(|hook| hook.path().clone())
            .collect();
        assert_eq!(paths, ["/first", "/second"].map(std::path::PathBuf::from));
        assert_eq!(hooks.poststop.len(), 1);
        assert_eq!(hooks.annotations["nerdctl/x"], "y");
        assert_eq!(hooks.oci_version, "1.2.0");
        assert_eq!(
            spec["hooks"],
            json!({"createContainer": [{"path": "/inside"}]})
        );
    }

    #[test]
    fn take_only_host_hooks_leaves_no_hooks() {
        let mut spec = json!({"hooks": {"poststop": [{"path": "/last"}]}});
        take(&mut spec).expect("takes");
        assert_eq!(spec, json!({}));
    }

    #[test]
    fn take_malformed_hooks_names_their_kind() {
        let mut spec = json!({"hooks": {"createRuntime": [{"path": 7}]}});
        let error = take(&mut spec).expect_err("is refused");
        assert!(error.to_string().contains("hooks.createRuntime"), "{error}");
    }
}
