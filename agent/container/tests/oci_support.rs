//! docs/oci-support.md has a row for every field of the specification's types,
//! and what its rows claim is there: the tests, and the words of refusals.
//!
//! The fields come from the types themselves: their `Deserialize` is asked to
//! read from a deserializer that knows no data and notes which fields it is asked for.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde::de::value::{Error, StrDeserializer};
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};

/// Reads anything from nothing, and notes the fields on the way.
struct Walk<'a> {
    place: String,
    fields: &'a mut BTreeSet<String>,
}

impl Walk<'_> {
    /// Text that the types with a syntax of their own accept.
    fn text(&self) -> &'static str {
        if self.place.contains("capabilities") {
            "CAP_CHOWN"
        } else {
            "0"
        }
    }
}

macro_rules! numbers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_u8(1)
        }
    )*};
}

macro_rules! texts {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_str(self.text())
        }
    )*};
}

impl<'de> Deserializer<'de> for Walk<'_> {
    type Error = Error;

    numbers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
    }
    texts! {
        deserialize_str deserialize_string deserialize_identifier
        deserialize_bytes deserialize_byte_buf deserialize_char
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f32(1.0)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(1.0)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(One(Some(self)))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(One(Some(self)))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_seq(One(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Entries {
            walk: self,
            keys: &["*"],
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        for key in keys {
            self.fields.insert(below(&self.place, key));
        }
        visitor.visit_map(Entries { walk: self, keys })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(variants[0].into_deserializer())
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

fn below(place: &str, key: &str) -> String {
    if place.is_empty() {
        key.to_owned()
    } else {
        format!("{place}.{key}")
    }
}

/// A list of one.
struct One<'a>(Option<Walk<'a>>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let Some(walk) = self.0.take() else {
            return Ok(None);
        };
        let place = format!("{}[]", walk.place);
        let fields = walk.fields;
        seed.deserialize(Walk { place, fields }).map(Some)
    }
}

/// One value for each key.
struct Entries<'a> {
    walk: Walk<'a>,
    keys: &'static [&'static str],
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        match self.keys.first() {
            Some(key) => {
                let key: StrDeserializer<'_, Error> = key.into_deserializer();
                seed.deserialize(key).map(Some)
            }
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, rest) = self.keys.split_first().expect("a key came before");
        self.keys = rest;
        seed.deserialize(Walk {
            place: below(&self.walk.place, key),
            fields: self.walk.fields,
        })
    }
}

/// Every field below [`Spec`], as in `linux.devices[].path`.
fn fields() -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    let walk = Walk {
        place: String::new(),
        fields: &mut fields,
    };
    Spec::deserialize(walk).expect("reads anything");
    fields
}

/// A row of the table.
struct Row {
    field: String,
    state: String,
    proof: String,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.field, self.state, self.proof)
    }
}

impl Row {
    /// A refused whole needs no rows for its parts.
    fn covers_parts(&self) -> bool {
        self.state != "works"
    }

    /// What is quoted in the last column.
    fn quoted(&self) -> Vec<&str> {
        self.proof.split('`').skip(1).step_by(2).collect()
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn rows() -> Vec<Row> {
    let document = fs::read_to_string(root().join("docs/oci-support.md")).expect("is there");
    let section = document
        .split("\n## ")
        .find(|text| text.starts_with("Fields\n"));
    let lines = section.expect("has its fields").lines();
    let lines = lines.filter(|line| line.starts_with("| `"));
    let rows = lines.map(|line| {
        let columns: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [field, state, proof] = columns[..] else {
            panic!("not a row of three columns: {line}");
        };
        Row {
            field: field.trim_matches('`').to_owned(),
            state: state.to_owned(),
            proof: proof.to_owned(),
        }
    });
    rows.collect()
}

/// The text of every source that may prove something.
fn sources() -> String {
    fn collect(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).expect("is a directory") {
            let path = entry.expect("is readable").path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(&path).expect("is text"));
            }
        }
    }
    let mut text = String::new();
    for directory in [
        "agent/container/src",
        "agent/container/tests",
        "agent/src",
        "shim/src",
        "tests/e2e/src",
    ] {
        collect(&root().join(directory), &mut text);
    }
    text
}

#[test]
fn document_has_a_row_for_every_field() {
    let rows = rows();
    let row = |field: &str| rows.iter().find(|row| row.field == field);
    let is_covered = |field: &str| {
        let ends = field.match_indices(['.', '[']).map(|(end, _)| end);
        let mut wholes = ends.map(|end| &field[..end]);
        row(field).is_some() || wholes.any(|whole| row(whole).is_some_and(Row::covers_parts))
    };
    let fields = fields();
    let missing: Vec<_> = fields.iter().filter(|field| !is_covered(field)).collect();
    assert!(missing.is_empty(), "no row for {missing:#?}");
    let stale: Vec<_> = rows
        .iter()
        .filter(|row| !fields.contains(&row.field))
        .map(ToString::to_string)
        .collect();
    assert!(stale.is_empty(), "no field for {stale:#?}");
}

#[test]
fn document_names_tests_and_words_that_exist() {
    let sources = sources();
    for row in rows() {
        let quoted = row.quoted();
        match row.state.as_str() {
            "works" => {
                assert!(!quoted.is_empty(), "no test: {row}");
                for test in quoted {
                    let named = [format!("\"{test}\""), format!("fn {test}(")];
                    assert!(
                        named.iter().any(|name| sources.contains(name)),
                        "no test {test}: {row}"
                    );
                }
            }
            "refused" => {
                let words = quoted.first().unwrap_or_else(|| panic!("no words: {row}"));
                assert!(sources.contains(words), "nothing says {words:?}: {row}");
            }
            "not applicable" => assert!(!row.proof.is_empty(), "no reason: {row}"),
            _ => panic!("neither works, refused nor not applicable: {row}"),
        }
    }
}

#[test]
fn fields_are_found_at_every_depth() {
    let fields = fields();
    for field in [
        "ociVersion",
        "process.execCPUAffinity.final",
        "mounts[].uidMappings[].hostID",
        "linux.timeOffsets.*.nanosecs",
        "linux.resources.blockIO.throttleReadIOPSDevice[].rate",
        "linux.seccomp.syscalls[].args[].valueTwo",
        "hooks.startContainer[].timeout",
    ] {
        assert!(fields.contains(field), "{field}: {fields:#?}");
    }
}
