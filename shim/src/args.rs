//! The command line that containerd gives a shim: flags in the style of Go's
//! `flag` package (one dash or two, `-name value` or `-name=value`), then one
//! action.

use std::path::PathBuf;

use thiserror::Error;

/// What the shim is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `-v`: print the version.
    Version,
    /// `-info`: print what the runtime can do.
    Info,
    /// `start`: find or make the server of the container's pod.
    Start(Invocation),
    /// `delete`: clean up a container or pod.
    Delete(Invocation),
    /// `serve`: be the server; only `start` runs it.
    Serve(Invocation),
}

/// What containerd says with each action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invocation {
    /// containerd's namespace.
    pub namespace: String,
    /// The container (for `serve`: the pod) in question.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// containerd's own binary, the event publisher of old.
    pub publish_binary: String,
    /// The bundle; containerd 1.6 to 2.4 give it to `delete` only.
    pub bundle: Option<PathBuf>,
    /// Whether to log details.
    pub debug: bool,
}

/// A command line that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// A flag that no supported containerd gives.
    #[error(
        "flag {flag} is not known: need -namespace, -address, -publish-binary, -id, -bundle, -debug, -v or -info"
    )]
    UnknownFlag {
        /// As given.
        flag: String,
    },
    /// A flag at the end of the line that needs a value.
    #[error("flag -{name} needs a value")]
    NoValue {
        /// Without its dash.
        name: &'static str,
    },
    /// A switch with a value that is no boolean.
    #[error("flag -{name}={value}: need true or false")]
    NotBoolean {
        /// Without its dash.
        name: &'static str,
        /// As given.
        value: String,
    },
    /// No action, or one that is not known.
    #[error("action {action:?} is not known: containerd runs this program with start or delete")]
    Action {
        /// As given; empty when there was none.
        action: String,
    },
    /// Words after the action.
    #[error("unexpected argument {argument:?} after the action")]
    Trailing {
        /// The first of them.
        argument: String,
    },
    /// A flag without which the action cannot be done.
    #[error("flag -{name} is missing")]
    Missing {
        /// Without its dash.
        name: &'static str,
    },
}

impl Command {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// On anything that is not understood.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let mut arguments = arguments.into_iter();
        let mut invocation = Invocation::default();
        let (mut version, mut info) = (false, false);
        let mut action = None;
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(argument);
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = |name| {
                inline
                    .clone()
                    .or_else(|| arguments.next())
                    .ok_or(Error::NoValue { name })
            };
            match name {
                "namespace" => invocation.namespace = value("namespace")?,
                "id" => invocation.id = value("id")?,
                "address" => invocation.address = value("address")?,
                "publish-binary" => invocation.publish_binary = value("publish-binary")?,
                "bundle" => invocation.bundle = Some(value("bundle")?.into()),
                "debug" => invocation.debug = switch("debug", inline.as_deref())?,
                "v" => version = switch("v", inline.as_deref())?,
                "info" => info = switch("info", inline.as_deref())?,
                _ => return Err(Error::UnknownFlag { flag: argument }),
            }
        }
        if let Some(argument) = arguments.next() {
            return Err(Error::Trailing { argument });
        }
        if version {
            return Ok(Self::Version);
        }
        if info {
            return Ok(Self::Info);
        }
        let command = match action.as_deref() {
            Some("start") => Self::Start,
            Some("delete") => Self::Delete,
            Some("serve") => Self::Serve,
            _ => {
                return Err(Error::Action {
                    action: action.unwrap_or_default(),
                });
            }
        };
        for (name, value) in [("namespace", &invocation.namespace), ("id", &invocation.id)] {
            if value.is_empty() {
                return Err(Error::Missing { name });
            }
        }
        Ok(command(invocation))
    }
}

fn switch(name: &'static str, inline: Option<&str>) -> Result<bool, Error> {
    match inline {
        None | Some("true" | "1" | "t") => Ok(true),
        Some("false" | "0" | "f") => Ok(false),
        Some(value) => Err(Error::NotBoolean {
            name,
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Result<Command, Error> {
        Command::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn parse_line_of_containerd_is_a_start() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc -debug start";
        let expected = Invocation {
            namespace: "k8s.io".to_owned(),
            id: "abc".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: "/usr/bin/containerd".to_owned(),
            bundle: None,
            debug: true,
        };
        assert_eq!(parse(line), Ok(Command::Start(expected)));
    }

    #[test]
    fn parse_two_dashes_and_equals_signs_are_the_same() {
        assert_eq!(
            parse("--namespace=default --id=x --bundle=/b -debug=false delete"),
            parse("-namespace default -id x -bundle /b delete")
        );
    }

    #[test]
    fn parse_version_and_info_need_no_action() {
        assert_eq!(parse("-v"), Ok(Command::Version));
        assert_eq!(parse("-info"), Ok(Command::Info));
    }

    #[test]
    fn parse_unknown_flag_is_refused_by_name() {
        let refused = parse("-socket /s -id x start").expect_err("is refused");
        assert!(refused.to_string().contains("-socket"), "{refused}");
    }

    #[test]
    fn parse_start_without_id_is_refused() {
        assert_eq!(
            parse("-namespace x start"),
            Err(Error::Missing { name: "id" })
        );
    }

    proptest! {
        #[test]
        fn parse_any_words_never_panics(words in proptest::collection::vec(".*", 0..6)) {
            let _ = Command::parse(words);
        }
    }
}
