//! The network device: any rings and frames of the guest, while frames come for
//! it from the host, or its interface goes.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;

use arbitrary::{Result, Unstructured};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use vm_memory::{Bytes, GuestAddress};
use vmm_devices::stepped::SteppedNet;
use vmm_virtio::Activation;
use vmm_virtio::mock::{self, Buffer, Raised};

use crate::driver::{BUFFERS, Driver};

/// Entries of the receive and the transmit queue.
const SIZES: [u16; 2] = [64, 64];
const RX: usize = 0;
const TX: usize = 1;
/// Descriptors of one frame that the guest sends.
const PIECES: u16 = 3;
/// Room for any frame, and the distance of such places: one for each entry, where
/// no sound driver has anything else.
const PLACE: u64 = 0x1_1000;
const RX_PLACES: u64 = 0x10_0000;
/// A device that does not come to rest in so many turns spins.
const MAX_TURNS: usize = 1000;
const HEADER: usize = 12;
/// Ethernet's header with a VLAN's tag, 64 KiB.
const MAX_FRAME: usize = HEADER + 18 + 0x1_0000;

/// Feature bits by which the device decides (virtio 1.2 section 5.1.3).
const CSUM: u64 = 1;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
/// Each with what it needs: bits of an input's first byte.
const FEATURES: [u64; 6] = [
    1 << 15,                              // MRG_RXBUF
    1 << 1 | 1 << 7 | 1 << 8,             // GUEST_CSUM, GUEST_TSO4, GUEST_TSO6
    CSUM,                                 // and nothing that needs it
    CSUM | HOST_TSO4 | HOST_TSO6,         // segments
    CSUM | HOST_TSO6 | HOST_ECN | 1 << 9, // GUEST_ECN may lack what it needs
    1 << 16,                              // STATUS
];

struct Play<'a> {
    input: Unstructured<'a>,
    device: SteppedNet,
    driver: Driver,
    features: u64,
    /// The other end; nothing when it has gone.
    peer: Option<OwnedFd>,
    raised: mpsc::Receiver<Raised>,
    /// The driver has done nothing yet that no sound one does: it can be held to
    /// get what it is sent.
    sound: bool,
    /// Receive buffers that the device has, with their places.
    room: VecDeque<(u16, u64)>,
    /// Requests that a sound driver has in the transmit queue.
    sending: VecDeque<u16>,
    turn: u64,
    /// Frames that were sent to the guest, by their lengths and numbers.
    coming: VecDeque<(usize, u8)>,
    number: u8,
    /// Frames that did not come.
    missed: u64,
}

/// Two ends that keep packets apart.
pub fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("socketpair")
}

/// A frame for the guest.
fn frame((length, number): (usize, u8)) -> Vec<u8> {
    let bytes = (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(number));
    [0; HEADER].into_iter().chain(bytes).collect()
}

/// Tries one input.
pub fn run(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    let chosen = FEATURES.iter().enumerate();
    let features = chosen
        .filter(|(bit, _)| choice & (1 << bit) != 0)
        .fold(0, |features, (_, feature)| features | feature);
    let driver = Driver::new(&SIZES, 8 << 20);
    let (interrupt, raised) = mock::interrupt();
    let queues = (0..).zip(&driver.queues);
    let activation = Activation {
        memory: driver.memory.clone(),
        features,
        queues: queues
            .map(|(index, queue)| queue.active(index, choice & 0x40 != 0))
            .collect(),
        interrupt,
    };
    let (peer, ours) = pair();
    let mtu = if choice & 0x80 == 0 { 1500 } else { 68 };
    let mut play = Play {
        input: Unstructured::new(data),
        device: SteppedNet::try_new(mtu, ours, activation).expect("device"),
        driver,
        features,
        peer: Some(peer),
        raised,
        sound: true,
        room: VecDeque::new(),
        sending: VecDeque::new(),
        turn: 0,
        coming: VecDeque::new(),
        number: 0,
        missed: 0,
    };
    while !play.input.is_empty() {
        match play.act() {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => break,
        }
    }
    if play.settle() {
        play.finish();
    }
}

impl Play<'_> {
    /// False when the device is at an end.
    fn act(&mut self) -> Result<bool> {
        let choice: u8 = self.input.arbitrary()?;
        match choice % 16 {
            0..=3 => self.host_sends()?,
            4..=6 => {
                let length = match choice >> 6 {
                    0 => 12 + u64::from(self.input.arbitrary::<u8>()?),
                    1 => 0x600,
                    2 => 0x1000,
                    _ => PLACE,
                };
                for _ in 0..=self.input.arbitrary::<u8>()? % 64 {
                    self.offer_room(length as u32);
                }
            }
            7..=10 => self.guest_sends(choice >> 5)?,
            11 if choice & 0x20 == 0 => {
                self.sound = false;
                let queue = usize::from(choice >> 7);
                self.driver.misbehave(queue, &mut self.input)?;
            }
            12 => self.host_reads(),
            13 if choice >= 0xf0 => self.peer = None,
            _ => {}
        }
        Ok(choice & 0x10 != 0 || self.settle())
    }

    fn host_sends(&mut self) -> Result<()> {
        let [form, fine]: [u8; 2] = self.input.arbitrary()?;
        let length = match form % 8 {
            0..=3 => usize::from(fine),
            4 => 18 + 1500 - 128 + usize::from(fine),
            5 => usize::from(fine) * 64,
            6 => 0xffff - 128 + usize::from(fine),
            _ => usize::from(fine) * 256 + usize::from(form),
        };
        self.number = self.number.wrapping_add(1);
        let sent = (length, self.number);
        if let Some(peer) = &self.peer
            && send(peer.as_raw_fd(), &frame(sent), MsgFlags::empty()).is_ok()
        {
            self.coming.push_back(sent);
        }
        Ok(())
    }

    fn offer_room(&mut self, length: u32) {
        if self.room.len() < usize::from(SIZES[RX]) || !self.sound {
            let address = RX_PLACES + PLACE * (self.turn % u64::from(SIZES[RX]));
            self.turn += 1;
            let head = self.driver.queues[RX].offer(&[Buffer {
                address,
                length,
                writable: true,
            }]);
            self.room.push_back((head, address));
        }
    }

    /// The guest sends a frame: a sound one, most of the time.
    fn guest_sends(&mut self, form: u8) -> Result<()> {
        let fits = (self.sending.len() as u16 + 1) * PIECES <= SIZES[TX];
        if self.sound && !fits {
            return Ok(());
        }
        let mut header = [0; HEADER];
        let length = match form {
            0..=2 => u32::from(self.input.arbitrary::<u8>()?),
            3 => {
                header = self.input.arbitrary()?;
                100
            }
            4 | 5 => {
                header = [1, 0, 0, 0, 0, 5, 14, 0, 6, 0, 0, 0];
                let kinds = [0, 1, 3, 4, 5, 0x80, 0x81, 0x84];
                header[1] = *self.input.choose(&kinds)?;
                100
            }
            6 => u32::from(self.input.arbitrary::<u16>()?),
            _ => 0x1_0000 + u32::from(self.input.arbitrary::<u8>()?),
        };
        let at = BUFFERS;
        self.driver.put(at, &header);
        let split = u32::from(self.input.arbitrary::<u8>()?).min(length);
        let pieces = [(0, split), (split, 12), (split + 12, length - split)];
        // The header may lie across two.
        let pieces = pieces.map(|(offset, length)| Buffer {
            address: at + u64::from(offset),
            length,
            writable: false,
        });
        let head = self.driver.queues[TX].offer(&pieces);
        self.sending.push_back(head);
        Ok(())
    }

    /// What reaches the host is whole, and asks for nothing that the driver has
    /// not negotiated.
    fn host_reads(&mut self) {
        let Some(peer) = &self.peer else { return };
        let mut frame = vec![0; MAX_FRAME + 1];
        while let Ok(length) = recv(peer.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            assert!((HEADER + 14..=MAX_FRAME).contains(&length), "{length}");
            let has = |feature| self.features & feature != 0;
            assert!(frame[0] == 0 || frame[0] == 1 && has(CSUM));
            let segments = match frame[1] & 0x7f {
                0 => frame[1] == 0,
                1 => frame[0] == 1 && has(HOST_TSO4),
                4 => frame[0] == 1 && has(HOST_TSO6),
                _ => false,
            };
            assert!(segments && (frame[1] < 0x80 || has(HOST_ECN)));
            assert_eq!(frame[10..12], [0, 0]);
        }
    }

    /// The device's thread gets to its next sleep. False when it is at an end.
    fn settle(&mut self) -> bool {
        let mut turns = 0;
        // Twice: the first may have been told of what the second does.
        for _ in 0..2 {
            loop {
                match self.device.turn() {
                    Ok(false) => break,
                    Ok(true) => turns += 1,
                    Err(fault) => {
                        assert!(!self.sound, "a sound driver broke the device: {fault}");
                        return false;
                    }
                }
                assert!(turns < MAX_TURNS, "a device that never comes to rest");
            }
        }
        assert_eq!(self.device.is_link_up(), self.peer.is_some());
        let mut told = self.raised.try_iter();
        let harmless = |it| matches!(it, Raised::Used(_) | Raised::Config);
        assert!(told.all(harmless));
        while let Some((head, written)) = self.driver.queues[TX].take_used() {
            assert_eq!(written, 0);
            assert!(!self.sound || self.sending.pop_front() == Some(head));
        }
        self.guest_reads();
        true
    }

    fn guest_reads(&mut self) {
        let mut got = Vec::new();
        let mut buffers = 0;
        while let Some((head, written)) = self.driver.queues[RX].take_used() {
            assert!(written > 0 && written as usize <= MAX_FRAME);
            if !self.sound {
                continue;
            }
            let (expected, address) = self.room.pop_front().expect("no more than it was given");
            assert_eq!(head, expected, "in their order");
            let start = got.len();
            got.resize(start + written as usize, 0);
            let place = GuestAddress(address);
            let read = self.driver.memory.read_slice(&mut got[start..], place);
            read.expect("in memory");
            buffers += 1;
            if buffers == u16::from_le_bytes([got[10], got[11]]) {
                got[10..12].fill(0);
                // Those before it were dropped.
                while frame(self.coming.pop_front().expect("one that was sent")) != got {
                    self.missed += 1;
                }
                got.clear();
                buffers = 0;
            }
        }
        assert_eq!(buffers, 0, "a frame of which a part is missing");
        assert!(
            self.missed <= self.device.dropped(),
            "dropped and not counted"
        );
    }

    /// With room for everything, everything comes, unless it was counted; and
    /// what a pause gives back has been completed, or was never taken.
    fn finish(mut self) {
        loop {
            self.host_reads();
            let before = self.coming.len() + self.sending.len();
            if self.sound {
                for _ in 0..SIZES[RX] {
                    self.offer_room(PLACE as u32);
                }
            }
            if !self.settle() {
                return;
            }
            if self.coming.len() + self.sending.len() == before {
                break;
            }
        }
        if self.sound && self.peer.is_some() {
            let missed = self.missed + self.coming.len() as u64;
            assert!(
                missed <= self.device.dropped(),
                "{missed} frames did not come"
            );
            assert!(self.sending.is_empty(), "frames that are not taken");
        }
        for queue in self.device.into_queues() {
            let state = queue.queue.state();
            assert_eq!(state.next_avail, state.next_used);
        }
    }
}
