//! Small programs of our own in the images, in C and static: an image needs no libraries for them.

use std::fs;

use anyhow::{Context, Result};

use crate::build_root::{BuildRoot, OUT, SRC};
use crate::command::read_output;

/// A program: its name and source.
pub(super) struct Program {
    /// The binary's name.
    pub(super) name: &'static str,
    source: &'static str,
}

/// The sandbox's idle process.
pub(super) const PAUSE: Program = Program {
    name: "pause",
    source: include_str!("programs/pause.c"),
};
/// For tests: writes through a mapping.
pub(super) const MMAP_WRITE: Program = Program {
    name: "mmap-write",
    source: include_str!("programs/mmap-write.c"),
};
/// For tests: sockets, locks and mappings that processes share through a file.
pub(super) const VOLUME_PROBE: Program = Program {
    name: "volume-probe",
    source: include_str!("programs/volume-probe.c"),
};
/// For tests: a file system whose server does not answer.
pub(super) const HANG_FS: Program = Program {
    name: "hang-fs",
    source: include_str!("programs/hang-fs.c"),
};
/// For conformance: prints its effective user.
pub(super) const EFFECTIVE_UID: Program = Program {
    name: "effective-uid",
    source: include_str!("programs/effective-uid.c"),
};

impl Program {
    /// Compiles it in the build root.
    ///
    /// # Errors
    /// When the compiler does not run or refuses the source.
    pub(super) fn compile(&self, root: &BuildRoot) -> Result<Vec<u8>> {
        let name = self.name;
        let dir = tempfile::tempdir().with_context(|| format!("make a directory for {name}"))?;
        let (source, out) = (dir.path().join("src"), dir.path().join("out"));
        for path in [&source, &out] {
            fs::create_dir(path).with_context(|| format!("create {}", path.display()))?;
        }
        let file = format!("{name}.c");
        fs::write(source.join(&file), self.source).with_context(|| format!("write {file}"))?;
        let gcc = root
            .command("gcc")
            .args([
                "-std=gnu11",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-static",
                "-s",
            ])
            .args(["-o", &format!("{OUT}/{name}"), &format!("{SRC}/{file}")])
            .read_only(&source, SRC)
            .writable(&out, OUT);
        read_output(&mut gcc.into_command())?;
        fs::read(out.join(name)).with_context(|| format!("read {name}"))
    }
}
