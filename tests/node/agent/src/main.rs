//! The agent in the test node: runs commands for the node tool, over the protocol of this package's library.
//!
//! `node-agent ADDRESS:PORT` serves; `node-agent probe` says whether guests can run here (see `probe`); `node-agent hold`
//! keeps a VM that never runs (see `hold`).

mod claim;
mod hold;
mod probe;
mod session;
mod terminal;

use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: node-agent ADDRESS:PORT | probe | hold");
        return ExitCode::from(2);
    };
    match address.as_str() {
        "probe" => probe(),
        "hold" => hold(),
        address => serve(address),
    }
}

fn serve(address: &str) -> ExitCode {
    let listener = match TcpListener::bind(address) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("node-agent: listen on {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let claims = Arc::new(claim::Claims::default());
    loop {
        match listener.accept() {
            Ok((connection, _)) => {
                let claims = Arc::clone(&claims);
                thread::spawn(move || {
                    if let Err(error) = session::serve(&connection, &claims) {
                        eprintln!("node-agent: {error}");
                    }
                });
            }
            // Out of descriptors, or the client is gone again: neither ends the node.
            Err(error) => eprintln!("node-agent: accept: {error}"),
        }
    }
}

fn probe() -> ExitCode {
    match probe::run() {
        Ok(()) => {
            println!("{}", probe::RUNS);
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("PROBE no guest runs: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Returns only when the VM cannot be made.
fn hold() -> ExitCode {
    match hold::hold() {
        Ok(_held) => loop {
            thread::park();
        },
        Err(reason) => {
            eprintln!("node-agent hold: {reason}");
            ExitCode::FAILURE
        }
    }
}
