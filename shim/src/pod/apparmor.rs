//! The AppArmor policy that the guest has: the host's, for each profile that a
//! process of the pod asks for.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

use super::{Agent, Error, Pod, blocking};
use crate::host;
use crate::spec;

/// The hash of the policy that each profile was loaded with last: most containers ask
/// for the same.
#[derive(Debug, Default)]
pub struct Loaded(HashMap<String, u64>);

/// The profile that a `process` of the OCI runtime configuration asks for.
pub fn profile_of(process: &Value) -> Option<String> {
    spec::text(process, "/apparmorProfile")
        .filter(|profile| !profile.is_empty())
        .map(str::to_owned)
}

impl Pod {
    /// Sees to it that the guest has the policy of `profile` as the host has it now.
    pub async fn load_apparmor(&self, agent: &Agent, profile: Option<&str>) -> Result<(), Error> {
        let Some(profile) = profile.map(str::to_owned) else {
            return Ok(());
        };
        // Held while it is read and loaded: the guest gets what is read last.
        let mut loaded = self.apparmor.lock().await;
        let name = profile.clone();
        let read = blocking(move || Ok(host::apparmor::policy(&name)?));
        let Some(policy) = read.await? else {
            return Ok(());
        };
        let mut hasher = DefaultHasher::new();
        policy.hash(&mut hasher);
        let hash = hasher.finish();
        if loaded.0.get(&profile) == Some(&hash) {
            return Ok(());
        }
        self.explain(agent.load_apparmor_policy(policy).await)
            .await?;
        // It may hold others, as they were when it was loaded on the host: what is
        // asked for next is loaded again.
        loaded.0.clear();
        loaded.0.insert(profile, hash);
        Ok(())
    }
}
