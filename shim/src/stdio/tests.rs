use std::fmt::Write as _;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Guest {
    plan: Plan,
    directory: tempfile::TempDir,
}

fn fifo(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .expect("makes a FIFO");
    path.to_str().expect("is text").to_owned()
}

impl Guest {
    fn with_fifos() -> Self {
        let directory = tempfile::tempdir().expect("makes a directory");
        let [stdin, stdout, stderr] = ["in", "out", "err"].map(|name| fifo(directory.path(), name));
        let plan = Plan::parse(&stdin, &stdout, &stderr, false).expect("parses");
        Self { plan, directory }
    }

    /// A client that reads from now on: it has opened the FIFO.
    fn client(&self, name: &str) -> JoinHandle<Vec<u8>> {
        let mut fifo = pipe::OpenOptions::new()
            .open_receiver(self.path(name))
            .expect("opens");
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            fifo.read_to_end(&mut bytes).await.expect("reads");
            bytes
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Connects opened streams to sockets, whose other ends are the guest's.
async fn connected(
    opened: Opened,
    exit: &watch::Receiver<Option<Exit>>,
) -> (Streams, std::collections::BTreeMap<i32, UnixStream>) {
    let guest_ends = Mutex::new(std::collections::BTreeMap::new());
    let streams = opened
        .connect(
            |kind| {
                let (host, guest) = UnixStream::pair().expect("makes a pair");
                locked(&guest_ends).insert(kind as i32, guest);
                std::future::ready(Ok::<_, io::Error>(host))
            },
            exit,
        )
        .await
        .expect("connects");
    (streams, guest_ends.into_inner().expect("is not poisoned"))
}

fn exited(last_words: Option<&str>) -> Exit {
    Exit {
        status: 0,
        at_ns: 0,
        last_words: last_words.map(str::to_owned),
        oom_kills: 0,
    }
}

#[tokio::test]
async fn output_of_twenty_megabytes_just_before_the_end_arrives_whole() {
    const BYTES: usize = 20_000_000;
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    let client = guest.client("out");
    let mut stdout = ends.remove(&(Kind::STDOUT as i32)).expect("is connected");
    stdout.write_all(&vec![b'x'; BYTES]).await.expect("writes");
    drop((stdout, ends));
    exit.send_replace(Some(exited(None)));
    streams.drain(Duration::from_secs(20)).await;
    assert_eq!(client.await.expect("ends").len(), BYTES);
}

#[tokio::test]
async fn input_survives_a_client_that_goes_and_ends_with_close_io() {
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    let mut stdin = ends.remove(&(Kind::STDIN as i32)).expect("is connected");
    streams.start_input().expect("opens");
    for words in ["first client ", "second client"] {
        let path = guest.path("in");
        // Each opens, writes, and closes: no end of input.
        tokio::task::spawn_blocking(move || std::fs::write(path, words).expect("writes"))
            .await
            .expect("ends");
    }
    streams.close_stdin();
    streams.close_stdin();
    let mut text = String::new();
    stdin.read_to_string(&mut text).await.expect("ends");
    assert_eq!(text, "first client second client");
}

#[tokio::test]
async fn input_closed_before_the_start_is_what_was_written_by_then() {
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    let mut stdin = ends.remove(&(Kind::STDIN as i32)).expect("is connected");
    // As containerd's client opens it: for both, so that it does not wait.
    let mut options = std::fs::File::options();
    let mut client = options
        .read(true)
        .write(true)
        .open(guest.path("in"))
        .expect("opens");
    io::Write::write_all(&mut client, b"early words").expect("writes");
    streams.close_stdin();
    streams.start_input().expect("opens");
    drop(client);
    let mut text = String::new();
    let read = stdin.read_to_string(&mut text);
    let read = tokio::time::timeout(Duration::from_secs(20), read).await;
    read.expect("ends").expect("reads");
    assert_eq!(text, "early words");
}

#[tokio::test]
async fn input_is_not_read_before_the_start() {
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, _ends) = connected(opened, &exit.subscribe()).await;
    // Without a reader it cannot be opened without waiting (ENXIO): a client
    // has sent nothing yet.
    let write = || pipe::OpenOptions::new().open_sender(guest.path("in"));
    assert!(write().is_err());
    streams.start_input().expect("opens");
    assert!(write().is_ok());
}

#[tokio::test]
async fn drain_without_a_reader_lets_go_after_its_bound() {
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    let mut stdout = ends.remove(&(Kind::STDOUT as i32)).expect("is connected");
    let writer = tokio::spawn(async move { stdout.write_all(&vec![b'x'; 4 << 20]).await });
    exit.send_replace(Some(exited(None)));
    drop(ends);
    streams.drain(Duration::from_millis(50)).await;
    // The guest is not left waiting either.
    assert!(writer.await.expect("ends").is_err());
}

#[tokio::test]
async fn last_words_reach_stderr_before_its_end() {
    let guest = Guest::with_fifos();
    let opened = Opened::open(&guest.plan, "c", "default")
        .await
        .expect("opens");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    let client = guest.client("err");
    let mut stderr = ends.remove(&(Kind::STDERR as i32)).expect("is connected");
    stderr.write_all(b"some output\n").await.expect("writes");
    drop((stderr, ends));
    exit.send_replace(Some(exited(Some("guest kernel panicked"))));
    streams.drain(Duration::from_secs(20)).await;
    assert_eq!(
        client.await.expect("ends"),
        b"some output\nbulkhead: guest kernel panicked\n"
    );
}

#[tokio::test]
async fn open_file_uri_makes_directories_and_appends() {
    let directory = tempfile::tempdir().expect("makes a directory");
    let path = directory.path().join("a/b/log");
    let uri = format!("file://{}", path.display());
    let plan = Plan::parse("", &uri, &uri, false).expect("parses");
    let exit = watch::Sender::new(None);
    for words in ["one\n", "two\n"] {
        let opened = Opened::open(&plan, "c", "default").await.expect("opens");
        let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
        let mut stdout = ends.remove(&(Kind::STDOUT as i32)).expect("is connected");
        stdout.write_all(words.as_bytes()).await.expect("writes");
        drop((stdout, ends));
        exit.send_replace(Some(exited(None)));
        streams.drain(Duration::from_secs(20)).await;
    }
    assert_eq!(std::fs::read_to_string(path).expect("reads"), "one\ntwo\n");
}

#[tokio::test]
async fn open_missing_fifo_names_its_path() {
    let plan = Plan::parse("", "/nonexistent/out", "", false).expect("parses");
    let error = Opened::open(&plan, "c", "default")
        .await
        .expect_err("fails");
    assert!(error.to_string().contains("/nonexistent/out"), "{error}");
}

/// `sh -c SCRIPT` as a URI: no file is executed that a fork elsewhere in this
/// process may still hold open for writing.
fn shell(scheme: &str, script: &str) -> String {
    let mut uri = format!("{scheme}:///bin/sh?-c=");
    for byte in script.bytes() {
        write!(uri, "%{byte:02x}").expect("writes to a String");
    }
    uri
}

#[tokio::test]
async fn logging_program_gets_environment_and_both_streams() {
    let directory = tempfile::tempdir().expect("makes a directory");
    let log = directory.path().join("log");
    let script = format!(
        "exec 5>&-\n{{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID\"; cat <&3; cat <&4; }} >{}",
        log.display()
    );
    let uri = shell("binary", &script);
    let plan = Plan::parse("", &uri, &uri, false).expect("parses");
    let opened = Opened::open(&plan, "c", "default").await.expect("starts");
    let exit = watch::Sender::new(None);
    let (streams, mut ends) = connected(opened, &exit.subscribe()).await;
    for (kind, words) in [(Kind::STDOUT, "out\n"), (Kind::STDERR, "err\n")] {
        let mut end = ends.remove(&(kind as i32)).expect("is connected");
        end.write_all(words.as_bytes()).await.expect("writes");
    }
    exit.send_replace(Some(exited(None)));
    streams.drain(Duration::from_secs(20)).await;
    let text = std::fs::read_to_string(log).expect("reads");
    assert_eq!(text, "default/c\nout\nerr\n");
}

#[tokio::test]
async fn logging_program_of_v2_that_ends_early_is_an_error() {
    let uri = shell("binary-v2", "exit 1");
    let plan = Plan::parse("", &uri, &uri, false).expect("parses");
    let error = Opened::open(&plan, "c", "default")
        .await
        .expect_err("fails");
    assert!(
        matches!(
            error,
            Error::Logger {
                source: logger::Error::NotReady,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn logging_program_of_a_container_that_never_was_is_killed_and_collected() {
    let directory = tempfile::tempdir().expect("makes a directory");
    let file = directory.path().join("pid");
    let script = format!("echo $$ >{}; exec 5>&-; exec sleep 1000", file.display());
    let uri = shell("binary", &script);
    let plan = Plan::parse("", &uri, &uri, false).expect("parses");
    let opened = Opened::open(&plan, "c", "default").await.expect("starts");
    let pid = std::fs::read_to_string(file).expect("reads");
    let process = PathBuf::from("/proc").join(pid.trim());
    assert!(process.exists());
    drop(opened);
    assert!(!process.exists());
}
