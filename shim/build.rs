//! Generates the messages of `proto/cri.proto`.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/cri.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated file opens with inner attributes, which include!() does not
    // take: it is a module by path instead.
    let file = out.join("cri.rs");
    let module = format!("#[path = \"{}\"]\npub mod cri;\n", file.display());
    fs::write(out.join("cri_module.rs"), module)?;
    Ok(())
}
