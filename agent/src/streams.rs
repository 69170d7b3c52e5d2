//! stdio streams: each a vsock connection from the host, introduced by a
//! header, then raw bytes. vsock's credit is the backpressure: a reader that is
//! slow on the host stops the container's writes, and nothing piles up here.

use std::{io, sync::Arc};

use agent_protocol::{
    MAX_STREAM_HEADER_BYTES, STREAM_ACCEPTED, STREAM_REFUSED, api::stream_header::Kind,
    decode_stream_header,
};
use nix::errno::Errno;

use crate::{
    nonblocking::NonBlocking,
    stdio::{End, StreamKey, StreamTable},
};

/// Bytes that are read from a terminal at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// Serves one connection to the stream port until either side ends.
///
/// # Errors
/// When the peer breaks the contract or the connection breaks.
pub async fn serve(table: Arc<StreamTable>, connection: NonBlocking) -> io::Result<()> {
    let key = match read_header(&connection).await {
        Ok(key) => key,
        Err(error) => {
            connection.write(&[STREAM_REFUSED]).await?;
            return Err(error);
        }
    };
    let end = match table.take(&key) {
        Ok(end) => end,
        Err(refusal) => {
            connection.write(&[STREAM_REFUSED]).await?;
            return Err(io::Error::other(refusal));
        }
    };
    match relay(&key, &connection, end).await {
        Relayed::Done => table.close(&key),
        Relayed::ConnectionLost(end) => table.put_back(&key, end),
        Relayed::Unusable(end, error) => {
            table.put_back(&key, end);
            return Err(error);
        }
    }
    Ok(())
}

async fn read_header(connection: &NonBlocking) -> io::Result<StreamKey> {
    let invalid = |message: &str| io::Error::new(io::ErrorKind::InvalidData, message.to_owned());
    let mut length = [0; 2];
    connection.read_exact(&mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MAX_STREAM_HEADER_BYTES {
        return Err(invalid("stream header is too long"));
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    let header = decode_stream_header(&body).map_err(io::Error::other)?;
    match header.kind.enum_value() {
        Ok(kind) if kind != Kind::KIND_UNSPECIFIED => Ok(StreamKey::new(&header.process, kind)),
        _ => Err(invalid("stream header names no stream")),
    }
}

enum Relayed {
    /// The process closed its end and the host has all of it, or the host closed
    /// the process's standard input.
    Done,
    /// The connection broke: the process's end is still good.
    ConnectionLost(End),
    /// The process's end could not be watched; a later connection may be luckier.
    Unusable(End, io::Error),
}

async fn relay(key: &StreamKey, connection: &NonBlocking, end: End) -> Relayed {
    let End {
        descriptor,
        mut unsent,
    } = end;
    let end = match NonBlocking::try_new(descriptor) {
        Ok(end) => end,
        Err((descriptor, error)) => return Relayed::Unusable(End { descriptor, unsent }, error),
    };
    let relayed = match connection.write(&[STREAM_ACCEPTED]).await {
        Ok(_) if key.kind() == Kind::STDIN => relay_input(connection, &end, &mut unsent).await,
        Ok(_) => relay_output(connection, &end, &mut unsent).await,
        Err(error) => Err(error),
    };
    if relayed.is_ok() {
        return Relayed::Done;
    }
    unsent.shrink_to_fit();
    Relayed::ConnectionLost(End {
        descriptor: end.into_inner(),
        unsent,
    })
}

/// Returns when the process has closed its end and the host was told so.
async fn relay_output(
    connection: &NonBlocking,
    end: &NonBlocking,
    unsent: &mut Vec<u8>,
) -> io::Result<()> {
    // The host sends nothing here, so whatever can be read is its leaving.
    let mut nothing = [0; 1];
    tokio::select! {
        moved = move_all(end, connection, unsent) => moved?,
        _ = connection.read(&mut nothing) => return Err(io::ErrorKind::ConnectionReset.into()),
    }
    connection.end_writing()
}

/// Returns when the host has closed the input, or the process its end.
async fn relay_input(
    connection: &NonBlocking,
    end: &NonBlocking,
    unsent: &mut Vec<u8>,
) -> io::Result<()> {
    match move_all(connection, end, unsent).await {
        // There is nobody left to read.
        Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => Ok(()),
        result => result,
    }
}

/// Moves everything until the end of `from`: in the kernel, unless the process
/// is at a terminal.
async fn move_all(from: &NonBlocking, to: &NonBlocking, unsent: &mut Vec<u8>) -> io::Result<()> {
    if from.is_pipe() || to.is_pipe() {
        from.splice_to(to).await
    } else {
        copy(from, to, unsent).await
    }
}

/// Copies until the end of `from`. What was read and not yet written is in
/// `unsent` at all times, also when this is dropped half-way.
async fn copy(from: &NonBlocking, to: &NonBlocking, unsent: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        while !unsent.is_empty() {
            let written = to.write(unsent).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            unsent.drain(..written);
        }
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        unsent.extend_from_slice(&buffer[..length]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::open_pipes;
    use agent_protocol::{
        api::{ProcessId, Stdio, StreamHeader},
        encode_stream_header,
    };
    use std::{
        fs::File,
        io::{Read, Write},
        os::{fd::OwnedFd, unix::net},
    };
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
        task::JoinHandle,
    };

    fn process() -> ProcessId {
        ProcessId {
            container_id: "c".to_owned(),
            ..ProcessId::default()
        }
    }

    fn header(kind: Kind) -> StreamHeader {
        StreamHeader {
            process: protobuf::MessageField::some(process()),
            kind: kind.into(),
            ..StreamHeader::default()
        }
    }

    /// The host's end and the agent's.
    fn connection() -> (UnixStream, NonBlocking) {
        let (host, guest) = net::UnixStream::pair().expect("socket pair");
        host.set_nonblocking(true).expect("non-blocking");
        let host = UnixStream::from_std(host).expect("is watched");
        (
            host,
            NonBlocking::try_new(guest.into()).expect("is watched"),
        )
    }

    async fn connect(
        table: &Arc<StreamTable>,
        kind: Kind,
    ) -> (UnixStream, u8, JoinHandle<io::Result<()>>) {
        let (mut host, guest) = connection();
        let served = tokio::spawn(serve(Arc::clone(table), guest));
        let bytes = encode_stream_header(&header(kind)).expect("encodes");
        host.write_all(&bytes).await.expect("header");
        let answer = host.read_u8().await.expect("answer");
        (host, answer, served)
    }

    fn offer(stdin: bool, stdout: bool) -> (Arc<StreamTable>, [OwnedFd; 3]) {
        let wanted = Stdio {
            stdin,
            stdout,
            ..Stdio::default()
        };
        let pipes = open_pipes(&wanted).expect("pipes");
        let table = Arc::new(StreamTable::default());
        table.insert(&process(), pipes.agent);
        (table, pipes.process)
    }

    #[tokio::test]
    async fn serve_output_of_a_process_that_is_gone_arrives_whole() {
        let (table, [_, stdout, _]) = offer(false, true);
        let sent: Vec<u8> = (0..3_000_000u32).map(|index| index as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || File::from(stdout).write_all(&sent));
        let (mut host, answer, served) = connect(&table, Kind::STDOUT).await;
        let mut received = Vec::new();
        host.read_to_end(&mut received).await.expect("reads");
        assert_eq!(answer, STREAM_ACCEPTED);
        assert!(received == expected);
        writer.join().expect("thread").expect("writes");
        served.await.expect("task").expect("served");
    }

    #[tokio::test]
    async fn serve_input_half_close_ends_the_process_input() {
        let (table, [stdin, ..]) = offer(true, false);
        let (mut host, _, _) = connect(&table, Kind::STDIN).await;
        host.write_all(b"hi\n").await.expect("writes");
        host.shutdown().await.expect("half-close");
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::from(stdin).read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(read.await.expect("task").expect("reads"), "hi\n");
    }

    #[tokio::test]
    async fn serve_output_again_after_the_host_left_goes_on() {
        let (table, [_, stdout, _]) = offer(false, true);
        let (host, _, served) = connect(&table, Kind::STDOUT).await;
        drop(host);
        served.await.expect("task").expect("served");
        let (mut host, answer, _) = connect(&table, Kind::STDOUT).await;
        assert_eq!(answer, STREAM_ACCEPTED);
        File::from(stdout).write_all(b"later").expect("writes");
        let mut received = String::new();
        host.read_to_string(&mut received).await.expect("reads");
        assert_eq!(received, "later");
    }

    #[tokio::test]
    async fn serve_connection_that_breaks_before_the_answer_leaves_the_stream_free() {
        let (table, [_, stdout, _]) = offer(false, true);
        let bytes = encode_stream_header(&header(Kind::STDOUT)).expect("encodes");
        let (mut host, guest) = connection();
        host.write_all(&bytes).await.expect("header");
        drop(host);
        let served = serve(Arc::clone(&table), guest).await;
        served.expect("a lost connection is no error");
        let (mut host, answer, _) = connect(&table, Kind::STDOUT).await;
        assert_eq!(answer, STREAM_ACCEPTED);
        drop(stdout);
        assert_eq!(host.read(&mut [0]).await.expect("reads"), 0);
    }

    #[tokio::test]
    async fn serve_end_that_cannot_be_watched_is_put_back() {
        let table = Arc::new(StreamTable::default());
        // epoll refuses regular files.
        let file = tempfile::tempfile().expect("file").into();
        table.insert(&process(), vec![(Kind::STDOUT, file)]);
        let bytes = encode_stream_header(&header(Kind::STDOUT)).expect("encodes");
        let (mut host, guest) = connection();
        host.write_all(&bytes).await.expect("header");
        let served = serve(Arc::clone(&table), guest).await;
        assert!(served.is_err());
        assert!(
            table
                .take(&StreamKey::new(&process(), Kind::STDOUT))
                .is_ok()
        );
    }

    /// `end` is offered as the output of a process that writes to `process`.
    async fn broken_connection_loses_nothing(end: OwnedFd, process_end: OwnedFd) {
        let table = Arc::new(StreamTable::default());
        table.insert(&process(), vec![(Kind::STDOUT, end)]);
        // More than the sockets and the buffer hold, so that some is in the agent.
        let sent: Vec<u8> = (0..3_000_000u32).map(|index| index as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || File::from(process_end).write_all(&sent));
        let (mut host, _, served) = connect(&table, Kind::STDOUT).await;
        let mut received = vec![0; 100_000];
        host.read_exact(&mut received).await.expect("reads");
        // Leaves by its only means, one byte, so that nothing unread resets the
        // socket and what is in it can still be counted.
        host.write_all(b".").await.expect("writes");
        served.await.expect("task").expect("served");
        host.read_to_end(&mut received).await.expect("reads");
        let (mut host, answer, _) = connect(&table, Kind::STDOUT).await;
        assert_eq!(answer, STREAM_ACCEPTED);
        host.read_to_end(&mut received).await.expect("reads");
        assert!(received == expected);
        writer.join().expect("thread").expect("writes");
    }

    #[tokio::test]
    async fn serve_what_a_broken_connection_did_not_take_of_a_pipe_goes_to_the_next() {
        let (reader, writer) = nix::unistd::pipe().expect("pipe");
        broken_connection_loses_nothing(reader, writer).await;
    }

    /// As a terminal's output, which is copied.
    #[tokio::test]
    async fn serve_what_a_broken_connection_did_not_take_of_a_copy_goes_to_the_next() {
        let (ours, theirs) = net::UnixStream::pair().expect("socket pair");
        broken_connection_loses_nothing(ours.into(), theirs.into()).await;
    }

    #[tokio::test]
    async fn serve_second_connection_to_one_stream_is_refused() {
        let (table, _process) = offer(false, true);
        let (_first, _, _) = connect(&table, Kind::STDOUT).await;
        let (_, answer, _) = connect(&table, Kind::STDOUT).await;
        assert_eq!(answer, STREAM_REFUSED);
    }

    #[tokio::test]
    async fn serve_stream_that_was_not_offered_is_refused() {
        let (table, _process) = offer(false, true);
        let (_, answer, _) = connect(&table, Kind::STDIN).await;
        assert_eq!(answer, STREAM_REFUSED);
    }

    #[tokio::test]
    async fn read_header_longer_than_the_contract_is_an_error() {
        let (mut host, guest) = connection();
        host.write_all(&[0xff; 4]).await.expect("writes");
        assert!(read_header(&guest).await.is_err());
    }
}
