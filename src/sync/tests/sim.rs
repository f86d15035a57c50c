//! Proves the kill switch by simulation: real replicas, a model store, and faults between them.
//!
//! Every fault, delay, pause and clock jump comes from a seed, so a failed run can be repeated: `SIM_SEED=… cargo test --lib
//! sim::every_promise_holds -- --nocapture`.
//!
//! `sim/checker.rs` holds the promises. Mutants, each broken in one line, show that the checker would see a broken promise. Look
//! next at `sim/simulation.rs`, which runs one simulation.

mod checker;
mod clients;
mod fault_plan;
mod fixture;
mod host;
mod remote_store;
mod replica;
mod rng;
mod simulation;
mod store;
mod wire;

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use self::checker::{Promise, RunHistory};
use crate::model::mutant::{self, Mutant};

pub(super) use fixture::AlternatingPolicy;
pub(super) use replica::NoApprovals;

pub(super) const START_UNIX_S: i64 = 1_700_000_000;
/// Seeds of the ordinary run. `PORTCULLIS_SIM_SEEDS` sets another number.
const SEEDS: u64 = 200;

fn from_environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is `{value}`: give a number")))
}

/// Totals of the runs. They show how much the runs have tested.
#[derive(Debug, Default)]
struct RunTotals {
    seeds: u64,
    answers: u64,
    /// Answers from a revision that the caller had seen, or a later one.
    at_least: u64,
    /// Waits for the fleet that succeeded: no replica answers from before any more.
    waits: u64,
}

impl fmt::Display for RunTotals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seeds, answers, at_least, waits } = self;
        write!(f, "{seeds} seeds, {answers} answers, {at_least} of them `at_least`, {waits} waits for the fleet")
    }
}

/// Runs a seed. Returns the totals, or the violation in its history.
fn check_seed(seed: u64) -> Result<RunTotals, String> {
    let RunHistory { answers, waits, .. } = &run_and_check(seed)?;
    let at_least = answers.iter().filter(|answer| answer.at_least.is_some() && !answer.unavailable).count();
    let waits = waits.iter().filter(|wait| wait.returned.is_some_and(|(_, said)| said)).count();
    Ok(RunTotals { seeds: 1, answers: answers.len() as u64, at_least: at_least as u64, waits: waits as u64 })
}

fn run_and_check(seed: u64) -> Result<RunHistory, String> {
    let outcome = simulation::run(seed, false)?;
    match checker::check(&outcome.history) {
        Ok(()) => Ok(outcome.history),
        Err(violation) => Err(format!(
            "seed {seed}: {violation}\nrun it again, with its trace: SIM_SEED={seed} cargo test --lib sim::every_promise_holds -- --nocapture"
        )),
    }
}

#[test]
fn every_promise_holds() {
    if let Some(seed) = from_environment("SIM_SEED") {
        let outcome = simulation::run(seed, true).unwrap();
        outcome.trace.iter().for_each(|line| println!("{line}"));
        return checker::check(&outcome.history).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
    }
    let first = from_environment("PORTCULLIS_SIM_FIRST").unwrap_or(0);
    let seeds = from_environment("PORTCULLIS_SIM_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(first);
    let seen = Mutex::new((RunTotals::default(), Vec::new()));
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= first + seeds {
            return;
        }
        let verdict = check_seed(seed);
        let (seen, failed) = &mut *seen.lock().unwrap();
        match verdict {
            Ok(one) => {
                seen.seeds += one.seeds;
                seen.answers += one.answers;
                seen.at_least += one.at_least;
                seen.waits += one.waits;
            }
            Err(problem) => {
                println!("{problem}");
                failed.push(problem);
            }
        }
        if seen.seeds.is_multiple_of(500) {
            println!("passed so far: {seen}; {} failed", failed.len());
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let (seen, failed) = seen.into_inner().unwrap();
    println!("passed: {seen}");
    assert!(failed.is_empty(), "{} of {seeds} seeds fail:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn a_seed_runs_the_same_again() {
    for seed in 0..8 {
        let (first, second) = (simulation::run(seed, true).unwrap(), simulation::run(seed, true).unwrap());
        assert!(first.trace.len() > 300, "seed {seed} has a trace of {} lines", first.trace.len());
        for (line, again) in first.trace.iter().zip(&second.trace) {
            assert_eq!(line, again, "seed {seed} ran otherwise the second time");
        }
        assert_eq!(first.trace.len(), second.trace.len(), "seed {seed}");
    }
}

/// Runs seeds until one of them shows that the mutant breaks the promise.
fn catches(mutant: Mutant, promise: Promise, first: u64) {
    let breaks = |seed: u64| {
        let outcome = mutant::run_with_mutant(Some(mutant), || simulation::run(seed, false)).unwrap();
        checker::check(&outcome.history).err().filter(|violation| violation.promise == promise).map(|violation| (seed, violation))
    };
    // Start with the seed that is known to show it. If the simulation has changed since, another seed does.
    let caught = (first..SEEDS).chain(0..first).find_map(breaks);
    let (seed, violation) = caught.unwrap_or_else(|| panic!("{mutant:?} passes {SEEDS} seeds: the checker does not see it"));
    println!("{mutant:?} {first} {seed}: {violation}");
}

macro_rules! mutants {
    ($($name:ident: $mutant:ident breaks $promise:ident, seed $first:literal;)*) => {
        mod mutants {
            $(#[test] fn $name() { super::catches(super::Mutant::$mutant, super::Promise::$promise, $first); })*
        }
    };
}

mutants! {
    skip_recheck: SkipRecheck breaks States, seed 1;
    recheck_newer_proof: RecheckNewerProof breaks Bound, seed 169;
    valid_for_bound: ValidForBound breaks States, seed 0;
    at_least_ignored: AtLeastIgnored breaks AtLeast, seed 0;
    at_least_old_view: AtLeastOldView breaks AtLeast, seed 2;
    clean_forever: CleanForever breaks Revision, seed 0;
    arrival_time: ArrivalTime breaks Bound, seed 25;
    forget_known: ForgetKnownPosition breaks Forward, seed 3;
    renew_without_head: RenewWithoutHead breaks Bound, seed 25;
    renew_in_resync: RenewInResync breaks Bound, seed 26;
    renew_on_failure: RenewOnFailure breaks Bound, seed 1;
    ignore_fork: IgnoreFork breaks Forward, seed 3;
    ignore_fall: IgnoreRollback breaks Forward, seed 3;
    ignore_history: IgnoreHistory breaks Digest, seed 27;
    proof_survives_quarantine: ProofSurvivesQuarantine breaks States, seed 199;
    drop_commit: DropCommit breaks Revision, seed 12;
    policy_only: PolicyOnly breaks Revision, seed 0;
    lost_insert: LostInsert breaks Revision, seed 0;
    load_without_revocations: LoadWithoutRevocations breaks Revision, seed 2;
    boot_clock_only: BootClockOnly breaks Bound, seed 32;
    acknowledge_before_barrier: AcknowledgeBeforeBarrier breaks Fleet, seed 10;
    acknowledge_received: AcknowledgeReceived breaks Fleet, seed 5;
    silent_ran_out: SilentRanOut breaks Fleet, seed 17;
    wait_by_wall_clock: WaitByWallClock breaks Fleet, seed 41;
    one_incarnation: OneIncarnation breaks Fleet, seed 17;
    one_lane: RevocationsWaitForPolicy breaks Revision, seed 9;
    claim_policy: ClaimPolicy breaks LastGood, seed 1;
    remove_last: RemoveLast breaks Revision, seed 34;
    prune_early: PruneEarly breaks Revision, seed 0;
    one_operator: OneOperator breaks TwoOperators, seed 3;
    same_operator: SameOperator breaks TwoOperators, seed 27;
    pause_after_success: PauseAfterSuccess breaks Recovery, seed 178;
    place_once: PositionWrittenOnce breaks Forward, seed 50;
}
