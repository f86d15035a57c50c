//! The policy administration point: validated writes, each a signed act of an operator.
//!
//! Nothing is written before its signature, its roles and its meaning were checked; what is refused is recorded too. Must not
//! know protobuf (`api` converts) and must not reach a serving request: what it writes comes back through `store` and `sync`.
//! Look next at [`authorize`](Admin::authorize), then at `pap/apply.rs`.

mod adopt;
mod apply;
mod approve;
mod authorize;
mod diff;
mod fleet;
mod history;
mod keys;
mod operators;
mod recognize;
mod revoke;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

pub use adopt::{Adopted, Adopting, AdoptionWaited, WAIT_MS_MAX};
pub use apply::ApplyOutcome;
pub use approve::{Answer, Answered};
pub use authorize::{Authorized, Method};
pub use diff::{DiffOutcome, PAIRS_LISTED_MAX};
pub use fleet::Waited;
pub use history::{HISTORY_LISTED_DEFAULT, PolicyRevision};
pub use operators::{ListedOperator, NewOperator, OperatorChanged, OperatorState};
pub use recognize::{DocumentNames, Recognition, Sightings, Standing};
pub use revoke::{Reinstated, RevokeRequest};

use crate::audit::{Act, ActOutcome, Recorder};
use crate::model::records::{ActRow, DocumentKey, DocumentRow, Origin, Write};
use crate::model::revision::Revision;
use crate::model::time::Clock;
pub use crate::policy::diagnostic::Diagnostic as DiagnosticText;
use crate::policy::diagnostic::Diagnostic;
pub use crate::policy::diff::{DocumentChange, PairChange};
pub use crate::policy::document::OperatorSpec;
pub use crate::policy::source::SourceFile as PolicyFile;
use crate::store::{self, CommitRequest, Committed, Store, StoredDocument};
pub use crate::store::{CommittedBy, Revocations};

/// Why an act was not done. One line each; nothing was written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The signature is missing, malformed, altered, stale, replayed or nobody's.
    #[error("{0}")]
    Unauthenticated(String),
    /// The key that signed is revoked: it signs nothing any more.
    #[error("{0}")]
    KeyRevoked(String),
    /// The operator lacks the role, or a second operator is needed.
    #[error("{0}")]
    PermissionDenied(String),
    /// What was asked for has no meaning.
    #[error("{field}: {message}")]
    Invalid {
        /// The request's field.
        field: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// The policy has errors; nothing of it was applied.
    #[error("the policy has {} error(s): nothing was applied", .0.iter().filter(|d| d.is_error()).count())]
    Policy(Vec<Diagnostic>),
    /// Tests of the policy fail; nothing of it was applied.
    #[error("{} of {} test(s) of the policy fail: nothing was applied", .failures.len(), .failures.len() + .passed)]
    Tests {
        /// What failed, some lines each.
        failures: Vec<String>,
        /// How many expected calls came to what was wanted.
        passed: usize,
    },
    /// There is no such document.
    #[error("there is no document `{kind} {id}`")]
    NotFound {
        /// The kind asked for.
        kind: String,
        /// The id asked for.
        id: String,
    },
    /// What was asked for cannot be said; nothing follows from that for what was written before.
    #[error("{0}")]
    NotSaid(String),
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// What was asked for changes nothing, and is not told because that could not be recorded.
    #[error(
        "the audit log cannot be written, so nothing was done or told: make room on the disk of the data folder, then repeat"
    )]
    AuditUnavailable,
    /// The act ended as `cause` says, and that is not in the audit log.
    #[error("{cause}{}", Error::UNRECORDED)]
    Unrecorded {
        /// How the act ended.
        cause: Box<Error>,
    },
}

/// What kind of fault a store's error is, for whoever maps it to a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// Somebody else was first: read again and repeat.
    Conflict,
    /// What was asked makes no sense for what is stored.
    Rejected,
    /// The store cannot be reached or is not what it was; nothing was written.
    Unavailable,
    /// It may or may not have been written.
    Unknown,
}

impl Error {
    /// What is added to the message of an act whose end is not in the audit log.
    pub const UNRECORDED: &str =
        "; this answer is not in the audit log, which cannot be written: make room on the disk of the data folder";

    /// What kind of refusal it is, as on the wire.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Unauthenticated(_) => "UNAUTHENTICATED",
            Error::KeyRevoked(_) => "REVOKED_KEY",
            Error::PermissionDenied(_) => "PERMISSION_DENIED",
            Error::Invalid { .. } => "INVALID_ARGUMENT",
            Error::Policy(_) => "POLICY_INVALID",
            Error::Tests { .. } => "POLICY_TESTS_FAILED",
            Error::NotFound { .. } => "NOT_FOUND",
            Error::NotSaid(_) => "NOT_SAID",
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

    /// The kind of a store's fault; `Unavailable` for what is no store's.
    pub fn store_fault(&self) -> StoreFault {
        match self {
            Error::Unrecorded { cause } => cause.store_fault(),
            Error::Store(
                store::Error::Conflict { .. } | store::Error::DocumentsChanged { .. } | store::Error::ActReplayed { .. },
            ) => StoreFault::Conflict,
            Error::Store(store::Error::Rejected(_) | store::Error::NobodyLeft) => StoreFault::Rejected,
            Error::Store(store::Error::Unknown(_)) => StoreFault::Unknown,
            _ => StoreFault::Unavailable,
        }
    }
}

/// What an act is told that would lock everybody out.
const NOBODY_LEFT: &str = "nobody with the role `administer` would be left whose key is not revoked, so nothing could be administered any \
                           more: add another administrator first (`portcullis operator add`), or have one of them do it";

/// The door to every administrative act.
pub struct Admin {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    recorder: Arc<Recorder>,
    spent: Mutex<authorize::SpentSignatures>,
    applying: tokio::sync::Mutex<()>,
    waits: tokio::sync::Semaphore,
    silences: Mutex<fleet::Silences>,
    sources: recognize::Sources,
}

impl Admin {
    /// An administration point over a store; acts are recorded by `recorder`.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, recorder: Arc<Recorder>) -> Self {
        let waits = tokio::sync::Semaphore::new(fleet::WAITS_MAX);
        Self {
            store,
            clock,
            recorder,
            spent: Mutex::default(),
            applying: tokio::sync::Mutex::default(),
            waits,
            silences: Mutex::default(),
            sources: recognize::Sources::default(),
        }
    }

    /// The recorder of acts. It needs no barrier before sockets: an act is in the kernel before it is answered, or the answer says
    /// that it is not.
    pub fn recorder(&self) -> Arc<Recorder> {
        self.recorder.clone()
    }

    /// History and newest revision, for whoever is about to sign.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn revision(&self) -> Result<Revision, Error> {
        Ok(self.store.revision().await?)
    }

    /// One stored document.
    ///
    /// # Errors
    /// [`Error::NotFound`], or if the store cannot be read.
    pub async fn document(&self, by: &Authorized, kind: &str, id: &str) -> Result<DocumentRow, Error> {
        let documents = self.store.documents(Some(kind)).await?.documents;
        self.record(by, None, "read")?;
        documents
            .into_iter()
            .map(|document| document.row)
            .find(|row| row.key.id == id)
            .ok_or_else(|| Error::NotFound { kind: kind.to_owned(), id: id.to_owned() })
    }

    /// Where documents stand, as far as there are any: path and line.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn places(
        &self,
        by: &Authorized,
        keys: BTreeSet<DocumentKey>,
    ) -> Result<BTreeMap<DocumentKey, (String, u32)>, Error> {
        self.record(by, None, "explain a call")?;
        let kinds: BTreeSet<&str> = keys.iter().map(|key| key.kind.as_str()).collect();
        let mut places = BTreeMap::new();
        for kind in kinds {
            let rows = self.store.documents(Some(kind)).await?.documents.into_iter().map(|document| document.row);
            places.extend(rows.filter(|row| keys.contains(&row.key)).map(|row| (row.key, (row.path, row.line))));
        }
        Ok(places)
    }

    /// Records a read that is answered elsewhere.
    ///
    /// # Errors
    /// [`Error::AuditUnavailable`].
    pub fn record_read(&self, by: &Authorized, account: &str) -> Result<(), Error> {
        self.record(by, None, account)
    }

    /// The names of the stored documents, of one kind or all.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn documents(&self, by: &Authorized, kind: Option<&str>) -> Result<Vec<DocumentKey>, Error> {
        let documents = self.store.documents(kind).await?.documents;
        self.record(by, None, "read")?;
        Ok(documents.into_iter().map(|document| document.row.key).collect())
    }

    /// The newest revocations, at most `limit`, when and by whom each was last changed, and how many there are in all.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn revocations(&self, by: &Authorized, limit: usize) -> Result<Revocations, Error> {
        let listed = self.store.revocations(limit).await?;
        self.record(by, None, "read")?;
        Ok(listed)
    }

    /// Commits an act. INVARIANT: what the store did is what is answered, whatever becomes of the line in the audit log: the store
    /// keeps the signed act itself.
    async fn commit(
        &self,
        by: &Authorized,
        writes: Vec<Write>,
        documents_unchanged_since: Option<u64>,
        reason: &str,
    ) -> Result<Committed, Error> {
        self.commit_leaving(by, Vec::new(), writes, documents_unchanged_since, reason).await
    }

    /// As [`Admin::commit`], where of some keys one must not be revoked afterwards.
    async fn commit_leaving(
        &self,
        by: &Authorized,
        one_must_sign: Vec<String>,
        writes: Vec<Write>,
        documents_unchanged_since: Option<u64>,
        reason: &str,
    ) -> Result<Committed, Error> {
        let act = ActRow {
            operators: by.operators().to_vec(),
            keys: by.keys().iter().map(ToString::to_string).collect(),
            method: by.method().to_owned(),
            signatures: by.signatures().to_vec(),
            jtis: by.jtis().to_vec(),
            reason: reason.to_owned(),
        };
        let request = CommitRequest { writes, documents_unchanged_since, one_must_sign, act: Some(act), ..Default::default() };
        match self.store.commit(request).await {
            Ok(committed) => {
                // By whom, where it was done; every replica logs what it brings about. The operators' words are not logged.
                tracing::info!(revision = %committed.revision, by = ?by.operators(), method = by.method(), "an act was done");
                if self.record(by, Some(&committed.revision), reason).is_err() {
                    by.mark_unrecorded();
                    tracing::error!(revision = %committed.revision, "an act was done and is not in the audit log yet");
                }
                Ok(committed)
            }
            Err(store::Error::ActReplayed { jti }) => {
                let error = Error::Unauthenticated(format!("the signed act `{jti}` was used before: sign a new one"));
                self.record_refused(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
            // A replica that has not heard of the revocation let it pass; the store does not.
            Err(store::Error::SignerRevoked { thumbprint }) => {
                let error = authorize::key_revoked(by.operator_of(&thumbprint), &thumbprint);
                self.record_refused(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
            Err(error) => {
                let error = match error {
                    store::Error::NobodyLeft => Error::PermissionDenied(NOBODY_LEFT.to_owned()),
                    error => Error::Store(error),
                };
                self.record_refused(by.method(), by.operators(), by.peer(), &error)?;
                Err(error)
            }
        }
    }

    /// Records that somebody waits for what an act brings about. It is a part of the act, and told like it where it is not recorded.
    fn record_wait(&self, by: &Authorized, revision: &Revision, account: &str) {
        if self.record(by, Some(revision), account).is_err() {
            by.mark_unrecorded();
        }
    }

    fn record(&self, by: &Authorized, revision: Option<&Revision>, reason: &str) -> Result<(), Error> {
        let revision = revision.map(ToString::to_string);
        let act = Act {
            time_unix_ns: self.clock.now().unix_ns,
            method: by.method(),
            operators: by.operators(),
            signatures: by.signatures(),
            outcome: ActOutcome::Accepted,
            code: "OK",
            reason,
            revision: revision.as_deref(),
            peer: by.peer(),
        };
        self.recorder.record_act(&act).map_err(|_| Error::AuditUnavailable)
    }

    /// Records an act that was refused, or of which nobody knows whether it was done.
    ///
    /// # Errors
    /// [`Error::Unrecorded`] with the error that was to be recorded.
    pub(crate) fn record_refused(&self, method: &str, operators: &[String], peer: &str, error: &Error) -> Result<(), Error> {
        let reason = error.to_string();
        let is_unknown = matches!(error, Error::Store(_)) && error.store_fault() == StoreFault::Unknown;
        let act = Act {
            time_unix_ns: self.clock.now().unix_ns,
            // A method that there is not is what its caller wrote; the reason names it.
            method: authorize::METHODS.iter().find(|known| known.path == method).map_or("unknown", |known| known.path),
            operators,
            signatures: &[],
            outcome: if is_unknown { ActOutcome::Unknown } else { ActOutcome::Refused },
            code: error.code(),
            reason: &reason,
            revision: None,
            peer,
        };
        self.recorder.record_act(&act).map_err(|_| Error::Unrecorded { cause: Box::new(error.clone()) })
    }
}

/// Makes the first operator of an empty store, with every role; `None` if the store is not empty.
///
/// # Errors
/// If the store cannot be read or written.
pub async fn make_first_operator(
    store: &dyn Store,
    id: &str,
    key: &crate::model::jwk::PublicKey,
) -> Result<Option<Committed>, Error> {
    let revision = store.revision().await?;
    if revision.number > 0 {
        return Ok(None);
    }
    let json = format!(
        r#"{{"id":"{id}","keys":[{}],"kind":"operator","roles":["respond","administer","approve","audit"]}}"#,
        key.to_jwk()
    );
    let document = DocumentKey { kind: "operator".to_owned(), id: id.to_owned() };
    let row = DocumentRow { key: document.clone(), json, path: String::new(), line: 0, origin: Origin::Api };
    let request = CommitRequest { writes: vec![Write::PutDocument(row)], expected: vec![(document, None)], ..Default::default() };
    match store.commit(request).await {
        Ok(committed) => Ok(Some(committed)),
        // Another process was first: its operator stands.
        Err(store::Error::Conflict { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn keyed(documents: Vec<StoredDocument>) -> BTreeMap<DocumentKey, StoredDocument> {
    documents.into_iter().map(|document| (document.row.key.clone(), document)).collect()
}
