//! `linux.personality` and `linux.memoryPolicy`: what a process inherits from
//! the one that sets it, and every process of a container has.

use std::io;

use oci_spec::runtime::{
    LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain, MemoryPolicyFlagType,
    MemoryPolicyModeType,
};

use crate::Unsupported;
use crate::kernel_calls::{set_memory_policy, set_personality};

/// `MAX_NUMNODES` of the guest's kernel is 64 (`CONFIG_NODES_SHIFT=6`).
const MAX_NODES: u32 = 64;

/// Refuses flags, of which the specification defines none (config-linux.md, "Personality").
pub fn check_personality(personality: &LinuxPersonality) -> Result<(), Unsupported> {
    match personality.flags().iter().flatten().next() {
        Some(flag) => Err(Unsupported::new(
            "linux.personality.flags",
            format!("{flag:?} is no flag of the specification, which has none yet"),
        )),
        None => Ok(()),
    }
}

/// Sets the caller's.
pub fn enter_personality(personality: &LinuxPersonality) -> io::Result<()> {
    // linux/personality.h
    set_personality(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

/// Refuses nodes that cannot be meant.
pub fn check_memory_policy(policy: &LinuxMemoryPolicy) -> Result<(), Unsupported> {
    let nodes = node_mask(policy.nodes().as_deref().unwrap_or_default());
    nodes
        .map(drop)
        .map_err(|reason| Unsupported::new("linux.memoryPolicy.nodes", reason))
}

/// Sets the caller's.
pub fn enter_memory_policy(policy: &LinuxMemoryPolicy) -> io::Result<()> {
    // linux/mempolicy.h
    let mode = match policy.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    let flags = policy.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
                MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
                MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
            }
    });
    let nodes = node_mask(policy.nodes().as_deref().unwrap_or_default());
    set_memory_policy(mode | flags, nodes.map_err(io::Error::other)?)
}

/// A list like `0-1,3` as bits.
fn node_mask(list: &str) -> Result<u64, String> {
    let number = |text: &str| {
        text.trim()
            .parse::<u32>()
            .ok()
            .filter(|node| *node < MAX_NODES)
            .ok_or_else(|| format!("{text:?} in {list:?} is not the number of a memory node"))
    };
    let mut mask = 0;
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        for node in first..=last {
            mask |= 1 << node;
        }
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_mask_takes_single_numbers_and_ranges() {
        assert_eq!(node_mask(""), Ok(0));
        assert_eq!(node_mask("0-1,3"), Ok(0b1011));
        assert_eq!(node_mask("63"), Ok(1 << 63));
        assert!(node_mask("64").is_err());
        assert!(node_mask("a").is_err());
    }
}
