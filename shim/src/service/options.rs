//! The options that a client sends with Create.
//!
//! This runtime has none of its own. Clients that ask for a user namespace send
//! runc's whatever the runtime, to say whose the standard streams are to be.

use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;

use super::Error;

/// `containerd.runc.v1.Options` (containerd, api/types/runc/options/oci.proto).
const RUNC: &str = "containerd.runc.v1.Options";
/// Its fields, by number.
const FIELDS: [(u32, &str); 12] = [
    (1, "no_pivot_root"),
    (2, "no_new_keyring"),
    (3, "shim_cgroup"),
    (IO_UID, "io_uid"),
    (IO_GID, "io_gid"),
    (6, "binary_name"),
    (7, "root"),
    (9, "systemd_cgroup"),
    (10, "criu_image_path"),
    (11, "criu_work_path"),
    (TASK_API_ADDRESS, "task_api_address"),
    (TASK_API_VERSION, "task_api_version"),
];
const IO_UID: u32 = 4;
const IO_GID: u32 = 5;
const TASK_API_ADDRESS: u32 = 12;
const TASK_API_VERSION: u32 = 13;

/// Takes what has its effect here: `io_uid` and `io_gid` name the root of the
/// container's user namespace, and the guest gives the streams to that user by
/// itself; the address and version of the task service, which CRI names where a pod was
/// asked for by the sandbox service, are those by which this call has come.
///
/// # Errors
/// Any other option, by name.
pub fn check(options: &Any) -> Result<(), Error> {
    let refuse = |what: String, reason: &str| {
        Err(Error::Argument {
            what,
            reason: reason.to_owned(),
        })
    };
    if options.value.is_empty() {
        return Ok(());
    }
    if options.type_url.rsplit('/').next() != Some(RUNC) {
        let what = format!("options of type {}", options.type_url);
        return refuse(what, "this runtime has no options yet: leave them out");
    }
    match first_unknown(&options.value) {
        Ok(None) => Ok(()),
        Ok(Some(number)) => {
            let named = FIELDS.iter().find(|(field, _)| *field == number);
            let name = named.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned());
            refuse(
                format!("option {name} of {RUNC}"),
                "it is runc's and means nothing to this runtime: leave it out",
            )
        }
        Err(error) => refuse(format!("options of type {RUNC}"), &error.to_string()),
    }
}

/// The number of the first field that is none of these.
fn first_unknown(value: &[u8]) -> protobuf::Result<Option<u32>> {
    let mut input = CodedInputStream::from_bytes(value);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag >> 3 {
            IO_UID | IO_GID | TASK_API_VERSION => drop(input.read_uint32()?),
            TASK_API_ADDRESS => drop(input.read_string()?),
            number => return Ok(Some(number)),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_owned(),
            ..Any::default()
        }
    }

    #[test]
    fn check_owner_of_the_streams_is_taken() {
        check(&any(RUNC, b"")).unwrap();
        // Fields 4 and 5, varints: 100000.
        check(&any(RUNC, b"\x20\xa0\x8d\x06\x28\xa0\x8d\x06")).unwrap();
    }

    #[test]
    fn check_where_the_task_service_is_is_taken() {
        check(&any(RUNC, b"\x62\x0bttrpc+unix:\x68\x03")).unwrap();
    }

    #[test]
    fn check_what_only_runc_can_do_is_refused_by_name() {
        let error = check(&any(RUNC, b"\x20\x01\x32\x01x")).unwrap_err();
        assert!(error.to_string().contains("binary_name"), "{error}");
        let error = check(&any(RUNC, b"\x48\x01")).unwrap_err();
        assert!(error.to_string().contains("systemd_cgroup"), "{error}");
    }

    #[test]
    fn check_options_of_others_and_what_is_none_are_refused() {
        let error = check(&any("runtimeoptions.v1.Options", b"x")).unwrap_err();
        assert!(error.to_string().contains("runtimeoptions"), "{error}");
        check(&any(RUNC, b"\x20")).unwrap_err();
    }
}
