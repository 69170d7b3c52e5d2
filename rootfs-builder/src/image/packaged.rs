//! Programs out of a Debian root, with the libraries that they need.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

use super::layer::Layer;
use crate::build_root::BuildRoot;
use crate::command::read_output;

/// Adds `programs` (paths without a leading slash), their shared libraries and the loader.
pub(super) fn add_programs(layer: &mut Layer, root: &BuildRoot, programs: &[&str]) -> Result<()> {
    for program in programs {
        layer.file(program, 0o755, read(root, program)?);
    }
    for library in libraries(root, programs)? {
        layer.file(&library, 0o755, read(root, &library)?);
    }
    Ok(())
}

/// The content of a file in the root.
pub(super) fn read(root: &BuildRoot, name: &str) -> Result<Vec<u8>> {
    let path = root.path().join(name);
    fs::read(&path).with_context(|| format!("read {}", path.display()))
}

/// What `ldd` prints as an absolute path.
fn libraries(root: &BuildRoot, programs: &[&str]) -> Result<BTreeSet<String>> {
    let programs = programs.iter().map(|program| format!("/{program}"));
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
