//! The AppArmor policy that the guest has: the host's, for each profile that a
//! process of the pod asks for.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

use super::{Agent, Error, Pod, blocking};
use crate::host;
use crate::spec;

/// What was loaded so far, by its hash: most containers ask for the same.
#[derive(Debug, Default)]
pub struct Loaded(HashSet<u64>);

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
        let read = blocking(move || Ok(host::apparmor::policy(&profile)?));
        let Some(policy) = read.await? else {
            return Ok(());
        };
        let mut hasher = DefaultHasher::new();
        policy.hash(&mut hasher);
        let hash = hasher.finish();
        // Held while it is loaded: whoever wants the same waits for it.
        let mut loaded = self.apparmor.lock().await;
        if !loaded.0.contains(&hash) {
            self.explain(agent.load_apparmor_policy(policy).await)
                .await?;
            loaded.0.insert(hash);
        }
        Ok(())
    }
}
