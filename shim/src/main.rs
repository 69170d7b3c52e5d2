//! `containerd-shim-bulkhead-v2`: what containerd runs for each container.

use std::process::ExitCode;

use anyhow::Context;
use shim::args::Command;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // containerd shows these words at the user's prompt.
        Err(error) => {
            eprintln!("containerd-shim-bulkhead-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match Command::parse(std::env::args().skip(1))? {
        Command::Version => {
            println!("containerd-shim-bulkhead-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::Info => shim::features::print(&mut std::io::stdout().lock())
            .context("write the runtime's features"),
        Command::Start(invocation) => Ok(shim::bootstrap::start(&invocation)?),
        Command::Delete(invocation) => Ok(shim::delete::delete(&invocation)?),
        Command::Serve(invocation) => Ok(shim::server::serve(&invocation)?),
    }
}
