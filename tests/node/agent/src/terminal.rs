//! Pseudo-terminals for interactive commands.
#![expect(
    unsafe_code,
    reason = "terminal ioctls, and code between fork and exec"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::pty::{Winsize, openpty};
use node_agent::wire::WindowSize;

mod raw {
    nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, nix::pty::Winsize);
    nix::ioctl_write_int_bad!(set_controlling_terminal, nix::libc::TIOCSCTTY);
}

/// Gives `command` a terminal of its own for all three streams, in a new session, and returns the other end of it.
pub(crate) fn attach(command: &mut Command, size: WindowSize) -> io::Result<File> {
    let pty = openpty(&winsize(size), None)?;
    command
        .stdin(Stdio::from(pty.slave.try_clone()?))
        .stdout(Stdio::from(pty.slave.try_clone()?))
        .stderr(Stdio::from(pty.slave));
    // SAFETY: both are plain system calls, which are async-signal-safe and touch no memory; descriptor 0 is the terminal
    // by now, since the standard library has placed the three streams before it calls this.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            raw::set_controlling_terminal(0, 0)?;
            Ok(())
        });
    }
    Ok(File::from(pty.master))
}

/// Tells the terminal its size; the foreground processes get SIGWINCH.
pub(crate) fn resize(master: &File, size: WindowSize) -> io::Result<()> {
    let size = winsize(size);
    // SAFETY: the argument is a live winsize, which the kernel only reads.
    unsafe { raw::set_window_size(master.as_raw_fd(), &raw const size) }?;
    Ok(())
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
