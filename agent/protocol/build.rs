//! Generates client, server and messages from `proto/agent.proto`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/agent.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Customize::default()
        })
        .run()?;
    // The generated files open with inner attributes, which include!() does not
    // take: they are modules by path instead.
    let modules = ["agent", "agent_ttrpc"].map(|name| {
        let file = out.join(name).with_extension("rs");
        format!("#[path = \"{}\"]\npub mod {name};\n", file.display())
    });
    fs::write(out.join("modules.rs"), modules.concat())?;
    Ok(())
}
