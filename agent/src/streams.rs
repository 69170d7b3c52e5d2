//! stdio streams: each a vsock connection from the host, introduced by a
//! header, then raw bytes. vsock's credit is the backpressure: a reader that is
//! slow on the host stops the container's writes, and nothing piles up here.

use std::{io, os::fd::OwnedFd, sync::Arc};

use agent_protocol::{
    MAX_STREAM_HEADER_BYTES, STREAM_ACCEPTED, STREAM_REFUSED, api::stream_header::Kind,
    decode_stream_header,
};
use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy_buf};

use crate::{
    nonblocking::NonBlocking,
    stdio::{StreamKey, StreamTable},
};

/// Bytes that one direction of one stream holds at the most: a pipe's default
/// capacity, so that one read empties a full pipe.
const BUFFER_BYTES: usize = 64 * 1024;

/// Serves one connection to the stream port until either side ends.
///
/// # Errors
/// When the peer breaks the contract or the connection breaks.
pub async fn serve<S>(table: Arc<StreamTable>, mut connection: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let key = match read_header(&mut connection).await {
        Ok(key) => key,
        Err(error) => {
            connection.write_all(&[STREAM_REFUSED]).await?;
            return Err(error);
        }
    };
    let end = match table.take(&key) {
        Ok(end) => end,
        Err(refusal) => {
            connection.write_all(&[STREAM_REFUSED]).await?;
            return Err(io::Error::other(refusal));
        }
    };
    let relayed = relay(&key, connection, end).await?;
    match relayed {
        Relayed::ProcessDone | Relayed::HostDone => table.close(&key),
        Relayed::ConnectionLost(end) => {
            table.put_back(&key, end);
            return Ok(());
        }
    }
    Ok(())
}

async fn read_header<S: AsyncRead + Unpin>(connection: &mut S) -> io::Result<StreamKey> {
    let invalid = |message: &str| io::Error::new(io::ErrorKind::InvalidData, message.to_owned());
    let length = usize::from(connection.read_u16().await?);
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
    /// The process closed its end and the host has all of it.
    ProcessDone,
    /// The host closed the process's standard input.
    HostDone,
    /// The connection broke: the process's end is still good.
    ConnectionLost(OwnedFd),
}

async fn relay<S>(key: &StreamKey, mut connection: S, end: OwnedFd) -> io::Result<Relayed>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut end = NonBlocking::try_new(end)?;
    connection.write_all(&[STREAM_ACCEPTED]).await?;
    if key.kind() == Kind::STDIN {
        return Ok(relay_input(connection, end).await);
    }
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let relayed = {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, &mut end);
        // The host sends nothing here, so whatever can be read is its leaving.
        let mut nothing = [0; 1];
        tokio::select! {
            copied = copy_buf(&mut reader, &mut to_host) => copied.map(|_| true),
            _ = from_host.read(&mut nothing) => Ok(false),
        }
    };
    match relayed {
        Ok(true) => {
            to_host.shutdown().await?;
            Ok(Relayed::ProcessDone)
        }
        Ok(false) | Err(_) => Ok(Relayed::ConnectionLost(end.into_inner())),
    }
}

async fn relay_input<S>(connection: S, mut end: NonBlocking) -> Relayed
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, connection);
    match copy_buf(&mut reader, &mut end).await {
        Ok(_) => Relayed::HostDone,
        // The process closed its end: there is nobody left to read.
        Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => Relayed::HostDone,
        Err(_) => Relayed::ConnectionLost(end.into_inner()),
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
    };
    use tokio::{net::UnixStream, task::JoinHandle};

    fn process() -> ProcessId {
        ProcessId {
            container_id: "c".to_owned(),
            ..ProcessId::default()
        }
    }

    async fn connect(
        table: &Arc<StreamTable>,
        kind: Kind,
    ) -> (UnixStream, u8, JoinHandle<io::Result<()>>) {
        let (mut host, guest) = UnixStream::pair().expect("socket pair");
        let served = tokio::spawn(serve(Arc::clone(table), guest));
        let header = StreamHeader {
            process: protobuf::MessageField::some(process()),
            kind: kind.into(),
            ..StreamHeader::default()
        };
        let bytes = encode_stream_header(&header).expect("encodes");
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
        let mut long = [0xff; 4].as_slice();
        assert!(read_header(&mut long).await.is_err());
    }
}
