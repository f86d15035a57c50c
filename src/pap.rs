//! The policy administration point (PAP): validated writes, each a signed act of an operator.
//!
//! Every act passes the checks of its signature, its roles and its content before it is written. Refused acts are recorded too.
//! This module must not know protobuf, because `api` converts. It must not reach a serving request either; its writes arrive
//! there through `store` and `sync`. Look next at [`authorize`](AdministrationPoint::authorize), then at `pap/apply.rs`.

mod administrators;
mod adoption;
mod apply;
mod approve;
mod authorize;
mod dead_keys;
mod diff;
mod fleet;
mod operators;
mod policy_history;
mod revoke;
mod shared_read;
mod target_lookup;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

pub use adoption::{ADOPTION_WAIT_MS_MAX, AdoptionWaitOutcome, ReplicaAdoptionProgress, StoreAdoptionOutcome};
pub use apply::ApplyOutcome;
pub use approve::{AnswerOutcome, ApprovalAnswer};
pub use authorize::{AdminMethod, AuthorizedAct};
pub use diff::{DiffOutcome, PAIRS_LISTED_MAX};
pub use fleet::FleetWaitReport;
pub use operators::{ListedOperator, NewOperator, OperatorChangeOutcome, OperatorState};
pub use policy_history::{HISTORY_LISTED_DEFAULT, PolicyRevision};
pub use revoke::{ReinstateOutcome, RevokeOutcome, RevokeRequest};
pub use target_lookup::{DocumentNames, KnownNamesSource, NameStatus, TargetLookup};

use crate::audit::{ActOutcome, ActRecord, AuditRecorder};
use crate::model::revision::Revision;
use crate::model::rows::{ActRow, DocumentKey, DocumentOrigin, DocumentRow, StoreWrite};
use crate::model::time::Clock;
pub use crate::policy::diagnostic::Diagnostic as DiagnosticText;
use crate::policy::diagnostic::Diagnostic;
pub use crate::policy::diff::{AgentToolChange, DocumentChange};
pub use crate::policy::document::OperatorSpec;
pub use crate::policy::source::SourceFile as PolicyFile;
use crate::store::{self, CommitOutcome, CommitRequest, Store, StoredDocument};
pub use crate::store::{CommitMetadata, RevocationPage};

/// The reason why an act was not done. Each message is one line. Nothing was written, unless the variant says otherwise.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The signature is missing, malformed, altered, stale or replayed, or it belongs to no operator.
    #[error("{0}")]
    Unauthenticated(String),
    /// The signing key is revoked, so its signatures no longer count.
    #[error("{0}")]
    KeyRevoked(String),
    /// The operator lacks the role, or a second operator must sign.
    #[error("{0}")]
    PermissionDenied(String),
    /// A field of the request is invalid.
    #[error("{field}: {message}")]
    InvalidArgument {
        /// The name of the field.
        field: &'static str,
        /// The mistake and its remedy.
        message: String,
    },
    /// The policy has errors, so nothing of it was applied.
    #[error("the policy has {} error(s): nothing was applied", .0.iter().filter(|diagnostic| diagnostic.is_error()).count())]
    InvalidPolicy(Vec<Diagnostic>),
    /// Tests of the policy fail, so nothing of it was applied.
    #[error("{} of {} test(s) of the policy fail: nothing was applied", .failures.len(), .failures.len() + .passed)]
    TestsFailed {
        /// The failed calls, several lines each.
        failures: Vec<String>,
        /// The number of calls with the expected answer.
        passed: usize,
    },
    /// The document does not exist.
    #[error("there is no document `{kind} {id}`{hint}")]
    NotFound {
        /// The requested kind.
        kind: String,
        /// The requested id.
        id: String,
        /// A suggestion after the message; empty if there is none.
        hint: String,
    },
    /// The question cannot be answered. Earlier writes are not affected.
    #[error("{0}")]
    CannotAnswer(String),
    /// The store failed or refused the act.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The request changes nothing. Its answer is withheld, because the request could not be recorded.
    #[error(
        "the audit log cannot be written, so nothing was done or answered: make room on the disk of the data folder, then repeat"
    )]
    AuditUnavailable,
    /// The act ended as `cause` states, but the audit log lacks its end.
    #[error("{cause}{}", Error::UNRECORDED)]
    Unrecorded {
        /// The end of the act.
        cause: Box<Error>,
    },
}

/// The kind of a store error, for the mapping to a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// Another writer was first. The caller must read again and repeat.
    Conflict,
    /// The request contradicts the stored state.
    Rejected,
    /// The store cannot be reached or was replaced. Nothing was written.
    Unavailable,
    /// The write may or may not have happened.
    Unknown,
}

impl Error {
    /// The suffix of a message whose act is missing in the audit log.
    pub const UNRECORDED: &str =
        "; this answer is not in the audit log, which cannot be written: make room on the disk of the data folder";

    /// The code of the error on the wire.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Unauthenticated(_) => "UNAUTHENTICATED",
            Error::KeyRevoked(_) => "REVOKED_KEY",
            Error::PermissionDenied(_) => "PERMISSION_DENIED",
            Error::InvalidArgument { .. } => "INVALID_ARGUMENT",
            Error::InvalidPolicy(_) => "POLICY_INVALID",
            Error::TestsFailed { .. } => "POLICY_TESTS_FAILED",
            Error::NotFound { .. } => "NOT_FOUND",
            Error::CannotAnswer(_) => "NOT_SAID",
            Error::AuditUnavailable => "AUDIT_UNAVAILABLE",
            Error::Unrecorded { cause } => cause.code(),
            Error::Store(_) => match self.store_fault() {
                StoreFault::Conflict => "CONFLICT",
                StoreFault::Rejected => "REJECTED",
                StoreFault::Unavailable => "STORE_UNAVAILABLE",
                StoreFault::Unknown => "COMMIT_UNKNOWN",
            },
        }
    }

    /// The kind of a store error; `Unavailable` for all other errors.
    pub fn store_fault(&self) -> StoreFault {
        match self {
            Error::Unrecorded { cause } => cause.store_fault(),
            Error::Store(
                store::Error::Conflict { .. } | store::Error::DocumentsChanged { .. } | store::Error::ActReplayed { .. },
            ) => StoreFault::Conflict,
            Error::Store(store::Error::Rejected(_) | store::Error::NoSignerLeft) => StoreFault::Rejected,
            Error::Store(store::Error::OutcomeUnknown(_)) => StoreFault::Unknown,
            _ => StoreFault::Unavailable,
        }
    }
}

/// The message for an act that would leave no administrator.
const NO_ADMINISTRATOR_LEFT: &str = "nobody with the role `administer` would be left whose key is not revoked, so nothing could be administered any \
                           more: add another administrator first (`portcullis operator add`), or have one of them do it";

/// The policy administration point. Every administrative act goes through it.
pub struct AdministrationPoint {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    recorder: Arc<AuditRecorder>,
    operators: authorize::OperatorReader,
    revision: shared_read::SharedRead<Result<Revision, store::Error>>,
    spent_signatures: Mutex<authorize::SpentSignatures>,
    apply_lock: tokio::sync::Mutex<()>,
    wait_slots: fleet::WaitSlots,
    silence_tracker: Mutex<fleet::SilenceTracker>,
    lookup_sources: target_lookup::LookupSources,
}

impl AdministrationPoint {
    /// Creates an administration point over a store. `recorder` records its acts.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, recorder: Arc<AuditRecorder>) -> Self {
        Self {
            store,
            clock,
            recorder,
            operators: authorize::OperatorReader::default(),
            revision: shared_read::SharedRead::default(),
            spent_signatures: Mutex::default(),
            apply_lock: tokio::sync::Mutex::default(),
            wait_slots: fleet::WaitSlots::default(),
            silence_tracker: Mutex::default(),
            lookup_sources: target_lookup::LookupSources::default(),
        }
    }

    /// The recorder of acts. It needs no write barrier in front of the sockets: an act is recorded before its answer, or the
    /// answer states that it is not.
    pub fn recorder(&self) -> Arc<AuditRecorder> {
        self.recorder.clone()
    }

    /// The history and newest revision. A client needs them for the next signature. Anybody may ask, so callers share a read.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn revision(&self) -> Result<Revision, Error> {
        Ok(self.revision.read(self.store.revision()).await?)
    }

    /// Reads one stored document.
    ///
    /// # Errors
    /// [`Error::NotFound`], or if the store cannot be read.
    pub async fn document(&self, by: &AuthorizedAct, kind: &str, id: &str) -> Result<DocumentRow, Error> {
        let documents = self.store.documents(Some(kind)).await?.documents;
        self.record_act(by, None, "read")?;
        documents.into_iter().map(|document| document.row).find(|row| row.key.id == id).ok_or_else(|| Error::NotFound {
            kind: kind.to_owned(),
            id: id.to_owned(),
            hint: String::new(),
        })
    }

    /// The path and line of documents. Documents that do not exist are left out.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn document_locations(
        &self,
        by: &AuthorizedAct,
        keys: BTreeSet<DocumentKey>,
    ) -> Result<BTreeMap<DocumentKey, (String, u32)>, Error> {
        self.record_act(by, None, "explain a call")?;
        let kinds: BTreeSet<&str> = keys.iter().map(|key| key.kind.as_str()).collect();
        let mut locations = BTreeMap::new();
        for kind in kinds {
            let rows = self.store.documents(Some(kind)).await?.documents.into_iter().map(|document| document.row);
            locations.extend(rows.filter(|row| keys.contains(&row.key)).map(|row| (row.key, (row.path, row.line))));
        }
        Ok(locations)
    }

    /// Records a read that another module answers.
    ///
    /// # Errors
    /// [`Error::AuditUnavailable`].
    pub fn record_read(&self, by: &AuthorizedAct, description: &str) -> Result<(), Error> {
        self.record_act(by, None, description)
    }

    /// The keys of the stored documents, of one kind or of all.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn document_keys(&self, by: &AuthorizedAct, kind: Option<&str>) -> Result<Vec<DocumentKey>, Error> {
        let documents = self.store.documents(kind).await?.documents;
        self.record_act(by, None, "read")?;
        Ok(documents.into_iter().map(|document| document.row.key).collect())
    }

    /// The newest revocations, at most `limit`, with the time and author of their last change, and the number of all.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn revocations(&self, by: &AuthorizedAct, limit: usize) -> Result<RevocationPage, Error> {
        let page = self.store.revocations(limit).await?;
        self.record_act(by, None, "read")?;
        Ok(page)
    }

    /// Commits an act.
    ///
    /// INVARIANT: the answer states the result of the store, even if the audit log fails, because the store keeps the signed act
    /// itself.
    async fn commit(
        &self,
        by: &AuthorizedAct,
        writes: Vec<StoreWrite>,
        documents_unchanged_since: Option<u64>,
        reason: &str,
    ) -> Result<CommitOutcome, Error> {
        self.commit_retaining_signer(by, Vec::new(), writes, documents_unchanged_since, reason).await
    }

    /// As [`AdministrationPoint::commit`], but the commit fails if it would leave all keys in `keep_one_unrevoked` revoked.
    async fn commit_retaining_signer(
        &self,
        by: &AuthorizedAct,
        keep_one_unrevoked: Vec<String>,
        writes: Vec<StoreWrite>,
        documents_unchanged_since: Option<u64>,
        reason: &str,
    ) -> Result<CommitOutcome, Error> {
        let act = ActRow {
            operators: by.operators().to_vec(),
            keys: by.keys().iter().map(ToString::to_string).collect(),
            method: by.method().to_owned(),
            signatures: by.signatures().to_vec(),
            jtis: by.jtis().to_vec(),
            reason: reason.to_owned(),
        };
        let request =
            CommitRequest { writes, documents_unchanged_since, keep_one_unrevoked, act: Some(act), ..Default::default() };
        match self.store.commit(request).await {
            Ok(committed) => {
                // Only this process logs the operators. Every replica logs the effect of the act. The reason that operators gave
                // is not logged.
                tracing::info!(revision = %committed.revision, by = ?by.operators(), method = by.method(), "an act was done");
                if self.record_act(by, Some(&committed.revision), reason).is_err() {
                    by.mark_unrecorded();
                    tracing::error!(revision = %committed.revision, "an act was done and is not in the audit log yet");
                }
                Ok(committed)
            }
            Err(store::Error::ActReplayed { jti }) => {
                let error = Error::Unauthenticated(format!("the signed act `{jti}` was used before: sign a new one"));
                self.record_refusal(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
            // A replica may not know of the revocation yet and accept the signature, but the store refuses the commit.
            Err(store::Error::SignerRevoked { thumbprint }) => {
                let error = self.key_revoked_error(by.operator_by_key(&thumbprint), &thumbprint).await;
                self.record_refusal(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
            Err(error) => {
                let error = match error {
                    store::Error::NoSignerLeft => Error::PermissionDenied(NO_ADMINISTRATOR_LEFT.to_owned()),
                    error => Error::Store(error),
                };
                self.record_refusal(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
        }
    }

    /// Records a wait for the effect of an act. The wait is a part of the act, so a missing record is reported with the act.
    fn record_wait(&self, by: &AuthorizedAct, revision: &Revision, description: &str) {
        if self.record_accepted(by, Some(revision), false, description).is_err() {
            by.mark_unrecorded();
        }
    }

    /// Records an accepted act or read. `revision` is the commit of the act, if it made one.
    fn record_act(&self, by: &AuthorizedAct, revision: Option<&Revision>, reason: &str) -> Result<(), Error> {
        self.record_accepted(by, revision, revision.is_some(), reason)
    }

    fn record_accepted(
        &self,
        by: &AuthorizedAct,
        revision: Option<&Revision>,
        committed: bool,
        reason: &str,
    ) -> Result<(), Error> {
        let revision = revision.map(ToString::to_string);
        let act = ActRecord {
            time_unix_ns: self.clock.now().unix_ns,
            method: by.method(),
            operators: by.operators(),
            signatures: by.signatures(),
            outcome: ActOutcome::Accepted,
            code: "OK",
            reason,
            revision: revision.as_deref(),
            committed,
            peer: by.peer(),
        };
        self.recorder.record_act(&act).map_err(|_| Error::AuditUnavailable)
    }

    /// Records an act that was refused, or whose result is unknown.
    ///
    /// # Errors
    /// [`Error::Unrecorded`] with the given error as its cause.
    pub(crate) fn record_refusal(&self, method: &str, operators: &[String], peer: &str, error: &Error) -> Result<(), Error> {
        let reason = error.to_string();
        let is_unknown = matches!(error, Error::Store(_)) && error.store_fault() == StoreFault::Unknown;
        let act = ActRecord {
            time_unix_ns: self.clock.now().unix_ns,
            // An unknown method is arbitrary text from the caller, so only the reason contains it.
            method: authorize::METHODS.iter().find(|known| known.path == method).map_or("unknown", |known| known.path),
            operators,
            signatures: &[],
            outcome: if is_unknown { ActOutcome::Unknown } else { ActOutcome::Refused },
            code: error.code(),
            reason: &reason,
            revision: None,
            committed: false,
            peer,
        };
        self.recorder.record_act(&act).map_err(|_| Error::Unrecorded { cause: Box::new(error.clone()) })
    }
}

/// Creates the first operator of an empty store, with every role. `None` if the store is not empty.
///
/// # Errors
/// If the store cannot be read or written.
pub async fn create_first_operator(
    store: &dyn Store,
    id: &str,
    key: &crate::model::jwk::PublicKey,
) -> Result<Option<CommitOutcome>, Error> {
    let revision = store.revision().await?;
    if revision.number > 0 {
        return Ok(None);
    }
    let json = format!(
        r#"{{"id":"{id}","keys":[{}],"kind":"operator","roles":["respond","administer","approve","audit"]}}"#,
        key.to_jwk()
    );
    let document = DocumentKey { kind: "operator".to_owned(), id: id.to_owned() };
    let row = DocumentRow { key: document.clone(), json, path: String::new(), line: 0, origin: DocumentOrigin::Api };
    let request =
        CommitRequest { writes: vec![StoreWrite::PutDocument(row)], expected: vec![(document, None)], ..Default::default() };
    match store.commit(request).await {
        Ok(committed) => Ok(Some(committed)),
        // Another process was first, so its operator counts.
        Err(store::Error::Conflict { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn index_by_key(documents: Vec<StoredDocument>) -> BTreeMap<DocumentKey, StoredDocument> {
    documents.into_iter().map(|document| (document.row.key.clone(), document)).collect()
}
