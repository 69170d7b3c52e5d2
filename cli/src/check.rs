//! `bulkhead check`: each thing that a pod needs from the host, and what to do
//! when it is not there.

use std::{
    fs::{self, File},
    io,
    path::Path,
    process::ExitCode,
};

use kvm_ioctls::{Cap, Kvm};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// What a pod cannot run without, in the words of the kernel's KVM API.
const CAPABILITIES: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];
/// Relative to the installation's prefix.
const FILES: [&str; 5] = [
    "bin/containerd-shim-bulkhead-v2",
    "libexec/bulkhead/bulkhead-vmm",
    "libexec/bulkhead/virtiofsd",
    "share/bulkhead/vmlinux",
    "share/bulkhead/initramfs.cpio",
];

type Outcome = Result<String, String>;

/// Checks everything, prints a line each, and fails if any failed.
pub fn run(prefix: &Path) -> ExitCode {
    let outcomes = [
        ("KVM", check_kvm()),
        ("cgroups", check_cgroups(Path::new("/sys/fs/cgroup"))),
        ("files", check_files(prefix)),
    ];
    for (what, outcome) in &outcomes {
        match outcome {
            Ok(found) => println!("ok      {what}: {found}"),
            Err(missing) => println!("FAILED  {what}: {missing}"),
        }
    }
    if outcomes.iter().all(|(_, outcome)| outcome.is_ok()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn check_kvm() -> Outcome {
    let kvm = Kvm::new().map_err(|errno| explain_kvm(&io::Error::from(errno)))?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(format!("/dev/kvm speaks API version {version}, need 12"));
    }
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        return Err(format!("this kernel lacks {}", missing.join(", ")));
    }
    kvm.create_vm().map_err(|errno| {
        format!("/dev/kvm cannot create a VM: {errno}; is another hypervisor running?")
    })?;
    Ok("a VM can be created".to_owned())
}

fn explain_kvm(error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => {
            "load kvm_intel or kvm_amd, and enable virtualisation in the firmware (in a VM: nested virtualisation)"
        }
        io::ErrorKind::PermissionDenied => "run as root",
        _ => "see the kernel's log",
    };
    format!("cannot open /dev/kvm: {error}; {hint}")
}

fn check_cgroups(root: &Path) -> Outcome {
    let found = statfs(root).map_err(|errno| format!("{}: {errno}", root.display()))?;
    if found.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(format!(
            "{} is not cgroup v2; boot with systemd.unified_cgroup_hierarchy=1",
            root.display()
        ));
    }
    let probe = root.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&probe).map_err(|error| format!("{}: {error}", probe.display()))?;
    Ok(format!("version 2 with {}", controllers.trim()))
}

fn check_files(prefix: &Path) -> Outcome {
    let missing: Vec<String> = FILES
        .iter()
        .map(|file| prefix.join(file))
        .filter_map(|path| {
            let error = File::open(&path).err()?;
            Some(format!("{}: {error}", path.display()))
        })
        .collect();
    if missing.is_empty() {
        Ok(format!("installed below {}", prefix.display()))
    } else {
        Err(format!("{}; install Bulkhead again", missing.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_files_missing_kernel_is_named() {
        let prefix = tempfile::tempdir().expect("temporary directory");
        let outcome = check_files(prefix.path());
        assert!(outcome.is_err_and(|text| text.contains("share/bulkhead/vmlinux: ")));
    }

    #[test]
    fn check_cgroups_directory_that_is_no_cgroup_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let outcome = check_cgroups(directory.path());
        assert!(outcome.is_err_and(|text| text.contains("is not cgroup v2")));
    }

    #[test]
    fn explain_kvm_without_the_device_names_the_modules() {
        let text = explain_kvm(&io::ErrorKind::NotFound.into());
        assert!(text.contains("kvm_amd"));
    }
}
