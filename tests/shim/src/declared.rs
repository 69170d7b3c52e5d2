//! Where ours is meant to differ from runc's shim.

use crate::compare::Declared;

const WRONG: &str = "wrong_calls";
const WRONG_EXECS: &str = "wrong_calls_of_execs";
const INVALID: &str = "INVALID_ARGUMENT";
const EXISTS: &str = "ALREADY_EXISTS";
const REFUSED: &str = "FAILED_PRECONDITION";

/// The difference that ours says `ours` to calls of [`WRONG`] about `about`.
const fn wrong(about: &'static str, ours: &'static str, reason: &'static str) -> Declared {
    Declared {
        scenario: WRONG,
        about,
        ours,
        reason,
    }
}

/// The same of the calls of [`WRONG_EXECS`].
const fn wrong_exec(about: &'static str, ours: &'static str, reason: &'static str) -> Declared {
    Declared {
        scenario: WRONG_EXECS,
        about,
        ours,
        reason,
    }
}

/// Each difference with its reason.
pub const DECLARED: &[Declared] = &[
    wrong(
        "Create with ",
        INVALID,
        "an id that is no single name is the caller's mistake, and said to be",
    ),
    wrong(
        "Exec with ",
        INVALID,
        "an id that is no single name, or a specification that is none, is the caller's mistake",
    ),
    wrong(
        "Delete after Exec with ",
        "",
        "the exec was refused: there is nothing to delete",
    ),
    wrong(
        "Update with ",
        INVALID,
        "resources that are no resources are the caller's mistake",
    ),
    wrong(
        "Kill with signal 999",
        INVALID,
        "there is no such signal, whatever the container does",
    ),
    wrong(
        ", Create",
        EXISTS,
        "runc's shim finds only in runc that the id is taken, and loses that code",
    ),
    wrong(
        "2 created, Exec",
        REFUSED,
        "nothing runs yet that the exec could join",
    ),
    wrong(
        "2 created, Delete after Exec",
        "",
        "the exec was refused: there is nothing to delete",
    ),
    wrong_exec(
        "Exec of a missing program",
        REFUSED,
        "what cannot be executed is refused at once, and not at Start",
    ),
    wrong_exec(
        "of a missing program",
        "",
        "the exec was refused: there is nothing to start or delete",
    ),
    wrong(
        "ResizePty",
        REFUSED,
        "there is no terminal whose size could be set; runc's shim ignores the call",
    ),
    wrong_exec(
        "ResizePty",
        REFUSED,
        "there is no terminal whose size could be set; runc's shim ignores the call",
    ),
    wrong_exec(
        "CloseIO of an",
        "NOT_FOUND",
        "runc's shim says so too, in words, and loses the code",
    ),
    Declared {
        scenario: "log_file",
        about: "a new file",
        ours: "err out",
        reason: "nothing is lost, however soon Delete comes",
    },
    Declared {
        scenario: "log_file",
        about: "the same once more",
        ours: "err err out out",
        reason: "nothing is lost, however soon Delete comes",
    },
    Declared {
        scenario: "no_streams",
        about: "status",
        ours: "0",
        reason: "the outputs are /dev/null, which takes all",
    },
    Declared {
        scenario: "delete_before_start",
        about: "exit status",
        ours: "137",
        reason: "it was killed: 0 would say that its program had run and succeeded",
    },
];

/// Scenarios in which runc's shim itself does not do what is asked of ours,
/// each with what is wrong.
pub const EXCUSED: &[(&str, &str)] = &[
    (
        "start_as_each_containerd",
        "runc's shim serves only the containerd of its own release",
    ),
    (
        "life_for_containerd_1_7",
        "runc's shim serves only the containerd of its own release",
    ),
    (
        "order_of_events",
        "runc's shim now and then does not tell of the end of a task that is deleted at once after it",
    ),
    (
        WRONG_EXECS,
        "runc's shim counts an exec whose Start failed as one less that runs, and dies of it with the init",
    ),
    (
        "log_file",
        "runc's shim loses the last lines now and then when Delete comes at once",
    ),
    (
        "no_streams",
        "under runc's shim the outputs are open for reading only, so that writing fails",
    ),
];
