//! The proofs that were spent, each once: one row for each proof, until the proof has expired.
//!
//! Runs inside the transaction of `super::write`.

use rusqlite::{Connection, OptionalExtension};

use super::error::SqliteError;
use crate::model::approval::ProofUse;
use crate::model::time::ClockReading;

/// Expired keys that one spending removes. It is more than a spending adds, so that expired keys do not accumulate.
const FORGOTTEN_MAX: i64 = 64;

/// Spends a key. Returns `false` if it was spent before.
///
/// The cutoff of forgotten keys is an expiry that was stored, not the clock. Every key that expires up to the cutoff counts as
/// spent.
pub(super) fn spend_proof(connection: &Connection, proof: &ProofUse, now: ClockReading) -> Result<bool, SqliteError> {
    if !is_proof_new(connection, proof)? {
        return Ok(false);
    }
    connection
        .prepare_cached("INSERT INTO spent (key, expires_at_unix_s) VALUES (?1, ?2)")?
        .execute((proof.key, proof.expires_at_unix_s))?;
    let newest: Option<i64> = connection
        .prepare_cached(
            "SELECT max(expires_at_unix_s) FROM (
                SELECT expires_at_unix_s FROM spent WHERE expires_at_unix_s < ?1 ORDER BY expires_at_unix_s LIMIT ?2)",
        )?
        .query_one((now.unix_s(), FORGOTTEN_MAX), |row| row.get(0))
        .optional()?
        .flatten();
    if let Some(newest) = newest {
        connection.prepare_cached("DELETE FROM spent WHERE expires_at_unix_s <= ?1")?.execute([newest])?;
        connection
            .prepare_cached("UPDATE head SET spent_forgotten_unix_s = max(coalesce(spent_forgotten_unix_s, ?1), ?1)")?
            .execute([newest])?;
    }
    Ok(true)
}

/// Whether a key was not spent before, as far as the store remembers.
pub(super) fn is_proof_new(connection: &Connection, proof: &ProofUse) -> Result<bool, SqliteError> {
    let forgotten: Option<i64> =
        connection.prepare_cached("SELECT spent_forgotten_unix_s FROM head")?.query_one((), |row| row.get(0))?;
    if forgotten.is_some_and(|forgotten| proof.expires_at_unix_s <= forgotten) {
        return Ok(false);
    }
    Ok(!connection.prepare_cached("SELECT 1 FROM spent WHERE key = ?1")?.exists([proof.key])?)
}
