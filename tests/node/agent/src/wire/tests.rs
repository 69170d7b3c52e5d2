use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::MAX_DATA;

fn stream() -> impl Strategy<Value = Stream> {
    prop_oneof![
        Just(Stream::Stdin),
        Just(Stream::Stdout),
        Just(Stream::Stderr)
    ]
}

fn window() -> impl Strategy<Value = WindowSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns })
}

fn exec() -> impl Strategy<Value = Frame> {
    let bytes = || vec(any::<u8>(), 0..20);
    (
        vec(bytes(), 0..5),
        vec((bytes(), bytes()), 0..5),
        bytes(),
        proptest::option::of(window()),
    )
        .prop_map(|(argv, env, cwd, tty)| {
            Frame::Exec(Box::new(Exec {
                argv,
                env,
                cwd,
                tty,
            }))
        })
}

fn claim() -> impl Strategy<Value = Frame> {
    (
        any::<u32>(),
        any::<Token>(),
        ".*",
        any::<u64>(),
        vec(any::<u8>(), 64),
    )
        .prop_map(|(version, token, hostname, unix_nanos, seed)| {
            let seed = seed.try_into().unwrap();
            Frame::Claim(
                version,
                Box::new(Claim {
                    token,
                    hostname,
                    unix_nanos,
                    seed,
                }),
            )
        })
}

fn frame() -> impl Strategy<Value = Frame> {
    prop_oneof![
        any::<(u32, Token)>().prop_map(|(version, token)| Frame::Hello(version, token)),
        claim(),
        Just(Frame::Welcome),
        ".*".prop_map(Frame::Refused),
        exec(),
        any::<u32>().prop_map(Frame::Started),
        (stream(), vec(any::<u8>(), 1..2000)).prop_map(|(s, data)| Frame::Data(s, data)),
        stream().prop_map(Frame::Eof),
        (stream(), any::<u32>()).prop_map(|(s, n)| Frame::Credit(s, n)),
        any::<i32>().prop_map(Frame::Signal),
        window().prop_map(Frame::Resize),
        any::<i32>().prop_map(|code| Frame::Exit(Exit::Code(code))),
        any::<i32>().prop_map(|signal| Frame::Exit(Exit::Signal(signal))),
        Just(Frame::Ping),
        Just(Frame::Pong),
    ]
}

proptest! {
    #[test]
    fn frames_written_are_read_back_in_order(frames in vec(frame(), 0..8)) {
        let mut bytes = Vec::new();
        for frame in &frames {
            write_frame(&mut bytes, frame).unwrap();
        }
        let mut from = bytes.as_slice();
        for frame in frames {
            prop_assert_eq!(read_frame(&mut from).unwrap(), Some(frame));
        }
        prop_assert_eq!(read_frame(&mut from).unwrap(), None);
    }

    #[test]
    fn read_frame_cut_anywhere_is_an_error(frame in frame(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &frame).unwrap();
        let cut = 1 + cut.index(bytes.len() - 1);
        prop_assert!(matches!(read_frame(&mut &bytes[..cut]), Err(WireError::Io(_))));
    }

    #[test]
    fn read_frame_arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        let mut from = bytes.as_slice();
        while let Ok(Some(_)) = read_frame(&mut from) {}
    }

    #[test]
    fn decode_arbitrary_payload_is_refused_or_encodes_to_itself(kind in 0u8..20, payload in vec(any::<u8>(), 0..120)) {
        if let Ok(frame) = decode(kind, &payload) {
            let mut out = Vec::new();
            prop_assert_eq!(encode(&frame, &mut out), kind);
            prop_assert_eq!(out, payload);
        }
    }
}

#[test]
fn read_frame_huge_length_is_refused_before_it_is_read() {
    let bytes = [PING, 0xff, 0xff, 0xff, 0xff];
    assert!(matches!(
        read_frame(&mut bytes.as_slice()),
        Err(WireError::TooLarge(_))
    ));
}

#[test]
fn decode_data_empty_or_too_long_is_refused() {
    for length in [0, MAX_DATA + 1] {
        let payload = vec![1; length + 1];
        assert!(matches!(
            decode(DATA, &payload),
            Err(WireError::Malformed(DATA))
        ));
    }
}

#[test]
fn write_frame_too_large_writes_nothing() {
    let mut out = Vec::new();
    let exec = Exec {
        argv: vec![vec![b'x'; MAX_PAYLOAD]],
        ..Exec::default()
    };
    let result = write_frame(&mut out, &Frame::Exec(Box::new(exec)));
    assert!(matches!(result, Err(WireError::TooLarge(_))));
    assert!(out.is_empty());
}
