//! The images that critest pulls, with what its specs expect to find in them, from Debian's packages. All but pause and
//! nonewprivs are a busybox with one thing more.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::layer::Layer;
use super::layout::Packed;
use super::packaged::{add_programs, read};
use super::programs::EFFECTIVE_UID;
use super::{busybox, pause, registry};
use crate::build_root::BuildRoot;

/// The packages of the root that they are taken from.
pub(super) const PACKAGES: [&str; 4] = ["busybox", "nginx", "procps", "util-linux"];

/// Specs look for processes and System V memory with tools that Debian's busybox lacks.
const TOOLS: [&str; 2] = ["usr/bin/ipcs", "usr/bin/pgrep"];
const NGINX: &str = "usr/sbin/nginx";

/// Where most of the images that only differ in one file or field are said to be.
macro_rules! staging {
    ($name:literal) => {
        concat!("gcr.io/k8s-staging-cri-tools/", $name)
    };
}
macro_rules! e2e {
    ($name:literal) => {
        concat!("registry.k8s.io/e2e-test-images/", $name)
    };
}

/// Writes the storage of a registry with all of them to `directory`.
///
/// # Errors
/// When a program is missing in `packages`, does not compile in `build`, or a file cannot be written.
pub(super) fn write(directory: &Path, build: &BuildRoot, packages: &BuildRoot) -> Result<()> {
    let base = busybox::layer(packages, &TOOLS)?;
    let add = |layers: &[&Layer], config: &Value, names: &[&str]| -> Result<()> {
        let image = Packed::new(layers, config)?;
        names
            .iter()
            .try_for_each(|name| registry::add(directory, &image, name))
    };
    let config = busybox::config();
    add(&[&base], &config, &[e2e!("busybox:1.29-2")])?;
    for (name, port) in [
        (e2e!("nginx:1.14-2"), 80),
        (staging!("hostnet-nginx-amd64:latest"), 12003),
    ] {
        let command = json!({ "Env": config["Env"], "Cmd": ["nginx", "-g", "daemon off;"] });
        add(&[&base, &nginx(packages, port)?], &command, &[name])?;
    }
    // A spec looks for the name in the log.
    let command = "echo httpd: serving /var/www; exec httpd -f -vv -p 80 -h /var/www";
    let command = json!({ "Env": config["Env"], "Cmd": ["sh", "-c", command] });
    add(
        &[&base, &page("var/www/index.html")],
        &command,
        &[e2e!("httpd:2.4.39-4")],
    )?;

    for (name, file) in ONE_FILE {
        let mut layer = Layer::new();
        layer.file(file, 0o644, file);
        let names: Vec<_> = name.to_vec();
        add(&[&base, &layer], &config, &names)?;
    }
    for (name, user) in USERS {
        add(&[&base], &with_user(&config, user), &[name])?;
    }
    let name = staging!("test-image-predefined-group:latest");
    add(&[&base, &group()], &with_user(&config, "1000"), &[name])?;

    let mut layer = Layer::new();
    layer.file(EFFECTIVE_UID.name, 0o4755, EFFECTIVE_UID.compile(build)?);
    let command = json!({ "Cmd": [format!("/{}", EFFECTIVE_UID.name)] });
    add(&[&layer], &command, &[e2e!("nonewprivs:1.3")])?;

    // Another image than the sandboxes', since a spec removes it by its identity.
    let pause = pause::packed(build, Some("3.9")).context("make the image pause")?;
    for name in ["registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"] {
        registry::add(directory, &pause, name)?;
    }
    Ok(())
}

/// Names of one image each, and the file that tells it from the others.
const ONE_FILE: [(&[&str], &str); 7] = [
    (&[staging!("test-image-1:latest")], "test-image-1"),
    (&[staging!("test-image-2:latest")], "test-image-2"),
    (&[staging!("test-image-3:latest")], "test-image-3"),
    (&[staging!("test-image-latest:latest")], "test-image-latest"),
    (&[staging!("test-image-tag:test")], "test-image-tag-test"),
    (&[staging!("test-image-tag:all")], "test-image-tag-all"),
    (
        &[
            staging!("test-image-tags:1"),
            staging!("test-image-tags:2"),
            staging!("test-image-tags:3"),
        ],
        "test-image-tags",
    ),
];

/// Images whose configuration names a user, in every way that there is.
const USERS: [(&str, &str); 4] = [
    (staging!("test-image-user-uid:latest"), "1002"),
    (staging!("test-image-user-username:latest"), "www-data"),
    (staging!("test-image-user-uid-group:latest"), "1003:1004"),
    (
        staging!("test-image-user-username-group:latest"),
        "www-data:1004",
    ),
];

fn with_user(config: &Value, user: &str) -> Value {
    let mut config = config.clone();
    config["User"] = json!(user);
    config
}

/// A user that belongs to a group by the image's own files.
fn group() -> Layer {
    let mut layer = Layer::new();
    layer.file(
        "etc/passwd",
        0o644,
        format!(
            "{}default-user:x:1000:1000::/home:/bin/sh\n",
            busybox::PASSWD
        ),
    );
    layer.file(
        "etc/group",
        0o644,
        format!(
            "{}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
            busybox::GROUP
        ),
    );
    layer
}

fn page(name: &str) -> Layer {
    let mut layer = Layer::new();
    layer.file(name, 0o644, "<h1>It works</h1>\n");
    layer
}

/// A web server on `port`, v4 and v6, that logs to its standard output and error.
fn nginx(root: &BuildRoot, port: u16) -> Result<Layer> {
    let mut layer = page("usr/share/nginx/html/index.html");
    add_programs(&mut layer, root, &[NGINX])?;
    layer.file(
        "etc/nginx/mime.types",
        0o644,
        read(root, "etc/nginx/mime.types")?,
    );
    layer.file(
        "etc/nginx/nginx.conf",
        0o644,
        format!(
            "pid /run/nginx.pid;\nerror_log /dev/stderr;\nevents {{}}\nhttp {{\n  include mime.types;\n  access_log /dev/stdout;\n  \
             server {{\n    listen {port};\n    listen [::]:{port};\n    root /usr/share/nginx/html;\n  }}\n}}\n"
        ),
    );
    layer.directory("var/log/nginx", 0o755);
    layer.directory("var/lib/nginx", 0o755);
    layer.symlink("var/run", "../run");
    Ok(layer)
}
