//! `docker.io/library/busybox`: Debian's busybox with a hard link per applet, and tools for locks and extended attributes.

use anyhow::{Context, Result};
use serde_json::json;

use super::layer::Layer;
use super::layout::{self, Packed};
use super::packaged::add_programs;
use super::programs::{HANG_FS, MMAP_WRITE, VOLUME_PROBE};
use crate::build_root::BuildRoot;
use crate::command::read_output;

const NAME: &str = "docker.io/library/busybox:latest";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BUSYBOX: &str = "bin/busybox";
/// Not among busybox's applets.
const TOOLS: [&str; 3] = ["usr/bin/flock", "usr/bin/getfattr", "usr/bin/setfattr"];

pub(super) const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
pub(super) const GROUP: &str = "\
root:x:0:
daemon:x:1:
www-data:x:33:
users:x:100:
nogroup:x:65534:
";
const NSSWITCH: &str = "\
passwd: files
group: files
hosts: files dns
";

/// What its configuration says, but for the user.
pub(super) fn config() -> serde_json::Value {
    json!({ "Env": [PATH], "Cmd": ["sh"] })
}

pub(super) fn archive(root: &BuildRoot) -> Result<Vec<u8>> {
    let mut layer = layer(root, &TOOLS)?;
    for program in [MMAP_WRITE, VOLUME_PROBE, HANG_FS] {
        let file = format!("usr/local/bin/{}", program.name);
        layer.file(&file, 0o755, program.compile(root)?);
    }
    Packed::new(&[&layer], &config())
        .and_then(|image| layout::archive(&image, &[NAME]))
        .context("write the image busybox")
}

/// busybox out of `root`, with `tools` beside it.
pub(super) fn layer(root: &BuildRoot, tools: &[&str]) -> Result<Layer> {
    let mut layer = Layer::new();
    for (name, mode) in [
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("var/tmp", 0o1777),
        ("var/www", 0o755),
    ] {
        layer.directory(name, mode);
    }
    layer.file("etc/passwd", 0o644, PASSWD);
    layer.file("etc/group", 0o644, GROUP);
    layer.file("etc/nsswitch.conf", 0o644, NSSWITCH);

    let programs: Vec<_> = std::iter::once(&BUSYBOX).chain(tools).copied().collect();
    add_programs(&mut layer, root, &programs)?;
    // Hard links, as in the image of that name elsewhere: programs that look at their own name and inode meet the same.
    let applets = read_output(&mut root.command("busybox").arg("--list").into_command())?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), BUSYBOX);
    }
    layer.symlink("usr/bin/env", "../../bin/env");
    Ok(layer)
}
