//! `bulkhead-node`: nodes for the command line. The library is for tests.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cli::run(cli::Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead-node: {error:#}");
            // As `docker run` and `env` do, so that it is not taken for the command's own status.
            ExitCode::from(125)
        }
    }
}
