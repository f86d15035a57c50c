//! Tests expiry: for any order of issuing, revoking, pruning and waiting, a revoked credential is never permitted again while it is valid.
//!
//! The rows come from the rules that every store uses. The answers come from the publisher and the index that every replica uses.
//! A naive list of credentials is the reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::{CellPublisher, RevocationPruner, SnapshotPublisher as _};
use crate::model::limits::{IAT_SKEW_S, REVOCATION_RETENTION_S, ROOT_LIFETIME_S_HARD_MAX};
use crate::model::mutant::{self, Mutant};
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{RevocationKind, RevocationRow, RevocationTarget, RowChange, StoreWrite};
use crate::model::time::{Clock as _, ManualClock, SystemClock};
use crate::revocation::{RevocationIndex, TargetRef};
use crate::snapshot::SnapshotCell;
use crate::store::sqlite::SqliteStore;
use crate::store::{CommitRequest, CommitRow, Settings, Store, StoreState, expiry, write_rules};

#[derive(Clone, Debug)]
enum ExpiryStep {
    /// A root token for an agent and a session, whose `iat` is off the clock by so many seconds.
    Issue {
        agent: usize,
        session: usize,
        life_s: i64,
        iat_off_s: i64,
    },
    Revoke(usize, RevocationKind),
    Reinstate(usize),
    Prune,
    Wait(i64),
}

fn steps() -> impl Strategy<Value = Vec<ExpiryStep>> {
    let issue = (0..2_usize, 0..2_usize, 1..=ROOT_LIFETIME_S_HARD_MAX, -60..=IAT_SKEW_S)
        .prop_map(|(agent, session, life_s, iat_off_s)| ExpiryStep::Issue { agent, session, life_s, iat_off_s });
    let meaning = prop_oneof![Just(RevocationKind::Suspend), Just(RevocationKind::Watermark), Just(RevocationKind::Dead)];
    let step = prop_oneof![
        4 => issue,
        3 => (0..12_usize, meaning).prop_map(|(which, meaning)| ExpiryStep::Revoke(which, meaning)),
        1 => (0..2_usize).prop_map(ExpiryStep::Reinstate),
        3 => Just(ExpiryStep::Prune),
        3 => (0..=ROOT_LIFETIME_S_HARD_MAX * 2).prop_map(ExpiryStep::Wait),
    ];
    prop::collection::vec(step, 1..60)
}

struct IssuedRoot {
    targets: [RevocationTarget; 3],
    iat_s: i64,
    exp_s: i64,
    /// Whether the credential was revoked in a way that is never undone.
    revoked: bool,
}

fn target(which: usize) -> RevocationTarget {
    match which {
        0..2 => RevocationTarget::Agent(format!("a{which}")),
        2..4 => RevocationTarget::Session(format!("s{}", which - 2)),
        _ => RevocationTarget::Token(format!("t{}", which - 4)),
    }
}

/// The rows of a store, and a replica that follows them.
struct ExpiryWorld {
    now_s: i64,
    rows: BTreeMap<RevocationTarget, RevocationRow>,
    credentials: Vec<IssuedRoot>,
    number: u64,
    publisher: CellPublisher,
    cell: Arc<SnapshotCell>,
    index: Arc<RevocationIndex>,
}

impl ExpiryWorld {
    fn new() -> Self {
        let (cell, index) = (Arc::new(SnapshotCell::default()), Arc::new(RevocationIndex::new()));
        let mut publisher = CellPublisher::new(cell.clone(), index.clone());
        let revision = Revision { history: HistoryId::new("h"), number: 0 };
        let (documents, revocations) = (vec![], vec![]);
        let (hash, digest, settings) = ([0; 32], StateDigest::default(), Settings::default());
        let state = StoreState { revision, hash, digest, settings, documents, revocations };
        publisher.publish_state(state, SystemClock.now()).unwrap();
        Self { now_s: 1_750_000_000, rows: BTreeMap::new(), credentials: vec![], number: 0, publisher, cell, index }
    }

    fn commit(&mut self, changes: Vec<RowChange>) {
        self.number += 1;
        let (number, unix_ms) = (self.number, self.now_s * 1000);
        let row = CommitRow { number, previous_hash: [0; 32], hash: [0; 32], digest: StateDigest::default(), unix_ms, changes };
        self.publisher.publish_commits(&[row], SystemClock.now()).unwrap();
    }

    fn take(&mut self, step: ExpiryStep) {
        let watermark_s = self.now_s + IAT_SKEW_S;
        match step {
            ExpiryStep::Issue { agent, session, life_s, iat_off_s } => {
                let targets = [target(agent), target(2 + session), target(4 + self.credentials.len())];
                let iat_s = self.now_s + iat_off_s;
                // A dead session stays dead for credentials that are issued later.
                let revoked = self.rows.get(&targets[1]).is_some_and(|row| row.dead);
                self.credentials.push(IssuedRoot { targets, iat_s, exp_s: iat_s + life_s, revoked });
            }
            ExpiryStep::Revoke(which, meaning) => {
                let target = target(which);
                let row = self.rows.get(&target).cloned();
                let Ok(row) = write_rules::revoke_row(row, &target, meaning, "", self.number + 1, watermark_s) else { return };
                for credential in self.credentials.iter_mut().filter(|credential| credential.targets.contains(&target)) {
                    credential.revoked |= meaning != RevocationKind::Suspend;
                }
                self.rows.insert(target, row.clone());
                self.commit(vec![RowChange::Revocation(row)]);
            }
            ExpiryStep::Reinstate(which) => {
                let target = target(which);
                let row = self.rows.get(&target).cloned();
                let Ok(row) = write_rules::reinstate_row(row, &target, "", self.number + 1, watermark_s) else { return };
                self.rows.insert(target, row.clone());
                self.commit(vec![RowChange::Revocation(row)]);
            }
            ExpiryStep::Prune => {
                let (over, kept) =
                    std::mem::take(&mut self.rows).into_iter().partition(|(_, row)| expiry::has_expired(row, self.now_s));
                self.rows = kept;
                let over: BTreeMap<RevocationTarget, RevocationRow> = over;
                self.commit(over.into_keys().map(RowChange::RevocationRemoved).collect());
            }
            ExpiryStep::Wait(s) => self.now_s += s,
        }
    }

    /// A credential that is permitted although it must not be.
    fn wrongly_alive(&self) -> Option<String> {
        let view = self.cell.load().unwrap();
        let number = view.snapshot.revision().number;
        let hit = |credential: &IssuedRoot| {
            let keys = credential.targets.iter().map(|target| self.index.key(TargetRef::from(target)));
            keys.into_iter().any(|key| self.index.find_hit(key, credential.iat_s, number).is_some())
        };
        let suspended = |target: &RevocationTarget| self.rows.get(target).is_some_and(|row| row.suspended);
        let must_die = |credential: &&IssuedRoot| credential.revoked || credential.targets.iter().any(suspended);
        let valid = self.credentials.iter().filter(|credential| self.now_s < credential.exp_s);
        valid.filter(must_die).find(|credential| !hit(credential)).map(|credential| format!("{:?}", credential.targets))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_revoked_comes_back(steps in steps()) {
        let mut world = ExpiryWorld::new();
        for step in steps {
            world.take(step.clone());
            prop_assert_eq!(world.wrongly_alive(), None, "after {:?} at {}", step, world.now_s);
        }
        // Once no decision uses an older snapshot, the index holds only the rows of the store.
        drop(world.cell.load());
        world.commit(vec![]);
        drop(world.cell.load());
        world.publisher.renew_proof(SystemClock.now());
        let in_effect = |row: &&RevocationRow| row.dead || row.suspended || row.watermark_unix_s.is_some();
        prop_assert!(world.index.len() >= world.rows.values().filter(in_effect).count() as u64);
        prop_assert!(world.index.len() <= world.rows.len() as u64, "{} held, {} rows", world.index.len(), world.rows.len());
    }
}

/// A decision may hold an older snapshot than the published one. A row that denies in it must deny until that decision ends.
#[test]
fn what_a_held_snapshot_sees_is_kept_until_it_is_let_go() {
    let check = |mutant: Option<Mutant>, expected: [bool; 2]| {
        let seen = mutant::run_with_mutant(mutant, || {
            let mut world = ExpiryWorld::new();
            world.take(ExpiryStep::Revoke(4, RevocationKind::Dead));
            let held = world.cell.load().unwrap();
            world.take(ExpiryStep::Wait(2 * REVOCATION_RETENTION_S));
            world.take(ExpiryStep::Prune);
            world.publisher.renew_proof(SystemClock.now());
            let key = world.index.key(TargetRef::from(&target(4)));
            let number = held.snapshot.revision().number;
            let seen = [number, number + 1].map(|number| world.index.find_hit(key, 0, number).is_some());
            drop(held);
            drop(world.cell.load());
            world.publisher.renew_proof(SystemClock.now());
            assert_eq!(world.index.len(), 0, "nobody sees it any more");
            seen
        });
        assert_eq!(seen, expected, "{mutant:?}");
    };
    check(None, [true, false]);
    check(Some(Mutant::PruneVisibleEntry), [false, false]);
}

#[tokio::test]
async fn upkeep_prunes_by_a_clock_that_ran_and_not_by_one_that_jumped() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::at_unix_s(1_750_000_000));
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&folder.path().join("s"), clock.clone()).unwrap());
    let writes =
        (0..10).map(|id| StoreWrite::Revoke { target: target(4 + id), kind: RevocationKind::Dead, reason: String::new() });
    store.commit(CommitRequest { writes: writes.collect(), ..CommitRequest::default() }).await.unwrap();
    let upkeep = RevocationPruner::new(store.clone(), clock.clone());
    clock.step_wall_ms(REVOCATION_RETENTION_S * 1000 * 10);
    assert_eq!(upkeep.prune_expired().await, 0, "the wall clock jumped");
    clock.step_wall_ms(-REVOCATION_RETENTION_S * 1000 * 10);
    clock.advance_ms((REVOCATION_RETENTION_S + 2 * IAT_SKEW_S) * 1000);
    assert_eq!(upkeep.prune_expired().await, 10);
    assert_eq!(store.revocations(10).await.unwrap().total, 0);
}
