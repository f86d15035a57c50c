//! Operators beside the policy folder: added and retired by a command, listed with the state of their keys.
//!
//! They are documents like those of a folder, of the program's own origin, so that `apply` leaves them alone. What changes them is what a
//! folder that changes operators needs: two people once two administer. Look next at `apply.rs`.

use super::apply::{Plan, aside, needs_two, still_administered, two_signed};
use super::revoke::check_reason;
use super::{Admin, Authorized, Error, keyed};
use crate::model::constraint::abridged;
use crate::model::ids::UserId;
use crate::model::json::parse_object;
use crate::model::jwk::PublicKey;
use crate::model::records::{Change, DocumentKey, DocumentRow, Origin, Target, Write};
use crate::model::revision::Revision;
use crate::policy::diff::DocumentChange;
use crate::policy::document::{Document, OperatorSpec, Role};
use crate::policy::{Body, Compiled};
use crate::store::rules::HISTORY_LISTED_MAX;
use crate::store::{StoredDocument, signers};

/// The kind of an operator's document.
const KIND: &str = "operator";

/// An operator as they are asked to be added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewOperator {
    /// Their name.
    pub id: String,
    /// Public JWKs.
    pub keys: Vec<Vec<u8>>,
    /// Names of roles.
    pub roles: Vec<String>,
    /// Groups of operators.
    pub groups: Vec<String>,
    /// Issuer and subject of the users that they are.
    pub users: Vec<(String, String)>,
}

/// Whether those who administer signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SignedBy {
    /// They did.
    Operators,
    /// Nobody did.
    Nobody,
}

impl NewOperator {
    fn spec(&self) -> Result<OperatorSpec, Error> {
        let invalid = |field, message: String| Err(Error::Invalid { field, message });
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
            match Role::ALL.iter().find(|role| role.as_str() == name) {
                Some(role) => roles.push(*role),
                None => return invalid("roles", format!("`{}` is no role: {}", abridged(name), role_names())),
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
    Role::ALL.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ")
}

/// What adding or retiring did.
#[derive(Clone, Debug)]
pub struct OperatorChanged {
    /// The revision of the act, durable.
    pub revision: Revision,
    /// By the store's clock.
    pub unix_ms: i64,
    /// The operator as it is, or was.
    pub operator: OperatorSpec,
    /// Whether it is in the audit log too; the store keeps it in any case.
    pub is_recorded: bool,
}

/// Where an operator stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorState {
    /// Some key of theirs signs.
    Active,
    /// Each of their keys is revoked.
    Revoked,
    /// They are an operator no more.
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

/// An operator, or one who was.
#[derive(Clone, Debug)]
pub struct ListedOperator {
    /// As the document says, or said last.
    pub operator: OperatorSpec,
    /// Where they stand.
    pub state: OperatorState,
    /// For each key: why it is revoked, if it is.
    pub revoked: Vec<Option<String>>,
    /// The file and line in the policy folder; `None` for one that was added by a command or made by the program.
    pub place: Option<(String, u32)>,
    /// The revision that put or, for one who retired, removed the document.
    pub revision: Revision,
}

impl Admin {
    /// Adds an operator; durable when this returns.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one who is there already, [`Error::Policy`] for what no operator's document may say or for a key that is
    /// dead, [`Error::PermissionDenied`] where a second operator must sign, or as the store fails.
    pub async fn add_operator(&self, by: &Authorized, new: &NewOperator, reason: &str) -> Result<OperatorChanged, Error> {
        self.add(by, SignedBy::Operators, new, reason).await
    }

    /// Adds an operator whom nobody who administers signed for: for whoever can write the store itself, where no key is left that could.
    /// `who` goes into the records.
    ///
    /// # Errors
    /// As [`Admin::add_operator`], but for signatures.
    pub async fn break_glass(&self, who: String, new: &NewOperator, reason: &str) -> Result<OperatorChanged, Error> {
        self.add(&Authorized::break_glass(who), SignedBy::Nobody, new, reason).await
    }

    async fn add(&self, by: &Authorized, signed_by: SignedBy, new: &NewOperator, reason: &str) -> Result<OperatorChanged, Error> {
        let _one = self.applying.lock().await;
        let stored = self.store.documents(None).await?;
        let since = stored.revision.number;
        let two_needed = needs_two(stored.documents.iter());
        let operator = self.or_record_refused(by, new.spec())?;
        let document = self.or_record_refused(by, new_document(&operator, &stored.documents, reason))?;
        let plan = self.or_record_refused(by, added(&document, stored.documents).await)?;
        let alive = self.no_dead_keys(&plan.newly_listed(std::slice::from_ref(&document))).await;
        self.or_record_refused(by, alive)?;
        let account = match signed_by {
            SignedBy::Operators => {
                self.or_record_refused(by, two_signed(by, two_needed, &plan))?;
                format!("add operator {}: {reason}", operator.id)
            }
            SignedBy::Nobody => format!("break glass, signed by nobody, {}: add operator {}: {reason}", by.peer(), operator.id),
        };
        let committed = self.commit(by, plan.writes, Some(since), &account).await?;
        let is_recorded = !by.is_unrecorded();
        Ok(OperatorChanged { revision: committed.revision, unix_ms: committed.unix_ms, operator, is_recorded })
    }

    /// Retires an operator who was added by a command, or the first one: their keys are dead for good.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] for one of the policy folder, or where nobody would be left who administers;
    /// [`Error::PermissionDenied`] where a second operator must sign, or where nobody would be left whose key is not revoked; or as the
    /// store fails.
    pub async fn retire_operator(&self, by: &Authorized, id: &str, reason: &str) -> Result<OperatorChanged, Error> {
        let _one = self.applying.lock().await;
        let stored = self.store.documents(Some(KIND)).await?;
        let since = stored.revision.number;
        let two_needed = needs_two(stored.documents.iter());
        let checked = retired(id, stored.documents, reason);
        let (operator, plan) = self.or_record_refused(by, checked)?;
        self.or_record_refused(by, two_signed(by, two_needed, &plan))?;
        let account = format!("retire operator {id}: {reason}");
        let committed = self.commit_leaving(by, plan.one_must_sign, plan.writes, Some(since), &account).await?;
        let is_recorded = !by.is_unrecorded();
        Ok(OperatorChanged { revision: committed.revision, unix_ms: committed.unix_ms, operator, is_recorded })
    }

    /// Who may administer, respond, approve or audit, and who might: by id, those who retired last. Of these as many are told as the
    /// history of policy reaches back to.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn list_operators(&self, by: &Authorized) -> Result<Vec<ListedOperator>, Error> {
        let stored = self.store.documents(Some(KIND)).await?;
        let history = self.store.history(HISTORY_LISTED_MAX).await?;
        let present: Vec<(OperatorSpec, StoredDocument)> = stored
            .documents
            .into_iter()
            .filter_map(|stored| operator_in(&stored.row).map(|operator| (operator, stored)))
            .collect();
        // The newest word on each one who is not there: when they were removed, and what their document said before.
        let mut gone: Vec<(DocumentKey, u64, Option<OperatorSpec>)> = Vec::new();
        for commit in &history {
            for change in commit.changes.iter().rev() {
                match change {
                    Change::DocumentRemoved(key) if key.kind == KIND => {
                        let known = present.iter().any(|(operator, _)| operator.id.as_str() == key.id);
                        if !known && !gone.iter().any(|(removed, ..)| removed == key) {
                            gone.push((key.clone(), commit.number, None));
                        }
                    }
                    Change::Document(row) if row.key.kind == KIND => {
                        if let Some((.., said @ None)) = gone.iter_mut().find(|(removed, ..)| *removed == row.key) {
                            *said = operator_in(row);
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
            let place = (stored.row.origin == Origin::Folder).then(|| (stored.row.path.clone(), stored.row.line));
            listed.push(ListedOperator { operator, state, revoked, place, revision: revision(stored.revision) });
        }
        for (key, number, said) in gone {
            let nothing = OperatorSpec { id: key.id.as_str().into(), keys: vec![], roles: vec![], groups: vec![], users: vec![] };
            let operator = said.unwrap_or(nothing);
            let revoked = self.revoked_keys(&operator).await?;
            let (state, revision) = (OperatorState::Retired, revision(number));
            listed.push(ListedOperator { operator, state, revoked, place: None, revision });
        }
        self.record(by, None, "read")?;
        Ok(listed)
    }

    async fn revoked_keys(&self, operator: &OperatorSpec) -> Result<Vec<Option<String>>, Error> {
        let targets: Vec<Target> = operator.keys.iter().map(|key| signers::target(key.thumbprint().as_str())).collect();
        let rows = self.store.revocations_of(&targets).await?;
        let why = |target: &Target| rows.iter().find(|row| row.target == *target && row.dead).map(|row| row.reason.clone());
        Ok(targets.iter().map(why).collect())
    }
}

/// The document of an operator who is not there yet, read back as any stored one is, so that the same limits hold.
fn new_document(operator: &OperatorSpec, stored: &[StoredDocument], reason: &str) -> Result<Document, Error> {
    check_reason(reason)?;
    let invalid = |field, message: String| Error::Invalid { field, message };
    let document = Document::new(Body::Operator(operator.clone()), operator.id.as_str());
    let row = document.to_row(Origin::Api);
    if let Some(before) = stored.iter().find(|stored| stored.row.key == row.key) {
        let place = place(&before.row);
        return Err(invalid("id", format!("there is an operator `{}` already{place}: choose another name", operator.id)));
    }
    if operator.roles.is_empty() {
        return Err(invalid("roles", format!("an operator without a role may nothing: name one of {}", role_names())));
    }
    Document::from_row(&row).map_err(|error| invalid("operator", error.to_string()))
}

/// What adding a document writes, if all documents together are a policy.
async fn added(document: &Document, stored: Vec<StoredDocument>) -> Result<Plan, Error> {
    let row = document.to_row(Origin::Api);
    let plan = Plan {
        changes: vec![DocumentChange { change: "added", key: row.key.clone() }],
        writes: vec![Write::PutDocument(row.clone())],
        ..Plan::default()
    };
    let whole = move || {
        let mut rows = keyed(stored);
        rows.insert(row.key.clone(), StoredDocument { row, revision: 0 });
        let documents: Vec<Document> = rows.values().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
        Compiled::compile(&documents).map(drop).map_err(Error::Policy)
    };
    aside(whole).await??;
    Ok(plan)
}

/// What retiring writes: the document goes, and its keys are dead.
fn retired(id: &str, stored: Vec<StoredDocument>, reason: &str) -> Result<(OperatorSpec, Plan), Error> {
    check_reason(reason)?;
    let mut rows = keyed(stored);
    let key = DocumentKey { kind: KIND.to_owned(), id: id.to_owned() };
    let Some(gone) = rows.remove(&key) else { return Err(Error::NotFound { kind: KIND.to_owned(), id: id.to_owned() }) };
    if gone.row.origin == Origin::Folder {
        let message = format!(
            "operator `{id}` stands in the policy folder{}: take it out there and apply the folder; `portcullis revoke key` ends its keys \
             at once",
            place(&gone.row)
        );
        return Err(Error::Invalid { field: "id", message });
    }
    let after: Vec<Document> = rows.values().filter_map(|stored| Document::from_row(&stored.row).ok()).collect();
    still_administered(&after)?;
    let operator = operator_in(&gone.row);
    let mut plan = Plan {
        changes: vec![DocumentChange { change: "removed", key: key.clone() }],
        writes: vec![Write::RemoveDocument(key)],
        replaced: vec![gone.row],
        ..Plan::default()
    };
    plan.complete(&after);
    let nothing = OperatorSpec { id: id.into(), keys: vec![], roles: vec![], groups: vec![], users: vec![] };
    Ok((operator.unwrap_or(nothing), plan))
}

fn operator_in(row: &DocumentRow) -> Option<OperatorSpec> {
    match Document::from_row(row).ok()?.body {
        Body::Operator(operator) => Some(operator),
        _ => None,
    }
}

fn place(row: &DocumentRow) -> String {
    if row.path.is_empty() { String::new() } else { format!(" ({}:{})", row.path, row.line) }
}
