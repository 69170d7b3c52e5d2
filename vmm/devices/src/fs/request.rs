//! FUSE requests, as far as they are checked before a file server sees them
//! (Linux include/uapi/linux/fuse.h, protocol 7.38).
//!
//! The file server ends itself on a malformed request, and every container of
//! the pod would lose its files with it. So each request is checked against
//! what its operation needs: that its parts are there, that names end where
//! they should, and that the reply fits.

/// `struct fuse_in_header`.
pub(super) const IN_HEADER_BYTES: usize = 40;
/// `struct fuse_out_header`.
pub(super) const OUT_HEADER_BYTES: usize = 16;
/// Most payload of one request: `max_write` and the most that the file server
/// reads at a time.
pub(super) const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Most bytes of a request: payload, header and fixed part, within the limit of
/// the file server (a page more than the payload).
pub(super) const MAX_REQUEST_BYTES: usize = MAX_PAYLOAD_BYTES + 4096;
/// Most bytes of a reply.
pub(super) const MAX_REPLY_BYTES: usize = MAX_PAYLOAD_BYTES + OUT_HEADER_BYTES;
/// `struct fuse_write_in`, with the header before it: all of a write but the
/// payload.
pub(super) const WRITE_PREFIX_BYTES: usize = IN_HEADER_BYTES + 40;

pub(super) const FUSE_FORGET: u32 = 2;
pub(super) const FUSE_WRITE: u32 = 16;
pub(super) const FUSE_INIT: u32 = 26;
pub(super) const FUSE_INTERRUPT: u32 = 36;
pub(super) const FUSE_DESTROY: u32 = 38;
pub(super) const FUSE_BATCH_FORGET: u32 = 42;

/// `FUSE_SETXATTR_EXT` in `flags` of the reply to `FUSE_INIT`.
pub(super) const INIT_SETXATTR_EXT: u32 = 1 << 29;
/// `FUSE_INIT_EXT` in `flags`: `flags2` follows.
const INIT_EXT: u32 = 1 << 30;
/// `FUSE_SECURITY_CTX`, bit 32 of all flags, in `flags2`.
const INIT_SECURITY_CTX: u32 = 1 << 0;
/// `FUSE_EXT_GROUPS`: the one extension of requests that is passed on.
const EXT_GROUPS: u32 = 32;
/// `NGROUPS_MAX`.
const MAX_GROUPS: usize = 65536;

/// `struct fuse_entry_out`, `fuse_attr_out`, `fuse_open_out`.
const ENTRY: usize = 128;
const ATTR: usize = 104;
const OPEN: usize = 16;
/// `PATH_MAX` without its NUL: what a link can hold.
const LINK_TARGET: usize = 4095;

/// `struct fuse_in_header`, as far as it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InHeader {
    pub(super) length: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    /// Extensions at the end, in units of 8 bytes.
    extensions: u16,
}

impl InHeader {
    pub(super) fn decode(bytes: &[u8; IN_HEADER_BYTES]) -> Self {
        Self {
            length: u32_at(bytes, 0),
            opcode: u32_at(bytes, 4),
            unique: u64::from(u32_at(bytes, 8)) | u64::from(u32_at(bytes, 12)) << 32,
            extensions: u16::from_le_bytes([bytes[36], bytes[37]]),
        }
    }

    /// Never answered.
    pub(super) fn is_without_reply(self) -> bool {
        matches!(
            self.opcode,
            FUSE_FORGET | FUSE_BATCH_FORGET | FUSE_INTERRUPT
        )
    }
}

/// `struct fuse_out_header` for an error, or for success without a body.
pub(super) fn reply_header(unique: u64, errno: i32) -> [u8; OUT_HEADER_BYTES] {
    let mut bytes = [0; OUT_HEADER_BYTES];
    bytes[0..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&(-errno).to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// Why a request is not passed on: the error number it is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused(pub(super) i32);

const MALFORMED: Refused = Refused(nix::libc::EINVAL);
const UNKNOWN: Refused = Refused(nix::libc::ENOSYS);

/// What a request looks like after its header.
enum Shape {
    /// A fixed part, and nothing else of interest.
    Fixed(usize),
    /// A fixed part, then so many names, each ending with a NUL.
    Names(usize, usize),
    /// Like names, then extensions.
    Creation(usize, usize),
    Init,
    Write,
    SetXattr,
    BatchForget,
}

/// What its reply can be at most, without the header.
enum Reply {
    None,
    Fixed(usize),
    /// As many bytes as the `u32` at this offset of the request's body says.
    Sized(usize),
    /// Like that, and if it says 0 the size that would be needed.
    SizedOrSize(usize),
}

/// What each operation must look like; nothing for those that the file server
/// does not know or does not implement.
fn operation(opcode: u32) -> Option<(Shape, Reply)> {
    use Reply::{None as NoReply, Sized as SizedBy, SizedOrSize};
    use Shape::{Creation, Fixed, Names};
    let fixed = Reply::Fixed;
    Some(match opcode {
        1 => (Names(0, 1), fixed(ENTRY)), // LOOKUP
        FUSE_FORGET => (Fixed(8), NoReply),
        3 => (Fixed(16), fixed(ATTR)),            // GETATTR
        4 => (Fixed(88), fixed(ATTR)),            // SETATTR
        5 => (Fixed(0), fixed(LINK_TARGET)),      // READLINK
        6 => (Creation(0, 2), fixed(ENTRY)),      // SYMLINK
        8 => (Creation(16, 1), fixed(ENTRY)),     // MKNOD
        9 => (Creation(8, 1), fixed(ENTRY)),      // MKDIR
        10 | 11 => (Names(0, 1), fixed(0)),       // UNLINK, RMDIR
        12 => (Names(8, 2), fixed(0)),            // RENAME
        13 => (Names(8, 1), fixed(ENTRY)),        // LINK
        14 | 27 => (Fixed(8), fixed(OPEN)),       // OPEN, OPENDIR
        15 | 28 | 44 => (Fixed(40), SizedBy(16)), // READ, READDIR, READDIRPLUS
        FUSE_WRITE => (Shape::Write, fixed(8)),
        17 => (Fixed(0), fixed(80)),           // STATFS
        18 | 25 | 29 => (Fixed(24), fixed(0)), // RELEASE, FLUSH, RELEASEDIR
        20 | 30 => (Fixed(16), fixed(0)),      // FSYNC, FSYNCDIR
        21 => (Shape::SetXattr, fixed(0)),
        22 => (Names(8, 1), SizedOrSize(0)), // GETXATTR
        23 => (Fixed(8), SizedOrSize(0)),    // LISTXATTR
        24 => (Names(0, 1), fixed(0)),       // REMOVEXATTR
        FUSE_INIT => (Shape::Init, fixed(64)),
        34 | 50 => (Fixed(8), fixed(0)), // ACCESS, SYNCFS
        35 => (Creation(16, 1), fixed(ENTRY + OPEN)), // CREATE
        FUSE_DESTROY => (Fixed(0), fixed(0)),
        FUSE_BATCH_FORGET => (Shape::BatchForget, NoReply),
        43 => (Fixed(32), fixed(0)),    // FALLOCATE
        45 => (Names(16, 2), fixed(0)), // RENAME2
        46 => (Fixed(24), fixed(8)),    // LSEEK
        47 => (Fixed(56), fixed(8)),    // COPY_FILE_RANGE
        _ => return None,
    })
}

/// Checks a request, and tells how many bytes its reply can have: 0 when there
/// is none.
///
/// `bytes` is the request, of a write without its payload; `total` is its whole
/// length; `room` is what the guest has for the reply. `setxattr_ext` is what
/// guest and file server agreed on.
///
/// # Errors
/// When the file server could not make sense of it.
pub(super) fn check(
    header: InHeader,
    bytes: &[u8],
    total: usize,
    room: usize,
    setxattr_ext: bool,
) -> Result<usize, Refused> {
    let body = bytes.get(IN_HEADER_BYTES..).ok_or(MALFORMED)?;
    if header.length as usize != total || total > MAX_REQUEST_BYTES {
        return Err(MALFORMED);
    }
    let (shape, reply) = operation(header.opcode).ok_or(UNKNOWN)?;
    let extensions = usize::from(header.extensions) * 8;
    let fits = match shape {
        Shape::Fixed(fixed) => body.len() >= fixed,
        Shape::Names(fixed, names) => body.len() >= fixed && are_names(&body[fixed..], names),
        Shape::Creation(fixed, names) => is_creation(body, fixed, names, extensions),
        Shape::Init => is_init(body),
        Shape::Write => body.len() >= 40 && total - WRITE_PREFIX_BYTES == u32_at(body, 16) as usize,
        Shape::SetXattr => is_set_xattr(body, if setxattr_ext { 16 } else { 8 }),
        Shape::BatchForget => body.len() >= 8 && (body.len() - 8) / 16 >= u32_at(body, 0) as usize,
    };
    if !fits {
        return Err(MALFORMED);
    }
    let size = |at| u32_at(body, at) as usize;
    let reply = match reply {
        Reply::None => return Ok(0),
        Reply::Fixed(bytes) => bytes,
        Reply::SizedOrSize(at) if size(at) == 0 => 8,
        Reply::Sized(at) | Reply::SizedOrSize(at) => size(at),
    };
    // The reply of an operation with a limit may be shorter, but a server
    // that wants to write more than there is room for has no way out.
    if reply > MAX_PAYLOAD_BYTES || OUT_HEADER_BYTES + reply > room {
        return Err(MALFORMED);
    }
    Ok(OUT_HEADER_BYTES + reply)
}

/// Takes out of a `FUSE_INIT` what may not be agreed on: security contexts
/// would be labels of the guest's policy on the host's files.
pub(super) fn restrict_init(bytes: &mut [u8]) {
    let Some(body) = bytes.get_mut(IN_HEADER_BYTES..) else {
        return;
    };
    if body.len() >= 20 && u32_at(body, 12) & INIT_EXT != 0 {
        let flags2 = u32_at(body, 16) & !INIT_SECURITY_CTX;
        body[16..20].copy_from_slice(&flags2.to_le_bytes());
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

/// Exactly so many names, each ending with its NUL, and nothing else.
fn are_names(bytes: &[u8], names: usize) -> bool {
    let found = bytes.split_inclusive(|byte| *byte == 0).count();
    bytes.last() == Some(&0) && found == names
}

fn is_creation(body: &[u8], fixed: usize, names: usize, extensions: usize) -> bool {
    let Some(end) = body.len().checked_sub(extensions) else {
        return false;
    };
    end >= fixed && are_names(&body[fixed..end], names) && is_groups(&body[end..])
}

/// No extension, or the caller's supplementary groups alone (`struct
/// fuse_ext_header`, `fuse_supp_groups`).
fn is_groups(extension: &[u8]) -> bool {
    if extension.is_empty() {
        return true;
    }
    let groups = u32_at(extension, 8) as usize;
    extension.len() >= 12
        && u32_at(extension, 0) as usize == extension.len()
        && u32_at(extension, 4) == EXT_GROUPS
        && groups <= MAX_GROUPS
        && extension.len() == 8 + (4 + 4 * groups).next_multiple_of(8)
}

fn is_init(body: &[u8]) -> bool {
    let needed = if u32_at(body, 12) & INIT_EXT != 0 {
        64
    } else {
        16
    };
    body.len() >= needed
}

/// A name, then a value as long as it is said to be.
fn is_set_xattr(body: &[u8], fixed: usize) -> bool {
    let Some(rest) = body.get(fixed..) else {
        return false;
    };
    rest.iter()
        .position(|byte| *byte == 0)
        .is_some_and(|name| rest.len() - (name + 1) == u32_at(body, 0) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        with_extensions(opcode, body, 0)
    }

    fn with_extensions(opcode: u32, body: &[u8], extensions: u16) -> Vec<u8> {
        let mut bytes = vec![0; IN_HEADER_BYTES];
        let length = (IN_HEADER_BYTES + body.len()) as u32;
        bytes[0..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&7u64.to_le_bytes());
        bytes[36..38].copy_from_slice(&extensions.to_le_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn checked(bytes: &[u8], room: usize) -> Result<usize, Refused> {
        let header = InHeader::decode(bytes[..IN_HEADER_BYTES].try_into().expect("a header"));
        check(header, bytes, bytes.len(), room, true)
    }

    #[test]
    fn check_lookup_needs_one_name_that_ends() {
        assert_eq!(checked(&request(1, b"name\0"), 200), Ok(144));
        for body in [&b"name"[..], b"", b"na\0me\0", b"name\0x"] {
            assert_eq!(checked(&request(1, body), 200), Err(MALFORMED), "{body:?}");
        }
    }

    #[test]
    fn check_reply_without_room_is_refused() {
        assert_eq!(checked(&request(1, b"name\0"), 143), Err(MALFORMED));
        assert_eq!(checked(&request(5, b""), 16 + 4094), Err(MALFORMED));
    }

    #[test]
    fn check_length_other_than_the_buffer_is_refused() {
        let mut bytes = request(3, &[0; 16]);
        bytes[0] += 1;
        assert_eq!(checked(&bytes, 200), Err(MALFORMED));
    }

    #[test]
    fn check_unknown_operation_is_not_implemented() {
        for opcode in [0, 7, 31, 39, 48, 51, 4096, u32::MAX] {
            assert_eq!(checked(&request(opcode, &[0; 64]), 200), Err(UNKNOWN));
        }
    }

    #[test]
    fn check_read_reply_is_what_it_asks_for_and_no_more_than_the_limit() {
        let mut body = [0; 40];
        body[16..20].copy_from_slice(&4096u32.to_le_bytes());
        assert_eq!(checked(&request(15, &body), 5000), Ok(4112));
        assert_eq!(checked(&request(15, &body), 4111), Err(MALFORMED));
        body[16..20].copy_from_slice(&((1u32 << 20) + 1).to_le_bytes());
        assert_eq!(checked(&request(15, &body), usize::MAX), Err(MALFORMED));
    }

    #[test]
    fn check_write_payload_is_as_long_as_it_says() {
        let mut body = vec![0; 40];
        body[16] = 100;
        let bytes = request(FUSE_WRITE, &body);
        let header = |total: usize| InHeader {
            length: total as u32,
            opcode: FUSE_WRITE,
            unique: 1,
            extensions: 0,
        };
        assert_eq!(check(header(180), &bytes, 180, 24, false), Ok(24));
        assert_eq!(check(header(181), &bytes, 181, 24, false), Err(MALFORMED));
    }

    #[test]
    fn check_setxattr_value_is_as_long_as_it_says_in_both_layouts() {
        let body = |fixed: usize| {
            let mut body = vec![0; fixed];
            body[0] = 5;
            body.extend_from_slice(b"user.a\0value");
            request(21, &body)
        };
        let verdict = |bytes: &[u8], extended| {
            let header = InHeader::decode(bytes[..40].try_into().expect("a header"));
            check(header, bytes, bytes.len(), 16, extended)
        };
        assert_eq!(verdict(&body(16), true), Ok(16));
        assert_eq!(verdict(&body(8), false), Ok(16));
        assert_eq!(verdict(&body(16), false), Err(MALFORMED));
        assert_eq!(verdict(&body(8), true), Err(MALFORMED));
    }

    #[test]
    fn check_groups_are_the_only_extension() {
        let mut body = vec![0; 8];
        body.extend_from_slice(b"directory\0");
        let name_end = body.len();
        body.extend_from_slice(&16u32.to_le_bytes());
        body.extend_from_slice(&32u32.to_le_bytes());
        body.extend_from_slice(&1u32.to_le_bytes());
        body.extend_from_slice(&1000u32.to_le_bytes());
        assert_eq!(checked(&with_extensions(9, &body, 2), 200), Ok(144));
        // One group more than there is room for; another kind; a wrong length.
        for (at, value) in [(8, 2), (4, 1), (0, 17)] {
            let mut wrong = body.clone();
            wrong[name_end + at] = value;
            assert_eq!(checked(&with_extensions(9, &wrong, 2), 200), Err(MALFORMED));
        }
        assert_eq!(
            checked(&with_extensions(9, &body, 100), 200),
            Err(MALFORMED)
        );
    }

    #[test]
    fn check_forget_has_no_reply() {
        assert_eq!(checked(&request(FUSE_FORGET, &[0; 8]), 0), Ok(0));
        let mut body = vec![0; 8 + 32];
        body[0] = 2;
        assert_eq!(checked(&request(FUSE_BATCH_FORGET, &body), 0), Ok(0));
        body[0] = 3;
        let refused = checked(&request(FUSE_BATCH_FORGET, &body), 0);
        assert_eq!(refused, Err(MALFORMED));
    }

    #[test]
    fn restrict_init_takes_security_contexts_out_and_nothing_else() {
        let mut body = vec![0xff; 64];
        let mut bytes = request(FUSE_INIT, &body);
        restrict_init(&mut bytes);
        body[16] = 0xfe;
        assert_eq!(bytes[IN_HEADER_BYTES..], body);
        // Without the second word of flags there is nothing to take out.
        let mut short = request(FUSE_INIT, &[0; 16]);
        let before = short.clone();
        restrict_init(&mut short);
        assert_eq!(short, before);
    }

    proptest! {
        #[test]
        fn check_any_bytes_never_panics_and_never_promises_more_than_room(
            opcode in 0u32..56,
            body in proptest::collection::vec(any::<u8>(), 0..200),
            extensions in 0u16..10,
            room in 0usize..10_000,
            setxattr_ext: bool,
        ) {
            let bytes = with_extensions(opcode, &body, extensions);
            let header = InHeader::decode(bytes[..IN_HEADER_BYTES].try_into().expect("a header"));
            for total in [bytes.len(), bytes.len() + 1] {
                if let Ok(reply) = check(InHeader { length: total as u32, ..header }, &bytes, total, room, setxattr_ext) {
                    prop_assert!(reply <= room);
                }
            }
        }
    }
}
