//! What is written to a PostgreSQL store: commits, one after the other by the lock on the head, and keys that are spent.
//!
//! Look next at `super::apply`, which says what becomes of the rows.

use tokio_postgres::types::Type;

use super::apply::{Found, Rows, document_name, target_name};
use super::approvals;
use super::lineage;
use super::link::{CHANNEL, Fault, Link};
use super::pending;
use super::read::{self, Expected, Head, signed};
use crate::model::records::{ActRow, Change, Origin, Target, Write};
use crate::model::revision::Revision;
use crate::store::chain::{changes_as_stored, commit_hash};
use crate::store::{CommitRequest, Committed, Error, second, signers};

/// Expired keys that one request forgets; more than it adds, so that they cannot pile up.
const FORGOTTEN_MAX: i64 = 64;

pub(super) async fn commit(
    link: &Link,
    expected: &Expected,
    request: &CommitRequest,
    unix_ms: Option<i64>,
    notify: bool,
) -> Result<Committed, Fault> {
    let head = read::head(link, expected, true).await?;
    let unix_ms = unix_ms.unwrap_or(head.unix_ms);
    let number = head.revision.number.checked_add(1).ok_or_else(|| Error::Rejected("no revision number is left".to_owned()))?;
    let mut rows = touched(link, request, &head, number, unix_ms).await?;
    rows.check(request, &head)?;
    let forgotten = match &request.act {
        Some(act) => record_act(link, act, number, &head, unix_ms).await?,
        None => head.jtis_forgotten_unix_s,
    };
    let (changes, revision) = make(link, request, &head, &mut rows, unix_ms).await?;
    rows.check_left(request)?;
    store_documents(link, &rows).await?;
    store_revocations(link, &rows).await?;
    for (act, row) in rows.pending_to_store() {
        pending::put(link, act, row, unix_ms).await?;
    }
    for row in rows.approvals_to_store() {
        approvals::put(link, row).await?;
    }
    let stored = changes_as_stored(&changes)?;
    let hash = commit_hash(&head.hash, number, &stored);
    let of_documents = changes.iter().any(Change::is_of_document);
    let documents_number = if of_documents { number } else { head.documents_number };
    let (stored_number, digest) = (signed(number)?, rows.digest.to_hex());
    link.execute(
        "INSERT INTO portcullis.log (number, previous_hash, hash, digest, unix_ms, changes, of_documents)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
        &[
            (&stored_number, Type::INT8),
            (&head.hash.as_slice(), Type::BYTEA),
            (&hash.as_slice(), Type::BYTEA),
            (&digest, Type::TEXT),
            (&unix_ms, Type::INT8),
            (&stored, Type::BYTEA),
            (&of_documents, Type::BOOL),
        ],
    )
    .await?;
    let moved = link
        .execute(
            "UPDATE portcullis.head SET number = $1, hash = $2, digest = $3, revocations = $4, documents_number = $5,
                 jtis_forgotten_unix_s = $6 WHERE number = $1 - 1 AND (SELECT history FROM portcullis.meta) = $7",
            &[
                (&stored_number, Type::INT8),
                (&hash.as_slice(), Type::BYTEA),
                (&digest, Type::TEXT),
                (&signed(rows.revocations_total)?, Type::INT8),
                (&signed(documents_number)?, Type::INT8),
                (&forgotten, Type::INT8),
                (&revision.history.as_str(), Type::TEXT),
            ],
        )
        .await?;
    // Who waited for the lock on the head has read the history from before it was adopted.
    if moved != 1 {
        return Err(Error::Unavailable("the store was adopted meanwhile, nothing was written: ask again".to_owned()).into());
    }
    if notify {
        link.execute("SELECT pg_notify($1, $2)", &[(&CHANNEL, Type::TEXT), (&number.to_string(), Type::TEXT)]).await?;
    }
    Ok(Committed { revision, unix_ms, changes, freshness_bound_ms: head.settings.freshness_bound_ms })
}

/// Makes the writes in order; what they changed, and the revision that they make.
async fn make(
    link: &Link,
    request: &CommitRequest,
    head: &Head,
    rows: &mut Rows,
    unix_ms: i64,
) -> Result<(Vec<Change>, Revision), Fault> {
    let mut revision = Revision { number: head.revision.number.saturating_add(1), ..head.revision.clone() };
    let mut changes = Vec::with_capacity(request.writes.len());
    for write in &request.writes {
        match write {
            Write::Prune { before_unix_s, .. } => changes.extend(rows.prune((*before_unix_s).min(unix_ms.div_euclid(1_000)))?),
            Write::Merge(merge) => {
                changes.extend(rows.merge(merge, &head.revision.history)?);
                lineage::merged(link, merge, &changes, unix_ms).await?;
            }
            Write::Adopt { reason } => {
                changes.push(rows.void_roots(reason)?);
                revision = lineage::begin(link, head, revision.number, unix_ms).await?;
            }
            write => changes.extend(rows.write(write)?),
        }
    }
    Ok((changes, revision))
}

/// Every row that the request writes or expects something of, as it stands.
async fn touched(link: &Link, request: &CommitRequest, head: &Head, number: u64, unix_ms: i64) -> Result<Rows, Fault> {
    let (mut documents, mut revocations, mut approved, mut expiring) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut acts = Vec::new();
    for key in signers::keys(request) {
        revocations.push(target_name(&signers::target(key))?.0);
    }
    documents.extend(request.expected.iter().map(|(key, _)| document_name(key)));
    for write in &request.writes {
        match write {
            Write::PutDocument(row) => documents.push(document_name(&row.key)),
            Write::RemoveDocument(key) => documents.push(document_name(key)),
            Write::Revoke { target, .. } | Write::Reinstate { target, .. } | Write::ReinstateByTwo { target, .. } => {
                revocations.push(target_name(target)?.0);
                if target.can_suspend() {
                    acts.push(second::name(target)?);
                }
            }
            // An adoption takes away what waits by itself.
            Write::Adopt { .. } => revocations.push(target_name(&Target::All)?.0),
            Write::Merge(merge) => {
                for row in &merge.rows {
                    revocations.push(target_name(&row.target)?.0);
                }
            }
            Write::Prune { before_unix_s, rows_max } => {
                let before_unix_s = (*before_unix_s).min(unix_ms.div_euclid(1_000));
                expiring.extend(read::expiring(link, before_unix_s, *rows_max).await?);
            }
            Write::Approve { digest, .. } | Write::Refuse { digest, .. } => approved.push(digest.as_str()),
        }
    }
    let documents = match documents.as_slice() {
        [] => vec![],
        keys => {
            let sql = format!("SELECT {} FROM portcullis.documents WHERE key = ANY ($1)", read::DOCUMENT);
            read::stream(link, &sql, &[(&keys, Type::BYTEA_ARRAY)], read::document_row).await?
        }
    };
    let pending = pending::rows(link, &acts).await?;
    for row in pending.values() {
        revocations.push(target_name(&signers::target(&row.key))?.0);
    }
    let mut found = expiring;
    if !revocations.is_empty() {
        let sql = format!("SELECT {} FROM portcullis.revocations WHERE key = ANY ($1)", read::REVOCATION);
        found.extend(read::stream(link, &sql, &[(&revocations, Type::BYTEA_ARRAY)], read::revocation_row).await?);
    }
    let revocations = found;
    let approvals = approvals::locked(link, &approved).await?;
    Ok(Rows::new(head, number, unix_ms, Found { documents, revocations, approvals, pending }))
}

async fn store_documents(link: &Link, rows: &Rows) -> Result<(), Fault> {
    let (put, remove) = rows.documents_to_store();
    if !remove.is_empty() {
        let keys: Vec<_> = remove.iter().map(|key| document_name(key)).collect();
        link.execute("DELETE FROM portcullis.documents WHERE key = ANY ($1)", &[(&keys, Type::BYTEA_ARRAY)]).await?;
    }
    if put.is_empty() {
        return Ok(());
    }
    let keys: Vec<_> = put.iter().map(|one| document_name(&one.row.key)).collect();
    let kinds: Vec<_> = put.iter().map(|one| one.row.key.kind.as_str()).collect();
    let ids: Vec<_> = put.iter().map(|one| one.row.key.id.as_str()).collect();
    let jsons: Vec<_> = put.iter().map(|one| one.row.json.as_str()).collect();
    let paths: Vec<_> = put.iter().map(|one| one.row.path.as_str()).collect();
    let lines: Vec<_> = put.iter().map(|one| i64::from(one.row.line)).collect();
    let origins: Vec<_> = put
        .iter()
        .map(|one| match one.row.origin {
            Origin::Folder => "folder",
            Origin::Api => "api",
        })
        .collect();
    let revisions = put.iter().map(|one| signed(one.revision)).collect::<Result<Vec<_>, _>>()?;
    link.execute(
        "INSERT INTO portcullis.documents (key, kind, id, json, path, line, origin, revision)
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (key) DO UPDATE SET json = excluded.json, path = excluded.path, line = excluded.line, origin = excluded.origin,
         revision = excluded.revision",
        &[
            (&keys, Type::BYTEA_ARRAY),
            (&kinds, Type::TEXT_ARRAY),
            (&ids, Type::TEXT_ARRAY),
            (&jsons, Type::TEXT_ARRAY),
            (&paths, Type::TEXT_ARRAY),
            (&lines, Type::INT8_ARRAY),
            (&origins, Type::TEXT_ARRAY),
            (&revisions, Type::INT8_ARRAY),
        ],
    )
    .await?;
    Ok(())
}

async fn store_revocations(link: &Link, rows: &Rows) -> Result<(), Fault> {
    let remove = rows.revocations_to_remove();
    if !remove.is_empty() {
        let keys = remove.iter().map(|target| Ok(target_name(target)?.0)).collect::<Result<Vec<_>, Error>>()?;
        link.execute("DELETE FROM portcullis.revocations WHERE key = ANY ($1)", &[(&keys, Type::BYTEA_ARRAY)]).await?;
    }
    let put = rows.revocations_to_store();
    if put.is_empty() {
        return Ok(());
    }
    let names = put.iter().map(|row| target_name(&row.target)).collect::<Result<Vec<_>, _>>()?;
    let (keys, targets): (Vec<_>, Vec<_>) = names.into_iter().unzip();
    let dead: Vec<_> = put.iter().map(|row| row.dead).collect();
    let suspended: Vec<_> = put.iter().map(|row| row.suspended).collect();
    let watermarks: Vec<_> = put.iter().map(|row| row.watermark_unix_s).collect();
    let expiries: Vec<_> = put.iter().map(|row| row.expires_at_unix_s).collect();
    let reasons: Vec<_> = put.iter().map(|row| row.reason.as_str()).collect();
    let revisions = put.iter().map(|row| signed(row.revision)).collect::<Result<Vec<_>, _>>()?;
    link.execute(
        "INSERT INTO portcullis.revocations (key, target, dead, suspended, watermark_unix_s, expires_at_unix_s, reason, revision)
         SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (key) DO UPDATE SET dead = excluded.dead, suspended = excluded.suspended,
         watermark_unix_s = excluded.watermark_unix_s, expires_at_unix_s = excluded.expires_at_unix_s, reason = excluded.reason,
         revision = excluded.revision",
        &[
            (&keys, Type::BYTEA_ARRAY),
            (&targets, Type::TEXT_ARRAY),
            (&dead, Type::BOOL_ARRAY),
            (&suspended, Type::BOOL_ARRAY),
            (&watermarks, Type::INT8_ARRAY),
            (&expiries, Type::INT8_ARRAY),
            (&reasons, Type::TEXT_ARRAY),
            (&revisions, Type::INT8_ARRAY),
        ],
    )
    .await?;
    Ok(())
}

/// Stores who did it, once per signature; answers by when everything forgotten had expired.
///
/// What is forgotten is dated by what was stored, not by the clock: everything up to that date counts as used, so a clock that
/// jumps ahead and back lets no signature in twice. The lock on the head keeps all others out.
async fn record_act(link: &Link, act: &ActRow, number: u64, head: &Head, unix_ms: i64) -> Result<Option<i64>, Fault> {
    let jtis: Vec<&str> = act.jtis.iter().map(|(jti, _)| jti.as_str()).collect();
    let expiries: Vec<i64> = act.jtis.iter().map(|(_, expires_at_unix_s)| *expires_at_unix_s).collect();
    let used = link.rows("SELECT jti FROM portcullis.act_jtis WHERE jti = ANY ($1)", &[(&jtis, Type::TEXT_ARRAY)]).await?;
    let used = used.iter().map(|row| read::text(row, 0)).collect::<Result<Vec<_>, _>>()?;
    for (index, (jti, expires_at_unix_s)) in act.jtis.iter().enumerate() {
        let forgotten = head.jtis_forgotten_unix_s.is_some_and(|forgotten| *expires_at_unix_s <= forgotten);
        let twice = jtis.iter().take(index).any(|before| before == jti);
        if forgotten || twice || used.contains(&jti.as_str()) {
            return Err(Error::ActReplayed { jti: jti.clone() }.into());
        }
    }
    link.execute(
        "INSERT INTO portcullis.act_jtis (jti, expires_at_unix_s) SELECT * FROM unnest($1, $2)",
        &[(&jtis, Type::TEXT_ARRAY), (&expiries, Type::INT8_ARRAY)],
    )
    .await?;
    let text = serde_json::to_string(act).map_err(|error| Error::Rejected(format!("the act cannot be stored: {error}")))?;
    link.execute(
        "INSERT INTO portcullis.acts (number, unix_ms, act) VALUES ($1, $2, $3)",
        &[(&signed(number)?, Type::INT8), (&unix_ms, Type::INT8), (&text, Type::TEXT)],
    )
    .await?;
    let newest = oldest_expired(link, "act_jtis", unix_ms.div_euclid(1_000)).await?;
    if let Some(newest) = newest {
        link.execute("DELETE FROM portcullis.act_jtis WHERE expires_at_unix_s <= $1", &[(&newest, Type::INT8)]).await?;
    }
    Ok(newest.max(head.jtis_forgotten_unix_s))
}

/// By when the oldest of the expired keys in a table had expired, if there are any.
async fn oldest_expired(link: &Link, table: &str, unix_s: i64) -> Result<Option<i64>, Fault> {
    let sql = format!(
        "SELECT max(expires_at_unix_s) FROM (SELECT expires_at_unix_s FROM portcullis.{table} WHERE expires_at_unix_s < $1
             ORDER BY expires_at_unix_s LIMIT $2) expired"
    );
    let row = link.row(&sql, &[(&unix_s, Type::INT8), (&FORGOTTEN_MAX, Type::INT8)]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.flatten())
}

/// Spends a key; see [`record_act`] for how keys are forgotten.
pub(super) async fn spend(
    link: &Link,
    expected: &Expected,
    key: &[u8; 32],
    expires_at_unix_s: i64,
    unix_ms: Option<i64>,
) -> Result<bool, Fault> {
    let head = read::head(link, expected, false).await?;
    let unix_s = unix_ms.unwrap_or(head.unix_ms).div_euclid(1_000);
    let added = link
        .execute(
            "INSERT INTO portcullis.spent (key, expires_at_unix_s) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            &[(&key.as_slice(), Type::BYTEA), (&expires_at_unix_s, Type::INT8)],
        )
        .await?;
    if added == 0 {
        return Ok(false);
    }
    // INVARIANT: asked after the key was added. Whoever forgot the same key meanwhile had committed before it could be added, so that
    // shows here.
    let row = link.row("SELECT unix_s FROM portcullis.spent_forgotten", &[]).await?;
    let row = row.ok_or_else(|| read::corrupt("the row of forgotten keys is missing".to_owned()))?;
    if row.try_get::<_, Option<i64>>(0)?.is_some_and(|forgotten| expires_at_unix_s <= forgotten) {
        link.execute("DELETE FROM portcullis.spent WHERE key = $1", &[(&key.as_slice(), Type::BYTEA)]).await?;
        return Ok(false);
    }
    let Some(newest) = oldest_expired(link, "spent", unix_s).await? else { return Ok(true) };
    // One forgets at a time; the others go on, for the next will.
    if link.row("SELECT 1 FROM portcullis.spent_forgotten FOR UPDATE SKIP LOCKED", &[]).await?.is_some() {
        link.execute("DELETE FROM portcullis.spent WHERE expires_at_unix_s <= $1", &[(&newest, Type::INT8)]).await?;
        link.execute("UPDATE portcullis.spent_forgotten SET unix_s = greatest(unix_s, $1)", &[(&newest, Type::INT8)]).await?;
    }
    Ok(true)
}
