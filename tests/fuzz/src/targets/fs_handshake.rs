//! What a file server says on its vhost-user socket while the device introduces
//! itself.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_devices::stepped::SteppedFileSystem;
use vmm_virtio::Activation;
use vmm_virtio::mock;

use crate::driver::Driver;

/// Below what the socket's buffer holds: nobody reads while we write.
const MAX_BYTES: usize = 16 * 1024;

/// Tries one input.
pub fn run(data: &[u8]) {
    let (socket, mut server) = UnixStream::pair().expect("pair");
    let driver = Driver::new(&[16, 16], 0x4_0000);
    let (interrupt, _raised) = mock::interrupt();
    let queues = (0..).zip(&driver.queues);
    let activation = Activation {
        memory: driver.memory.clone(),
        features: 0,
        queues: queues
            .map(|(index, queue)| queue.active(index, false))
            .collect(),
        interrupt,
    };
    let device = SteppedFileSystem::try_new(activation, socket).expect("memory");
    let mut device = device.expect("both queues");
    let data = &data[..data.len().min(MAX_BYTES)];
    server.write_all(data).expect("room in the buffer");
    // Whoever waits for more than was said learns that there is none.
    server.shutdown(Shutdown::Write).expect("shutdown");
    let _ = device.start();
}
