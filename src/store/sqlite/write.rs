//! The writer of a SQLite store: one thread that runs the requests which wait together in one shared transaction.
//!
//! Each request runs inside a savepoint, so that one that is refused takes nothing of the others with it, and all that were
//! accepted become durable with one `fsync`. An answer leaves only after that, and after a second connection
//! has read the commit back.
//! Look next at `store/commit_rows.rs`, and at `super::file_watch` for the checks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use super::approvals;
use super::connection::SqliteConnection;
use super::error::SqliteError;
use super::fleet;
use super::lineage;
use super::pending_acts;
use super::read::{self, SqliteHead, encode_target};
use super::reader_thread;
use super::spent_proofs;
use super::store_thread::JobQueues;
use crate::model::approval::{
    ApprovalRow, ApprovalSubmission, ApprovalSubmissionOutcome, ApprovalUseOutcome, ApprovalUseRequest, ProofUse,
};
use crate::model::limits::LEDGER_TIMEOUT_MS;
use crate::model::revision::Revision;
use crate::model::rows::{
    ActRow, DocumentKey, DocumentOrigin, DocumentRow, PendingTwoPersonRow, RevocationRow, RevocationTarget, RowChange, StoreWrite,
};
use crate::model::time::{Clock, ClockReading};
use crate::store::commit_rows::{self, CommitMoment, CommitRows, CommitSums};
use crate::store::hash_chain::{commit_hash, document_sha256, encode_changes, revocation_sha256};
use crate::store::{CommitOutcome, CommitRequest, Error, ReplicaHeartbeat, ReplicaRegistration, expiry, signers};

/// Requests that share a transaction.
const BATCH_JOBS_MAX: usize = 64;
/// Expired signatures that one act removes. It is more than an act adds, so that expired signatures do not accumulate.
const FORGOTTEN_KEYS_MAX: i64 = 64;

/// A request, and the channel for its answer.
pub(super) enum WriteJob {
    Commit(CommitRequest, ReplySender<CommitOutcome>),
    Spend(ProofUse, JobDeadline, ReplySender<bool>),
    Ask(ApprovalSubmission, JobDeadline, ReplySender<ApprovalSubmissionOutcome>),
    Use(ApprovalUseRequest, JobDeadline, ReplySender<ApprovalUseOutcome>),
    GiveBack(ApprovalUseRequest, ReplySender<bool>),
    Register(ReplicaRegistration, ReplySender<()>),
    Heartbeat(ReplicaHeartbeat),
    /// Closes the connection. Later jobs fail.
    Close(ReplySender<()>),
}

/// The time after which a job that has not begun is refused.
pub(super) type JobDeadline = Instant;

/// The channel for the answer to a job.
pub(super) type ReplySender<T> = oneshot::Sender<Result<T, Error>>;

/// A request that was executed but is not durable yet.
enum ExecutedJob {
    Commit(Result<CommitOutcome, Error>, ReplySender<CommitOutcome>),
    Spend(Result<bool, Error>, ReplySender<bool>),
    Ask(Result<ApprovalSubmissionOutcome, Error>, ReplySender<ApprovalSubmissionOutcome>),
    Use(Result<ApprovalUseOutcome, Error>, ReplySender<ApprovalUseOutcome>),
    GiveBack(Result<bool, Error>, ReplySender<bool>),
    Register(Result<(), Error>, ReplySender<()>),
    /// Nobody waits for its answer.
    Heartbeat,
    /// Executed after all other jobs of the batch are answered, whatever their result.
    Close(ReplySender<()>),
}

/// Decides when to copy the write-ahead log to the database file: soon after a commit. Then a crash leaves little in the log, and
/// a copy of the file alone lacks little.
///
/// Another thread makes the checkpoint, because a commit must not wait for it. Under a load without a pause, however, that
/// checkpoint never catches up, and SQLite never restarts the log. Therefore the writer itself copies a long log between two
/// batches.
pub(super) struct CheckpointSchedule {
    worker: Option<mpsc::WeakSender<reader_thread::ReadJob>>,
    asked_at: ClockReading,
    is_wanted: bool,
}

impl CheckpointSchedule {
    /// Minimum time between two checkpoints.
    const INTERVAL_MS: u64 = 1_000;
    /// The writer itself copies a log that is longer than this, whatever was written.
    const LOG_BYTES: u64 = 16 * 1024 * 1024;

    pub(super) fn new(reader: Option<mpsc::WeakSender<reader_thread::ReadJob>>, now: ClockReading) -> Self {
        Self { worker: reader, asked_at: now, is_wanted: false }
    }

    /// Starts a checkpoint after a write, if one is due. Heartbeats alone do not make a checkpoint due.
    fn note_write(&mut self, db: &mut SqliteConnection, is_worth_it: bool, now: ClockReading) {
        let is_long = db.files().log_bytes() > Self::LOG_BYTES;
        self.is_wanted |= is_worth_it || is_long;
        if !self.is_wanted || now.elapsed_ms_since(self.asked_at) < Self::INTERVAL_MS {
            return;
        }
        let asked = self.worker.as_ref().and_then(mpsc::WeakSender::upgrade).filter(|_| !is_long);
        let is_done = match asked {
            Some(reader) => reader.try_send(Box::new(run_checkpoint)).is_ok(),
            None => {
                run_checkpoint(db);
                true
            }
        };
        if is_done {
            (self.asked_at, self.is_wanted) = (now, false);
        }
    }
}

fn run_checkpoint(db: &mut SqliteConnection) {
    if let Err(error) = db.checkpoint() {
        tracing::warn!(%error, "the write-ahead log was not copied to the store's file; nothing is lost, and it is tried again");
    }
}

/// Serves requests until no more can come. The connection `witness` finds each commit again before it is acknowledged; it is
/// declared last, so that `db` is closed last.
pub(super) fn run_writer(
    mut db: SqliteConnection,
    mut jobs: JobQueues<WriteJob>,
    clock: Arc<dyn Clock>,
    wake: watch::Sender<u64>,
    mut checkpoints: CheckpointSchedule,
    mut witness: SqliteConnection,
) {
    let mut batch = Vec::with_capacity(BATCH_JOBS_MAX);
    while jobs.take_batch(&mut batch, BATCH_JOBS_MAX) {
        let mut ran = Vec::with_capacity(batch.len());
        let begun = Instant::now();
        let (late, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut batch).into_iter().partition(|job| job.is_late(begun));
        late.into_iter().for_each(|job| job.refuse(&deadline_error()).send_reply(&Ok(())));
        if waiting.is_empty() {
            continue;
        }
        let outcome = run_batch(&db, &witness, waiting, clock.now(), &mut ran);
        let newest = ran.iter().filter_map(ExecutedJob::committed_number).max();
        if let (Ok(()), Some(number)) = (&outcome, newest) {
            wake.send_replace(number);
        }
        let is_worth_it = ran.iter().any(|one| !matches!(one, ExecutedJob::Heartbeat));
        let mut closing = Vec::new();
        for one in ran {
            match one {
                ExecutedJob::Close(reply) => closing.push(reply),
                one => one.send_reply(&outcome),
            }
        }
        if outcome.is_ok() {
            checkpoints.note_write(&mut db, is_worth_it, clock.now());
        }
        for reply in closing {
            // The sender may have stopped waiting.
            let _ = reply.send(witness.close().and_then(|()| db.close()));
        }
    }
}

/// Runs requests in one transaction and makes them durable. An error is the answer to every request that seemed to succeed.
fn run_batch(
    db: &SqliteConnection,
    witness: &SqliteConnection,
    batch: Vec<WriteJob>,
    now: ClockReading,
    ran: &mut Vec<ExecutedJob>,
) -> Result<(), Error> {
    let transaction = match begin_transaction(db) {
        Ok(transaction) => transaction,
        Err(error) => {
            ran.extend(batch.into_iter().map(|job| job.refuse(&error)));
            return Err(error);
        }
    };
    let mut intact = true;
    for job in batch {
        // INVARIANT: when a disk is full or fails, SQLite rolls back by itself. Then nothing of the batch counts, and no further
        // request may run, because it would run outside the transaction.
        if !intact {
            ran.push(job.refuse(&rolled_back_error()));
            continue;
        }
        ran.push(match job {
            WriteJob::Commit(request, reply) => ExecutedJob::Commit(
                run_in_savepoint(db, &mut intact, |connection| commit_request(connection, &request, now)),
                reply,
            ),
            WriteJob::Spend(proof, _, reply) => ExecutedJob::Spend(
                run_in_savepoint(db, &mut intact, |connection| spent_proofs::spend_proof(connection, &proof, now)),
                reply,
            ),
            WriteJob::Ask(request, _, reply) => ExecutedJob::Ask(
                run_in_savepoint(db, &mut intact, |connection| approvals::ask_approval(connection, &request, now)),
                reply,
            ),
            WriteJob::Use(request, _, reply) => ExecutedJob::Use(
                run_in_savepoint(db, &mut intact, |connection| approvals::use_approvals(connection, &request, now)),
                reply,
            ),
            WriteJob::GiveBack(request, reply) => ExecutedJob::GiveBack(
                run_in_savepoint(db, &mut intact, |connection| approvals::give_back_approvals(connection, &request)),
                reply,
            ),
            WriteJob::Register(registration, reply) => ExecutedJob::Register(
                run_in_savepoint(db, &mut intact, |connection| fleet::register_replica(connection, &registration, now)),
                reply,
            ),
            WriteJob::Close(reply) => ExecutedJob::Close(reply),
            WriteJob::Heartbeat(heartbeat) => {
                // A lost heartbeat is followed by the next one, and nothing here depends on its content.
                let _ = run_in_savepoint(db, &mut intact, |connection| fleet::write_heartbeat(connection, &heartbeat, now));
                ExecutedJob::Heartbeat
            }
        });
    }
    if !intact {
        return Err(rolled_back_error());
    }
    commit_transaction(db, witness, transaction)
}

/// Begins a transaction that writes.
fn begin_transaction(db: &SqliteConnection) -> Result<Transaction<'_>, Error> {
    db.check_files()?;
    let known = db.files().newest_commit();
    // `transaction_with_behavior` would borrow all of `db`.
    let begun = Transaction::new_unchecked(&db.connection, TransactionBehavior::Immediate);
    let transaction = begun.map_err(|error| db.to_store_error(error.into()))?;
    // INVARIANT: nothing, not even a heartbeat, is written after an older head, because it would overwrite acknowledged commits in
    // the write-ahead log. An error rolls back.
    db.files().check_head(&transaction, known).map_err(|fault| db.to_store_error(fault))?;
    Ok(transaction)
}

/// Makes a transaction durable, and checks that the commit will be found again.
fn commit_transaction(db: &SqliteConnection, witness: &SqliteConnection, transaction: Transaction<'_>) -> Result<(), Error> {
    let head = read::read_head(&transaction).map_err(|fault| db.to_store_error(fault))?;
    let (number, hash) = (head.revision.number, head.hash);
    transaction.commit().map_err(|error| match error.sqlite_error_code() {
        // A commit is not in the log if the log had no room for its last frame.
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull) => db.to_store_error(error.into()),
        _ => unknown_outcome(&db.to_store_error(error.into())),
    })?;
    db.files().record_commit(number, hash);
    // INVARIANT: a commit that nobody will find again is not durable, and is never acknowledged. The connection that wrote it could
    // find it in its own cache, so another one looks.
    witness.check_continues(Some((number, hash))).map_err(|error| unknown_outcome(&error))
}

fn unknown_outcome(error: &Error) -> Error {
    Error::OutcomeUnknown(format!("{error}: it may or may not have been written"))
}

fn rolled_back_error() -> Error {
    Error::Unavailable("the store gave up the transaction, nothing was written: see to its disk and repeat".to_owned())
}

fn deadline_error() -> Error {
    Error::Unavailable(format!("the store did not take a use within {LEDGER_TIMEOUT_MS} ms: try again"))
}

impl WriteJob {
    /// Whether the job waited too long to be started.
    fn is_late(&self, now: Instant) -> bool {
        match self {
            WriteJob::Spend(_, until, _) | WriteJob::Ask(_, until, _) | WriteJob::Use(_, until, _) => now >= *until,
            WriteJob::Commit(..)
            | WriteJob::GiveBack(..)
            | WriteJob::Register(..)
            | WriteJob::Heartbeat(_)
            | WriteJob::Close(_) => false,
        }
    }

    fn refuse(self, error: &Error) -> ExecutedJob {
        match self {
            WriteJob::Commit(_, reply) => ExecutedJob::Commit(Err(error.clone()), reply),
            WriteJob::Spend(.., reply) => ExecutedJob::Spend(Err(error.clone()), reply),
            WriteJob::Ask(.., reply) => ExecutedJob::Ask(Err(error.clone()), reply),
            WriteJob::Use(.., reply) => ExecutedJob::Use(Err(error.clone()), reply),
            WriteJob::GiveBack(_, reply) => ExecutedJob::GiveBack(Err(error.clone()), reply),
            WriteJob::Register(_, reply) => ExecutedJob::Register(Err(error.clone()), reply),
            WriteJob::Heartbeat(_) => ExecutedJob::Heartbeat,
            WriteJob::Close(reply) => ExecutedJob::Close(reply),
        }
    }
}

impl ExecutedJob {
    fn committed_number(&self) -> Option<u64> {
        match self {
            ExecutedJob::Commit(Ok(committed), _) => Some(committed.revision.number),
            _ => None,
        }
    }

    /// Sends the answer. The receiver may have stopped waiting.
    fn send_reply(self, outcome: &Result<(), Error>) {
        fn send<T>(result: Result<T, Error>, outcome: &Result<(), Error>, reply: ReplySender<T>) {
            let _ = reply.send(result.and_then(|done| outcome.clone().map(|()| done)));
        }
        match self {
            ExecutedJob::Commit(result, reply) => send(result, outcome, reply),
            ExecutedJob::Spend(result, reply) => send(result, outcome, reply),
            ExecutedJob::Ask(result, reply) => send(result, outcome, reply),
            ExecutedJob::Use(result, reply) => send(result, outcome, reply),
            ExecutedJob::GiveBack(result, reply) => send(result, outcome, reply),
            ExecutedJob::Register(result, reply) => send(result, outcome, reply),
            ExecutedJob::Heartbeat | ExecutedJob::Close(_) => {}
        }
    }
}

/// Runs one request so that a failure leaves no trace of it. Sets `intact` to false if that is impossible.
fn run_in_savepoint<T>(
    db: &SqliteConnection,
    intact: &mut bool,
    run: impl FnOnce(&Connection) -> Result<T, SqliteError>,
) -> Result<T, Error> {
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
        db.to_store_error(fault)
    })
}

fn commit_request(connection: &Connection, request: &CommitRequest, now: ClockReading) -> Result<CommitOutcome, SqliteError> {
    let before = read::read_head(connection)?;
    let number = before.revision.number.checked_add(1).ok_or_else(|| Error::Rejected("no revision number is left".to_owned()))?;
    for (key, expected) in &request.expected {
        if read::read_document(connection, key)?.map(|document| document.revision) != *expected {
            return Err(Error::Conflict { kind: key.kind.clone(), id: key.id.clone() }.into());
        }
    }
    if request.documents_unchanged_since.is_some_and(|since| before.documents_number > since) {
        return Err(Error::DocumentsChanged { revision: before.documents_number }.into());
    }
    // INVARIANT: checked in the transaction of the act, so that a caller who has not yet heard of a revocation learns of it here.
    let revoked = revoked_keys(connection, request)?;
    signers::check_signers(request, |key| revoked.contains(key))?;
    if let Some(act) = &request.act {
        record_act(connection, act, number, &before, now)?;
    }
    let watermark_unix_s = now.unix_s().saturating_add(before.settings.iat_skew_s);
    let moment = CommitMoment { number, unix_ms: now.unix_ms(), watermark_unix_s };
    let sums = CommitSums { digest: before.digest, revocations_total: before.revocations };
    let mut rows = CommitWriter { connection, moment, sums };
    let mut changes = Vec::with_capacity(request.writes.len());
    let mut revision = Revision { number, ..before.revision.clone() };
    for write in &request.writes {
        match write {
            StoreWrite::Prune { before_unix_s, rows_max } => {
                changes.extend(rows.prune((*before_unix_s).min(now.unix_s()), *rows_max)?);
            }
            StoreWrite::Merge(merge) => {
                changes.extend(commit_rows::merge(&mut rows, merge, &before.revision.history)?);
                lineage::record_merge(connection, merge, &changes, now)?;
            }
            StoreWrite::Adopt { reason } => {
                changes.push(commit_rows::void_roots(&mut rows, reason)?);
                revision = lineage::begin_history(connection, &before, number, now)?;
            }
            write => changes.extend(commit_rows::apply_write(&mut rows, write)?),
        }
    }
    if !request.keep_one_unrevoked.is_empty() {
        let revoked = revoked_keys(connection, request)?;
        signers::check_signer_left(request, |key| revoked.contains(key))?;
    }
    let of_documents = changes.iter().any(RowChange::changes_document);
    let stored = encode_changes(&changes)?;
    let hash = commit_hash(&before.hash, number, &stored);
    connection
        .prepare_cached(
            "INSERT INTO log (number, previous_hash, hash, digest, unix_ms, changes, of_documents)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((read::to_i64(number)?, before.hash, hash, rows.sums.digest.to_hex(), now.unix_ms(), stored, of_documents))?;
    let documents_number = if of_documents { number } else { before.documents_number };
    connection
        .prepare_cached("UPDATE head SET number = ?1, hash = ?2, digest = ?3, revocations = ?4, documents_number = ?5")?
        .execute((
            read::to_i64(number)?,
            hash,
            rows.sums.digest.to_hex(),
            read::to_i64(rows.sums.revocations_total)?,
            read::to_i64(documents_number)?,
        ))?;
    let freshness_bound_ms = before.settings.freshness_bound_ms;
    Ok(CommitOutcome { revision, unix_ms: now.unix_ms(), changes, freshness_bound_ms })
}

/// The keys that a request depends on and that are revoked at present.
fn revoked_keys<'a>(connection: &Connection, request: &'a CommitRequest) -> Result<BTreeSet<&'a str>, SqliteError> {
    let mut revoked = BTreeSet::new();
    for key in signers::required_keys(request) {
        if read::is_key_revoked(connection, key)? {
            revoked.insert(key);
        }
    }
    Ok(revoked)
}

/// Writes the rows of one commit, and keeps the digest and the number of revocations up to date.
struct CommitWriter<'a> {
    connection: &'a Connection,
    moment: CommitMoment,
    sums: CommitSums,
}

impl CommitRows for CommitWriter<'_> {
    type Error = SqliteError;

    fn moment(&self) -> CommitMoment {
        self.moment
    }

    fn sums_mut(&mut self) -> &mut CommitSums {
        &mut self.sums
    }

    fn put_document(&mut self, row: &DocumentRow) -> Result<RowChange, SqliteError> {
        if let Some(before) = read::read_document(self.connection, &row.key)? {
            self.sums.digest.remove(&document_sha256(&before.row, before.revision));
        }
        let origin = match row.origin {
            DocumentOrigin::Folder => "folder",
            DocumentOrigin::Api => "api",
        };
        self.connection
            .prepare_cached(
                "INSERT INTO documents (kind, id, json, path, line, origin, revision) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (kind, id) DO UPDATE SET json = excluded.json, path = excluded.path, line = excluded.line,
                 origin = excluded.origin, revision = excluded.revision",
            )?
            .execute((&row.key.kind, &row.key.id, &row.json, &row.path, row.line, origin, read::to_i64(self.moment.number)?))?;
        self.sums.digest.add(&document_sha256(row, self.moment.number));
        Ok(RowChange::Document(row.clone()))
    }

    fn remove_document(&mut self, key: &DocumentKey) -> Result<RowChange, SqliteError> {
        let Some(before) = read::read_document(self.connection, key)? else {
            return Err(Error::Rejected(format!("there is no document `{} {}` to remove", key.kind, key.id)).into());
        };
        self.connection.prepare_cached("DELETE FROM documents WHERE kind = ?1 AND id = ?2")?.execute((&key.kind, &key.id))?;
        self.sums.digest.remove(&document_sha256(&before.row, before.revision));
        Ok(RowChange::DocumentRemoved(key.clone()))
    }

    fn revocation(&self, target: &RevocationTarget) -> Result<Option<RevocationRow>, SqliteError> {
        read::read_revocation(self.connection, &encode_target(target)?)
    }

    fn put_revocation(&mut self, row: &RevocationRow) -> Result<(), SqliteError> {
        self.connection
            .prepare_cached(
                "INSERT INTO revocations (target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (target) DO UPDATE SET dead = excluded.dead, suspended = excluded.suspended,
                 watermark_unix_s = excluded.watermark_unix_s, expires_at_unix_s = excluded.expires_at_unix_s,
                 reason = excluded.reason, revision = excluded.revision",
            )?
            .execute((
                encode_target(&row.target)?,
                row.dead,
                row.suspended,
                row.watermark_unix_s,
                row.expires_at_unix_s,
                &row.reason,
                read::to_i64(row.revision)?,
            ))?;
        Ok(())
    }

    fn pending(&self, act: &str) -> Result<Option<PendingTwoPersonRow>, SqliteError> {
        match pending_acts::read_pending_act(self.connection, act)? {
            Some(row) if read::is_key_revoked(self.connection, &row.key)? => Ok(None),
            row => Ok(row),
        }
    }

    fn put_pending(&mut self, act: &str, row: PendingTwoPersonRow) -> Result<(), SqliteError> {
        pending_acts::put_pending_act(self.connection, act, &row, self.moment.unix_ms)
    }

    fn remove_pending(&mut self, act: &str) -> Result<(), SqliteError> {
        pending_acts::remove_pending_act(self.connection, act)
    }

    fn approval(&self, digest: &str) -> Result<Option<ApprovalRow>, SqliteError> {
        Ok(approvals::read_approval(self.connection, digest)?.0)
    }

    fn put_approval(&mut self, row: ApprovalRow) -> Result<(), SqliteError> {
        approvals::put_approval(self.connection, &row)
    }
}

impl CommitWriter<'_> {
    /// Deletes expired revocations, the oldest first.
    fn prune(&mut self, before_unix_s: i64, rows_max: usize) -> Result<Vec<RowChange>, SqliteError> {
        let mut removed = Vec::new();
        for row in read::expired_revocations(self.connection, before_unix_s, rows_max)? {
            if !expiry::has_expired(&row, before_unix_s) {
                continue;
            }
            self.connection
                .prepare_cached("DELETE FROM revocations WHERE target = ?1")?
                .execute([encode_target(&row.target)?])?;
            self.sums.digest.remove(&revocation_sha256(&row));
            self.sums.revocations_total = self.sums.revocations_total.saturating_sub(1);
            removed.push(RowChange::RevocationRemoved(row.target));
        }
        if removed.is_empty() { Err(expiry::nothing_expired_error().into()) } else { Ok(removed) }
    }
}

/// Stores an act, and each of its signatures once.
///
/// The cutoff of forgotten signatures is an expiry that was stored, not the clock. Every signature that expires up to the cutoff
/// counts as used. Therefore a clock that jumps ahead and back admits no signature twice.
fn record_act(
    connection: &Connection,
    act: &ActRow,
    number: u64,
    head: &SqliteHead,
    now: ClockReading,
) -> Result<(), SqliteError> {
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
        read::to_i64(number)?,
        now.unix_ms(),
        text,
    ))?;
    let newest: Option<i64> = connection
        .prepare_cached(
            "SELECT max(expires_at_unix_s) FROM (
                SELECT expires_at_unix_s FROM act_jtis WHERE expires_at_unix_s < ?1 ORDER BY expires_at_unix_s LIMIT ?2)",
        )?
        .query_one((now.unix_s(), FORGOTTEN_KEYS_MAX), |row| row.get(0))?;
    if let Some(newest) = newest {
        connection.prepare_cached("DELETE FROM act_jtis WHERE expires_at_unix_s <= ?1")?.execute([newest])?;
        connection
            .prepare_cached("UPDATE head SET jtis_forgotten_unix_s = max(coalesce(jtis_forgotten_unix_s, ?1), ?1)")?
            .execute([newest])?;
    }
    Ok(())
}
