//! `rootfs-builder`: builds what is not compiled by cargo alone, and prints where it is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use rootfs_builder::build_root::{BuildRoot, RustToolchain};
use rootfs_builder::cache::Cache;
use rootfs_builder::image::{self, Image};
use rootfs_builder::install::{self, Artefacts};
use rootfs_builder::source::Workspace;
use rootfs_builder::static_build::StaticBuild;
use rootfs_builder::{initramfs, kernel, product, reproducible, virtiofsd};

/// Builds the guest's root file system, virtiofsd, the product's binaries and the test images.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Makes the Debian 13 root in which everything is built.
    BuildRoot,
    /// Builds the guest kernel: vmlinux, config, version.
    Kernel,
    /// Builds the static virtiofsd.
    Virtiofsd,
    /// Builds the static binaries of shim, VMM, agent and command.
    Product(Profile),
    /// Builds the guest's initramfs.
    Initramfs(Profile),
    /// Makes the archive of an OCI image.
    Image { name: Image },
    /// Makes the storage of a registry with the images that critest pulls.
    ConformanceRegistry,
    /// Builds all of the above but the conformance images.
    All(Profile),
    /// Builds what a host needs and lays it out below a prefix.
    Install {
        #[command(flatten)]
        profile: Profile,
        prefix: PathBuf,
    },
    /// Builds agent, initramfs and images a second time and compares the bytes.
    Reproducible(Profile),
}

#[derive(Args)]
struct Profile {
    /// The cargo profile of the product's binaries.
    #[arg(long = "profile", default_value = "release")]
    name: String,
}

fn main() -> ExitCode {
    match Builder::open().and_then(|builder| builder.run(&Arguments::parse().action)) {
        Ok(lines) => {
            for line in lines {
                println!("{line}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("rootfs-builder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Builder {
    cache: Cache,
    workspace: Workspace,
    root: BuildRoot,
}

impl Builder {
    fn open() -> Result<Self> {
        let cache = Cache::open()?;
        let workspace =
            Workspace::open(&env::current_dir().context("find the working directory")?)?;
        let root = BuildRoot::open(&cache)?;
        Ok(Self {
            cache,
            workspace,
            root,
        })
    }

    /// The lines to print: for what was built, its path.
    fn run(&self, action: &Action) -> Result<Vec<String>> {
        let path = match action {
            Action::BuildRoot => self.root.path().to_owned(),
            Action::Kernel => self.kernel()?,
            Action::Virtiofsd => self.virtiofsd()?,
            Action::Product(profile) => self.product(profile)?,
            Action::Initramfs(profile) => self.initramfs(profile)?,
            Action::Image { name } => name.or_build(&self.cache, &self.root)?,
            Action::ConformanceRegistry => image::conformance_registry(&self.cache, &self.root)?,
            Action::All(profile) => return self.all(profile),
            Action::Install { profile, prefix } => self.install(profile, prefix)?,
            Action::Reproducible(profile) => {
                let build = self.static_build()?;
                return reproducible::check(
                    &self.cache,
                    &self.workspace,
                    &self.root,
                    &build,
                    &profile.name,
                );
            }
        };
        Ok(vec![path.display().to_string()])
    }

    fn all(&self, profile: &Profile) -> Result<Vec<String>> {
        // The quick ones first: their mistakes show before the long ones have run.
        let mut paths = Vec::new();
        for image in Image::ALL {
            paths.push(image.or_build(&self.cache, &self.root)?);
        }
        paths.extend([
            self.product(profile)?,
            self.initramfs(profile)?,
            self.virtiofsd()?,
            self.kernel()?,
        ]);
        Ok(paths
            .iter()
            .map(|path| path.display().to_string())
            .collect())
    }

    fn install(&self, profile: &Profile, prefix: &Path) -> Result<PathBuf> {
        let artefacts = Artefacts {
            product: self.product(profile)?,
            virtiofsd: self.virtiofsd()?,
            vmlinux: self.kernel()?.join("vmlinux"),
            initramfs: self.initramfs(profile)?,
        };
        install::install(&artefacts, prefix)?;
        Ok(prefix.to_owned())
    }

    fn static_build(&self) -> Result<StaticBuild> {
        Ok(StaticBuild::open(
            self.root.clone(),
            RustToolchain::open(self.workspace.root())?,
        )?)
    }

    fn kernel(&self) -> Result<PathBuf> {
        kernel::or_build(&self.cache, self.workspace.root(), &self.root)
    }

    fn virtiofsd(&self) -> Result<PathBuf> {
        virtiofsd::or_build(&self.cache, self.workspace.root(), &self.static_build()?)
    }

    fn product(&self, profile: &Profile) -> Result<PathBuf> {
        product::or_build(
            &self.cache,
            &self.workspace,
            &self.static_build()?,
            &profile.name,
        )
    }

    fn initramfs(&self, profile: &Profile) -> Result<PathBuf> {
        let build = self.static_build()?;
        let agent = product::binary(
            &self.cache,
            &self.workspace,
            &build,
            &profile.name,
            product::AGENT,
        )?;
        initramfs::or_build(&self.cache, &agent)
    }
}
