//! Revokes and reinstates targets: the writes of the kill switch.
//!
//! A revocation must not depend on slow work, so nothing here reads a whole policy. Look next at `pap/target_lookup.rs`, which looks
//! up the name of a revoked target.

use std::time::Duration;

use super::administrators::{administrators, operator_keys};
use super::target_lookup::NameStatus;
use super::{AdministrationPoint, AuthorizedAct, Error};
use crate::model::ids::contains_control_character;
use crate::model::limits::{ACT_REASON_BYTES_MAX, ID_BYTES_MAX, TWO_PERSON_WINDOW_MS};
use crate::model::rows::{DocumentKey, RevocationKind, RevocationTarget, RowChange, StoreWrite};
use crate::policy::diagnostic::nearest_name;
use crate::policy::document::{Document, DocumentBody, OperatorSpec, tool_name_error};
use crate::store::{self, CommitOutcome, StoredDocument};

/// The number of newest revocations in which a similar suspended name is searched.
const SUSPENDED_LISTED_MAX: usize = 1_000;
/// The time limit of that search, and of other reads for an answer.
const HINT_TIMEOUT: Duration = Duration::from_millis(500);
/// The number of attempts to revoke an administrator's key while others apply policy.
const REVOKE_KEY_ATTEMPTS_MAX: usize = 8;

/// A request for a revocation.
#[derive(Clone, Debug)]
pub struct RevokeRequest {
    /// The kind of target, as on the command line.
    pub kind: String,
    /// The parts of its key.
    pub key: Vec<String>,
    /// The meaning of the revocation. `None`: suspend the target if it can be suspended, else revoke it for good.
    pub revocation_kind: Option<RevocationKind>,
    /// The reason.
    pub reason: String,
}

/// The result of a revocation.
#[derive(Clone, Debug)]
pub struct RevokeOutcome {
    /// The target as it was stored.
    pub target: RevocationTarget,
    /// The revision of the act, durable.
    pub committed: CommitOutcome,
    /// Roots issued at or before this time are void, in seconds since the Unix epoch, if the act set a watermark.
    pub watermark_unix_s: Option<i64>,
}

/// The result of a reinstatement.
#[derive(Clone, Debug)]
pub struct ReinstateOutcome {
    /// The revision of the act, durable.
    pub committed: CommitOutcome,
    /// If set, nothing is reinstated yet: another operator must make the same call before this time of the store's clock.
    pub waits_until_unix_ms: Option<i64>,
}

impl AdministrationPoint {
    /// Revokes a target. The act is durable when this returns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown target or meaning, or if the store fails.
    pub async fn revoke(&self, by: &AuthorizedAct, request: RevokeRequest) -> Result<RevokeOutcome, Error> {
        let checked = self.check_request(&request).await;
        let (target, revocation_kind) = self.or_record_refusal(by, checked)?;
        let write = StoreWrite::Revoke { target: target.clone(), kind: revocation_kind, reason: request.reason.clone() };
        let description = format!("revoke {target} ({revocation_kind:?}): {}", request.reason);
        let committed = match &target {
            RevocationTarget::Key(key) => self.revoke_key(by, key, write, &description).await?,
            _ => self.commit(by, vec![write], None, &description).await?,
        };
        let watermark_unix_s = match revocation_kind {
            RevocationKind::Watermark => self.watermark_of(&target, &committed).await,
            RevocationKind::Suspend | RevocationKind::Dead => None,
        };
        Ok(RevokeOutcome { target, committed, watermark_unix_s })
    }

    /// The watermark of a target after a commit. The commit is done, so a failing read must not turn it into an error.
    async fn watermark_of(&self, target: &RevocationTarget, committed: &CommitOutcome) -> Option<i64> {
        let changed = committed.changes.iter().find_map(|change| match change {
            RowChange::Revocation(row) => row.watermark_unix_s,
            _ => None,
        });
        if changed.is_some() {
            return changed;
        }
        // A second watermark within the same second changes no row.
        let rows = tokio::time::timeout(HINT_TIMEOUT, self.store.revocations_of(std::slice::from_ref(target))).await;
        rows.ok()?.ok()?.first().and_then(|row| row.watermark_unix_s)
    }

    /// Revokes a key. An operator without the role `administer` must leave some administrator with a valid key, so that a
    /// revocation cannot lock everybody out.
    ///
    /// An administrator may revoke even the last key, its own. Otherwise a stolen key would stay valid for lack of another
    /// administrator.
    async fn revoke_key(
        &self,
        by: &AuthorizedAct,
        key: &str,
        write: StoreWrite,
        description: &str,
    ) -> Result<CommitOutcome, Error> {
        // A concurrent apply must not make the revocation of a key fail.
        let mut rounds = 0..REVOKE_KEY_ATTEMPTS_MAX;
        loop {
            let listed = self.store.documents(Some("operator")).await?;
            let administrators: Vec<OperatorSpec> = administrators(&listed.documents).collect();
            let held = |operator: &OperatorSpec| operator.keys.iter().any(|held| held.thumbprint().as_str() == key);
            let signed = |operator: &OperatorSpec| by.operators().iter().any(|id| id == operator.id.as_str());
            if !administrators.iter().any(held) || administrators.iter().any(signed) {
                return self.commit(by, vec![write], None, description).await;
            }
            let (left, since) = (operator_keys(&administrators), Some(listed.revision.number));
            match self.commit_retaining_signer(by, left, vec![write.clone()], since, description).await {
                Err(Error::Store(store::Error::DocumentsChanged { .. })) if rounds.next().is_some() => {}
                done => return done,
            }
        }
    }

    /// Lifts the suspension of a target.
    ///
    /// If two or more operators administer, two are needed to reinstate everything (`all`), or a target whose document states
    /// `two_person`. Either both sign one call, or another one calls within [`TWO_PERSON_WINDOW_MS`] of the first.
    ///
    /// # Errors
    /// - [`Error::InvalidArgument`] for a target that cannot be suspended.
    /// - [`Rejected`](crate::store::Error::Rejected) for a target that is not suspended, or if the same operator calls twice.
    /// - Any other error of the store.
    pub async fn reinstate(
        &self,
        by: &AuthorizedAct,
        kind: &str,
        key: &[String],
        reason: String,
    ) -> Result<ReinstateOutcome, Error> {
        let checked = match self.parse_target(kind, key).await {
            Ok(target) if target.can_suspend() => check_reason(&reason).map(|()| target),
            Ok(target) => Err(invalid_argument(
                "target",
                format!("a {} that was revoked is dead: there is nothing to reinstate", target.kind()),
            )),
            Err(error) => Err(error),
        };
        let target = self.or_record_refusal(by, checked)?;
        let asked = match target {
            RevocationTarget::All => Some(u64::MAX),
            _ => self.two_person_revision(&target).await?,
        };
        match asked {
            Some(read_at) => self.reinstate_by_two(by, target, read_at, reason).await,
            // If a document adds `two_person` at this moment, the rule applies to later suspensions only.
            None => {
                let description = format!("reinstate {target}: {reason}");
                let write = StoreWrite::Reinstate { target: target.clone(), reason };
                match self.commit(by, vec![write], None, &description).await {
                    Ok(committed) => Ok(ReinstateOutcome { committed, waits_until_unix_ms: None }),
                    Err(Error::Store(store::Error::Rejected(why))) => {
                        let hint = self.suspended_hint(&target).await;
                        Err(Error::Store(store::Error::Rejected(format!("{why}{hint}"))))
                    }
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// A hint why a target is not suspended: a suspended target has a similar name, or the name is unknown. Empty if neither is
    /// found in time.
    async fn suspended_hint(&self, target: &RevocationTarget) -> String {
        let listed = async {
            let listed = self.store.revocations(SUSPENDED_LISTED_MAX).await.ok()?;
            let suspended = listed.rows.iter().filter(|row| row.suspended && row.target.kind() == target.kind());
            let names: Vec<(String, String)> =
                suspended.map(|row| (row.target.key_parts().join(" "), row.target.to_string())).collect();
            let near = nearest_name(&target.key_parts().join(" "), names.iter().map(|(parts, _)| parts.as_str()))?.to_owned();
            names.into_iter().find(|(parts, _)| *parts == near).map(|(_, shown)| shown)
        };
        if let Some(near) = tokio::time::timeout(HINT_TIMEOUT, listed).await.ok().flatten() {
            return format!("; did you mean `{near}`, which is suspended?");
        }
        let Ok(Ok(revision)) = tokio::time::timeout(HINT_TIMEOUT, self.store.revision()).await else { return String::new() };
        let name = self.look_up_target(target, &revision).await;
        match name.status {
            NameStatus::Unknown => format!("; nothing bears that name: {}", name.note),
            NameStatus::Known | NameStatus::NotChecked => String::new(),
        }
    }

    /// Returns the revision at which a document demanded two operators for a target; `None` if no document does.
    async fn two_person_revision(&self, target: &RevocationTarget) -> Result<Option<u64>, Error> {
        let named = |kind: &str, id: &str| DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
        let keys = match target {
            // Reinstating a delegation admits its agent again, so the rule of the agent's document applies.
            RevocationTarget::Agent(agent) | RevocationTarget::Delegation { agent, .. } => vec![named("agent", agent)],
            RevocationTarget::Application(id) => vec![named("application", id)],
            RevocationTarget::Tool(tool) => {
                let server = tool.split_once('/').map_or("", |(server, _)| server);
                vec![named("tool", tool), named("server", server)]
            }
            _ => return Ok(None),
        };
        let found = self.store.documents_by_key(&keys).await?;
        // A document that cannot be read may have demanded two operators.
        let asks = |stored: &StoredDocument| Document::from_row(&stored.row).map_or(true, |document| document.two_person);
        Ok(found.documents.iter().any(asks).then_some(found.revision.number))
    }

    /// Reinstates a target that needs two operators. Either both sign this call, or the store records the first call and the
    /// second one lifts the suspension. A single administrator needs no second one.
    async fn reinstate_by_two(
        &self,
        by: &AuthorizedAct,
        target: RevocationTarget,
        read_at: u64,
        reason: String,
    ) -> Result<ReinstateOutcome, Error> {
        let listed = self.store.documents(Some("operator")).await?;
        // The administrators were read a moment ago. The commit fails if documents have changed since.
        let since = Some(listed.revision.number.min(read_at));
        let administrators: Vec<String> = administrators(&listed.documents).map(|operator| operator.id.to_string()).collect();
        // A single administrator has no second one to wait for. Without this exception a suspension could never be lifted.
        if administrators.len() < 2 || by.operators().len() > 1 {
            let description = format!("reinstate {target}: {reason}");
            let write = StoreWrite::Reinstate { target, reason };
            return Ok(ReinstateOutcome {
                committed: self.commit(by, vec![write], since, &description).await?,
                waits_until_unix_ms: None,
            });
        }
        // Nobody else could be the second operator, so a wait would be in vain.
        if let Ok(counted) = self.administrators().await
            && counted.lacks_second()
        {
            let message = format!("two operators must reinstate `{target}`{}", counted.shortage_hint());
            return self.or_record_refusal(by, Err(Error::PermissionDenied(message)));
        }
        let operator = by.operators().first().cloned().unwrap_or_default();
        let key = by.keys().first().map(ToString::to_string).unwrap_or_default();
        let description = format!("reinstate {target}, one of two operators: {reason}");
        let write = StoreWrite::ReinstateByTwo { target, reason, operator, key, administrators };
        let committed = self.commit(by, vec![write], since, &description).await?;
        let waits = committed.changes.is_empty().then(|| committed.unix_ms.saturating_add(TWO_PERSON_WINDOW_MS));
        Ok(ReinstateOutcome { committed, waits_until_unix_ms: waits })
    }

    /// Checks a request. Returns the target, and the meaning or its default.
    async fn check_request(&self, request: &RevokeRequest) -> Result<(RevocationTarget, RevocationKind), Error> {
        check_reason(&request.reason)?;
        let target = self.parse_target(&request.kind, &request.key).await?;
        self.check_single_name(&target).await?;
        let revocation_kind =
            request.revocation_kind.unwrap_or(if target.can_suspend() { RevocationKind::Suspend } else { RevocationKind::Dead });
        let fits_target = match revocation_kind {
            RevocationKind::Suspend => target.can_suspend(),
            RevocationKind::Watermark => target.can_watermark(),
            RevocationKind::Dead => !target.can_suspend(),
        };
        if !fits_target {
            let message =
                format!("`{}` cannot be revoked with the meaning {revocation_kind:?}: leave the meaning out", target.kind());
            return Err(invalid_argument("meaning", message));
        }
        Ok((target, revocation_kind))
    }

    /// Parses a target. An issuer's key is resolved to its thumbprint.
    async fn parse_target(&self, kind: &str, key: &[String]) -> Result<RevocationTarget, Error> {
        if let Some(long) = key.iter().find(|part| part.is_empty() || part.len() > ID_BYTES_MAX) {
            return Err(invalid_argument(
                "target.key",
                format!("a part of {} bytes: 1 to {ID_BYTES_MAX} are expected", long.len()),
            ));
        }
        if key.iter().any(|part| contains_control_character(part)) {
            return Err(invalid_argument("target.key", "a part holds a control character: no id has one".to_owned()));
        }
        let target = match (kind, key) {
            ("agent", [id]) => match crate::model::ids::spiffe_id_error(id) {
                Some(error) => return Err(invalid_argument("target.key", format!("`{id}` {error}"))),
                None => RevocationTarget::Agent(id.clone()),
            },
            ("session", [id]) => RevocationTarget::Session(id.clone()),
            ("task", [id]) => RevocationTarget::Task(id.clone()),
            ("delegation", [issuer, subject, agent]) => {
                RevocationTarget::Delegation { issuer: issuer.clone(), subject: subject.clone(), agent: agent.clone() }
            }
            ("application", [id]) => RevocationTarget::Application(id.clone()),
            ("user", [issuer, subject]) => RevocationTarget::User { issuer: issuer.clone(), subject: subject.clone() },
            ("key", [thumbprint]) => RevocationTarget::Key(thumbprint.clone()),
            ("issuer-key", [issuer, kid]) => self.find_issuer_key(issuer, kid).await?,
            ("tool", [name]) => RevocationTarget::Tool(name.clone()),
            ("hop", [hash]) => RevocationTarget::Hop(hash.clone()),
            ("token", [jti]) => RevocationTarget::Token(jti.clone()),
            ("all", []) => RevocationTarget::All,
            _ => return Err(invalid_argument("target", unknown_target_message(kind, key.len()))),
        };
        if let RevocationTarget::Key(digest) | RevocationTarget::Hop(digest) = &target
            && digest.len() != 43
        {
            let prints = match &target {
                RevocationTarget::Hop(_) => "`portcullis token inspect` prints it",
                _ => "`portcullis token inspect`, `token keygen` and `operator list` print thumbprints",
            };
            let message = format!("`{digest}` is not 43 characters of base64url: {prints}");
            return Err(invalid_argument("target.key", message));
        }
        Ok(target)
    }

    /// Refuses a pattern or an incomplete tool name, because a revocation of it would match nothing.
    async fn check_single_name(&self, target: &RevocationTarget) -> Result<(), Error> {
        let wrong = match target {
            RevocationTarget::Tool(name) => tool_name_error(name),
            _ if target.key_parts().contains(&"*") => Some("is a pattern, and a revocation takes one name"),
            RevocationTarget::Application(id) if id.ends_with('*') => Some("is a pattern, and a revocation takes one name"),
            RevocationTarget::Delegation { agent, .. } => crate::model::ids::spiffe_id_error(agent),
            _ => None,
        };
        let Some(wrong) = wrong else { return Ok(()) };
        let name = match target {
            RevocationTarget::Tool(name) => name.clone(),
            RevocationTarget::Delegation { agent, .. } if !target.key_parts().contains(&"*") => agent.clone(),
            _ => target.to_string(),
        };
        let hint = match target {
            RevocationTarget::Tool(_) => "name each tool as `server/tool`; `revoke all` stops everything",
            RevocationTarget::Delegation { .. } => "a delegation is ISS SUB AGENT, the agent by its SPIFFE ID",
            _ => "name each by itself; `revoke all` stops everything",
        };
        let near = self.nearest_target(target).await.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
        Err(invalid_argument("target.key", format!("`{name}` {wrong}: {hint}{near}")))
    }

    /// The key of an issuer with a `kid`, as a target with its thumbprint.
    async fn find_issuer_key(&self, issuer: &str, kid: &str) -> Result<RevocationTarget, Error> {
        let rows = self.store.documents(Some("issuer")).await?.documents;
        let documents: Vec<Document> = rows.iter().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
        let mut kids = Vec::new();
        for document in &documents {
            let DocumentBody::Issuer(spec) = &document.body else { continue };
            for named in spec.keys.iter().filter(|_| document.key.id == issuer) {
                match named.kid.as_deref() {
                    Some(own) if own == kid => return Ok(RevocationTarget::Key(named.key.thumbprint().to_string())),
                    own => kids.extend(own),
                }
            }
        }
        let hint = |near: Option<&str>| near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
        let ids = || documents.iter().map(|document| document.key.id.as_str());
        let message = if ids().any(|id| id == issuer) {
            format!("issuer `{issuer}` has no key with kid `{kid}`{}", hint(nearest_name(kid, kids)))
        } else if ids().any(|id| id == kid) {
            format!("`{kid}` is an issuer and `{issuer}` is none: the issuer comes first, then the kid")
        } else {
            format!("no document names issuer `{issuer}`{}", hint(nearest_name(issuer, ids())))
        };
        Err(invalid_argument("target.key", format!("{message}: nothing was revoked; a key can be named by its thumbprint too")))
    }

    pub(super) fn or_record_refusal<T>(&self, by: &AuthorizedAct, checked: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &checked {
            self.record_refusal(by.method(), by.operators(), by.peer(), error)?;
        }
        checked
    }
}

fn unknown_target_message(kind: &str, parts: usize) -> String {
    let forms = "agent ID · session SID · task TXN · delegation ISS SUB AGENT · application ID · user ISS SUB · key THUMBPRINT · \
                 issuer-key ISSUER KID · tool T · hop HASH · token JTI · all";
    format!("`{kind}` with {parts} part(s) is not a target; one of: {forms}")
}

pub(super) fn check_reason(reason: &str) -> Result<(), Error> {
    if reason.len() > ACT_REASON_BYTES_MAX {
        return Err(invalid_argument("reason", format!("{} bytes: at most {ACT_REASON_BYTES_MAX}", reason.len())));
    }
    Ok(())
}

fn invalid_argument(field: &'static str, message: String) -> Error {
    Error::InvalidArgument { field, message }
}
