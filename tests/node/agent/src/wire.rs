//! Frames: one byte of type, four bytes of payload length (little endian), the payload.

use std::io::{self, Read, Write};

/// The largest payload: an `Exec` with a long command line and environment. The kernel's own limit is 2 MiB.
pub const MAX_PAYLOAD: usize = 2 * 1024 * 1024;

/// A secret that lets its owner use the node, and nobody else on the same machine.
pub type Token = [u8; 32];

/// One of the three streams of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Towards the command.
    Stdin,
    /// From the command. With a terminal, everything it writes.
    Stdout,
    /// From the command.
    Stderr,
}

/// The size of a terminal in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// The command of a session.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Exec {
    /// The program, searched for on the environment's `PATH`, and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// Run on a terminal of this size instead of on pipes.
    pub tty: Option<WindowSize>,
}

/// What a node is told when it starts its own life as a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// From now on the only key to the node.
    pub token: Token,
    /// Its host name.
    pub hostname: String,
    /// The wall clock, in nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Fresh randomness: clones must not share their random numbers.
    pub seed: [u8; 64],
}

/// Everything that either side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Tool: I am the one who claimed the node; this is my protocol's version.
    Hello(u32, Token),
    /// Tool: the node is mine from now on.
    Claim(u32, Box<Claim>),
    /// Agent: go ahead.
    Welcome,
    /// Agent: no, and why. The connection ends.
    Refused(String),
    /// Tool: run this.
    Exec(Box<Exec>),
    /// Agent: it runs, with this pid.
    Started(u32),
    /// Bytes of a stream: at least one, at most [`crate::MAX_DATA`].
    Data(Stream, Vec<u8>),
    /// A stream has ended; said by its receiver, that nobody reads it any more.
    Eof(Stream),
    /// The receiver of a stream has used up this many bytes of it.
    Credit(Stream, u32),
    /// Tool: send this signal to the command's process group.
    Signal(i32),
    /// Tool: the terminal has a new size.
    Resize(WindowSize),
    /// Agent: the command has ended; its streams may still carry data.
    Exit(Exit),
    /// Tool: are you alive?
    Ping,
    /// Agent: yes.
    Pong,
}

/// A peer that does not keep to the protocol, or a connection that broke.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed, or ended within a frame.
    #[error("connection to the node")]
    Io(#[from] io::Error),
    /// A frame type that does not exist.
    #[error("frame of unknown type {0}")]
    UnknownType(u8),
    /// A payload larger than any legitimate one.
    #[error("frame payload of {0} bytes is too large")]
    TooLarge(usize),
    /// A payload that does not fit its type.
    #[error("malformed payload in a frame of type {0}")]
    Malformed(u8),
}

const HELLO: u8 = 1;
const CLAIM: u8 = 2;
const WELCOME: u8 = 3;
const REFUSED: u8 = 4;
const EXEC: u8 = 5;
const STARTED: u8 = 6;
const DATA: u8 = 7;
const EOF: u8 = 8;
const CREDIT: u8 = 9;
const SIGNAL: u8 = 10;
const RESIZE: u8 = 11;
const EXIT: u8 = 12;
const PING: u8 = 13;
const PONG: u8 = 14;

/// Writes one frame with a single `write_all`, so that frames written under one lock never interleave.
///
/// # Errors
/// [`WireError::TooLarge`] before anything is written, [`WireError::Io`].
pub fn write_frame(to: &mut impl Write, frame: &Frame) -> Result<(), WireError> {
    let mut bytes = vec![0; 5];
    let kind = encode(frame, &mut bytes);
    let length = bytes.len() - 5;
    if length > MAX_PAYLOAD {
        return Err(WireError::TooLarge(length));
    }
    bytes[0] = kind;
    bytes[1..5].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(to.write_all(&bytes)?)
}

/// Reads one frame; `None` when the connection ends between two frames.
///
/// # Errors
/// Any [`WireError`]; the connection is of no use afterwards.
pub fn read_frame(from: &mut impl Read) -> Result<Option<Frame>, WireError> {
    let mut kind = [0];
    loop {
        match from.read(&mut kind) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_PAYLOAD {
        return Err(WireError::TooLarge(length));
    }
    // Grows with what really arrives: a length alone reserves nothing.
    let mut payload = Vec::new();
    from.take(length as u64).read_to_end(&mut payload)?;
    if payload.len() != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    decode(kind[0], &payload).map(Some)
}

fn encode(frame: &Frame, out: &mut Vec<u8>) -> u8 {
    match frame {
        Frame::Hello(version, token) => {
            put_u32(out, *version);
            out.extend(token);
            HELLO
        }
        Frame::Claim(version, claim) => {
            put_u32(out, *version);
            out.extend(claim.token);
            out.extend(claim.unix_nanos.to_le_bytes());
            out.extend(claim.seed);
            put_bytes(out, claim.hostname.as_bytes());
            CLAIM
        }
        Frame::Welcome => WELCOME,
        Frame::Refused(reason) => {
            put_bytes(out, reason.as_bytes());
            REFUSED
        }
        Frame::Exec(exec) => {
            put_exec(out, exec);
            EXEC
        }
        Frame::Started(pid) => {
            put_u32(out, *pid);
            STARTED
        }
        Frame::Data(stream, bytes) => {
            out.push(stream_number(*stream));
            out.extend(bytes);
            DATA
        }
        Frame::Eof(stream) => {
            out.push(stream_number(*stream));
            EOF
        }
        Frame::Credit(stream, bytes) => {
            out.push(stream_number(*stream));
            put_u32(out, *bytes);
            CREDIT
        }
        Frame::Signal(number) => {
            out.extend(number.to_le_bytes());
            SIGNAL
        }
        Frame::Resize(size) => {
            put_window(out, *size);
            RESIZE
        }
        Frame::Exit(exit) => {
            let (how, number) = match exit {
                Exit::Code(code) => (0, code),
                Exit::Signal(signal) => (1, signal),
            };
            out.push(how);
            out.extend(number.to_le_bytes());
            EXIT
        }
        Frame::Ping => PING,
        Frame::Pong => PONG,
    }
}

fn decode(kind: u8, payload: &[u8]) -> Result<Frame, WireError> {
    if !(HELLO..=PONG).contains(&kind) {
        return Err(WireError::UnknownType(kind));
    }
    let mut fields = Fields { rest: payload };
    decode_fields(kind, &mut fields)
        .filter(|_| fields.rest.is_empty())
        .ok_or(WireError::Malformed(kind))
}

fn decode_fields(kind: u8, fields: &mut Fields<'_>) -> Option<Frame> {
    Some(match kind {
        HELLO => Frame::Hello(fields.u32()?, fields.array()?),
        CLAIM => Frame::Claim(
            fields.u32()?,
            Box::new(Claim {
                token: fields.array()?,
                unix_nanos: u64::from_le_bytes(fields.array()?),
                seed: fields.array()?,
                hostname: fields.text()?,
            }),
        ),
        WELCOME => Frame::Welcome,
        REFUSED => Frame::Refused(fields.text()?),
        EXEC => Frame::Exec(Box::new(fields.exec()?)),
        STARTED => Frame::Started(fields.u32()?),
        DATA => {
            let stream = fields.stream()?;
            let bytes = std::mem::take(&mut fields.rest);
            if bytes.is_empty() || bytes.len() > crate::MAX_DATA {
                return None;
            }
            Frame::Data(stream, bytes.to_vec())
        }
        EOF => Frame::Eof(fields.stream()?),
        CREDIT => Frame::Credit(fields.stream()?, fields.u32()?),
        SIGNAL => Frame::Signal(fields.i32()?),
        RESIZE => Frame::Resize(fields.window()?),
        EXIT => match fields.byte()? {
            0 => Frame::Exit(Exit::Code(fields.i32()?)),
            1 => Frame::Exit(Exit::Signal(fields.i32()?)),
            _ => return None,
        },
        PING => Frame::Ping,
        PONG => Frame::Pong,
        _ => return None,
    })
}

fn stream_number(stream: Stream) -> u8 {
    match stream {
        Stream::Stdin => 0,
        Stream::Stdout => 1,
        Stream::Stderr => 2,
    }
}

fn put_u32(out: &mut Vec<u8>, number: u32) {
    out.extend(number.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // Longer than MAX_PAYLOAD is refused as a whole, so the length fits.
    put_u32(out, bytes.len() as u32);
    out.extend(bytes);
}

fn put_window(out: &mut Vec<u8>, size: WindowSize) {
    out.extend(size.rows.to_le_bytes());
    out.extend(size.columns.to_le_bytes());
}

fn put_exec(out: &mut Vec<u8>, exec: &Exec) {
    put_u32(out, exec.argv.len() as u32);
    for arg in &exec.argv {
        put_bytes(out, arg);
    }
    put_u32(out, exec.env.len() as u32);
    for (name, value) in &exec.env {
        put_bytes(out, name);
        put_bytes(out, value);
    }
    put_bytes(out, &exec.cwd);
    out.push(u8::from(exec.tty.is_some()));
    if let Some(size) = exec.tty {
        put_window(out, size);
    }
}

/// What is left of a payload. Every method takes its field off the front, or returns `None` when it is not all there.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let length = self.u32()?;
        self.take(length as usize).map(<[u8]>::to_vec)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }

    fn stream(&mut self) -> Option<Stream> {
        match self.byte()? {
            0 => Some(Stream::Stdin),
            1 => Some(Stream::Stdout),
            2 => Some(Stream::Stderr),
            _ => None,
        }
    }

    fn window(&mut self) -> Option<WindowSize> {
        Some(WindowSize {
            rows: self.u16()?,
            columns: self.u16()?,
        })
    }

    fn exec(&mut self) -> Option<Exec> {
        // Counts come from the peer: elements are taken one by one and nothing is reserved for them.
        let mut exec = Exec::default();
        for _ in 0..self.u32()? {
            exec.argv.push(self.bytes()?);
        }
        for _ in 0..self.u32()? {
            exec.env.push((self.bytes()?, self.bytes()?));
        }
        exec.cwd = self.bytes()?;
        exec.tty = match self.byte()? {
            0 => None,
            1 => Some(self.window()?),
            _ => return None,
        };
        Some(exec)
    }
}

#[cfg(test)]
mod tests;
