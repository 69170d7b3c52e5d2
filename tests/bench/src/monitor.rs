//! `bulkhead-vmm` launched bare, without a jail, over its control socket.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{
    socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, setsockopt,
        socketpair, sockopt,
    },
    time::{TimeVal, TimeValLike},
};
use vmm_config::{
    Boot, FdIndex, Memory, Vcpus, VmConfig,
    control::{self, Event, ExitReason, MAX_MESSAGE_BYTES, Request, Timings},
};

/// Boots a guest whose init resets at once, and waits until the monitor is
/// gone.
///
/// # Errors
/// When the guest ends in any other way, or says nothing for `limit`.
pub fn boot(vmm: &Path, kernel: &Path, initramfs: &Path, limit: Duration) -> Result<Timings> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let seconds = i64::try_from(limit.as_secs())?;
    setsockopt(&ours, sockopt::ReceiveTimeout, &TimeVal::seconds(seconds))?;
    // The monitor finds its socket at descriptor 3. dup2 in the shell keeps
    // this launcher free of code between fork and exec.
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg("exec \"$0\" 3<&0 </dev/null")
        .arg(vmm)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .spawn()
        .with_context(|| format!("cannot execute {}", vmm.display()))?;
    send_boot(&ours, kernel, initramfs)?;
    let timings = match receive(&ours)? {
        Event::Started(timings) => timings,
        other => bail!("the monitor answered {other:?}"),
    };
    match receive(&ours)? {
        Event::Exited(exit) if exit.reason == ExitReason::Reset => {}
        other => bail!("the guest did not reset: {other:?}"),
    }
    child.wait()?;
    Ok(timings)
}

fn send_boot(socket: &OwnedFd, kernel: &Path, initramfs: &Path) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let files = [kvm, open(kernel)?, open(initramfs)?];
    let config = VmConfig {
        kvm: FdIndex(0),
        vcpus: Vcpus { boot: 1, max: 1 },
        memory: Memory {
            size_mib: 512,
            max_mib: 512,
        },
        boot: Boot {
            kernel: FdIndex(1),
            initramfs: Some(FdIndex(2)),
            command_line: String::new(),
        },
        console: None,
        vsock: None,
        file_systems: Vec::new(),
    };
    let packet = control::encode(&Request::Boot(Box::new(config)));
    let descriptors = files.each_ref().map(AsRawFd::as_raw_fd);
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&packet)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> Result<Event> {
    let mut packet = vec![0; MAX_MESSAGE_BYTES];
    let mut parts = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty())
        .context("waiting for the monitor")?;
    let length = message.bytes;
    ensure!(length > 0, "the monitor closed its socket");
    Ok(control::decode(&packet[..length])?)
}
