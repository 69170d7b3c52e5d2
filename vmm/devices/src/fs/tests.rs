//! Without a file server; tests/virtiofsd.rs has those with one.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_virtio::mock::{self, MockQueue, Raised};
use vmm_virtio::{Activation, VirtioDevice};

use super::{FileSystem, FileSystemConfig, FileSystemError, ServerFailed};

const LONG: Duration = Duration::from_secs(20);

fn device(tag: &str) -> (FileSystem, UnixStream, mpsc::Receiver<ServerFailed>) {
    let (socket, server) = UnixStream::pair().expect("pair");
    let (fail, failed) = mpsc::channel();
    let device = FileSystem::try_new(FileSystemConfig {
        tag: tag.to_owned(),
        socket,
        failed: Arc::new(move |failure| {
            let _ = fail.send(failure);
        }),
    })
    .expect("device");
    (device, server, failed)
}

fn activation() -> (Activation, mpsc::Receiver<Raised>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let priority = MockQueue::new(&memory, 0x1000, 128);
    let requests = MockQueue::new(&memory, 0x10000, 1024);
    let (interrupt, raised) = mock::interrupt();
    let activation = Activation {
        memory,
        features: 0,
        queues: vec![priority.active(0, true), requests.active(1, true)],
        interrupt,
    };
    (activation, raised)
}

#[test]
fn server_that_has_ended_is_told_once_and_the_device_does_not_start_again() {
    let (mut device, server, failed) = device("share");
    drop(server);
    let (first, raised) = activation();
    device.activate(first).expect("starts");
    let failure = failed.recv_timeout(LONG).expect("told");
    assert!(matches!(failure, ServerFailed::Ended { .. }), "{failure:?}");
    assert_eq!(
        failure.to_string(),
        "file server (virtiofsd) of share share ended; check its log"
    );
    assert_eq!(raised.recv_timeout(LONG), Ok(Raised::NeedsReset));
    device.reset();
    let error = device.activate(activation().0).expect_err("refused");
    assert_eq!(error.to_string(), "file system share cannot start");
    assert!(failed.try_recv().is_err());
}

#[test]
fn server_that_does_not_answer_does_not_keep_a_reset() {
    let (mut device, server, failed) = device("share");
    device.activate(activation().0).expect("starts");
    device.reset();
    assert!(failed.recv_timeout(LONG).is_ok());
    drop(server);
}

#[test]
fn server_that_talks_nonsense_is_told() {
    use std::io::Write;
    let (mut device, mut server, failed) = device("share");
    server.write_all(&[0xa5; 4096]).expect("write");
    device.activate(activation().0).expect("starts");
    assert!(failed.recv_timeout(LONG).is_ok());
}

#[test]
fn driver_with_one_queue_is_refused_and_may_try_again() {
    let (mut device, _server, failed) = device("share");
    let (mut short, _) = activation();
    short.queues.pop();
    assert!(device.activate(short).is_err());
    device.activate(activation().0).expect("starts");
    assert!(failed.try_recv().is_err());
}

#[test]
fn config_space_holds_tag_and_one_request_queue() {
    let (device, _server, _failed) = device("pod");
    let mut space = [0xff; 44];
    device.read_config(0, &mut space);
    assert_eq!(&space[..3], b"pod");
    assert_eq!(space[3..36], [0; 33]);
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn try_new_with_a_tag_that_does_not_fit_is_refused() {
    for tag in [String::new(), "x".repeat(37)] {
        let (socket, _server) = UnixStream::pair().expect("pair");
        let made = FileSystem::try_new(FileSystemConfig {
            tag,
            socket,
            failed: Arc::new(|_| ()),
        });
        assert!(matches!(made, Err(FileSystemError::Tag { .. })));
    }
}

#[test]
fn restore_of_another_shares_state_is_refused() {
    let (one, _server, _failed) = device("one");
    let (mut other, _other_server, _other_failed) = device("other");
    let error = other.restore(&one.save()).expect_err("refused");
    assert_eq!(error.reason, "it is of share one");
    other.restore(&other.save()).expect("its own");
}
