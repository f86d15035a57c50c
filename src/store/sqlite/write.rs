//! The writer of a SQLite store: one thread that runs the requests which wait together in one shared transaction.
//!
//! Each request runs inside a savepoint, so that one that is refused takes nothing of the others with it, and all that were
//! accepted become durable with one `fsync`. No answer leaves before that. Look next at `store/commit_rows.rs`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use super::approvals;
use super::fleet;
use super::lane::Jobs;
use super::lineage;
use super::open::Db;
use super::pending;
use super::read::{self, Head, target_name};
use super::reader_thread;
use super::spent_proofs;
use super::store_fault::Fault;
use crate::model::approval::{ApprovalRow, AskApproval, AskOutcome, ProofUse, UseApprovals, UseOutcome};
use crate::model::limits::LEDGER_WAIT_MS;
use crate::model::records::{ActRow, Change, DocumentKey, DocumentRow, Origin, PendingRow, RevocationRow, Target, Write};
use crate::model::revision::Revision;
use crate::model::time::{Clock, Now};
use crate::store::chain::{changes_as_stored, commit_hash, document_sha256, revocation_sha256};
use crate::store::commit_rows::{self, CommitMoment, CommitRows, CommitSums};
use crate::store::{CommitRequest, Committed, Error, Heartbeat, Registration, lapse, signers};

/// Requests that share a transaction.
const BATCH_JOBS_MAX: usize = 64;
/// Expired signatures that one act removes. It is more than an act adds, so that expired signatures do not accumulate.
const FORGOTTEN_MAX: i64 = 64;

/// A request, and the channel for its answer.
pub(super) enum Job {
    Commit(CommitRequest, Reply<Committed>),
    Spend(ProofUse, Until, Reply<bool>),
    Ask(AskApproval, Until, Reply<AskOutcome>),
    Use(UseApprovals, Until, Reply<UseOutcome>),
    GiveBack(UseApprovals, Reply<bool>),
    Register(Registration, Reply<()>),
    Beat(Heartbeat),
    /// Closes the connection. Later jobs fail.
    Close(Reply<()>),
}

/// The time after which a job that has not begun is refused.
pub(super) type Until = Instant;

/// The channel for the answer to a job.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// A request that was executed but is not durable yet.
enum Ran {
    Commit(Result<Committed, Error>, Reply<Committed>),
    Spend(Result<bool, Error>, Reply<bool>),
    Ask(Result<AskOutcome, Error>, Reply<AskOutcome>),
    Use(Result<UseOutcome, Error>, Reply<UseOutcome>),
    GiveBack(Result<bool, Error>, Reply<bool>),
    Register(Result<(), Error>, Reply<()>),
    /// Nobody waits for its answer.
    Beat,
    /// Executed after all other jobs of the batch are answered, whatever their result.
    Close(Reply<()>),
}

/// Decides when to copy the write-ahead log to the database file: soon after a commit. Then a crash leaves little in the log, and
/// a copy of the file alone lacks little.
///
/// Another thread makes the checkpoint, because a commit must not wait for it. Under a load without a pause, however, that
/// checkpoint never catches up, and SQLite never restarts the log. Therefore the writer itself copies a long log between two
/// batches.
pub(super) struct Checkpoints {
    lane: Option<mpsc::WeakSender<reader_thread::Job>>,
    asked_at: Now,
    is_wanted: bool,
}

impl Checkpoints {
    /// Minimum time between two checkpoints.
    const INTERVAL_MS: u64 = 1_000;
    /// The writer itself copies a log that is longer than this, whatever was written.
    const LOG_BYTES: u64 = 16 * 1024 * 1024;

    pub(super) fn new(lane: Option<mpsc::WeakSender<reader_thread::Job>>, now: Now) -> Self {
        Self { lane, asked_at: now, is_wanted: false }
    }

    /// Starts a checkpoint after a write, if one is due. Heartbeats alone do not make a checkpoint due.
    fn written(&mut self, db: &mut Db, is_worth_it: bool, now: Now) {
        let is_long = db.files().log_bytes() > Self::LOG_BYTES;
        self.is_wanted |= is_worth_it || is_long;
        if !self.is_wanted || now.ms_since(self.asked_at) < Self::INTERVAL_MS {
            return;
        }
        let asked = self.lane.as_ref().and_then(mpsc::WeakSender::upgrade).filter(|_| !is_long);
        let is_done = match asked {
            Some(lane) => lane.try_send(Box::new(checkpoint)).is_ok(),
            None => {
                checkpoint(db);
                true
            }
        };
        if is_done {
            (self.asked_at, self.is_wanted) = (now, false);
        }
    }
}

fn checkpoint(db: &mut Db) {
    if let Err(error) = db.checkpoint() {
        tracing::warn!(%error, "the write-ahead log was not copied to the store's file; nothing is lost, and it is tried again");
    }
}

/// Serves requests until no more can come.
pub(super) fn serve(
    mut db: Db,
    mut jobs: Jobs<Job>,
    clock: Arc<dyn Clock>,
    wake: watch::Sender<u64>,
    mut checkpoints: Checkpoints,
) {
    let mut batch = Vec::with_capacity(BATCH_JOBS_MAX);
    while jobs.take(&mut batch, BATCH_JOBS_MAX) {
        let mut ran = Vec::with_capacity(batch.len());
        let begun = Instant::now();
        let (late, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut batch).into_iter().partition(|job| job.is_late(begun));
        late.into_iter().for_each(|job| job.refused(&too_late()).answer(&Ok(())));
        if waiting.is_empty() {
            continue;
        }
        let outcome = run_batch(&mut db, waiting, clock.now(), &mut ran);
        let newest = ran.iter().filter_map(Ran::committed).max();
        if let (Ok(()), Some(number)) = (&outcome, newest) {
            wake.send_replace(number);
        }
        let is_worth_it = ran.iter().any(|one| !matches!(one, Ran::Beat));
        let mut closing = Vec::new();
        for one in ran {
            match one {
                Ran::Close(reply) => closing.push(reply),
                one => one.answer(&outcome),
            }
        }
        if outcome.is_ok() {
            checkpoints.written(&mut db, is_worth_it, clock.now());
        }
        for reply in closing {
            // The sender may have stopped waiting.
            let _ = reply.send(db.close());
        }
    }
}

/// Runs requests in one transaction and makes them durable. An error is the answer to every request that seemed to succeed.
fn run_batch(db: &mut Db, batch: Vec<Job>, now: Now, ran: &mut Vec<Ran>) -> Result<(), Error> {
    let begun = db.check_same().and_then(|()| {
        // `transaction_with_behavior` would borrow all of `db`.
        let begun = Transaction::new_unchecked(&db.connection, TransactionBehavior::Immediate);
        begun.map_err(|error| db.explain(error.into()))
    });
    let transaction = match begun {
        Ok(transaction) => transaction,
        Err(error) => {
            ran.extend(batch.into_iter().map(|job| job.refused(&error)));
            return Err(error);
        }
    };
    let mut intact = true;
    for job in batch {
        // INVARIANT: when a disk is full or fails, SQLite rolls back by itself. Then nothing of the batch counts, and no further
        // request may run, because it would run outside the transaction.
        if !intact {
            ran.push(job.refused(&gave_up()));
            continue;
        }
        ran.push(match job {
            Job::Commit(request, reply) => {
                Ran::Commit(in_savepoint(db, &mut intact, |connection| commit(connection, &request, now)), reply)
            }
            Job::Spend(proof, _, reply) => {
                Ran::Spend(in_savepoint(db, &mut intact, |connection| spent_proofs::spend(connection, &proof, now)), reply)
            }
            Job::Ask(request, _, reply) => {
                Ran::Ask(in_savepoint(db, &mut intact, |connection| approvals::ask(connection, &request, now)), reply)
            }
            Job::Use(request, _, reply) => {
                Ran::Use(in_savepoint(db, &mut intact, |connection| approvals::use_once(connection, &request, now)), reply)
            }
            Job::GiveBack(request, reply) => {
                Ran::GiveBack(in_savepoint(db, &mut intact, |connection| approvals::give_back(connection, &request)), reply)
            }
            Job::Register(registration, reply) => {
                Ran::Register(in_savepoint(db, &mut intact, |connection| fleet::register(connection, &registration, now)), reply)
            }
            Job::Close(reply) => Ran::Close(reply),
            Job::Beat(heartbeat) => {
                // A lost heartbeat is followed by the next one, and nothing here depends on its content.
                let _ = in_savepoint(db, &mut intact, |connection| fleet::beat(connection, &heartbeat, now));
                Ran::Beat
            }
        });
    }
    if !intact {
        return Err(gave_up());
    }
    transaction.commit().map_err(|error| match error.sqlite_error_code() {
        // A commit is not in the log if the log had no room for its last frame.
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull) => db.explain(error.into()),
        _ => Error::Unknown(format!("{}: it may or may not have been written", db.explain(error.into()))),
    })?;
    // INVARIANT: a commit to a file that nobody will find again is not durable, and is never acknowledged.
    db.check_same()
}

fn gave_up() -> Error {
    Error::Unavailable("the store gave up the transaction, nothing was written: see to its disk and repeat".to_owned())
}

fn too_late() -> Error {
    Error::Unavailable(format!("the store did not take a use within {LEDGER_WAIT_MS} ms: try again"))
}

impl Job {
    /// Whether the job waited too long to be started.
    fn is_late(&self, now: Instant) -> bool {
        match self {
            Job::Spend(_, until, _) | Job::Ask(_, until, _) | Job::Use(_, until, _) => now >= *until,
            Job::Commit(..) | Job::GiveBack(..) | Job::Register(..) | Job::Beat(_) | Job::Close(_) => false,
        }
    }

    fn refused(self, error: &Error) -> Ran {
        match self {
            Job::Commit(_, reply) => Ran::Commit(Err(error.clone()), reply),
            Job::Spend(.., reply) => Ran::Spend(Err(error.clone()), reply),
            Job::Ask(.., reply) => Ran::Ask(Err(error.clone()), reply),
            Job::Use(.., reply) => Ran::Use(Err(error.clone()), reply),
            Job::GiveBack(_, reply) => Ran::GiveBack(Err(error.clone()), reply),
            Job::Register(_, reply) => Ran::Register(Err(error.clone()), reply),
            Job::Beat(_) => Ran::Beat,
            Job::Close(reply) => Ran::Close(reply),
        }
    }
}

impl Ran {
    fn committed(&self) -> Option<u64> {
        match self {
            Ran::Commit(Ok(committed), _) => Some(committed.revision.number),
            _ => None,
        }
    }

    /// Sends the answer. The receiver may have stopped waiting.
    fn answer(self, outcome: &Result<(), Error>) {
        fn send<T>(result: Result<T, Error>, outcome: &Result<(), Error>, reply: Reply<T>) {
            let _ = reply.send(result.and_then(|done| outcome.clone().map(|()| done)));
        }
        match self {
            Ran::Commit(result, reply) => send(result, outcome, reply),
            Ran::Spend(result, reply) => send(result, outcome, reply),
            Ran::Ask(result, reply) => send(result, outcome, reply),
            Ran::Use(result, reply) => send(result, outcome, reply),
            Ran::GiveBack(result, reply) => send(result, outcome, reply),
            Ran::Register(result, reply) => send(result, outcome, reply),
            Ran::Beat | Ran::Close(_) => {}
        }
    }
}

/// Runs one request so that a failure leaves no trace of it. Sets `intact` to false if that is impossible.
fn in_savepoint<T>(db: &Db, intact: &mut bool, run: impl FnOnce(&Connection) -> Result<T, Fault>) -> Result<T, Error> {
    let execute = |sql: &str| db.connection.prepare_cached(sql).and_then(|mut statement| statement.execute(()));
    let attempt = || {
        execute("SAVEPOINT request")?;
        let done = run(&db.connection)?;
        execute("RELEASE request")?;
        Ok(done)
    };
    attempt().map_err(|fault| {
        let undone = execute("ROLLBACK TO request").and_then(|_| execute("RELEASE request"));
        *intact = undone.is_ok() && !db.connection.is_autocommit();
        db.explain(fault)
    })
}

fn commit(connection: &Connection, request: &CommitRequest, now: Now) -> Result<Committed, Fault> {
    let before = read::head(connection)?;
    let number = before.revision.number.checked_add(1).ok_or_else(|| Error::Rejected("no revision number is left".to_owned()))?;
    for (key, expected) in &request.expected {
        if read::document(connection, key)?.map(|document| document.revision) != *expected {
            return Err(Error::Conflict { kind: key.kind.clone(), id: key.id.clone() }.into());
        }
    }
    if request.documents_unchanged_since.is_some_and(|since| before.documents_number > since) {
        return Err(Error::DocumentsChanged { revision: before.documents_number }.into());
    }
    // INVARIANT: checked in the transaction of the act, so that a caller who has not yet heard of a revocation learns of it here.
    let revoked = revoked_keys(connection, request)?;
    signers::check_signed(request, |key| revoked.contains(key))?;
    if let Some(act) = &request.act {
        record_act(connection, act, number, &before, now)?;
    }
    let watermark_unix_s = now.unix_s().saturating_add(before.settings.iat_skew_s);
    let moment = CommitMoment { number, unix_ms: now.unix_ms(), watermark_unix_s };
    let sums = CommitSums { digest: before.digest, revocations_total: before.revocations };
    let mut rows = Rows { connection, moment, sums };
    let mut changes = Vec::with_capacity(request.writes.len());
    let mut revision = Revision { number, ..before.revision.clone() };
    for write in &request.writes {
        match write {
            Write::Prune { before_unix_s, rows_max } => {
                changes.extend(rows.prune((*before_unix_s).min(now.unix_s()), *rows_max)?);
            }
            Write::Merge(merge) => {
                changes.extend(commit_rows::merge(&mut rows, merge, &before.revision.history)?);
                lineage::merged(connection, merge, &changes, now)?;
            }
            Write::Adopt { reason } => {
                changes.push(commit_rows::void_roots(&mut rows, reason)?);
                revision = lineage::begin(connection, &before, number, now)?;
            }
            write => changes.extend(commit_rows::apply_write(&mut rows, write)?),
        }
    }
    if !request.one_must_sign.is_empty() {
        let revoked = revoked_keys(connection, request)?;
        signers::check_left(request, |key| revoked.contains(key))?;
    }
    let of_documents = changes.iter().any(Change::is_of_document);
    let stored = changes_as_stored(&changes)?;
    let hash = commit_hash(&before.hash, number, &stored);
    connection
        .prepare_cached(
            "INSERT INTO log (number, previous_hash, hash, digest, unix_ms, changes, of_documents)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((read::signed(number)?, before.hash, hash, rows.sums.digest.to_hex(), now.unix_ms(), stored, of_documents))?;
    let documents_number = if of_documents { number } else { before.documents_number };
    connection
        .prepare_cached("UPDATE head SET number = ?1, hash = ?2, digest = ?3, revocations = ?4, documents_number = ?5")?
        .execute((
            read::signed(number)?,
            hash,
            rows.sums.digest.to_hex(),
            read::signed(rows.sums.revocations_total)?,
            read::signed(documents_number)?,
        ))?;
    let freshness_bound_ms = before.settings.freshness_bound_ms;
    Ok(Committed { revision, unix_ms: now.unix_ms(), changes, freshness_bound_ms })
}

/// The keys that a request depends on and that are revoked at present.
fn revoked_keys<'a>(connection: &Connection, request: &'a CommitRequest) -> Result<BTreeSet<&'a str>, Fault> {
    let mut revoked = BTreeSet::new();
    for key in signers::keys(request) {
        if read::is_revoked(connection, key)? {
            revoked.insert(key);
        }
    }
    Ok(revoked)
}

/// Writes the rows of one commit, and keeps the digest and the number of revocations up to date.
struct Rows<'a> {
    connection: &'a Connection,
    moment: CommitMoment,
    sums: CommitSums,
}

impl CommitRows for Rows<'_> {
    type Error = Fault;

    fn moment(&self) -> CommitMoment {
        self.moment
    }

    fn sums(&mut self) -> &mut CommitSums {
        &mut self.sums
    }

    fn put_document(&mut self, row: &DocumentRow) -> Result<Change, Fault> {
        if let Some(before) = read::document(self.connection, &row.key)? {
            self.sums.digest.remove(&document_sha256(&before.row, before.revision));
        }
        let origin = match row.origin {
            Origin::Folder => "folder",
            Origin::Api => "api",
        };
        self.connection
            .prepare_cached(
                "INSERT INTO documents (kind, id, json, path, line, origin, revision) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (kind, id) DO UPDATE SET json = excluded.json, path = excluded.path, line = excluded.line,
                 origin = excluded.origin, revision = excluded.revision",
            )?
            .execute((&row.key.kind, &row.key.id, &row.json, &row.path, row.line, origin, read::signed(self.moment.number)?))?;
        self.sums.digest.add(&document_sha256(row, self.moment.number));
        Ok(Change::Document(row.clone()))
    }

    fn remove_document(&mut self, key: &DocumentKey) -> Result<Change, Fault> {
        let Some(before) = read::document(self.connection, key)? else {
            return Err(Error::Rejected(format!("there is no document `{} {}` to remove", key.kind, key.id)).into());
        };
        self.connection.prepare_cached("DELETE FROM documents WHERE kind = ?1 AND id = ?2")?.execute((&key.kind, &key.id))?;
        self.sums.digest.remove(&document_sha256(&before.row, before.revision));
        Ok(Change::DocumentRemoved(key.clone()))
    }

    fn revocation(&self, target: &Target) -> Result<Option<RevocationRow>, Fault> {
        read::revocation(self.connection, &target_name(target)?)
    }

    fn put_revocation(&mut self, row: &RevocationRow) -> Result<(), Fault> {
        self.connection
            .prepare_cached(
                "INSERT INTO revocations (target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (target) DO UPDATE SET dead = excluded.dead, suspended = excluded.suspended,
                 watermark_unix_s = excluded.watermark_unix_s, expires_at_unix_s = excluded.expires_at_unix_s,
                 reason = excluded.reason, revision = excluded.revision",
            )?
            .execute((
                target_name(&row.target)?,
                row.dead,
                row.suspended,
                row.watermark_unix_s,
                row.expires_at_unix_s,
                &row.reason,
                read::signed(row.revision)?,
            ))?;
        Ok(())
    }

    fn pending(&self, act: &str) -> Result<Option<PendingRow>, Fault> {
        match pending::row(self.connection, act)? {
            Some(row) if read::is_revoked(self.connection, &row.key)? => Ok(None),
            row => Ok(row),
        }
    }

    fn put_pending(&mut self, act: &str, row: PendingRow) -> Result<(), Fault> {
        pending::put(self.connection, act, &row, self.moment.unix_ms)
    }

    fn remove_pending(&mut self, act: &str) -> Result<(), Fault> {
        pending::remove(self.connection, act)
    }

    fn approval(&self, digest: &str) -> Result<Option<ApprovalRow>, Fault> {
        Ok(approvals::row(self.connection, digest)?.0)
    }

    fn put_approval(&mut self, row: ApprovalRow) -> Result<(), Fault> {
        approvals::put(self.connection, &row)
    }
}

impl Rows<'_> {
    /// Deletes expired revocations, the oldest first.
    fn prune(&mut self, before_unix_s: i64, rows_max: usize) -> Result<Vec<Change>, Fault> {
        let mut removed = Vec::new();
        for row in read::expiring(self.connection, before_unix_s, rows_max)? {
            if !lapse::has_lapsed(&row, before_unix_s) {
                continue;
            }
            self.connection.prepare_cached("DELETE FROM revocations WHERE target = ?1")?.execute([target_name(&row.target)?])?;
            self.sums.digest.remove(&revocation_sha256(&row));
            self.sums.revocations_total = self.sums.revocations_total.saturating_sub(1);
            removed.push(Change::RevocationRemoved(row.target));
        }
        if removed.is_empty() { Err(lapse::nothing().into()) } else { Ok(removed) }
    }
}

/// Stores an act, and each of its signatures once.
///
/// The cutoff of forgotten signatures is an expiry that was stored, not the clock. Every signature that expires up to the cutoff
/// counts as used. Therefore a clock that jumps ahead and back admits no signature twice.
fn record_act(connection: &Connection, act: &ActRow, number: u64, head: &Head, now: Now) -> Result<(), Fault> {
    for (jti, expires_at_unix_s) in &act.jtis {
        let forgotten = head.jtis_forgotten_unix_s.is_some_and(|forgotten| *expires_at_unix_s <= forgotten);
        let added = !forgotten
            && connection
                .prepare_cached("INSERT INTO act_jtis (jti, expires_at_unix_s) VALUES (?1, ?2) ON CONFLICT DO NOTHING")?
                .execute((jti, expires_at_unix_s))?
                == 1;
        if !added {
            return Err(Error::ActReplayed { jti: jti.clone() }.into());
        }
    }
    let text = serde_json::to_string(act).map_err(|error| Error::Rejected(format!("the act cannot be stored: {error}")))?;
    connection.prepare_cached("INSERT INTO acts (number, unix_ms, act) VALUES (?1, ?2, ?3)")?.execute((
        read::signed(number)?,
        now.unix_ms(),
        text,
    ))?;
    let newest: Option<i64> = connection
        .prepare_cached(
            "SELECT max(expires_at_unix_s) FROM (
                SELECT expires_at_unix_s FROM act_jtis WHERE expires_at_unix_s < ?1 ORDER BY expires_at_unix_s LIMIT ?2)",
        )?
        .query_one((now.unix_s(), FORGOTTEN_MAX), |row| row.get(0))?;
    if let Some(newest) = newest {
        connection.prepare_cached("DELETE FROM act_jtis WHERE expires_at_unix_s <= ?1")?.execute([newest])?;
        connection
            .prepare_cached("UPDATE head SET jtis_forgotten_unix_s = max(coalesce(jtis_forgotten_unix_s, ?1), ?1)")?
            .execute([newest])?;
    }
    Ok(())
}
