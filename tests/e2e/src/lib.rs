//! End-to-end tests: what a user would notice, through the real containerd in
//! a node.

pub mod checks;
pub mod lab;
pub mod labs;
pub mod stand_ins;
