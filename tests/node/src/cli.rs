//! The commands.

mod foreground;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bulkhead_node::{Golden, Node, NodeCommand, NodeOptions, running};
use clap::{Parser, Subcommand};
use rootfs_builder::cache::Cache;

/// Disposable test hosts: Debian 13 VMs with containerd and the tools in them.
#[derive(Parser)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Builds everything that a node is made of, and the snapshot that nodes are cloned from. `up` does it too when needed.
    Build,
    /// Starts a node, which lives until `down`.
    Up {
        /// Its name, and host name.
        name: String,
        /// A tree that is copied to a disk and mounted at /opt/bulkhead: bin/containerd-shim-bulkhead-v2 and so on.
        #[arg(long, value_name = "PREFIX")]
        share: Option<PathBuf>,
        /// A network that two nodes can share, which exists by being named.
        #[arg(long)]
        network: Option<String>,
    },
    /// Runs a command in a node, with this command's standard streams; its status becomes this command's, 128 + N for signal N.
    Exec {
        /// The node.
        name: String,
        /// An environment variable for the command, as NAME=VALUE.
        #[arg(long, short)]
        env: Vec<String>,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Runs an interactive shell, or a command, on a terminal in a node.
    Shell {
        /// The node.
        name: String,
        /// The program and its arguments, instead of bash.
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Copies a file or directory into a node.
    Push {
        /// The node.
        name: String,
        /// What.
        from: PathBuf,
        /// What it is called in the node: an absolute path, whose parent directory is made when it is not there.
        to: PathBuf,
    },
    /// Copies a file or directory out of a node.
    Pull {
        /// The node.
        name: String,
        /// What: an absolute path.
        from: PathBuf,
        /// What it is called here.
        to: PathBuf,
    },
    /// Prints a node's console log.
    Logs {
        /// The node.
        name: String,
    },
    /// Ends a node. Fails when its kernel has complained, and shows that.
    Down {
        /// The node.
        name: String,
    },
    /// Lists the nodes that are up: name, mode, QEMU's pid, shared network and address.
    List,
}

/// Runs one command; the code is the process's.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.action {
        Action::Build => {
            let golden = Golden::or_build(&Cache::open()?)?;
            println!(
                "nodes are ready to be cloned; mode: {}, time factor {}",
                golden.mode,
                golden.mode.time_factor()
            );
        }
        Action::Up {
            name,
            share,
            network,
        } => up(name, share, network)?,
        Action::Exec { name, env, command } => {
            return foreground::exec(&name, &with_env(command_of(command), env)?);
        }
        Action::Shell { name, command } => {
            let command = if command.is_empty() {
                NodeCommand::new("bash").arg("--login")
            } else {
                command_of(command)
            };
            return foreground::shell(&name, command);
        }
        Action::Push { name, from, to } => Node::attach(&name)?.push(&from, &to)?,
        Action::Pull { name, from, to } => Node::attach(&name)?.pull(&from, &to)?,
        Action::Logs { name } => {
            let console = Node::console_of(&name)?;
            io::stdout()
                .write_all(console.as_bytes())
                .context("print the console log")?;
        }
        Action::Down { name } => Node::attach(&name)?.down()?,
        Action::List => list()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: String, share: Option<PathBuf>, network: Option<String>) -> Result<()> {
    let mut options = NodeOptions::new(name).detached();
    if let Some(prefix) = share {
        options = options.prefix(prefix);
    }
    if let Some(network) = network {
        options = options.network(network);
    }
    let node = Node::up(&options)?;
    println!(
        "node {} is up; mode: {}, time factor {}",
        node.name(),
        node.mode(),
        node.time_factor()
    );
    Ok(())
}

fn list() -> Result<()> {
    for record in running()? {
        let network = record.network.map_or_else(
            || "-".to_owned(),
            |(name, address)| format!("{name} {address}"),
        );
        println!(
            "{}\t{}\t{}\t{network}",
            record.name, record.mode, record.pid
        );
    }
    Ok(())
}

fn command_of(words: Vec<OsString>) -> NodeCommand {
    // clap lets no empty command through.
    let mut words = words.into_iter();
    NodeCommand::new(words.next().unwrap_or_default()).args(words)
}

fn with_env(mut command: NodeCommand, variables: Vec<String>) -> Result<NodeCommand> {
    for variable in variables {
        let (name, value) = variable
            .split_once('=')
            .with_context(|| format!("--env {variable} is not NAME=VALUE"))?;
        command = command.env(name, value);
    }
    Ok(command)
}
