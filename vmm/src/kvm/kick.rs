//! Gets a vCPU thread out of the guest.
//!
//! The stopper sets the stop flag and sends a signal. Its handler sets
//! `immediate_exit` in the vCPU's `kvm_run` page, so that `KVM_RUN` returns at
//! once even when the signal came just before it: no window, no repetition.
#![expect(
    unsafe_code,
    reason = "a signal handler writes to the kvm_run page of its own thread"
)]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// The page of the vCPU that this thread runs. `const` and without a
    /// destructor: reading it in a signal handler allocates and locks nothing.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: non-null only between `Kickable::new` and its drop, during which the page is
        // mapped; written by this thread only, and one byte, so that the interrupted code sees
        // either value. Volatile because the kernel is the reader.
        unsafe { ptr::write_volatile(&raw mut (*page).immediate_exit, 1) };
    }
}

/// Makes the kick's signal known to the process. Must precede the first vCPU
/// thread.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn install() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Kicks the vCPU of a thread.
pub fn kick(thread: &JoinHandle<()>) {
    // Fails only for a thread that has ended, which needs no kick.
    let _ = thread.kill(SIGRTMIN());
}

/// While it lives, a kick ends the `KVM_RUN` of this thread.
pub struct Kickable<'a>(&'a mut VcpuFd);

impl<'a> Kickable<'a> {
    /// The calling thread runs this vCPU from now on.
    pub fn new(vcpu: &'a mut VcpuFd) -> Self {
        RUN_PAGE.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self(vcpu)
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        self.0
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}
