//! Ways in which the kill switch can be broken on purpose, so that its proof can be seen to fail.
//!
//! Each is a line of another module, switched on for one thread by the simulation in `sync/tests/sim.rs`, whose checker must
//! catch it, or by the tests under loom. Outside of this crate's own tests [`active`] is `false` at compile time, and nothing of it is left.

/// A way to break it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The age is not looked at again before answering.
    SkipRecheck,
    /// After a wait the newest proof of freshness is taken without its snapshot.
    #[cfg(test)]
    RecheckNewerProof,
    /// Every answer is valid for the whole bound.
    ValidForBound,
    /// What the caller has seen is not waited for.
    AtLeastIgnored,
    /// What the caller has seen is waited for, and then decided by the view of before.
    AtLeastOldView,
    /// A chain once found clean stays so.
    CleanForever,
    /// A proof dates from when the answer came.
    ArrivalTime,
    /// A restart forgets how far it was.
    ForgetKnown,
    /// An answer that does not reach the head renews the proof.
    RenewWithoutHead,
    /// A replica out of step renews its proof.
    RenewInResync,
    /// A failed poll renews the proof.
    RenewOnFailure,
    /// Hashes that do not follow each other are followed.
    IgnoreFork,
    /// A store that fell is followed.
    IgnoreFall,
    /// A store of another history is followed.
    IgnoreHistory,
    /// Quarantine leaves the proof as it is.
    ProofSurvivesQuarantine,
    /// Of several commits at once the first is left out.
    DropCommit,
    /// A commit's policy is applied, its revocations are not.
    PolicyOnly,
    /// A revocation's key is not put into the filter.
    LostInsert,
    /// What a full state revokes is not taken over.
    LoadWithoutRevocations,
    /// A replica acknowledges what it applied although a decision from before may still be in a handler.
    AcknowledgeBeforeBarrier,
    /// After the barrier a replica acknowledges what was applied while it ran.
    AcknowledgeNewest,
    /// A replica acknowledges what the store says is there.
    AcknowledgeReceived,
    /// Who waits for the fleet takes a silent replica for one that ran out.
    SilentRanOut,
    /// Who waits for the fleet counts by a clock that can be set.
    WaitByWallClock,
    /// All processes of a node are known by one name.
    OneIncarnation,
    /// While the policy cannot be built no revocation is applied.
    OneLane,
    /// A policy that could not be built counts as in force.
    ClaimPolicy,
    /// Of several commits what is removed goes last.
    RemoveLast,
    /// A store takes away what can still hit something.
    PruneEarly,
    /// Everything is let in again by one operator.
    OneOperator,
    /// Everything is let in again by the one who asked for it.
    SameOperator,
    /// A replica writes down where it is once.
    PlaceOnce,
    /// What succeeds between two failures is held up like these.
    PauseAfterSuccess,
    /// What an older snapshot sees is freed while somebody holds it.
    ForgetHeld,
    /// Age by the wall clock alone.
    WallClockOnly,
    /// Age by the boot clock alone.
    BootClockOnly,
    /// A reader names the generation after it took the view.
    GenerationAfterView,
    /// The generation moves before what was added can be found.
    GenerationFirst,
    /// What comes while a filter is built goes to the old one alone.
    LostWhileBuilding,
}

/// Whether it is broken in this way: never, but in this crate's own tests.
#[cfg(not(test))]
pub(crate) const fn active(_mutant: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(crate) use switch::{active, with};

#[cfg(test)]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    pub(crate) fn active(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }

    /// Runs something broken, on this thread alone.
    pub(crate) fn with<T>(mutant: Option<Mutant>, run: impl FnOnce() -> T) -> T {
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
