//! The line with which a host client says where it wants to go.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

/// `CONNECT ` and a port of up to ten digits, with room to spare.
const MAX_LINE_BYTES: usize = 32;

/// A line being read.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    line: Vec<u8>,
}

/// How far it got.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More is to come.
    Incomplete,
    /// The port that is asked for.
    Port(u32),
    /// Not such a line, or the client went away.
    Malformed,
}

impl Greeting {
    /// Reads what there is, and not a byte beyond the line: what follows is
    /// the stream's.
    pub(super) fn read(&mut self, stream: &UnixStream) -> io::Result<Progress> {
        loop {
            let mut seen = [0; MAX_LINE_BYTES];
            let count = match recv(stream.as_raw_fd(), &mut seen, MsgFlags::MSG_PEEK) {
                Ok(0) => return Ok(Progress::Malformed),
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(nix::Error::EAGAIN) => return Ok(Progress::Incomplete),
                Err(error) => return Err(error.into()),
            };
            let end = seen[..count].iter().position(|&byte| byte == b'\n');
            let take = end.map_or(count, |end| end + 1);
            let mut taken = vec![0; take];
            (&*stream).read_exact(&mut taken)?;
            self.line.extend_from_slice(&taken);
            if self.line.len() > MAX_LINE_BYTES {
                return Ok(Progress::Malformed);
            }
            if end.is_some() {
                return Ok(parse(&self.line).map_or(Progress::Malformed, Progress::Port));
            }
        }
    }
}

/// The port of `CONNECT <port>\n`: digits only, and no port that a guest cannot
/// listen on (`VMADDR_PORT_ANY`).
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (port != u32::MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn pair() -> (UnixStream, UnixStream) {
        let (client, server) = UnixStream::pair().expect("pair");
        server.set_nonblocking(true).expect("nonblocking");
        (client, server)
    }

    #[test]
    fn read_line_in_pieces_gives_the_port_and_leaves_the_rest() {
        let (mut client, mut server) = pair();
        let mut greeting = Greeting::default();
        client.write_all(b"CONN").expect("write");
        assert_eq!(greeting.read(&server).expect("read"), Progress::Incomplete);
        client.write_all(b"ECT 1024\nrest").expect("write");
        assert_eq!(greeting.read(&server).expect("read"), Progress::Port(1024));
        let mut rest = [0; 4];
        server.read_exact(&mut rest).expect("rest");
        assert_eq!(&rest, b"rest");
    }

    #[test]
    fn read_endless_line_is_malformed() {
        let (mut client, server) = pair();
        client.write_all(&[b'1'; 1000]).expect("write");
        let progress = Greeting::default().read(&server).expect("read");
        assert_eq!(progress, Progress::Malformed);
    }

    #[test]
    fn read_from_client_that_went_away_is_malformed() {
        let (client, server) = pair();
        drop(client);
        let progress = Greeting::default().read(&server).expect("read");
        assert_eq!(progress, Progress::Malformed);
    }

    #[test]
    fn parse_anything_but_connect_and_digits_is_nothing() {
        for line in [
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 1 \n",
            "CONNECT 0x1\n",
            "connect 1\n",
            "CONNECT 4294967295\n",
            "CONNECT 4294967296\n",
            "CONNECT 1\r\n",
            "CONNECT 1",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(parse(b"CONNECT 0\n"), Some(0));
    }

    proptest! {
        #[test]
        fn parse_any_bytes_never_panics(line in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&line);
        }
    }
}
