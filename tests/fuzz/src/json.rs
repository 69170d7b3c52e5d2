//! JSON that is nearly right: a document with some of its parts exchanged for
//! what a parser likes least.

use arbitrary::{Result, Unstructured};
use serde_json::{Map, Value, json};

/// Most changes to one document.
const MAX_CHANGES: u8 = 12;

/// Most values that one change adds by repeating: repeated again and again, few
/// bytes of input would else make a document that is large itself.
const MAX_REPEATED: usize = 1024;

/// How many values there are in one, itself included.
fn parts(value: &Value) -> usize {
    let below: usize = match value {
        Value::Array(list) => list.iter().map(parts).sum(),
        Value::Object(map) => map.values().map(parts).sum(),
        _ => 0,
    };
    1 + below
}

/// `document` with a few changes that the input decides on.
pub fn change(mut document: Value, input: &mut Unstructured<'_>) -> Result<Value> {
    for _ in 0..=input.arbitrary::<u8>()? % MAX_CHANGES {
        if input.is_empty() {
            break;
        }
        change_one(&mut document, input)?;
    }
    Ok(document)
}

/// Goes down to some part and changes it.
fn change_one(place: &mut Value, input: &mut Unstructured<'_>) -> Result<()> {
    let choice = usize::from(input.arbitrary::<u8>()?);
    if choice < 0xe0 {
        let part = match place {
            Value::Object(map) if !map.is_empty() => {
                let index = choice % map.len();
                map.iter_mut().nth(index).map(|(_, value)| value)
            }
            Value::Array(list) if !list.is_empty() => {
                let index = choice % list.len();
                list.get_mut(index)
            }
            _ => None,
        };
        if let Some(part) = part {
            return change_one(part, input);
        }
    }
    match place {
        Value::Object(map) => change_object(map, input)?,
        Value::Array(list) => match input.arbitrary::<u8>()? % 4 {
            0 => {
                list.pop();
            }
            1 => list.push(any_value(input)?),
            2 => {
                let times = usize::from(input.arbitrary::<u8>()?);
                if let Some(first) = list.first().cloned() {
                    let times = times.min(MAX_REPEATED / parts(&first));
                    list.extend(std::iter::repeat_n(first, times));
                }
            }
            _ => *place = any_value(input)?,
        },
        Value::String(text) if input.arbitrary::<u8>()? % 2 == 0 => {
            let more = any_text(input)?;
            let at = usize::from(input.arbitrary::<u8>()?).min(text.len());
            if text.is_char_boundary(at) {
                text.insert_str(at, &more);
            }
        }
        _ => *place = any_value(input)?,
    }
    Ok(())
}

fn change_object(map: &mut Map<String, Value>, input: &mut Unstructured<'_>) -> Result<()> {
    let choice: u8 = input.arbitrary()?;
    let key = map
        .keys()
        .nth(usize::from(choice >> 2) % map.len().max(1))
        .cloned();
    match (choice % 4, key) {
        (0, Some(key)) => {
            map.remove(&key);
        }
        (1, Some(key)) => {
            let value = map.remove(&key).unwrap_or_default();
            map.insert(any_text(input)?, value);
        }
        _ => {
            map.insert(any_text(input)?, any_value(input)?);
        }
    }
    Ok(())
}

fn any_value(input: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match input.arbitrary::<u8>()? % 16 {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(i64::MIN),
        3 => json!(u64::MAX),
        4 => json!(-1),
        5 => json!(1e300),
        6 => json!([]),
        7 => json!({}),
        8 => {
            let mut deep = Value::Null;
            for _ in 0..input.arbitrary::<u8>()? {
                deep = json!([deep]);
            }
            deep
        }
        9 => json!(input.arbitrary::<i64>()?),
        10 => json!(input.arbitrary::<u32>()?),
        11 => json!([any_text(input)?, any_text(input)?]),
        _ => json!(any_text(input)?),
    })
}

fn any_text(input: &mut Unstructured<'_>) -> Result<String> {
    /// Words of the configuration, and paths that lead elsewhere.
    const WORDS: [&str; 56] = [
        "",
        "/",
        ".",
        "..",
        "/..",
        "/../etc",
        "../../..",
        "//",
        "/proc/self/root",
        "/proc/1/ns/net",
        "a/../b",
        "\0",
        "\n",
        "\u{202e}",
        "bind",
        "rbind",
        "ro",
        "rro",
        "rw",
        "dev",
        "remount",
        "tmpfs",
        "proc",
        "cgroup",
        "network",
        "pid",
        "ipc",
        "uts",
        "user",
        "mount",
        "time",
        "path",
        "type",
        "source",
        "options",
        "destination",
        "linux",
        "mounts",
        "hooks",
        "annotations",
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
        "container",
        "sandbox",
        "/run/bulkhead/share",
        "/run/bulkhead/pod/../../../etc",
        "/dev/shm",
        "SCMP_ACT_NOTIFY",
        "CAP_SYS_ADMIN",
        "net.ipv4.ip_forward",
        "kernel.shm_rmid_forced",
        "-.slice",
        "a-b.slice:x:y",
        "cgroup.procs",
        "memory.max",
        "sandboxes/c/shm",
    ];
    let choice: u8 = input.arbitrary()?;
    if let Some(word) = WORDS.get(usize::from(choice)) {
        return Ok((*word).to_owned());
    }
    if choice < 0xc0 {
        let length = usize::from(choice & 0x1f).min(input.len());
        return Ok(String::from_utf8_lossy(input.bytes(length)?).into_owned());
    }
    let count = usize::from(input.arbitrary::<u8>()?);
    Ok(["a", "/", "../", "a-", "%00"][usize::from(choice) % 5].repeat(count * 8))
}
