//! Deliberate faults in the kill switch. Tests use them to show that the checks of the kill switch would detect a fault.
//!
//! Each mutant changes one line of another module, for one thread. A test switches it on and asserts that a check then fails: the checker
//! of the simulation in `sync/tests/sim.rs`, the tests under loom, or a unit test. Outside of this crate's tests, [`is_active`] is `false` at
//! compile time, so no mutant is in the program.

/// One deliberate fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The freshness is not checked again before the answer.
    SkipRecheck,
    /// After a wait, the newest proof of freshness is used without its snapshot.
    #[cfg(test)]
    RecheckNewerProof,
    /// Every answer is valid for the whole freshness bound.
    ValidForBound,
    /// The decision does not wait for the requested revision.
    AtLeastIgnored,
    /// The decision waits for the requested revision and then uses the earlier view.
    AtLeastOldView,
    /// A chain that was once found clean is never checked again.
    CleanForever,
    /// A proof of freshness dates from the arrival of the answer.
    ArrivalTime,
    /// A restart forgets the position that the replica had recorded.
    ForgetKnownPosition,
    /// An answer that does not reach the head of the history renews the proof.
    RenewWithoutHead,
    /// A replica in resync renews its proof.
    RenewInResync,
    /// A failed poll renews its proof.
    RenewOnFailure,
    /// The follower accepts commits whose hashes do not form a chain.
    IgnoreFork,
    /// The follower accepts a store that has fallen behind.
    IgnoreRollback,
    /// The follower accepts a store of another history.
    IgnoreHistory,
    /// The proof survives quarantine.
    ProofSurvivesQuarantine,
    /// The first of several commits is skipped.
    DropCommit,
    /// The policy of a commit is applied and its revocations are not.
    PolicyOnly,
    /// The key of a revocation is not inserted into the filter.
    LostInsert,
    /// The revocations of a full state are not applied.
    LoadWithoutRevocations,
    /// A replica acknowledges an applied revision while a handler may still hold an earlier decision.
    AcknowledgeBeforeBarrier,
    /// After the barrier, a replica also acknowledges the revisions that were applied while the barrier ran.
    AcknowledgeNewest,
    /// A replica acknowledges the revisions that the store has announced.
    AcknowledgeReceived,
    /// A wait for the fleet treats a silent replica as run out too early.
    SilentRanOut,
    /// A wait for the fleet uses a clock that can be set.
    WaitByWallClock,
    /// All processes of a node have the same incarnation.
    OneIncarnation,
    /// No revocation is applied while the policy cannot be built.
    RevocationsWaitForPolicy,
    /// A policy that could not be built is reported as in force.
    ClaimPolicy,
    /// Removed revocations of several commits are applied last.
    RemoveLast,
    /// A store prunes revocations that can still apply to a chain.
    PruneEarly,
    /// One operator alone reinstates everything.
    OneOperator,
    /// The operator who asked for a reinstatement also confirms it.
    SameOperator,
    /// A replica records its position only once.
    PositionWrittenOnce,
    /// A success between two failures is delayed like a failure.
    PauseAfterSuccess,
    /// An entry is freed while an older snapshot that sees it is in use.
    PruneVisibleEntry,
    /// The age is measured by the wall clock alone.
    WallClockOnly,
    /// The age is measured by the boot clock alone.
    BootClockOnly,
    /// A reader reads the generation after the view.
    GenerationAfterView,
    /// The generation advances before the added entry can be found.
    GenerationFirst,
    /// An entry that is added while a filter is built is inserted only into the old filter.
    LostWhileBuilding,
}

/// Whether a mutant is switched on: never, except in this crate's own tests.
#[cfg(not(test))]
pub(crate) const fn is_active(_mutant: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(crate) use switch::{is_active, run_with_mutant};

#[cfg(test)]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    pub(crate) fn is_active(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }

    /// Runs `run` with a mutant switched on for this thread.
    pub(crate) fn run_with_mutant<T>(mutant: Option<Mutant>, run: impl FnOnce() -> T) -> T {
        struct Restore(Option<Mutant>);
        impl Drop for Restore {
            fn drop(&mut self) {
                ON.set(self.0);
            }
        }
        let _restore = Restore(ON.replace(mutant));
        run()
    }
}
