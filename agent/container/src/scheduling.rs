//! `process.scheduler`, `process.ioPriority` and `process.execCPUAffinity`.
//!
//! Set from outside, by the creator: what they ask for may take privileges that
//! the process itself does not have, and is not to slow its own set-up down.

use std::io;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
};

use crate::Unsupported;
use crate::kernel_calls::{SchedulingAttributes, set_io_priority, set_scheduling_attributes};

/// What the kernel refused of a process's scheduling.
#[derive(Debug, thiserror::Error)]
pub enum SchedulingError {
    /// `process.scheduler`.
    #[error("cannot set process.scheduler to {policy}")]
    Scheduler {
        /// As in `SCHED_FIFO`.
        policy: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `process.ioPriority`.
    #[error("cannot set process.ioPriority to {class} {priority}")]
    IoPriority {
        /// As in `IOPRIO_CLASS_BE`.
        class: String,
        /// Within the class.
        priority: i64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `process.execCPUAffinity`.
    #[error("cannot set process.execCPUAffinity to {cpus:?}: are these CPUs of the guest?")]
    Affinity {
        /// As asked for.
        cpus: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Refuses what has no effect, or none that the specification could mean.
pub fn check(process: &Process) -> Result<(), Unsupported> {
    if let Some(scheduler) = process.scheduler() {
        check_scheduler(scheduler)?;
    }
    if let Some(io) = process.io_priority()
        && !(0..=7).contains(&io.priority())
    {
        return Err(Unsupported::new(
            "process.ioPriority.priority",
            format!("{} is not between 0 and 7", io.priority()),
        ));
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        for (field, cpus) in [
            ("initial", affinity.initial()),
            ("final", affinity.cpu_affinity_final()),
        ] {
            if let Some(cpus) = cpus.as_ref().filter(|cpus| !cpus.is_empty()) {
                parse_cpus(cpus).map_err(|reason| {
                    Unsupported::new(format!("process.execCPUAffinity.{field}"), reason)
                })?;
            }
        }
    }
    Ok(())
}

fn check_scheduler(scheduler: &Scheduler) -> Result<(), Unsupported> {
    use LinuxSchedulerPolicy as Policy;
    let refuse = |field: &str, reason: String| {
        Err(Unsupported::new(
            format!("process.scheduler.{field}"),
            reason,
        ))
    };
    let policy = *scheduler.policy();
    if policy == Policy::SchedIso {
        return refuse("policy", "the kernel has no SCHED_ISO".into());
    }
    let of = format!("has no meaning for {policy}");
    let nice = scheduler.nice().filter(|nice| *nice != 0);
    if nice.is_some() && !matches!(policy, Policy::SchedOther | Policy::SchedBatch) {
        return refuse("nice", of);
    }
    if nice.is_some_and(|nice| !(-20..=19).contains(&nice)) {
        return refuse("nice", "is not between -20 and 19".into());
    }
    let priority = scheduler.priority().unwrap_or(0);
    match policy {
        Policy::SchedFifo | Policy::SchedRr if !(1..=99).contains(&priority) => {
            return refuse("priority", format!("{priority} is not between 1 and 99"));
        }
        Policy::SchedFifo | Policy::SchedRr => {}
        _ if priority != 0 => return refuse("priority", of),
        _ => {}
    }
    for (field, value) in [
        ("runtime", scheduler.runtime()),
        ("deadline", scheduler.deadline()),
        ("period", scheduler.period()),
    ] {
        if value.is_some_and(|value| value != 0) && policy != Policy::SchedDeadline {
            return refuse(field, of);
        }
    }
    let clamps = |flag: &LinuxSchedulerFlag| {
        matches!(
            flag,
            LinuxSchedulerFlag::SchedFlagUtilClampMin | LinuxSchedulerFlag::SchedFlagUtilClampMax
        )
    };
    match scheduler.flags().iter().flatten().find(|flag| clamps(flag)) {
        Some(flag) => refuse(
            "flags",
            format!("{flag}: the specification has no value to clamp to"),
        ),
        None => Ok(()),
    }
}

/// Sets what `process` names of the process `pid`.
pub fn apply(pid: i32, process: &Process) -> Result<(), SchedulingError> {
    if let Some(io) = process.io_priority() {
        set_io_priority(pid, io_priority(io)).map_err(|source| SchedulingError::IoPriority {
            class: io.class().to_string(),
            priority: io.priority(),
            source,
        })?;
    }
    if let Some(scheduler) = process.scheduler() {
        set_scheduling_attributes(pid, &attributes(scheduler)).map_err(|source| {
            SchedulingError::Scheduler {
                policy: scheduler.policy().to_string(),
                source,
            }
        })?;
    }
    Ok(())
}

/// `IOPRIO_PRIO_VALUE` of `linux/ioprio.h`.
fn io_priority(io: &LinuxIOPriority) -> i32 {
    let class = match io.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    class << 13 | io.priority() as i32
}

/// Policies as in `linux/sched.h`, flags as in `linux/sched/types.h`.
fn attributes(scheduler: &Scheduler) -> SchedulingAttributes {
    SchedulingAttributes {
        policy: match scheduler.policy() {
            LinuxSchedulerPolicy::SchedOther => 0,
            LinuxSchedulerPolicy::SchedFifo => 1,
            LinuxSchedulerPolicy::SchedRr => 2,
            LinuxSchedulerPolicy::SchedBatch => 3,
            LinuxSchedulerPolicy::SchedIso => 4,
            LinuxSchedulerPolicy::SchedIdle => 5,
            LinuxSchedulerPolicy::SchedDeadline => 6,
        },
        flags: scheduler.flags().iter().flatten().fold(0, |flags, flag| {
            flags
                | match flag {
                    LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                    LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                    LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                    LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                    LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                    LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                    LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
                }
        }),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).unsigned_abs(),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    }
}

/// Sets `process.execCPUAffinity.initial` of the caller, before it joins the
/// container's cgroup.
pub fn start_on(process: &Process) -> Result<(), SchedulingError> {
    let affinity = process.exec_cpu_affinity().as_ref();
    run_on(affinity.and_then(|affinity| affinity.initial().as_deref()))
}

/// Sets `process.execCPUAffinity.final` of the caller, in the container's cgroup.
pub fn go_on_on(process: &Process) -> Result<(), SchedulingError> {
    let affinity = process.exec_cpu_affinity().as_ref();
    run_on(affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()))
}

fn run_on(cpus: Option<&str>) -> Result<(), SchedulingError> {
    let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) else {
        return Ok(());
    };
    let failed = |source| SchedulingError::Affinity {
        cpus: cpus.to_owned(),
        source,
    };
    let set = parse_cpus(cpus).map_err(|reason| failed(io::Error::other(reason)))?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(|errno: Errno| failed(errno.into()))
}

/// A list like `0-3,7`.
fn parse_cpus(list: &str) -> Result<CpuSet, String> {
    let number = |text: &str| {
        text.trim()
            .parse::<usize>()
            .ok()
            .filter(|cpu| *cpu < CpuSet::count())
            .ok_or_else(|| format!("{text:?} in {list:?} is not the number of a CPU"))
    };
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        for cpu in first..=last {
            // Below the count, as checked.
            let _ = set.set(cpu);
        }
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn refused_field(process: &Value) -> Option<String> {
        let mut whole = json!({"user": {}, "cwd": "/"});
        for (key, value) in process.as_object().unwrap() {
            whole[key] = value.clone();
        }
        let process = serde_json::from_value(whole).unwrap();
        check(&process).err().map(|refused| refused.field)
    }

    #[test]
    fn check_what_a_policy_does_not_use_is_refused_by_name() {
        for (scheduler, field) in [
            (json!({"policy": "SCHED_ISO"}), "policy"),
            (json!({"policy": "SCHED_FIFO"}), "priority"),
            (json!({"policy": "SCHED_RR", "priority": 100}), "priority"),
            (json!({"policy": "SCHED_OTHER", "priority": 1}), "priority"),
            (json!({"policy": "SCHED_OTHER", "nice": 20}), "nice"),
            (json!({"policy": "SCHED_IDLE", "nice": 1}), "nice"),
            (json!({"policy": "SCHED_BATCH", "runtime": 1}), "runtime"),
            (json!({"policy": "SCHED_BATCH", "deadline": 1}), "deadline"),
            (json!({"policy": "SCHED_BATCH", "period": 1}), "period"),
            (
                json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"]}),
                "flags",
            ),
        ] {
            assert_eq!(
                refused_field(&json!({"scheduler": scheduler})),
                Some(format!("process.scheduler.{field}")),
                "{scheduler}"
            );
        }
        let io = json!({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}});
        assert_eq!(
            refused_field(&io),
            Some("process.ioPriority.priority".to_owned())
        );
        let affinity = json!({"execCPUAffinity": {"initial": "0", "final": "0-99999"}});
        assert_eq!(
            refused_field(&affinity),
            Some("process.execCPUAffinity.final".to_owned())
        );
    }

    #[test]
    fn check_each_policy_with_what_it_uses_is_accepted() {
        for scheduler in [
            json!({"policy": "SCHED_OTHER", "nice": -20, "flags": ["SCHED_RESET_ON_FORK"]}),
            json!({"policy": "SCHED_BATCH", "nice": 19}),
            json!({"policy": "SCHED_IDLE"}),
            json!({"policy": "SCHED_FIFO", "priority": 1}),
            json!({"policy": "SCHED_RR", "priority": 99}),
            json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3}),
        ] {
            assert_eq!(
                refused_field(&json!({"scheduler": scheduler})),
                None,
                "{scheduler}"
            );
        }
    }

    #[test]
    fn parse_cpus_takes_single_numbers_and_ranges() {
        let set = parse_cpus("0-2,5").unwrap();
        let cpus: Vec<_> = (0..8).filter(|cpu| set.is_set(*cpu).unwrap()).collect();
        assert_eq!(cpus, [0, 1, 2, 5]);
        assert!(parse_cpus("2-x").is_err());
    }
}
