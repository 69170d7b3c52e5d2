//! The size of this process's terminal.
#![expect(unsafe_code, reason = "a terminal ioctl")]

use std::io;
use std::os::fd::AsRawFd;

use bulkhead_node::WindowSize;
use nix::libc::winsize;

mod raw {
    nix::ioctl_read_bad!(window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);
}

/// `None` when standard input is no terminal.
pub(super) fn size() -> Option<WindowSize> {
    let mut size = winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel writes one winsize, into the live one that is given.
    unsafe { raw::window_size(io::stdin().as_raw_fd(), &raw mut size) }.ok()?;
    Some(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}
