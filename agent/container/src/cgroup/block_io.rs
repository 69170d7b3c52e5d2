//! `linux.resources.blockIO` as files of cgroup version 2.
//!
//! The container's files come from the host and not from a block device, so
//! these limits are about devices of the guest. A number names a device of
//! the guest or none: what the host calls so is not here.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

use super::limits::Setting;
use crate::Unsupported;

/// Its entries are the block devices of the guest, by number.
const DEVICES: &str = "/sys/dev/block";

/// What a device is limited in, as the specification and `io.max` name it.
type Throttle<'a> = (
    &'static str,
    &'static str,
    &'a Option<Vec<LinuxThrottleDevice>>,
);

fn throttles(io: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    [
        (
            "throttleReadBpsDevice",
            "rbps",
            io.throttle_read_bps_device(),
        ),
        (
            "throttleWriteBpsDevice",
            "wbps",
            io.throttle_write_bps_device(),
        ),
        (
            "throttleReadIOPSDevice",
            "riops",
            io.throttle_read_iops_device(),
        ),
        (
            "throttleWriteIOPSDevice",
            "wiops",
            io.throttle_write_iops_device(),
        ),
    ]
}

/// Refuses devices that are not there, and what version 2 does not have.
pub fn check(io: &LinuxBlockIo) -> Result<(), Unsupported> {
    check_in(io, Path::new(DEVICES))
}

fn check_in(io: &LinuxBlockIo, devices: &Path) -> Result<(), Unsupported> {
    let refuse = |field: &str, reason: String| {
        Err(Unsupported::new(
            format!("linux.resources.blockIO.{field}"),
            reason,
        ))
    };
    let leaf = "cgroup version 2 has no leaf weights".to_owned();
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return refuse("leafWeight", leaf);
    }
    if let Some(weight) = io.weight().filter(|weight| *weight != 0)
        && !is_weight(weight)
    {
        return refuse("weight", format!("{weight} is not between 10 and 1000"));
    }
    for (index, device) in io.weight_device().iter().flatten().enumerate() {
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return refuse(&format!("weightDevice[{index}].leafWeight"), leaf);
        }
        if !device.weight().is_some_and(is_weight) {
            let reason = "is missing or not between 10 and 1000";
            return refuse(&format!("weightDevice[{index}].weight"), reason.into());
        }
        exists(devices, device.major(), device.minor())
            .or_else(|reason| refuse(&format!("weightDevice[{index}]"), reason))?;
    }
    for (field, _, limits) in throttles(io) {
        for (index, limit) in limits.iter().flatten().enumerate() {
            exists(devices, limit.major(), limit.minor())
                .or_else(|reason| refuse(&format!("{field}[{index}]"), reason))?;
        }
    }
    Ok(())
}

fn is_weight(weight: u16) -> bool {
    (10..=1000).contains(&weight)
}

fn exists(devices: &Path, major: i64, minor: i64) -> Result<(), String> {
    if devices.join(format!("{major}:{minor}")).exists() {
        return Ok(());
    }
    Err(format!(
        "{major}:{minor} is no block device of the guest, where a device of the host is not"
    ))
}

/// Of a checked `io`.
pub fn settings(io: &LinuxBlockIo) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        // Each of the two schedulers has its own.
        settings.push(Setting::new("io.bfq.weight", &weight));
        settings.push(Setting::new("io.weight", &io_weight(weight)));
    }
    for device in io.weight_device().iter().flatten() {
        let number = format!("{}:{}", device.major(), device.minor());
        let weight = device.weight().unwrap_or_default();
        settings.push(Setting::new("io.bfq.weight", &format!("{number} {weight}")));
        let weight = io_weight(weight);
        settings.push(Setting::new("io.weight", &format!("{number} {weight}")));
    }
    for (_, key, limits) in throttles(io) {
        for limit in limits.iter().flatten() {
            let (major, minor) = (limit.major(), limit.minor());
            let rate = match limit.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            settings.push(Setting::new(
                "io.max",
                &format!("{major}:{minor} {key}={rate}"),
            ));
        }
    }
    settings
}

/// 10 to 1000 as 1 to 10000, as other OCI runtimes do.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn io(value: Value) -> LinuxBlockIo {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn settings_weight_and_limits_of_a_device_of_the_guest_are_written() {
        let devices = tempfile::tempdir().unwrap();
        std::fs::create_dir(devices.path().join("254:0")).unwrap();
        let device = json!({"major": 254, "minor": 0, "rate": 7});
        let io = io(json!({
            "weight": 1000,
            "weightDevice": [{"major": 254, "minor": 0, "weight": 10}],
            "throttleReadBpsDevice": [device], "throttleWriteBpsDevice": [device],
            "throttleReadIOPSDevice": [device], "throttleWriteIOPSDevice": [device],
        }));
        check_in(&io, devices.path()).unwrap();
        let written: Vec<_> = settings(&io)
            .into_iter()
            .map(|setting| format!("{} {}", setting.file, setting.value))
            .collect();
        assert_eq!(
            written,
            [
                "io.bfq.weight 1000",
                "io.weight 10000",
                "io.bfq.weight 254:0 10",
                "io.weight 254:0 1",
                "io.max 254:0 rbps=7",
                "io.max 254:0 wbps=7",
                "io.max 254:0 riops=7",
                "io.max 254:0 wiops=7",
            ]
        );
    }

    #[test]
    fn check_devices_of_the_host_are_refused_by_name() {
        let devices = tempfile::tempdir().unwrap();
        let device = json!([{"major": 8, "minor": 0, "rate": 1, "weight": 10}]);
        for field in [
            "weightDevice",
            "throttleReadBpsDevice",
            "throttleWriteBpsDevice",
            "throttleReadIOPSDevice",
            "throttleWriteIOPSDevice",
        ] {
            let mut value = json!({});
            value[field] = device.clone();
            let refused = check_in(&io(value), devices.path()).unwrap_err();
            assert_eq!(refused.field, format!("linux.resources.blockIO.{field}[0]"));
        }
        for (value, field) in [
            (json!({"weight": 9}), "weight"),
            (json!({"leafWeight": 10}), "leafWeight"),
            (
                json!({"weightDevice": [{"weight": 1}]}),
                "weightDevice[0].weight",
            ),
            (
                json!({"weightDevice": [{"leafWeight": 10}]}),
                "weightDevice[0].leafWeight",
            ),
        ] {
            let refused = check_in(&io(value), devices.path()).unwrap_err();
            assert_eq!(refused.field, format!("linux.resources.blockIO.{field}"));
        }
    }
}
