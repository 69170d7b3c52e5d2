//! `bulkhead`: the operator's command.

mod check;
mod list;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Looks after pods that run in VMs of their own.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tells whether this host can run pods, and what is missing.
    Check,
    /// Lists the running pods.
    List,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Check => Ok(check::run(&prefix()?)),
        Command::List => list::run().map(|()| ExitCode::SUCCESS),
    }
}

/// The installation that this executable belongs to: `PREFIX/bin/bulkhead`.
fn prefix() -> Result<PathBuf> {
    let executable = env::current_exe().context("cannot find this executable")?;
    let prefix = executable.ancestors().nth(2);
    let prefix = prefix.with_context(|| format!("{} has no prefix", executable.display()))?;
    Ok(prefix.to_owned())
}
