//! What the cases vary: each field of the specification with values that can be
//! told from inside.

mod files;
mod isolation;
mod process;
mod resources;

use serde_json::{Value, json};

use crate::matrix::{Company, Variation};

/// Every variation, in the order of the specification's chapters.
pub fn all() -> Vec<Variation> {
    [
        process::VARIATIONS,
        files::VARIATIONS,
        isolation::VARIATIONS,
        resources::VARIATIONS,
    ]
    .concat()
}

/// One that may be combined with others.
const fn any(
    name: &'static str,
    slot: &'static str,
    apply: fn(&mut Value, &crate::base::Place),
) -> Variation {
    with_company(name, slot, Company::Any, apply)
}

/// One that is run by itself.
const fn single(name: &'static str, apply: fn(&mut Value, &crate::base::Place)) -> Variation {
    with_company(name, name, Company::None, apply)
}

/// One that is run by itself in a pod of its own.
const fn own_pod(name: &'static str, apply: fn(&mut Value, &crate::base::Place)) -> Variation {
    with_company(name, name, Company::OwnPod, apply)
}

const fn with_company(
    name: &'static str,
    slot: &'static str,
    company: Company,
    apply: fn(&mut Value, &crate::base::Place),
) -> Variation {
    Variation {
        name,
        slot,
        company,
        apply,
    }
}

/// Sets what is at `path`, made of names and slashes; makes objects on the way.
fn put(spec: &mut Value, path: &str, value: Value) {
    *place_of(spec, path) = value;
}

/// Adds to the list at `path`.
fn add(spec: &mut Value, path: &str, value: Value) {
    let list = place_of(spec, path);
    if list.is_null() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.push(value);
    }
}

fn remove(spec: &mut Value, path: &str, name: &str) {
    if let Some(object) = place_of(spec, path).as_object_mut() {
        object.remove(name);
    }
}

fn place_of<'a>(spec: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('/').fold(spec, |place, name| &mut place[name])
}

fn mount(spec: &mut Value, destination: &str, kind: &str, source: &Value, options: &[&str]) {
    let mount = json!({
        "destination": destination, "type": kind, "source": source, "options": options,
    });
    add(spec, "mounts", mount);
}
