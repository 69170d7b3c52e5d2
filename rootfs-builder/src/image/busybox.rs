//! `docker.io/library/busybox`: Debian's busybox, tools for locks and extended attributes, and the libraries they need.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use serde_json::json;

use super::layer::Layer;
use super::layout;
use super::programs::{HANG_FS, MMAP_WRITE, VOLUME_PROBE};
use crate::build_root::BuildRoot;
use crate::command::read_output;

const NAME: &str = "docker.io/library/busybox:latest";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BUSYBOX: &str = "bin/busybox";
/// Not among busybox's applets.
const TOOLS: [&str; 3] = ["usr/bin/flock", "usr/bin/getfattr", "usr/bin/setfattr"];

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
const GROUP: &str = "\
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

pub(super) fn archive(root: &BuildRoot) -> Result<Vec<u8>> {
    let layer = layer(root)?;
    let config = json!({ "Env": [PATH], "Cmd": ["sh"] });
    layout::archive(&layer, &config, &[NAME]).context("write the image busybox")
}

fn layer(root: &BuildRoot) -> Result<Layer> {
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

    for program in std::iter::once(BUSYBOX).chain(TOOLS) {
        layer.file(program, 0o755, read(root, program)?);
    }
    for program in [MMAP_WRITE, VOLUME_PROBE, HANG_FS] {
        let file = format!("usr/local/bin/{}", program.name);
        layer.file(&file, 0o755, program.compile(root)?);
    }
    // Hard links, as in the image of that name elsewhere: programs that look at their own name and inode meet the same.
    let applets = read_output(&mut root.command("busybox").arg("--list").into_command())?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), BUSYBOX);
    }
    layer.symlink("usr/bin/env", "../../bin/env");
    for library in libraries(root)? {
        layer.file(&library, 0o755, read(root, &library)?);
    }
    Ok(layer)
}

/// The shared libraries of all programs, and the loader: what `ldd` prints as an absolute path.
fn libraries(root: &BuildRoot) -> Result<BTreeSet<String>> {
    let programs = std::iter::once(BUSYBOX)
        .chain(TOOLS)
        .map(|program| format!("/{program}"));
    let text = read_output(&mut root.command("ldd").args(programs).into_command())?;
    let libraries: BTreeSet<_> = loaded(&text).collect();
    anyhow::ensure!(!libraries.is_empty(), "ldd names no libraries: {text}");
    Ok(libraries)
}

/// `name => /path (address)`, or `/path (address)` for the loader; headings end in a colon.
fn loaded(text: &str) -> impl Iterator<Item = String> + '_ {
    text.lines()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with('/') && !word.ends_with(':'))
        })
        .map(|path| path.trim_start_matches('/').to_owned())
}

fn read(root: &BuildRoot, name: &str) -> Result<Vec<u8>> {
    let path = root.path().join(name);
    fs::read(&path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaded_ldd_output_gives_libraries_and_loader_only() {
        let text = "/bin/busybox:\n\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            loaded(text).collect::<Vec<_>>(),
            ["lib/x/libc.so.6", "lib64/ld-linux-x86-64.so.2"]
        );
    }
}
