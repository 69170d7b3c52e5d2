//! Builds the guest's root file system, virtiofsd, and the OCI images of tests and examples.

pub mod build_root;
pub mod cache;
pub mod command;
pub mod cpio;
pub mod debian_root;
pub mod image;
pub mod initramfs;
pub mod install;
pub mod kernel;
pub mod product;
pub mod reproducible;
pub mod source;
pub mod static_build;
pub mod virtiofsd;
