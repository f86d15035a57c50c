//! Operators outside the policy folder: a command adds and retires them, and lists them with the state of their keys.
//!
//! Their documents have the origin `Api`, so `apply` leaves them alone. A change needs the same signatures as a folder that
//! changes operators: two once two operators administer. Look next at `apply.rs`.

use super::apply::{ChangePlan, check_administrator_left, needs_two_operators, run_blocking};
use super::revoke::check_reason;
use super::{AdministrationPoint, AuthorizedAct, Error, index_by_key};
use crate::model::constraint::abbreviate;
use crate::model::ids::UserId;
use crate::model::json::parse_object;
use crate::model::jwk::PublicKey;
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationTarget, RowChange, StoreWrite};
use crate::policy::diagnostic::nearest_name;
use crate::policy::diff::DocumentChange;
use crate::policy::document::{Document, OperatorRole, OperatorSpec};
use crate::policy::{CompiledPolicy, DocumentBody};
use crate::store::write_rules::HISTORY_LISTED_MAX;
use crate::store::{StoredDocument, signers};

/// The kind of an operator's document.
const OPERATOR_KIND: &str = "operator";

/// The request for a new operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewOperator {
    /// The id.
    pub id: String,
    /// The public keys, each as JWK.
    pub keys: Vec<Vec<u8>>,
    /// The names of the roles.
    pub roles: Vec<String>,
    /// The operator groups.
    pub groups: Vec<String>,
    /// The users that are the same person as the operator: issuer and subject.
    pub users: Vec<(String, String)>,
}

/// Who signed the act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SignedBy {
    /// Administrators signed.
    Administrators,
    /// Nobody signed.
    Nobody,
}

impl NewOperator {
    /// Parses the keys and roles of the request.
    fn spec(&self) -> Result<OperatorSpec, Error> {
        let invalid = |field, message: String| Err(Error::InvalidArgument { field, message });
        let mut keys = Vec::new();
        for jwk in &self.keys {
            let key = parse_object(jwk).map_err(|error| error.to_string());
            match key.and_then(|jwk| PublicKey::from_jwk(&jwk).map_err(|error| error.to_string())) {
                Ok(key) => keys.push(key),
                Err(error) => return invalid("keys", error),
            }
        }
        let mut roles = Vec::new();
        for name in &self.roles {
            match OperatorRole::ALL.iter().find(|role| role.as_str() == name) {
                Some(role) => roles.push(*role),
                None => return invalid("roles", format!("`{}` is no role: {}", abbreviate(name), role_names())),
            }
        }
        Ok(OperatorSpec {
            id: self.id.as_str().into(),
            keys,
            roles,
            groups: self.groups.iter().map(|group| group.as_str().into()).collect(),
            users: self.users.iter().map(|(issuer, subject)| UserId::new(issuer.as_str(), subject.as_str())).collect(),
        })
    }
}

fn role_names() -> String {
    OperatorRole::ALL.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ")
}

/// The result of adding or retiring an operator.
#[derive(Clone, Debug)]
pub struct OperatorChangeOutcome {
    /// The revision of the act, durable.
    pub revision: Revision,
    /// The time of the commit, by the store's clock.
    pub unix_ms: i64,
    /// The operator after it was added, or before it was retired.
    pub operator: OperatorSpec,
    /// Whether the act is in the audit log too. The store keeps it in any case.
    pub is_recorded: bool,
}

/// The state of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorState {
    /// At least one of the operator's keys is valid.
    Active,
    /// All keys of the operator are revoked.
    Revoked,
    /// The operator's document was removed.
    Retired,
}

impl OperatorState {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            OperatorState::Active => "active",
            OperatorState::Revoked => "revoked",
            OperatorState::Retired => "retired",
        }
    }
}

/// A present or retired operator.
#[derive(Clone, Debug)]
pub struct ListedOperator {
    /// The content of the operator's document; for a retired operator, of its last version.
    pub operator: OperatorSpec,
    /// The state.
    pub state: OperatorState,
    /// For each key the reason of its revocation; `None` if the key is not revoked.
    pub revoked: Vec<Option<String>>,
    /// The file and line in the policy folder. `None` if a command or the program itself created the operator.
    pub location: Option<(String, u32)>,
    /// The revision that wrote the document or, for a retired operator, removed it.
    pub revision: Revision,
}

impl AdministrationPoint {
    /// Adds an operator. The act is durable when this returns.
    ///
    /// # Errors
    /// - [`Error::InvalidArgument`] if the operator exists already.
    /// - [`Rejected`](crate::store::Error::Rejected) for a document that names something unknown, or a dead key.
    /// - [`Error::PermissionDenied`] if a second operator must sign.
    /// - Any error of the store.
    pub async fn add_operator(
        &self,
        by: &AuthorizedAct,
        new: &NewOperator,
        reason: &str,
    ) -> Result<OperatorChangeOutcome, Error> {
        self.commit_new_operator(by, SignedBy::Administrators, new, reason).await
    }

    /// Adds an operator without any signature, for a caller with write access to the store itself when no key is left that can
    /// sign. `who` goes into the records.
    ///
    /// # Errors
    /// As for [`AdministrationPoint::add_operator`], except for signatures.
    pub async fn break_glass(&self, who: String, new: &NewOperator, reason: &str) -> Result<OperatorChangeOutcome, Error> {
        self.commit_new_operator(&AuthorizedAct::break_glass(who), SignedBy::Nobody, new, reason).await
    }

    /// The hint for an administrator after a break-glass act: whether further operators must be added in the same way. Empty if
    /// operators can sign every act again.
    pub async fn break_glass_hint(&self) -> String {
        self.administrator_shortage_hint().await
    }

    /// Checks and commits a new operator. Signatures of administrators are required only with [`SignedBy::Administrators`].
    async fn commit_new_operator(
        &self,
        by: &AuthorizedAct,
        signed_by: SignedBy,
        new: &NewOperator,
        reason: &str,
    ) -> Result<OperatorChangeOutcome, Error> {
        let _one = self.apply_lock.lock().await;
        let stored = self.store.documents(None).await?;
        let since = stored.revision.number;
        let two_needed = needs_two_operators(stored.documents.iter());
        let operator = self.or_record_refusal(by, new.spec())?;
        let document = self.or_record_refusal(by, new_operator_document(&operator, &stored.documents, reason))?;
        let plan = self.or_record_refusal(by, plan_addition(&document, stored.documents).await.map_err(rejected))?;
        let alive = self.check_no_dead_keys(&plan.newly_listed_keys(std::slice::from_ref(&document))).await;
        self.or_record_refusal(by, alive.map_err(rejected))?;
        let description = match signed_by {
            SignedBy::Administrators => {
                let signed = self.check_two_signed(by, two_needed, &plan).await;
                self.or_record_refusal(by, signed)?;
                format!("add operator {}: {reason}", operator.id)
            }
            SignedBy::Nobody => format!("break glass, signed by nobody, {}: add operator {}: {reason}", by.peer(), operator.id),
        };
        let committed = self.commit(by, plan.writes, Some(since), &description).await?;
        let is_recorded = !by.is_unrecorded();
        Ok(OperatorChangeOutcome { revision: committed.revision, unix_ms: committed.unix_ms, operator, is_recorded })
    }

    /// Retires an operator that a command or the program itself created. Its keys become dead for good.
    ///
    /// # Errors
    /// - [`Error::NotFound`] if there is no such operator.
    /// - [`Error::InvalidArgument`] for an operator of the policy folder, or if no administrator would remain.
    /// - [`Error::PermissionDenied`] if a second operator must sign, or if no administrator with a valid key would remain.
    /// - Any error of the store.
    pub async fn retire_operator(&self, by: &AuthorizedAct, id: &str, reason: &str) -> Result<OperatorChangeOutcome, Error> {
        let _one = self.apply_lock.lock().await;
        let stored = self.store.documents(Some(OPERATOR_KIND)).await?;
        let since = stored.revision.number;
        let two_needed = needs_two_operators(stored.documents.iter());
        let checked = plan_retirement(id, stored.documents, reason);
        let (operator, plan) = self.or_record_refusal(by, checked)?;
        let signed = self.check_two_signed(by, two_needed, &plan).await;
        self.or_record_refusal(by, signed)?;
        let description = format!("retire operator {id}: {reason}");
        let committed = self.commit_retaining_signer(by, plan.keep_one_unrevoked, plan.writes, Some(since), &description).await?;
        let is_recorded = !by.is_unrecorded();
        Ok(OperatorChangeOutcome { revision: committed.revision, unix_ms: committed.unix_ms, operator, is_recorded })
    }

    /// Lists the operators by id, then the retired ones. Retired operators are listed as far back as the history of policy
    /// reaches.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn list_operators(&self, by: &AuthorizedAct) -> Result<Vec<ListedOperator>, Error> {
        let stored = self.store.documents(Some(OPERATOR_KIND)).await?;
        let history = self.store.policy_history(HISTORY_LISTED_MAX).await?;
        let present: Vec<(OperatorSpec, StoredDocument)> = stored
            .documents
            .into_iter()
            .filter_map(|stored| read_operator(&stored.row).map(|operator| (operator, stored)))
            .collect();
        // For each absent operator: the newest revision that removed its document, and the last content before that.
        let mut gone: Vec<(DocumentKey, u64, Option<OperatorSpec>)> = Vec::new();
        for commit in &history {
            for change in commit.changes.iter().rev() {
                match change {
                    RowChange::DocumentRemoved(key) if key.kind == OPERATOR_KIND => {
                        let known = present.iter().any(|(operator, _)| operator.id.as_str() == key.id);
                        if !known && !gone.iter().any(|(removed, ..)| removed == key) {
                            gone.push((key.clone(), commit.number, None));
                        }
                    }
                    RowChange::Document(row) if row.key.kind == OPERATOR_KIND => {
                        if let Some((.., last_content @ None)) = gone.iter_mut().find(|(removed, ..)| *removed == row.key) {
                            *last_content = read_operator(row);
                        }
                    }
                    _ => {}
                }
            }
        }
        gone.sort_by(|one, other| one.0.cmp(&other.0));
        let revision = |number: u64| Revision { number, ..stored.revision.clone() };
        let mut listed = Vec::new();
        for (operator, stored) in present {
            let revoked = self.revoked_keys(&operator).await?;
            let state = if revoked.iter().all(Option::is_some) { OperatorState::Revoked } else { OperatorState::Active };
            let location = (stored.row.origin == DocumentOrigin::Folder).then(|| (stored.row.path.clone(), stored.row.line));
            listed.push(ListedOperator { operator, state, revoked, location, revision: revision(stored.revision) });
        }
        for (key, number, last_content) in gone {
            let nothing = OperatorSpec { id: key.id.as_str().into(), keys: vec![], roles: vec![], groups: vec![], users: vec![] };
            let operator = last_content.unwrap_or(nothing);
            let revoked = self.revoked_keys(&operator).await?;
            let (state, revision) = (OperatorState::Retired, revision(number));
            listed.push(ListedOperator { operator, state, revoked, location: None, revision });
        }
        self.record_act(by, None, "read")?;
        Ok(listed)
    }

    async fn revoked_keys(&self, operator: &OperatorSpec) -> Result<Vec<Option<String>>, Error> {
        let targets: Vec<RevocationTarget> =
            operator.keys.iter().map(|key| signers::key_target(key.thumbprint().as_str())).collect();
        let rows = self.store.revocations_of(&targets).await?;
        let why =
            |target: &RevocationTarget| rows.iter().find(|row| row.target == *target && row.dead).map(|row| row.reason.clone());
        Ok(targets.iter().map(why).collect())
    }
}

/// The refusal of one operator, in place of the refusal of a whole policy: warnings about other documents are left out.
fn rejected(error: Error) -> Error {
    match error {
        Error::InvalidPolicy(diagnostics) => {
            let errors: Vec<String> =
                diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).map(ToString::to_string).collect();
            Error::Store(crate::store::Error::Rejected(format!("the operator cannot be added: {}", errors.join("; "))))
        }
        other => other,
    }
}

/// The document of a new operator. It is read back like a stored one, so that the same limits apply.
fn new_operator_document(operator: &OperatorSpec, stored: &[StoredDocument], reason: &str) -> Result<Document, Error> {
    check_reason(reason)?;
    let invalid = |field, message: String| Error::InvalidArgument { field, message };
    let document = Document::new(DocumentBody::Operator(operator.clone()), operator.id.as_str());
    let row = document.to_row(DocumentOrigin::Api);
    if let Some(before) = stored.iter().find(|stored| stored.row.key == row.key) {
        let location = location_text(&before.row);
        return Err(invalid("id", format!("there is an operator `{}` already{location}: choose another name", operator.id)));
    }
    if operator.roles.is_empty() {
        return Err(invalid("roles", format!("an operator without a role may nothing: name one of {}", role_names())));
    }
    Document::from_row(&row).map_err(|error| invalid("operator", error.to_string()))
}

/// Plans the addition of a document. All documents together must still compile.
async fn plan_addition(document: &Document, stored: Vec<StoredDocument>) -> Result<ChangePlan, Error> {
    let row = document.to_row(DocumentOrigin::Api);
    let plan = ChangePlan {
        changes: vec![DocumentChange { change: "added", key: row.key.clone() }],
        writes: vec![StoreWrite::PutDocument(row.clone())],
        ..ChangePlan::default()
    };
    let whole = move || {
        let mut rows = index_by_key(stored);
        rows.insert(row.key.clone(), StoredDocument { row, revision: 0 });
        let documents: Vec<Document> = rows.values().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
        CompiledPolicy::compile(&documents).map(drop).map_err(Error::InvalidPolicy)
    };
    run_blocking(whole).await??;
    Ok(plan)
}

/// Plans a retirement: the document is removed and its keys become dead.
fn plan_retirement(id: &str, stored: Vec<StoredDocument>, reason: &str) -> Result<(OperatorSpec, ChangePlan), Error> {
    check_reason(reason)?;
    let mut rows = index_by_key(stored);
    let key = DocumentKey { kind: OPERATOR_KIND.to_owned(), id: id.to_owned() };
    let Some(gone) = rows.remove(&key) else {
        let near = nearest_name(id, rows.keys().map(|key| key.id.as_str()));
        let hint = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
        return Err(Error::NotFound { kind: OPERATOR_KIND.to_owned(), id: id.to_owned(), hint });
    };
    if gone.row.origin == DocumentOrigin::Folder {
        let message = format!(
            "operator `{id}` stands in the policy folder{}: take it out there and apply the folder; `portcullis revoke key` ends its keys \
             at once",
            location_text(&gone.row)
        );
        return Err(Error::InvalidArgument { field: "id", message });
    }
    let after: Vec<Document> = rows.values().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
    check_administrator_left(&after)?;
    let operator = read_operator(&gone.row);
    let mut plan = ChangePlan {
        changes: vec![DocumentChange { change: "removed", key: key.clone() }],
        writes: vec![StoreWrite::RemoveDocument(key)],
        replaced: vec![gone.row],
        ..ChangePlan::default()
    };
    plan.add_consequences(&after);
    let nothing = OperatorSpec { id: id.into(), keys: vec![], roles: vec![], groups: vec![], users: vec![] };
    Ok((operator.unwrap_or(nothing), plan))
}

fn read_operator(row: &DocumentRow) -> Option<OperatorSpec> {
    match Document::from_row(row).ok()?.body {
        DocumentBody::Operator(operator) => Some(operator),
        _ => None,
    }
}

fn location_text(row: &DocumentRow) -> String {
    if row.path.is_empty() { String::new() } else { format!(" ({}:{})", row.path, row.line) }
}
