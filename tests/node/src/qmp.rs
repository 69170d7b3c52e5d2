//! QEMU's control protocol, as far as the node needs it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

/// What can go wrong in talking to QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed, or QEMU has ended.
    #[error("talk to QEMU")]
    Io(#[from] io::Error),
    /// QEMU said something that is not JSON.
    #[error("understand what QEMU says")]
    Json(#[from] serde_json::Error),
    /// QEMU refused a command.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// Its words.
        reason: String,
    },
    /// The machine's state could not be saved or restored.
    #[error("QEMU's migration ended as {status}: {reason}")]
    Migration {
        /// The migration status.
        status: String,
        /// Its words, often empty.
        reason: String,
    },
}

/// A connection to one QEMU. It serves one client at a time.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    /// Negotiates over `stream`, whose other end QEMU has. No answer within `patience` is an error, then and later.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn open(stream: UnixStream, patience: Duration) -> Result<Self, QmpError> {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
            events: Vec::new(),
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command to its answer.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{line}")?;
        loop {
            let mut message = self.read()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    reason: text(error.get("desc")),
                });
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits until the migration under way has ended well.
    ///
    /// # Errors
    /// [`QmpError::Migration`] when it failed.
    pub fn wait_for_migration(&mut self) -> Result<(), QmpError> {
        loop {
            let message = if self.events.is_empty() {
                self.read()?
            } else {
                self.events.remove(0)
            };
            if message.get("event").and_then(Value::as_str) != Some("MIGRATION") {
                continue;
            }
            match text(message.pointer("/data/status")).as_str() {
                "completed" => return Ok(()),
                status @ ("failed" | "cancelled") => {
                    let info = self.execute("query-migrate", &json!({}))?;
                    return Err(QmpError::Migration {
                        status: status.to_owned(),
                        reason: text(info.get("error-desc")),
                    });
                }
                _ => {}
            }
        }
    }

    /// The loopback TCP port that QEMU's user network forwards into the node.
    ///
    /// # Errors
    /// Any [`QmpError`]; `Refused` when there is no such port.
    pub fn forwarded_port(&mut self) -> Result<u16, QmpError> {
        let command = "human-monitor-command";
        let answer = self.execute(command, &json!({"command-line": "info usernet"}))?;
        let table = answer.as_str().unwrap_or_default();
        forwarded_port(table).ok_or_else(|| QmpError::Refused {
            command: "info usernet".to_owned(),
            reason: format!("no forwarded port in {table:?}"),
        })
    }

    /// Makes QEMU end. The guest is not asked.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn quit(mut self) -> Result<(), QmpError> {
        self.execute("quit", &json!({})).map(|_| ())
    }

    fn read(&mut self) -> Result<Value, QmpError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn text(value: Option<&Value>) -> String {
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The columns are: protocol and state, descriptor, source address, source port, destination address, port, queues.
fn forwarded_port(table: &str) -> Option<u16> {
    let line = table.lines().find(|line| line.contains("HOST_FORWARD"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_port_is_the_source_port_of_the_forward() {
        let table = "Hub -1 (u0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                     TCP[HOST_FORWARD]  13       127.0.0.1 38941       10.0.2.15  7000     0     0\r\n";
        assert_eq!(forwarded_port(table), Some(38941));
        assert_eq!(forwarded_port("Hub"), None);
    }
}
