//! The way from `start` to a connection and to the end, without any container.

use anyhow::{Result, ensure};

use crate::bundle::Program;
use crate::client::{Target, code};
use crate::report::Facts;
use crate::shim::{Settings, with_shim_of};
use crate::start::Containerd;

/// For each containerd: what the shim answers, that a second `start` finds the
/// first, that nobody is there yet, and that it goes.
pub async fn each(settings: &Settings, facts: &mut Facts) -> Result<()> {
    let program = Program::new(&["true"]);
    for containerd in Containerd::ALL {
        let id = format!("boot-{}", containerd.name().replace('.', "-"));
        let version = with_shim_of(settings, &id, containerd, &program, async |shim| {
            let again = shim.start_again().await?;
            ensure!(
                &again == shim.address(),
                "a second `start` tells {again:?}, the first told {:?}",
                shim.address()
            );
            let absent = code(&shim.client().state(Target::init("absent")).await);
            ensure!(absent == "NOT_FOUND", "State of an unknown task: {absent}");
            Ok(shim.address().version)
        })
        .await?;
        ensure!(
            version == 2 || version == 3,
            "version {version} for {containerd:?}"
        );
        let told = format!("version told to containerd {}", containerd.name());
        facts.insert(told, version.to_string());
    }
    Ok(())
}
