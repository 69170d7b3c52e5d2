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

/// The oldest kernel: the first with `cgroup.kill`, by which a pod is killed.
const OLDEST_KERNEL: (u32, u32) = (5, 14);
/// From here on `vm.memfd_noexec` forbids programs in memory, such as the
/// stand-ins' (Documentation/userspace-api/mfd_noexec.rst).
const MEMFD_FORBIDDEN: u32 = 2;

type Outcome = Result<String, String>;

/// Checks everything, prints a line each, and fails if any failed.
pub fn run(prefix: &Path) -> ExitCode {
    let outcomes = [
        (
            "kernel",
            check_kernel(Path::new("/proc/sys/kernel/osrelease")),
        ),
        ("memfd", check_memfd(Path::new("/proc/sys/vm/memfd_noexec"))),
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

fn check_kernel(osrelease: &Path) -> Outcome {
    let text = fs::read_to_string(osrelease)
        .map_err(|error| format!("{}: {error}", osrelease.display()))?;
    let release = text.trim();
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok());
    let (oldest_major, oldest_minor) = OLDEST_KERNEL;
    match (next(), next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL => Ok(release.to_owned()),
        _ => Err(format!(
            "Linux {release}: need {oldest_major}.{oldest_minor} or later; upgrade the host's kernel"
        )),
    }
}

fn check_memfd(sysctl: &Path) -> Outcome {
    let text = match fs::read_to_string(sysctl) {
        // Linux before 6.3 has no such thing.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok("programs in memory are allowed".to_owned());
        }
        other => other.map_err(|error| format!("{}: {error}", sysctl.display()))?,
    };
    let value = text.trim();
    match value.parse::<u32>() {
        Ok(number) if number < MEMFD_FORBIDDEN => Ok(format!("vm.memfd_noexec is {value}")),
        _ => Err(format!(
            "vm.memfd_noexec is {value}, which forbids programs in memory, and no container would start; \
             sysctl -w vm.memfd_noexec=1, and look below /etc/sysctl.d for what sets it"
        )),
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

    /// A file like one below /proc/sys.
    fn sysctl(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        fs::write(&file, text).expect("writes");
        file
    }

    #[test]
    fn check_kernel_older_than_cgroup_kill_is_refused() {
        for (release, new_enough) in [
            ("5.14.0-503.el9.x86_64\n", true),
            ("6.1.0-9-amd64\n", true),
            ("10.0\n", true),
            ("5.13.19\n", false),
            ("4.18.0\n", false),
            ("nonsense\n", false),
        ] {
            let outcome = check_kernel(sysctl(release).path());
            assert_eq!(outcome.is_ok(), new_enough, "{release}");
        }
        let outcome = check_kernel(sysctl("5.10.0\n").path());
        assert!(outcome.is_err_and(|text| text.contains("5.14")));
    }

    #[test]
    fn check_memfd_that_forbids_programs_names_the_sysctl() {
        assert!(check_memfd(Path::new("/nonexistent")).is_ok());
        assert!(check_memfd(sysctl("1\n").path()).is_ok());
        let outcome = check_memfd(sysctl("2\n").path());
        assert!(outcome.is_err_and(|text| text.contains("sysctl -w vm.memfd_noexec=1")));
    }

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
