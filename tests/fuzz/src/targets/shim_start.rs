//! What containerd gives a shim beside `config.json`: arguments, standard input,
//! identities, the cgroup's path, the streams' places, and options of mounts.

use std::path::{Component, Path};

use shim::args::{Command, Invocation};
use shim::bootstrap::{Params, Reply};
use shim::host::cgroup::CgroupPath;
use shim::host::directory::{PodPaths, RUN_ROOT};
use shim::host::overlay_options;
use shim::spec::{GuestSpec, Membership, Peers, parse_pod, sandbox_spec};
use shim::stdio::{Plan, Target};

/// Tries one input.
pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(data);
    match choice % 6 {
        0 if choice & 0x80 != 0 => pod(data),
        0 => arguments(&text),
        1 => standard_input(data),
        2 => identities(&text),
        3 => cgroups_path(&text, choice & 0x80 != 0),
        4 => streams(&text, choice & 0x80 != 0),
        _ => overlay(&text),
    }
}

fn arguments(text: &str) {
    match Command::parse(text.split('\n').map(str::to_owned)) {
        Ok(
            Command::Start(invocation) | Command::Delete(invocation) | Command::Serve(invocation),
        ) => {
            assert!(!invocation.id.is_empty() && !invocation.namespace.is_empty());
        }
        Ok(Command::Version | Command::Info) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn standard_input(data: &[u8]) {
    let invocation = Invocation {
        namespace: "default".to_owned(),
        id: "c".to_owned(),
        address: "/run/containerd/containerd.sock".to_owned(),
        ..Invocation::default()
    };
    let Ok(params) = Params::parse(data, None, &invocation) else {
        return;
    };
    assert!(!params.ttrpc_address.is_empty(), "somewhere to send events");
    let address = "unix:///run/x";
    let reply = params.reply(address);
    assert!(params.reply == Reply::Result || reply == address.as_bytes());
}

/// A pod's configuration, by the sandbox service.
fn pod(data: &[u8]) {
    let Ok(config) = parse_pod(data) else {
        return;
    };
    let spec = sandbox_spec("box", &config, "/run/netns/cni");
    match GuestSpec::split(spec, "box", &Peers::default()) {
        Ok((host, _)) => {
            assert_eq!(host.membership, Membership::Sandbox);
            assert!(host.hooks.create_runtime.is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Whatever passes names one directory below that of all pods.
fn identities(text: &str) {
    let (namespace, id) = text.split_once('\n').unwrap_or((text, "c"));
    if let Ok(paths) = PodPaths::try_new(namespace, id) {
        let directory = paths.directory();
        assert_eq!(directory, Path::new(RUN_ROOT).join(namespace).join(id));
        let below = directory.strip_prefix(RUN_ROOT).expect("below");
        assert_eq!(below.components().count(), 2);
        assert!(below.components().all(is_normal));
    }
}

fn is_normal(part: Component<'_>) -> bool {
    matches!(part, Component::Normal(_))
}

fn cgroups_path(text: &str, is_sandbox: bool) {
    match CgroupPath::for_pod(Some(text), is_sandbox, "n", "c") {
        Ok(path) => {
            let path = path.relative();
            assert!(path.components().count() > 0, "not the root itself");
            assert!(path.components().all(is_normal), "{}", path.display());
        }
        Err(error) => assert!(error.to_string().len() < 100_000),
    }
}

fn streams(text: &str, terminal: bool) {
    let mut places = text.split('\n').chain(std::iter::repeat(""));
    let mut next = || places.next().unwrap_or_default();
    let Ok(plan) = Plan::parse(next(), next(), next(), terminal) else {
        return;
    };
    assert!(plan.stdin.is_none_or(|path| path.is_absolute()));
    for target in [plan.stdout, plan.stderr] {
        match target {
            Target::Null => {}
            Target::Path(path) | Target::File(path) => assert!(path.is_absolute()),
            Target::Logger(logger) => {
                assert!(logger.path.is_absolute());
                let arguments = logger.arguments.iter();
                let sound = |it: &std::ffi::OsString| !it.as_encoded_bytes().contains(&0);
                assert!(arguments.clone().all(sound), "no argument has a NUL");
            }
        }
    }
}

/// Layers that are too long together still name the same directories.
fn overlay(text: &str) {
    // Three of them are more than the kernel takes.
    let common = format!("/{}", "p".repeat(overlay_options::MAX_BYTES / 3 + 1));
    let layers: Vec<_> = text
        .split('\n')
        .map(|layer| match layer {
            "/" => layer.to_owned(),
            layer if layer.starts_with('/') => format!("{common}{layer}"),
            layer => layer.to_owned(),
        })
        .collect();
    let lower = format!(
        "lowerdir={}",
        [layers.join(":"), layers.join(":"), layers.join(":")].join(":")
    );
    let Ok(fitted) = overlay_options::fit(&[&lower, "index=off"]) else {
        return;
    };
    assert!(fitted.data.len() <= overlay_options::MAX_BYTES);
    let Some(directory) = fitted.directory else {
        return;
    };
    // Those that are not taken apart stay as they are.
    if lower.contains([',', '\\']) || !layers.iter().all(|layer| layer.starts_with('/')) {
        return;
    }
    let made = fitted.data.trim_start_matches("lowerdir=");
    let made = made.trim_end_matches(",index=off");
    for (given, made) in lower
        .trim_start_matches("lowerdir=")
        .split(':')
        .zip(made.split(':'))
    {
        assert!(!made.is_empty(), "a layer that is nowhere");
        let whole = directory.join(made);
        assert_eq!(whole, Path::new(given), "another directory");
    }
}
