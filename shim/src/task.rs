//! The life of one task: which call is right when, and in which order
//! containerd hears of it.
//!
//! Pure: the caller holds a lock around it, publishes what a transition
//! announces before letting go, and so keeps start before exit even when a
//! program ends before the call that started it has returned.

use thiserror::Error;

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + N for death by signal N.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_ns: i64,
    /// Why it ended with its pod, for the container's standard error.
    pub last_words: Option<String>,
    /// How many of the container's processes the guest's OOM killer had ended
    /// by then.
    pub oom_kills: u64,
}

/// Where a task stands, as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made, its program not yet executed.
    Created,
    /// Its program runs.
    Running,
    /// Its program would run, but for the client.
    Paused,
    /// Its program has ended.
    Stopped,
}

/// What containerd is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// It runs.
    Started,
    /// It is held.
    Paused,
    /// It runs again.
    Resumed,
    /// It has ended.
    Exited(Exit),
}

/// A call that does not fit the task's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WrongState {
    /// Start of a task that is being started or was.
    #[error("it was started before")]
    StartedBefore,
    /// Start of a task that has ended.
    #[error("it has ended")]
    Ended,
    /// Deleting a task that runs.
    #[error("it is running: kill it first")]
    Running,
    /// Anything on a task that is being deleted.
    #[error("it is being deleted")]
    Deleting,
    /// A further process in a task that has not been started, or pausing it.
    #[error("it is not running: start it first")]
    NotRunning,
    /// A further process in a task that is paused, or pausing it again.
    #[error("it is paused: resume it first")]
    Paused,
    /// Resuming a task that is not paused.
    #[error("it is not paused")]
    NotPaused,
    /// A signal to a task that has ended.
    #[error("its process has already finished")]
    Finished,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    /// Executed perhaps; the agent has not answered yet.
    Starting,
    Running,
    Paused,
    Stopped,
    /// On its way out, from created or stopped.
    Deleting,
}

/// One task's life, from created to deleted.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    phase: Phase,
    exit: Option<Exit>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    /// A task just created.
    pub fn new() -> Self {
        Self {
            phase: Phase::Created,
            exit: None,
        }
    }

    /// What clients see.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Running => State::Running,
            Phase::Paused => State::Paused,
            Phase::Stopped => State::Stopped,
            Phase::Deleting if self.exit.is_some() => State::Stopped,
            Phase::Created | Phase::Starting | Phase::Deleting => State::Created,
        }
    }

    /// How it ended, once that is told.
    pub fn exit(&self) -> Option<&Exit> {
        match self.phase {
            Phase::Stopped | Phase::Deleting => self.exit.as_ref(),
            Phase::Created | Phase::Starting | Phase::Running | Phase::Paused => None,
        }
    }

    /// Whether it has ended, told or not.
    pub fn has_ended(&self) -> bool {
        self.exit.is_some()
    }

    /// Start was asked for.
    pub fn begin_start(&mut self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Created => {
                self.phase = Phase::Starting;
                Ok(())
            }
            Phase::Starting | Phase::Running | Phase::Paused => Err(WrongState::StartedBefore),
            Phase::Stopped => Err(WrongState::Ended),
            Phase::Deleting => Err(WrongState::Deleting),
        }
    }

    /// The program was executed.
    pub fn started(&mut self) -> Vec<Announcement> {
        if self.phase != Phase::Starting {
            return Vec::new();
        }
        self.phase = Phase::Running;
        let mut announcements = vec![Announcement::Started];
        announcements.extend(self.stop_if_ended());
        announcements
    }

    /// The program could not be executed: the task is as it was, or has ended
    /// over it.
    pub fn start_failed(&mut self) -> Vec<Announcement> {
        if self.phase != Phase::Starting {
            return Vec::new();
        }
        self.phase = Phase::Created;
        self.stop_if_ended().into_iter().collect()
    }

    /// The program has ended. Only the first call counts.
    pub fn exited(&mut self, exit: Exit) -> Vec<Announcement> {
        if self.exit.is_some() {
            return Vec::new();
        }
        self.exit = Some(exit);
        match self.phase {
            // Told by `started` or `start_failed`, after what they tell.
            Phase::Starting => Vec::new(),
            Phase::Deleting => self
                .exit
                .clone()
                .map(Announcement::Exited)
                .into_iter()
                .collect(),
            Phase::Created | Phase::Running | Phase::Paused | Phase::Stopped => {
                self.stop_if_ended().into_iter().collect()
            }
        }
    }

    /// A signal was asked for.
    pub fn check_signal(&self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Created | Phase::Starting | Phase::Running | Phase::Paused => Ok(()),
            Phase::Stopped => Err(WrongState::Finished),
            Phase::Deleting if self.exit.is_some() => Err(WrongState::Finished),
            Phase::Deleting => Err(WrongState::Deleting),
        }
    }

    /// A signal to an exec was asked for. Unlike an init, which clients kill to
    /// be rid of a task, one that was not started has no process for them.
    pub fn check_exec_signal(&self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Created => Err(WrongState::NotRunning),
            Phase::Starting | Phase::Running | Phase::Paused | Phase::Stopped | Phase::Deleting => {
                self.check_signal()
            }
        }
    }

    /// A further process beside it, or a pause, was asked for.
    pub fn check_running(&self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Running => Ok(()),
            Phase::Paused => Err(WrongState::Paused),
            Phase::Created | Phase::Starting => Err(WrongState::NotRunning),
            Phase::Stopped => Err(WrongState::Ended),
            Phase::Deleting => Err(WrongState::Deleting),
        }
    }

    /// The guest holds it. Nothing to tell if it has ended over it.
    pub fn paused(&mut self) -> Vec<Announcement> {
        if self.phase != Phase::Running {
            return Vec::new();
        }
        self.phase = Phase::Paused;
        vec![Announcement::Paused]
    }

    /// Resuming was asked for.
    pub fn check_resume(&self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Paused => Ok(()),
            Phase::Created | Phase::Starting | Phase::Running => Err(WrongState::NotPaused),
            Phase::Stopped => Err(WrongState::Ended),
            Phase::Deleting => Err(WrongState::Deleting),
        }
    }

    /// The guest lets it run again.
    pub fn resumed(&mut self) -> Vec<Announcement> {
        if self.phase != Phase::Paused {
            return Vec::new();
        }
        self.phase = Phase::Running;
        vec![Announcement::Resumed]
    }

    /// Delete was asked for.
    pub fn begin_delete(&mut self) -> Result<(), WrongState> {
        match self.phase {
            Phase::Created | Phase::Stopped => {
                self.phase = Phase::Deleting;
                Ok(())
            }
            Phase::Starting | Phase::Running | Phase::Paused => Err(WrongState::Running),
            Phase::Deleting => Err(WrongState::Deleting),
        }
    }

    /// Deleting failed: it can be asked for again.
    pub fn delete_failed(&mut self) {
        if self.phase == Phase::Deleting {
            self.phase = if self.exit.is_some() {
                Phase::Stopped
            } else {
                Phase::Created
            };
        }
    }

    fn stop_if_ended(&mut self) -> Option<Announcement> {
        let exit = self.exit.clone()?;
        self.phase = Phase::Stopped;
        Some(Announcement::Exited(exit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at_ns: 1,
            last_words: None,
            oom_kills: 0,
        }
    }

    #[test]
    fn exit_during_start_is_told_after_it() {
        let mut task = Lifecycle::new();
        task.begin_start().expect("starts");
        assert_eq!(task.exited(exit(3)), []);
        assert_eq!(task.state(), State::Created);
        assert_eq!(task.exit(), None);
        assert_eq!(
            task.started(),
            [Announcement::Started, Announcement::Exited(exit(3))]
        );
        assert_eq!(task.state(), State::Stopped);
    }

    #[test]
    fn start_that_fails_can_be_deleted() {
        let mut task = Lifecycle::new();
        task.begin_start().expect("starts");
        assert_eq!(task.start_failed(), []);
        assert_eq!(task.begin_delete(), Ok(()));
        assert_eq!(task.exited(exit(137)), [Announcement::Exited(exit(137))]);
    }

    #[test]
    fn delete_of_running_task_is_refused() {
        let mut task = Lifecycle::new();
        task.begin_start().expect("starts");
        task.started();
        assert_eq!(task.begin_delete(), Err(WrongState::Running));
        task.exited(exit(0));
        assert_eq!(task.check_signal(), Err(WrongState::Finished));
        assert_eq!(task.begin_delete(), Ok(()));
        assert_eq!(task.begin_delete(), Err(WrongState::Deleting));
        // Clients forward signals until they hear of the end.
        assert_eq!(task.check_signal(), Err(WrongState::Finished));
        task.delete_failed();
        assert_eq!(task.begin_delete(), Ok(()));
    }

    #[test]
    fn signal_before_the_start_is_for_an_init_only() {
        let mut task = Lifecycle::new();
        assert_eq!(task.check_signal(), Ok(()));
        assert_eq!(task.check_exec_signal(), Err(WrongState::NotRunning));
        task.begin_start().expect("starts");
        assert_eq!(task.check_exec_signal(), Ok(()));
        task.started();
        task.exited(exit(0));
        assert_eq!(task.check_exec_signal(), Err(WrongState::Finished));
    }

    #[test]
    fn pause_is_told_once_and_ends_with_the_task() {
        let mut task = Lifecycle::new();
        assert_eq!(task.check_running(), Err(WrongState::NotRunning));
        task.begin_start().expect("starts");
        assert_eq!(task.paused(), []);
        task.started();
        assert_eq!(task.check_resume(), Err(WrongState::NotPaused));
        assert_eq!(task.paused(), [Announcement::Paused]);
        assert_eq!(task.paused(), []);
        assert_eq!(task.check_running(), Err(WrongState::Paused));
        assert_eq!(task.resumed(), [Announcement::Resumed]);
        task.paused();
        assert_eq!(task.exited(exit(137)), [Announcement::Exited(exit(137))]);
        assert_eq!(task.resumed(), []);
        assert_eq!(task.state(), State::Stopped);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        BeginStart,
        Started,
        StartFailed,
        Exited(u32),
        Paused,
        Resumed,
        BeginDelete,
        DeleteFailed,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::BeginStart),
            Just(Step::Started),
            Just(Step::StartFailed),
            (0u32..256).prop_map(Step::Exited),
            Just(Step::Paused),
            Just(Step::Resumed),
            Just(Step::BeginDelete),
            Just(Step::DeleteFailed),
        ];
        proptest::collection::vec(step, 0..24)
    }

    proptest! {
        #[test]
        fn any_calls_tell_start_at_most_once_then_one_exit(steps in steps()) {
            let mut task = Lifecycle::new();
            let mut told = Vec::new();
            let mut first_exit = None;
            for step in steps {
                let before = task.state();
                match step {
                    Step::BeginStart => { let _ = task.begin_start(); }
                    Step::Started => told.extend(task.started()),
                    Step::StartFailed => told.extend(task.start_failed()),
                    Step::Exited(status) => {
                        first_exit.get_or_insert(status);
                        told.extend(task.exited(exit(status)));
                    }
                    Step::Paused => told.extend(task.paused()),
                    Step::Resumed => told.extend(task.resumed()),
                    Step::BeginDelete => {
                        let deleted = task.begin_delete().is_ok();
                        let runs = matches!(before, State::Running | State::Paused);
                        prop_assert!(!deleted || !runs);
                    }
                    Step::DeleteFailed => task.delete_failed(),
                }
                // Stopped is for good.
                prop_assert!(before != State::Stopped || task.state() == State::Stopped);
                prop_assert_eq!(task.state() == State::Stopped, task.exit().is_some());
            }
            let starts = told.iter().filter(|told| **told == Announcement::Started).count();
            let exits: Vec<_> = told.iter().filter_map(|told| match told {
                Announcement::Exited(exit) => Some(exit.status),
                Announcement::Started | Announcement::Paused | Announcement::Resumed => None,
            }).collect();
            prop_assert!(starts <= 1 && exits.len() <= 1);
            if let Some(status) = exits.first() {
                prop_assert_eq!(Some(*status), first_exit);
                prop_assert!(matches!(told.last(), Some(Announcement::Exited(_))));
            }
        }
    }
}
