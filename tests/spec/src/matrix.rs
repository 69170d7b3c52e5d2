//! The cases: every variation alone, all of them packed into few containers, and
//! random combinations. The same seed gives the same cases.

use serde_json::Value;

use crate::base::{self, Place};
use crate::random::Random;

/// How a variation may be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// With others, in the pod of all cases.
    Any,
    /// By itself, in the pod of all cases: too much else changes with it.
    None,
    /// By itself, in a pod of its own.
    OwnPod,
}

/// One field, or one value of it, that differs from the base configuration.
#[derive(Clone, Copy, Debug)]
pub struct Variation {
    /// The field as in `config.json`, and after a colon the value.
    pub name: &'static str,
    /// Two variations with the same one exclude each other.
    pub slot: &'static str,
    /// What it may be combined with.
    pub company: Company,
    /// Changes a configuration.
    pub apply: fn(&mut Value, &Place),
}

/// One container of the matrix.
#[derive(Clone, Debug)]
pub struct Case {
    /// Unique in its matrix, and usable as a container's id.
    pub name: String,
    /// What it differs in from the base configuration.
    pub variations: Vec<Variation>,
}

impl Case {
    fn new(name: String, variations: Vec<Variation>) -> Self {
        Self { name, variations }
    }

    /// Its configuration.
    pub fn spec(&self, place: &Place) -> Value {
        let mut spec = base::spec(place);
        for variation in &self.variations {
            (variation.apply)(&mut spec, place);
        }
        spec
    }

    /// Whether it needs a pod of its own.
    pub fn own_pod(&self) -> bool {
        self.variations
            .iter()
            .any(|variation| variation.company == Company::OwnPod)
    }
}

/// The base configuration, then every variation alone.
pub fn alone(all: &[Variation]) -> Vec<Case> {
    let mut cases = vec![Case::new("base".to_owned(), Vec::new())];
    for (number, variation) in all.iter().enumerate() {
        cases.push(Case::new(format!("alone-{number}"), vec![*variation]));
    }
    cases
}

/// Every variation that `may_combine` once, in as few cases as its slot allows,
/// thrown together by `seed`.
pub fn packed(all: &[Variation], seed: u64, may_combine: impl Fn(&Variation) -> bool) -> Vec<Case> {
    let mut rest: Vec<_> = all
        .iter()
        .filter(|variation| variation.company == Company::Any && may_combine(variation))
        .copied()
        .collect();
    Random::new(seed).shuffle(&mut rest);
    let mut packs: Vec<Vec<Variation>> = Vec::new();
    for variation in rest {
        let free = packs
            .iter()
            .position(|pack| pack.iter().all(|other| other.slot != variation.slot));
        match free {
            Some(pack) => packs[pack].push(variation),
            None => packs.push(vec![variation]),
        }
    }
    let named = packs.into_iter().enumerate();
    named
        .map(|(number, pack)| Case::new(format!("packed-{number}"), pack))
        .collect()
}

/// `count` combinations of up to ten variations that `may_combine`.
pub fn random(
    all: &[Variation],
    seed: u64,
    count: usize,
    may_combine: impl Fn(&Variation) -> bool,
) -> Vec<Case> {
    const MOST: usize = 10;
    // Not the numbers that the packs were made with.
    let mut random = Random::new(seed ^ 0x5eed);
    let mut candidates: Vec<_> = all
        .iter()
        .filter(|variation| variation.company == Company::Any && may_combine(variation))
        .copied()
        .collect();
    (0..count)
        .map(|number| {
            random.shuffle(&mut candidates);
            let wanted = 2 + random.below(MOST - 1);
            let mut chosen: Vec<Variation> = Vec::new();
            for variation in &candidates {
                if chosen.len() < wanted && chosen.iter().all(|other| other.slot != variation.slot)
                {
                    chosen.push(*variation);
                }
            }
            Case::new(format!("random-{number}"), chosen)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;
    use crate::variations;

    fn place() -> Place {
        Place {
            rootfs: PathBuf::from("/place/rootfs"),
            volume: PathBuf::from("/place/volume"),
            checker: PathBuf::from("/place/spec-checker"),
            cgroup: PathBuf::from("/place/case"),
            pod: None,
        }
    }

    fn names(cases: &[Case]) -> Vec<Vec<&'static str>> {
        let of = |case: &Case| case.variations.iter().map(|one| one.name).collect();
        cases.iter().map(of).collect()
    }

    #[test]
    fn alone_every_variation_changes_the_base() {
        let base = base::spec(&place());
        let cases = alone(&variations::all());
        assert!(cases.len() > 80, "{} cases", cases.len());
        for case in &cases[1..] {
            assert_ne!(case.spec(&place()), base, "{}", case.variations[0].name);
        }
    }

    #[test]
    fn names_of_variations_are_unique() {
        let all = variations::all();
        let unique: BTreeSet<_> = all.iter().map(|variation| variation.name).collect();
        assert_eq!(unique.len(), all.len());
    }

    #[test]
    fn packed_has_each_combinable_variation_once() {
        let all = variations::all();
        let cases = packed(&all, 3, |_| true);
        let mut found: Vec<_> = names(&cases).concat();
        found.sort_unstable();
        let mut wanted: Vec<_> = all
            .iter()
            .filter(|variation| variation.company == Company::Any)
            .map(|variation| variation.name)
            .collect();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
        assert!(cases.len() < 20, "{} packs", cases.len());
    }

    #[test]
    fn combinations_never_use_a_slot_twice() {
        let all = variations::all();
        let mut cases = packed(&all, 5, |_| true);
        cases.extend(random(&all, 5, 50, |_| true));
        for case in cases {
            let slots: BTreeSet<_> = case.variations.iter().map(|one| one.slot).collect();
            assert_eq!(slots.len(), case.variations.len(), "{}", case.name);
        }
    }

    #[test]
    fn cases_of_a_seed_are_the_same_again_and_of_another_are_not() {
        let all = variations::all();
        let of = |seed| names(&random(&all, seed, 20, |_| true));
        assert_eq!(of(11), of(11));
        assert_ne!(of(11), of(12));
        let packs = |seed| names(&packed(&all, seed, |_| true));
        assert_eq!(packs(11), packs(11));
        assert_ne!(packs(11), packs(12));
    }
}
