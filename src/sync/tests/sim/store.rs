//! A model of the store: the real rules, hash chain and digest over a tree of commits, and two copies that can lose contact.
//!
//! Each commit is a node of a tree, and a copy has its head at some node. A failover to a stale copy, a crash that loses unsynced
//! commits and a restored backup only move that head. The tree keeps every acknowledged commit for the checker.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::START_UNIX_S;
use super::fixture::{RevocationModel, SimFixture};
use super::host::elapsed_ns;
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{DocumentKey, PendingTwoPersonRow, RevocationRow, RevocationTarget, RowChange, StoreWrite};
use crate::store::fleet::{HEARTBEAT_INTERVAL_MS, SILENCE_MS_MAX};
use crate::store::hash_chain::{GENESIS, commit_hash, document_sha256, encode_changes, revocation_sha256, state_digest};
use crate::store::two_person::{self, TwoPersonStep};
use crate::store::{
    ChangeLogPage, CommitRequest, CommitRow, Error, ReplicaHeartbeat, ReplicaList, ReplicaRegistration, ReplicaRow, ReplicaState,
    Settings, StoreState, StoredDocument, expiry, write_rules,
};

/// The durability of an acknowledged commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// One copy. A commit is on disk before it is acknowledged.
    Single,
    /// Two copies. A commit is on both before it is acknowledged or visible, and a poll is a write too.
    Synchronous,
    /// A commit is acknowledged first. The disk and the other copy receive it later, or never.
    Asynchronous,
}

/// A commit in the tree.
#[derive(Clone)]
pub(super) struct CommitNode {
    pub(super) parent: Option<usize>,
    pub(super) row: CommitRow,
    /// The histories that contain it. A restored copy shares its past with the original.
    pub(super) histories: Vec<HistoryId>,
    pub(super) created_ns: i64,
    pub(super) acknowledged_ns: Option<i64>,
    /// The time at which the store lost it.
    pub(super) lost_ns: Option<i64>,
    /// For each pair of chain and tool: whether it is revoked, and whether policy allows it.
    pub(super) revoked: Vec<bool>,
    pub(super) allowed: Vec<bool>,
    /// Whether its policy can be built.
    pub(super) builds: bool,
    /// Its changes to the revocation of everything, in order.
    pub(super) all: Vec<RevokeAllChange>,
    documents: BTreeMap<DocumentKey, StoredDocument>,
    revocations: BTreeMap<RevocationTarget, RevocationRow>,
    memory: RevocationModel,
    /// The pending request of one operator to reinstate everything, which a second operator must confirm.
    pending: Option<PendingTwoPersonRow>,
    /// The replicas' rows at the time of the commit. A backup of that time holds them.
    replicas: Vec<ReplicaRow>,
}

/// A change to the revocation of everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RevokeAllChange {
    Shut,
    /// An operator asks to lift it.
    Asked(String),
    /// An operator lifts it.
    Lifted(String),
}

/// The tree index of the newest commit when a simulation begins.
const FIRST: usize = 3;
/// The age of the first commits. Their revocations may be pruned.
const PAST_S: i64 = 10 * 86_400;

/// One copy of the store.
#[derive(Clone)]
pub(super) struct StoreCopy {
    pub(super) history: HistoryId,
    /// The tree index of its head. Index 0 is the empty store.
    pub(super) head: usize,
    /// The head that a crash leaves.
    pub(super) synced: usize,
    /// Whether the copy is no longer the one that answers.
    pub(super) fenced: bool,
    /// The rows of the replicas that follow it.
    replicas: Vec<ReplicaRow>,
}

/// The whole store.
pub(super) struct StoreCluster {
    pub(super) durability: Durability,
    pub(super) tree: Vec<CommitNode>,
    pub(super) copies: [StoreCopy; 2],
    /// The copy that takes writes.
    pub(super) primary: usize,
    /// Whether the copies reach each other.
    pub(super) joined: bool,
    /// Before this time an old primary may still have answered. See the checker.
    pub(super) settled_ns: i64,
    pub(super) failed_over_ns: Option<i64>,
    /// Limit of the commits in one answer.
    page: usize,
    settings: Settings,
    /// Whether heartbeats without news are written only now and then, as in a SQLite file.
    lazy: bool,
    spent: Vec<[u8; 32]>,
    /// The numbers of rows that the log has lost.
    holes: Vec<u64>,
}

/// The cluster as the machines share it.
pub(super) type SharedCluster = Mutex<StoreCluster>;

impl StoreCluster {
    pub(super) fn new(durability: Durability, page: usize, lazy: bool, settings: Settings, fixture: &SimFixture) -> Self {
        let history = HistoryId::new("first");
        let row = CommitRow {
            number: 0,
            previous_hash: GENESIS,
            hash: GENESIS,
            digest: StateDigest::default(),
            unix_ms: 0,
            changes: vec![],
        };
        let empty = CommitNode {
            parent: None,
            row,
            histories: vec![history.clone()],
            created_ns: 0,
            acknowledged_ns: None,
            lost_ns: None,
            revoked: fixture.revoked(&RevocationModel::default()),
            allowed: fixture.allowed(&BTreeMap::new()),
            builds: true,
            all: vec![],
            documents: BTreeMap::new(),
            revocations: BTreeMap::new(),
            memory: RevocationModel::default(),
            pending: None,
            replicas: vec![],
        };
        let copy = StoreCopy { history, head: 0, synced: 0, fenced: false, replicas: vec![] };
        let mut cluster = Self {
            durability,
            tree: vec![empty],
            copies: [copy.clone(), copy],
            primary: 0,
            joined: true,
            settled_ns: 0,
            failed_over_ns: None,
            page,
            settings,
            lazy,
            spent: vec![],
            holes: vec![],
        };
        for writes in fixture.past() {
            let request = CommitRequest { writes, ..CommitRequest::default() };
            let place = cluster.commit(0, &request, (START_UNIX_S - PAST_S) * 1_000, fixture).unwrap();
            cluster.tree[place].acknowledged_ns = Some(0);
            cluster.copies.iter_mut().for_each(|copy| (copy.head, copy.synced) = (place, place));
        }
        cluster
    }

    /// Adds a commit to a copy's head. In a synchronous pair, it adds it to the other copy's head too.
    pub(super) fn commit(
        &mut self,
        copy: usize,
        request: &CommitRequest,
        unix_ms: i64,
        fixture: &SimFixture,
    ) -> Result<usize, Error> {
        write_rules::check_request(request)?;
        let head = self.copies[copy].head;
        let before = &self.tree[head];
        let (mut documents, mut revocations) = (before.documents.clone(), before.revocations.clone());
        let (mut memory, mut pending, before) = (before.memory.clone(), before.pending.clone(), before.row.clone());
        let (number, unix_s) = (before.number + 1, unix_ms.div_euclid(1_000));
        let watermark_unix_s = unix_s + self.settings.iat_skew_s;
        let mut digest = before.digest;
        let (mut changes, mut all) = (Vec::new(), Vec::new());
        for write in &request.writes {
            let current = |target: &RevocationTarget| revocations.get(target).cloned();
            let row = match write {
                StoreWrite::PutDocument(row) => {
                    let stored = StoredDocument { row: row.clone(), revision: number };
                    digest.add(&document_sha256(row, number));
                    if let Some(before) = documents.insert(row.key.clone(), stored) {
                        digest.remove(&document_sha256(&before.row, before.revision));
                    }
                    changes.push(RowChange::Document(row.clone()));
                    continue;
                }
                StoreWrite::RemoveDocument(_)
                | StoreWrite::Adopt { .. }
                | StoreWrite::Merge(_)
                | StoreWrite::Approve { .. }
                | StoreWrite::Refuse { .. } => {
                    panic!("no writer of the simulation does that")
                }
                StoreWrite::Prune { before_unix_s, rows_max } => {
                    let before_unix_s = (*before_unix_s).min(unix_s);
                    let lapsed = revocations.values().filter(|row| expiry::has_expired(row, before_unix_s));
                    for row in lapsed.take(*rows_max).cloned().collect::<Vec<_>>() {
                        revocations.remove(&row.target);
                        digest.remove(&revocation_sha256(&row));
                        changes.push(RowChange::RevocationRemoved(row.target));
                    }
                    if changes.is_empty() {
                        return Err(expiry::nothing_expired_error());
                    }
                    continue;
                }
                StoreWrite::Revoke { target, kind: meaning, reason } => {
                    if *target == RevocationTarget::All {
                        pending = None;
                        all.push(RevokeAllChange::Shut);
                    }
                    let row = write_rules::revoke_row(current(target), target, *meaning, reason, number, watermark_unix_s)?;
                    memory.revoked(target, *meaning, watermark_unix_s);
                    row
                }
                StoreWrite::Reinstate { target, reason } => {
                    let row = write_rules::reinstate_row(current(target), target, reason, number, watermark_unix_s)?;
                    memory.reinstated(target);
                    row
                }
                StoreWrite::ReinstateByTwo { target, reason, operator, key, administrators } => {
                    assert_eq!(*target, RevocationTarget::All, "no document of the simulation asks for two people");
                    let half = two_person::next_step(pending.as_ref(), (operator, key), administrators, unix_ms)?;
                    let row = write_rules::reinstate_row(
                        current(&RevocationTarget::All),
                        &RevocationTarget::All,
                        reason,
                        number,
                        watermark_unix_s,
                    )?;
                    match half {
                        TwoPersonStep::AwaitSecond(row) => {
                            pending = Some(row);
                            all.push(RevokeAllChange::Asked(operator.clone()));
                            continue;
                        }
                        TwoPersonStep::Proceed => {
                            pending = None;
                            all.push(RevokeAllChange::Lifted(operator.clone()));
                            memory.reinstated(&RevocationTarget::All);
                            row
                        }
                    }
                }
            };
            digest.add(&revocation_sha256(&row));
            if let Some(before) = revocations.insert(row.target.clone(), row.clone()) {
                digest.remove(&revocation_sha256(&before));
            }
            changes.push(RowChange::Revocation(row));
        }
        let hash = commit_hash(&before.hash, number, &encode_changes(&changes)?);
        // A prune of the same rows in place of a lost commit would be the same commit, so nothing could tell the two apart.
        if self.tree.iter().any(|node| node.row.hash == hash) {
            return Err(expiry::nothing_expired_error());
        }
        let row = CommitRow { number, previous_hash: before.hash, hash, digest, unix_ms, changes };
        self.tree.push(CommitNode {
            parent: Some(head),
            row,
            histories: vec![self.copies[copy].history.clone()],
            created_ns: elapsed_ns(),
            acknowledged_ns: None,
            // A commit that an old primary still takes is lost from the start.
            lost_ns: (copy != self.primary).then(elapsed_ns),
            revoked: fixture.revoked(&memory),
            allowed: fixture.allowed(&documents),
            builds: fixture.builds(&documents),
            all,
            documents,
            revocations,
            memory,
            pending,
            replicas: self.copies[copy].replicas.clone(),
        });
        let place = self.tree.len() - 1;
        match self.durability {
            Durability::Single => (self.copies[copy].head, self.copies[copy].synced) = (place, place),
            Durability::Synchronous => self.copies.iter_mut().for_each(|copy| (copy.head, copy.synced) = (place, place)),
            Durability::Asynchronous => self.copies[copy].head = place,
        }
        Ok(place)
    }

    /// Whether an answer of a copy counts. In a synchronous pair, the other copy must confirm it.
    pub(super) fn confirms(&self, copy: usize) -> bool {
        !self.copies[copy].fenced && (self.durability != Durability::Synchronous || self.joined)
    }

    pub(super) fn load(&self, copy: usize) -> StoreState {
        let copy = &self.copies[copy];
        let node = &self.tree[copy.head];
        let documents: Vec<_> = node.documents.values().cloned().collect();
        let revocations: Vec<_> = node.revocations.values().cloned().collect();
        assert_eq!(state_digest(&documents, &revocations), node.row.digest, "the model keeps its digest up");
        StoreState {
            revision: Revision { history: copy.history.clone(), number: node.row.number },
            hash: node.row.hash,
            digest: node.row.digest,
            settings: self.settings,
            documents,
            revocations,
        }
    }

    pub(super) fn changes(&self, copy: usize, after: u64) -> ChangeLogPage {
        let copy = &self.copies[copy];
        let head = &self.tree[copy.head].row;
        let mut commits: Vec<_> = self.path(copy.head).take_while(|place| self.tree[*place].row.number > after).collect();
        commits.reverse();
        commits.retain(|place| !self.holes.contains(&self.tree[*place].row.number));
        commits.truncate(self.page);
        ChangeLogPage {
            history: copy.history.clone(),
            head: head.number,
            head_hash: head.hash,
            commits: commits.into_iter().map(|place| self.tree[place].row.clone()).collect(),
        }
    }

    /// Reads the log strictly: a gap is an error.
    pub(super) fn changes_read(&self, copy: usize, after: u64) -> Result<ChangeLogPage, Error> {
        let changes = self.changes(copy, after);
        let dense = changes.commits.iter().zip(after + 1..).all(|(commit, number)| commit.number == number);
        if dense && (changes.head <= after) == changes.commits.is_empty() {
            Ok(changes)
        } else {
            Err(Error::Corrupt("the log has a hole".to_owned()))
        }
    }

    pub(super) fn revision(&self, copy: usize) -> Revision {
        let copy = &self.copies[copy];
        Revision { history: copy.history.clone(), number: self.tree[copy.head].row.number }
    }

    /// The rows of the replicas in a copy. In a synchronous pair, those of both copies.
    fn rows(&mut self, copy: usize) -> Vec<&mut Vec<ReplicaRow>> {
        let both = self.durability == Durability::Synchronous;
        let rows = self.copies.iter_mut().enumerate().filter(|(place, _)| both || *place == copy);
        rows.map(|(_, copy)| &mut copy.replicas).collect()
    }

    pub(super) fn register(&mut self, copy: usize, registration: &ReplicaRegistration, unix_ms: i64) {
        for rows in self.rows(copy) {
            rows.retain(|row| {
                row.seen_unix_ms >= unix_ms - SILENCE_MS_MAX || row.registration.incarnation == registration.incarnation
            });
            match rows.iter_mut().find(|row| row.registration.incarnation == registration.incarnation) {
                Some(row) => (row.registration, row.seen_unix_ms) = (registration.clone(), unix_ms),
                None => rows.push(ReplicaRow {
                    registration: registration.clone(),
                    applied_number: 0,
                    acked_number: 0,
                    acked_unix_ms: 0,
                    acked_commit_unix_ms: None,
                    state: ReplicaState::default(),
                    seen_unix_ms: unix_ms,
                }),
            }
        }
    }

    /// Writes a heartbeat. Returns an error if it cannot be written.
    pub(super) fn beat(&mut self, copy: usize, heartbeat: &ReplicaHeartbeat, unix_ms: i64) -> Result<(), Error> {
        let lazy = self.lazy;
        let mut found = false;
        for rows in self.rows(copy) {
            let Some(row) = rows.iter_mut().find(|row| row.registration.incarnation == heartbeat.incarnation) else { continue };
            found = true;
            let same = (row.acked_number, row.state) == (heartbeat.acked_number, heartbeat.state);
            if lazy && same && row.age_ms(unix_ms) < HEARTBEAT_INTERVAL_MS {
                continue;
            }
            if heartbeat.acked_number > row.acked_number {
                row.acked_unix_ms = unix_ms;
            }
            (row.applied_number, row.acked_number) = (heartbeat.applied_number, heartbeat.acked_number);
            (row.state, row.seen_unix_ms) = (heartbeat.state, unix_ms);
        }
        if found { Ok(()) } else { Err(Error::Unregistered { incarnation: heartbeat.incarnation.clone() }) }
    }

    pub(super) fn replicas(&self, copy: usize, unix_ms: i64) -> ReplicaList {
        let heard = |row: &&ReplicaRow| row.seen_unix_ms >= unix_ms - SILENCE_MS_MAX;
        let rows = self.copies[copy].replicas.iter().filter(heard).cloned().collect();
        let freshness_bound_ms = self.settings.freshness_bound_ms;
        ReplicaList { unix_ms, revision: self.revision(copy), freshness_bound_ms, rows }
    }

    pub(super) fn spend(&mut self, key: [u8; 32]) -> bool {
        let first = !self.spent.contains(&key);
        if first {
            self.spent.push(key);
        }
        first
    }

    /// A node and its ancestors, down to the empty store.
    pub(super) fn path(&self, place: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(place), |place| self.tree[*place].parent)
    }

    /// The commit with this hash, if a snapshot of this revision and digest matches it.
    pub(super) fn find(&self, hash: [u8; 32], revision: &Revision, digest: StateDigest) -> Option<usize> {
        let place = self.tree.iter().position(|node| node.row.hash == hash)?;
        let node = &self.tree[place];
        let same = node.row.number == revision.number && node.row.digest == digest;
        (same && node.histories.contains(&revision.history)).then_some(place)
    }

    /// The log loses the row of the next commit.
    pub(super) fn tear(&mut self) {
        let head = self.copies[self.primary].head;
        self.holes.push(self.tree[head].row.number + 1);
    }

    /// The other copy takes over with the commits that it has.
    pub(super) fn fail_over(&mut self) {
        let (old, new) = (self.primary, 1 - self.primary);
        if self.durability == Durability::Synchronous {
            self.copies[old].fenced = true;
        }
        self.lose(self.copies[old].head, self.copies[new].head);
        self.primary = new;
        self.joined = true;
        self.failed_over_ns = Some(elapsed_ns());
        if self.durability == Durability::Synchronous {
            // The old primary returns later as a copy of the new one. Until then the new primary needs no other copy.
            self.durability = Durability::Single;
        }
    }

    /// An old primary that went on answering learns that it is no longer the primary.
    pub(super) fn step_down(&mut self) {
        let old = &mut self.copies[1 - self.primary];
        if self.failed_over_ns.is_some() && !old.fenced {
            old.fenced = true;
            self.settled_ns = elapsed_ns();
        }
    }

    /// A copy crashes and returns with the commits on its disk.
    pub(super) fn crash(&mut self, copy: usize) {
        let (head, synced) = (self.copies[copy].head, self.copies[copy].synced);
        if copy == self.primary {
            self.lose(head, synced);
        }
        self.copies[copy].head = synced;
    }

    /// A backup that is `back` commits old replaces the store.
    pub(super) fn restore(&mut self, back: usize, history: Option<HistoryId>) {
        let head = self.copies[self.primary].head;
        let old = self.path(head).nth(back).filter(|place| *place >= FIRST).unwrap_or(FIRST);
        self.lose(head, old);
        if let Some(history) = &history {
            let shared: Vec<_> = self.path(old).collect();
            shared.into_iter().for_each(|place| self.tree[place].histories.push(history.clone()));
        }
        let replicas = self.tree[old].replicas.clone();
        let copy = &mut self.copies[self.primary];
        (copy.head, copy.synced, copy.replicas) = (old, old, replicas);
        copy.history = history.unwrap_or_else(|| copy.history.clone());
    }

    /// The other copy and the disk of an asynchronous pair receive the commits after a while.
    pub(super) fn replicate(&mut self, to_disk: bool) {
        if self.durability != Durability::Asynchronous {
            return;
        }
        let primary = self.primary;
        if to_disk {
            self.copies.iter_mut().for_each(|copy| copy.synced = copy.head);
        } else if primary == 0 && self.joined {
            self.copies[1].head = self.copies[0].head;
            self.copies[1].replicas = self.copies[0].replicas.clone();
        }
    }

    fn lose(&mut self, from: usize, to: usize) {
        let kept: Vec<_> = self.path(to).collect();
        let lost: Vec<_> = self.path(from).filter(|place| !kept.contains(place)).collect();
        for place in lost {
            self.tree[place].lost_ns.get_or_insert(elapsed_ns());
        }
    }
}
