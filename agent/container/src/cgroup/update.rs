//! Changing the limits of a cgroup that is in use: all of them or none.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;

use oci_spec::runtime::LinuxResources;

use super::limits::{self, Setting};
use super::{Cgroup, CgroupError, device_rules, write_file};

impl Cgroup {
    /// Applies every limit that the checked `resources` name and leaves the
    /// others as they are. Device rules, if there are any, replace all that were.
    ///
    /// What can be known to fail is found before anything is written; if the
    /// kernel then refuses a value, those that were written are set back.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        // One at a time, or one would set back what the other wrote.
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_use(resources)?;
        let settings = limits::update_settings(resources, &|file| self.value(file));
        for setting in &settings {
            self.check_exists(setting)?;
        }
        let rules = resources.devices().iter().flatten().next();
        let program = rules.map(|_| device_rules::load(&self.path, resources));
        let program = program.transpose()?;
        let before: Vec<_> = settings
            .iter()
            .map(|setting| self.value(&setting.file))
            .collect();
        for (done, setting) in settings.iter().enumerate() {
            if let Err(error) = self.apply(setting) {
                self.set_back(&settings[..done], &before);
                return Err(error);
            }
        }
        if let Some(program) = program {
            if let Err(error) =
                device_rules::attach(&self.path, &program, devices.as_ref().map(OwnedFd::as_fd))
            {
                self.set_back(&settings, &before);
                return Err(error);
            }
            *devices = Some(program);
        }
        Ok(())
    }

    /// Keeps a limit from going below what is in use, where that is asked for.
    fn check_use(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let memory = resources.memory().as_ref();
        let memory = memory.filter(|memory| memory.check_before_update() == Some(true));
        let limit = memory.and_then(oci_spec::runtime::LinuxMemory::limit);
        let limit = limit.and_then(|limit| u64::try_from(limit).ok());
        let used = self.value("memory.current");
        let used = used.and_then(|text| text.parse().ok());
        match (limit.filter(|limit| *limit > 0), used) {
            (Some(limit), Some(used)) if limit < used => Err(CgroupError::InUse { limit, used }),
            _ => Ok(()),
        }
    }

    /// What a file holds; `None` when it is not there or is not for reading.
    fn value(&self, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        Some(text.trim_end().to_owned())
    }

    fn check_exists(&self, setting: &Setting) -> Result<(), CgroupError> {
        let path = self.path.join(&setting.file);
        match fs::metadata(&path) {
            Err(source) if !setting.vacuous_without_file => Err(CgroupError::Write {
                path,
                value: setting.value.clone(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// The last first: one file may have been written twice.
    fn set_back(&self, settings: &[Setting], before: &[Option<String>]) {
        for (setting, value) in settings.iter().zip(before).rev() {
            if let Some(value) = value {
                // The first error is the one to tell.
                let _ = write_file(&self.path.join(&setting.file), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    /// Plain files in the place of the kernel's.
    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), format!("{text}\n")).unwrap();
        }
        let cgroup = Cgroup::new(directory.path(), Path::new(""));
        (directory, cgroup)
    }

    fn update(cgroup: &Cgroup, resources: Value) -> Result<(), CgroupError> {
        let resources = serde_json::from_value(resources).unwrap();
        limits::check(&resources).unwrap();
        cgroup.update(&resources)
    }

    #[test]
    fn update_what_is_not_named_stays() {
        let (_directory, cgroup) = cgroup(&[
            ("cpu.max", "max 100000"),
            ("cpu.weight", "100"),
            ("memory.max", "4096"),
            ("pids.max", "7"),
        ]);
        update(&cgroup, json!({"pids": {"limit": 8}})).unwrap();
        update(&cgroup, json!({"memory": {"limit": -1}})).unwrap();
        update(&cgroup, json!({"cpu": {"quota": 5000, "period": 20000}})).unwrap();
        let values = ["cpu.max", "cpu.weight", "memory.max", "pids.max"].map(|f| cgroup.value(f));
        let expected = ["5000 20000", "100", "max", "8"].map(|text| Some(text.to_owned()));
        assert_eq!(values, expected);
        // A period alone keeps the quota.
        update(&cgroup, json!({"cpu": {"period": 30000}})).unwrap();
        assert_eq!(cgroup.value("cpu.max").unwrap(), "5000 30000");
        update(&cgroup, json!({"pids": {"limit": -1}})).unwrap();
        assert_eq!(cgroup.value("pids.max").unwrap(), "max");
    }

    #[test]
    fn update_limit_below_what_is_in_use_is_refused_when_asked() {
        let (_directory, cgroup) = cgroup(&[("memory.max", "4096"), ("memory.current", "1000")]);
        let checked = |limit: i64| json!({"memory": {"limit": limit, "checkBeforeUpdate": true}});
        let error = update(&cgroup, checked(999)).unwrap_err();
        assert!(matches!(error, CgroupError::InUse { .. }), "{error}");
        assert_eq!(cgroup.value("memory.max").unwrap(), "4096");
        update(&cgroup, checked(1000)).unwrap();
        update(&cgroup, json!({"memory": {"limit": 999}})).unwrap();
        assert_eq!(cgroup.value("memory.max").unwrap(), "999");
    }

    #[test]
    fn update_limit_that_cannot_be_set_changes_nothing() {
        let (directory, cgroup) = cgroup(&[("memory.max", "4096"), ("cpu.weight", "100")]);
        let both = json!({"memory": {"limit": 8192}, "cpu": {"shares": 2}, "pids": {"limit": 8}});
        // No controller for the last of them.
        let error = update(&cgroup, both.clone()).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
        assert_eq!(cgroup.value("memory.max").unwrap(), "4096");
        // One that the kernel refuses, as a directory refuses to be written.
        fs::create_dir(directory.path().join("pids.max")).unwrap();
        let error = update(&cgroup, both).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
        assert_eq!(cgroup.value("memory.max").unwrap(), "4096");
        assert_eq!(cgroup.value("cpu.weight").unwrap(), "100");
    }

    #[test]
    fn update_devices_that_cannot_be_replaced_changes_nothing() {
        let (_directory, cgroup) = cgroup(&[("pids.max", "7")]);
        // A directory that is no cgroup has no programs.
        let error = update(
            &cgroup,
            json!({"pids": {"limit": 8}, "devices": [{"allow": false, "access": "rwm"}]}),
        )
        .unwrap_err();
        assert!(matches!(error, CgroupError::Devices { .. }), "{error}");
        assert_eq!(cgroup.value("pids.max").unwrap(), "7");
    }
}
