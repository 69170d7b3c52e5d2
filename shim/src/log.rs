//! The shim's log: lines in containerd's own form, written to the FIFO `log` of
//! the first bundle, which containerd copies to its own log.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Sends the process's log to `bundle`'s FIFO. Without a FIFO there is no log.
pub fn init(bundle: &Path, debug: bool) {
    let Ok(fifo) = open(&bundle.join("log")) else {
        return;
    };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    // Fails only when a log is set already, as in tests.
    let _ = tracing::subscriber::set_global_default(
        tracing_subscriber::fmt()
            .with_max_level(level)
            .event_format(Logfmt)
            .with_writer(Fifo(Arc::new(fifo)))
            .finish(),
    );
}

/// Opens the FIFO for both directions: with a reader of our own, writing while
/// containerd restarts is neither an error nor the end of the log. Writing
/// never waits; lines for which the pipe has no room are lost.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
}

struct Fifo(Arc<File>);

struct Line(Arc<File>);

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Arc::clone(&self.0))
    }
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // All of it or none (pipe(7), O_NONBLOCK up to PIPE_BUF); a line that
        // does not fit is dropped, for nobody may wait for the log.
        let _ = (&*self.0).write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `time="..." level=info msg="..." key=value`.
struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "time=\"")?;
        SystemTime.format_time(&mut writer)?;
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG | Level::TRACE => "debug",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        writeln!(
            writer,
            "\" level={level} msg={:?} runtime=bulkhead{}",
            fields.message, fields.rest
        )
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn record(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else {
            // Writing to a String does not fail.
            let _ = write!(self.rest, " {}={value:?}", field.name());
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn fifo() -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().expect("makes a directory");
        let path = directory.path().join("log");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .expect("makes a FIFO");
        (directory, path)
    }

    #[test]
    fn log_line_has_containerds_form() {
        let (_directory, path) = fifo();
        let file = Arc::new(open(&path).expect("opens"));
        let subscriber = tracing_subscriber::fmt()
            .event_format(Logfmt)
            .with_writer(Fifo(Arc::clone(&file)))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(id = "c", status = 7, "a \"quoted\" word");
        });
        let mut bytes = [0; 512];
        let length = (&*file).read(&mut bytes).expect("reads");
        let line = String::from_utf8_lossy(&bytes[..length]);
        assert!(line.starts_with("time=\""), "{line}");
        assert!(
            line.ends_with("level=warning msg=\"a \\\"quoted\\\" word\" runtime=bulkhead id=\"c\" status=\"7\"\n"),
            "{line}"
        );
    }

    #[test]
    fn log_without_reader_drops_lines_and_never_waits() {
        let (_directory, path) = fifo();
        let mut line = Line(Arc::new(open(&path).expect("opens")));
        for _ in 0..1000 {
            assert_eq!(line.write(&[b'x'; 1024]).expect("is not an error"), 1024);
        }
    }
}
