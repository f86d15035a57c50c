//! Looks up the name of a revoked target, so that a mistyped revocation does not look like one with an effect.
//!
//! A lookup runs after the revocation is durable. It can never undo, delay or refuse the revocation. It has a time limit, and it
//! reports the sources that it could not search. Documents contain agents, applications, tools, issuers and keys. Sessions,
//! tasks, tokens, hops and users are known from verified chains and from the audit records of this process. Look next at
//! `audit::search`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;

use super::AdministrationPoint;
use crate::audit::search::{self, SearchOutcome};
use crate::model::ids::UserId;
use crate::model::revision::Revision;
use crate::model::rows::RevocationTarget;
use crate::model::time::Clock;
use crate::policy::diagnostic::nearest_name;
use crate::policy::document::{Document, DocumentBody};
use crate::store::{self, Store};
use crate::token::VerifiedChain;

/// The time limit of a lookup.
const LOOK_UP_TIMEOUT: Duration = Duration::from_millis(1_500);
/// The time limit of the search in the audit records.
const RECORDS_MS_MAX: u64 = 700;
/// The maximum number of searched chains.
const CHAINS_MAX: usize = 200_000;
/// The maximum number of names that are compared for a suggestion.
const NAMES_MAX: usize = 20_000;

/// The result of a lookup. It never affects the revocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetLookup {
    /// Whether the name is known.
    pub status: NameStatus,
    /// A similar target, if the name is unknown.
    pub nearest: Option<RevocationTarget>,
    /// The findings, and the sources that were searched or not, as text.
    pub note: String,
}

/// Whether any source knows a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameStatus {
    /// A document, a chain or a record contains the name.
    Known,
    /// No searched source contains the name.
    Unknown,
    /// No source could be searched.
    NotChecked,
}

impl TargetLookup {
    fn known(note: impl Into<String>) -> Self {
        Self { status: NameStatus::Known, nearest: None, note: note.into() }
    }

    fn unknown(note: impl Into<String>, nearest: Option<RevocationTarget>) -> Self {
        Self { status: NameStatus::Unknown, nearest, note: note.into() }
    }

    fn not_checked(note: impl Into<String>) -> Self {
        Self { status: NameStatus::NotChecked, nearest: None, note: note.into() }
    }
}

/// The names that a running server knows besides its store; `app` provides it.
#[async_trait]
pub trait KnownNamesSource: Send + Sync {
    /// The names in the documents in force. With a revision, the call waits until that revision is applied here.
    ///
    /// # Errors
    /// One line with the reason why there are no such documents.
    async fn documents(&self, at_least: Option<&Revision>) -> Result<Arc<dyn DocumentNames>, String>;

    /// Visits the cached verified chains, at most `chains_max`. Returns `false` if there are more.
    fn chains(&self, chains_max: usize, visit: &mut dyn FnMut(&VerifiedChain)) -> bool;
}

/// The names that the documents in force define.
pub trait DocumentNames: Send + Sync {
    /// Whether a name exists. The kinds are `agent`, `application`, `tool` and `issuer`; the tools of servers count too.
    fn has_document(&self, kind: &str, id: &str) -> bool;

    /// The ids of a kind, at most `ids_max`.
    fn ids_of_kind(&self, kind: &str, ids_max: usize) -> Vec<String>;

    /// The document that lists a key, as kind and id.
    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)>;
}

/// The sources of a lookup besides the store.
#[derive(Default)]
pub(super) struct LookupSources {
    server: OnceLock<Arc<dyn KnownNamesSource>>,
    record_directory: OnceLock<PathBuf>,
}

impl AdministrationPoint {
    /// Sets the server that lookups ask. Without one, they read the documents of the store. Only the first call has an effect.
    pub fn set_names_source(&self, names_source: Arc<dyn KnownNamesSource>) {
        let _ = self.lookup_sources.server.set(names_source);
    }

    /// Sets the directory of audit records that lookups search. Only the first call has an effect.
    pub fn set_record_directory(&self, directory: &Path) {
        let _ = self.lookup_sources.record_directory.set(directory.to_owned());
    }

    /// Looks up the name of a target, as of a revision. It takes at most [`LOOK_UP_TIMEOUT`].
    pub async fn look_up_target(&self, target: &RevocationTarget, at: &Revision) -> TargetLookup {
        match tokio::time::timeout(LOOK_UP_TIMEOUT, self.look_up_untimed(target, at)).await {
            Ok(recognition) => recognition,
            Err(_) => TargetLookup::not_checked(format!("the look-up took more than {} ms", LOOK_UP_TIMEOUT.as_millis())),
        }
    }

    /// The target with the most similar document name; `None` if no name is similar.
    pub(super) async fn nearest_target(&self, target: &RevocationTarget) -> Option<RevocationTarget> {
        let looked = async {
            let documents = match self.lookup_sources.server.get() {
                Some(names_source) => names_source.documents(None).await.ok()?,
                None => Arc::new(StoredDocumentNames::read(&*self.store, target).await.ok()?),
            };
            match target {
                RevocationTarget::Agent(id) | RevocationTarget::Application(id) | RevocationTarget::Tool(id) => {
                    look_up_document(target.kind(), id, &*documents).nearest
                }
                _ => None,
            }
        };
        tokio::time::timeout(LOOK_UP_TIMEOUT, looked).await.ok().flatten()
    }

    /// Looks up a target without the time limit.
    async fn look_up_untimed(&self, target: &RevocationTarget, at: &Revision) -> TargetLookup {
        if *target == RevocationTarget::All {
            return TargetLookup::known("");
        }
        let documents = match self.document_names(target, at).await {
            Ok(documents) => documents,
            Err(why) => return TargetLookup::not_checked(why),
        };
        match target {
            RevocationTarget::Agent(id) | RevocationTarget::Application(id) | RevocationTarget::Tool(id) => {
                look_up_document(target.kind(), id, &*documents)
            }
            RevocationTarget::Key(thumbprint) => self.look_up_key(thumbprint, &*documents).await,
            RevocationTarget::User { issuer, subject } => self.look_up_user([issuer, subject], None, &*documents).await,
            RevocationTarget::Delegation { issuer, subject, agent } => {
                self.look_up_user([issuer, subject], Some(agent), &*documents).await
            }
            RevocationTarget::Session(id) => self.look_up_credential(CredentialKind::Session, id).await,
            RevocationTarget::Task(id) => self.look_up_credential(CredentialKind::Task, id).await,
            RevocationTarget::Token(id) => self.look_up_credential(CredentialKind::Token, id).await,
            RevocationTarget::Hop(id) => self.look_up_credential(CredentialKind::Hop, id).await,
            RevocationTarget::All => TargetLookup::known(""),
        }
    }

    /// The names in documents, from the server or the store. If the server does not know the name yet, waits until revision `at`
    /// is applied and returns its documents, because that revision may have added the name.
    async fn document_names(&self, target: &RevocationTarget, at: &Revision) -> Result<Arc<dyn DocumentNames>, String> {
        let Some(names_source) = self.lookup_sources.server.get() else {
            return Ok(Arc::new(StoredDocumentNames::read(&*self.store, target).await.map_err(|error| error.to_string())?));
        };
        let documents = names_source.documents(None).await?;
        // A name that is already known needs no wait. An unknown name may be in a document that was just committed.
        let is_known = match target {
            RevocationTarget::Agent(id) | RevocationTarget::Application(id) | RevocationTarget::Tool(id) => {
                documents.has_document(target.kind(), id)
            }
            RevocationTarget::Key(thumbprint) => documents.key_holder(thumbprint).is_some(),
            RevocationTarget::User { issuer, .. } => documents.has_document("issuer", issuer),
            RevocationTarget::Delegation { issuer, agent, .. } => {
                documents.has_document("issuer", issuer) && documents.has_document("agent", agent)
            }
            _ => true,
        };
        if is_known { Ok(documents) } else { names_source.documents(Some(at)).await }
    }

    /// Looks up a key in documents first, then in chains and records.
    async fn look_up_key(&self, thumbprint: &str, documents: &dyn DocumentNames) -> TargetLookup {
        if let Some((kind, id)) = documents.key_holder(thumbprint) {
            return TargetLookup::known(format!("it is a key of {kind} `{id}`"));
        }
        match operator_with_key(&*self.store, thumbprint).await {
            Ok(Some(operator)) => {
                let hint = self.administrator_shortage_hint().await;
                return TargetLookup::known(format!("it is a key of operator `{operator}`{hint}"));
            }
            Ok(None) => {}
            Err(error) => return TargetLookup::not_checked(error.to_string()),
        }
        let seen = self.look_up_credential(CredentialKind::Key, thumbprint).await;
        match seen.status {
            NameStatus::Known => seen,
            status => {
                let note = format!("no document of an agent, issuer or operator lists key `{thumbprint}`, and {}", seen.note);
                // An unused key appears in documents only, and those were searched. So it is unknown even if no chain could be
                // searched.
                let status = if status == NameStatus::NotChecked { NameStatus::Unknown } else { status };
                TargetLookup { status, note, ..seen }
            }
        }
    }

    /// Looks up a user, or a delegation from a user to an agent. The note names every unknown part.
    async fn look_up_user(
        &self,
        [issuer, subject]: [&str; 2],
        agent: Option<&str>,
        documents: &dyn DocumentNames,
    ) -> TargetLookup {
        let target = |issuer: &str, subject: &str, agent: Option<&str>| match agent {
            None => RevocationTarget::User { issuer: issuer.to_owned(), subject: subject.to_owned() },
            Some(agent) => {
                RevocationTarget::Delegation { issuer: issuer.to_owned(), subject: subject.to_owned(), agent: agent.to_owned() }
            }
        };
        if !documents.has_document("issuer", issuer) && documents.has_document("issuer", subject) {
            let note = format!("`{subject}` is an issuer and `{issuer}` is none: the issuer comes first, then the subject");
            return TargetLookup::unknown(note, Some(target(subject, issuer, agent)));
        }
        let user = UserId::new(issuer, subject).to_string();
        let seen = self.look_up_credential(CredentialKind::User, &user).await;
        let near_user = match &seen.nearest {
            Some(RevocationTarget::User { subject, .. }) => Some(subject.clone()),
            _ => None,
        };
        let (mut wrong, mut unsure) = (Vec::new(), Vec::new());
        let near_issuer = nearest_document(documents, "issuer", issuer);
        if !documents.has_document("issuer", issuer) && seen.status != NameStatus::Known {
            wrong.push(format!("no document names issuer `{issuer}`"));
        }
        match seen.status {
            NameStatus::Known => {}
            NameStatus::Unknown => wrong.push(seen.note),
            NameStatus::NotChecked => unsure.push(seen.note),
        }
        let mut near_agent = None;
        if let Some(agent) = agent.filter(|agent| !documents.has_document("agent", agent)) {
            wrong.push(format!("no document names agent `{agent}`"));
            near_agent = nearest_document(documents, "agent", agent);
        }
        if wrong.is_empty() {
            return match unsure.is_empty() {
                true => TargetLookup::known(""),
                false => TargetLookup::not_checked(unsure.join("; ")),
            };
        }
        let is_near = near_user.is_some() || near_agent.is_some() || near_issuer.is_some();
        let meant = is_near.then(|| {
            let issuer = near_issuer.as_deref().unwrap_or(issuer);
            let subject = near_user.as_deref().unwrap_or(subject);
            target(issuer, subject, agent.map(|agent| near_agent.as_deref().unwrap_or(agent)))
        });
        TargetLookup::unknown([wrong, unsure].concat().join("; "), meant)
    }

    /// Looks up a name in chains and records.
    async fn look_up_credential(&self, wanted: CredentialKind, name: &str) -> TargetLookup {
        let (names_source, records) =
            (self.lookup_sources.server.get().cloned(), self.lookup_sources.record_directory.get().cloned());
        let (clock, owned) = (self.clock.clone(), name.to_owned());
        let looked = tokio::task::spawn_blocking(move || {
            search_credentials(wanted, &owned, names_source.as_deref(), records.as_deref(), &*clock)
        });
        let Ok(seen) = looked.await else {
            return TargetLookup::not_checked("the look-up ended early");
        };
        match seen.found {
            Some(found) if found == wanted => return TargetLookup::known(""),
            Some(other) => {
                let note = format!("`{name}` is the name of a {}, and of no {} that was seen", other.noun(), wanted.noun());
                return TargetLookup::unknown(note, other.target(name));
            }
            None => {}
        }
        if !seen.searched_any {
            let note = "no chain and no record of a decision is at hand here, so nobody can say whether anything bears that name";
            return TargetLookup::not_checked(note);
        }
        TargetLookup::unknown(
            format!("no {} `{name}` was seen; looked at {}", wanted.noun(), seen.description),
            wanted.nearest_target(name, &seen.names),
        )
    }
}

/// The kinds of names in a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CredentialKind {
    Session,
    Task,
    Token,
    Hop,
    Key,
    User,
}

impl CredentialKind {
    const ALL: [CredentialKind; 6] = [
        CredentialKind::Session,
        CredentialKind::Task,
        CredentialKind::Token,
        CredentialKind::Hop,
        CredentialKind::Key,
        CredentialKind::User,
    ];

    fn noun(self) -> &'static str {
        match self {
            CredentialKind::Session => "session",
            CredentialKind::Task => "task",
            CredentialKind::Token => "token",
            CredentialKind::Hop => "hop",
            CredentialKind::Key => "key",
            CredentialKind::User => "user",
        }
    }

    /// The path of the name in an audit record.
    fn record_member(self) -> &'static str {
        match self {
            CredentialKind::Session => "principals.session.id",
            CredentialKind::Task => "principals.task.id",
            CredentialKind::Token => "chain.jti",
            CredentialKind::Hop => "chain.hop_hash",
            CredentialKind::Key => "chain.holder_thumbprint",
            CredentialKind::User => "principals.user.id",
        }
    }

    fn target(self, name: &str) -> Option<RevocationTarget> {
        let name = name.to_owned();
        Some(match self {
            CredentialKind::Session => RevocationTarget::Session(name),
            CredentialKind::Task => RevocationTarget::Task(name),
            CredentialKind::Token => RevocationTarget::Token(name),
            CredentialKind::Hop => RevocationTarget::Hop(name),
            CredentialKind::Key => RevocationTarget::Key(name),
            CredentialKind::User => {
                let (issuer, subject) = parse_user(&name)?;
                RevocationTarget::User { issuer, subject }
            }
        })
    }

    /// The target with the most similar name of this kind.
    fn nearest_target(self, name: &str, names: &BTreeSet<String>) -> Option<RevocationTarget> {
        if self != CredentialKind::User {
            return nearest_name(name, names.iter().map(String::as_str)).and_then(|near| self.target(near));
        }
        // Only the subjects of users are compared. In the full text, every short subject would be similar to every other one.
        let (issuer, subject) = parse_user(name)?;
        let users: Vec<(String, String)> = names.iter().filter_map(|user| parse_user(user)).collect();
        let subjects = || users.iter().map(|(_, subject)| subject.as_str());
        let of_issuer = users.iter().filter(|(own, _)| *own == issuer).map(|(_, subject)| subject.as_str());
        let near = nearest_name(&subject, of_issuer).or_else(|| nearest_name(&subject, subjects()))?;
        let issuer = users.iter().find(|(own, subject)| *own == issuer && subject == near).map_or_else(
            || users.iter().find(|(_, subject)| subject == near).map(|(own, _)| own.clone()),
            |(own, _)| Some(own.clone()),
        )?;
        Some(RevocationTarget::User { issuer, subject: near.to_owned() })
    }

    /// Visits the names of this kind in a chain.
    fn visit_names(self, chain: &VerifiedChain, visit: &mut dyn FnMut(&str)) {
        let Some(subject) = chain.subject() else { return };
        match self {
            CredentialKind::Session => visit(subject.session.as_str()),
            CredentialKind::Task => visit(subject.task.as_str()),
            CredentialKind::User => visit(&subject.user.to_string()),
            CredentialKind::Token => chain.tokens().iter().for_each(|level| visit(&level.jti)),
            CredentialKind::Hop => chain.tokens().iter().for_each(|level| visit(&level.hop_hash())),
            CredentialKind::Key => {
                chain.tokens().iter().for_each(|level| visit(level.holder.thumbprint().as_str()));
                visit(chain.issuer_key_thumbprint());
            }
        }
    }
}

/// Parses the wire form of a user, `["iss","sub"]`.
fn parse_user(name: &str) -> Option<(String, String)> {
    serde_json::from_str(name).ok()
}

/// The findings in chains and records.
#[derive(Debug, Default)]
struct CredentialSearch {
    /// The kind of the name that was found. The wanted kind takes precedence over others.
    found: Option<CredentialKind>,
    /// Other names of the wanted kind.
    names: BTreeSet<String>,
    /// The searched sources, as text.
    description: String,
    searched_any: bool,
}

/// Searches the cached chains, and then the records unless the wanted kind was found. It blocks, so it runs on its own thread.
fn search_credentials(
    wanted: CredentialKind,
    name: &str,
    names_source: Option<&dyn KnownNamesSource>,
    records: Option<&Path>,
    clock: &dyn Clock,
) -> CredentialSearch {
    let (mut seen, mut accounts) = (CredentialSearch::default(), Vec::new());
    if let Some(names_source) = names_source {
        let mut count = 0_usize;
        let all = names_source.chains(CHAINS_MAX, &mut |chain| {
            count += 1;
            search_chain(wanted, name, chain, &mut seen);
        });
        let (s, rest) = (if count == 1 { "" } else { "s" }, if all { "" } else { " (there are more)" });
        accounts.push(format!("{count} chain{s} in this server's memory{rest}"));
        seen.searched_any = true;
    }
    if seen.found != Some(wanted)
        && let Some(directory) = records
    {
        let others = CredentialKind::ALL.into_iter().filter(|other| *other != wanted);
        let order: Vec<CredentialKind> = std::iter::once(wanted).chain(others).collect();
        let members: Vec<&str> = order.iter().map(|credential| credential.record_member()).collect();
        let began = clock.now();
        let stop = || clock.now().boot_elapsed_ms_since(began) >= RECORDS_MS_MAX;
        match search::search_name(directory, &members, name, search::SearchLimits::default(), &stop) {
            Ok(SearchOutcome { found, names, bytes, has_decisions, is_whole }) => {
                let found = found.and_then(|index| order.get(index)).copied();
                seen.found = if found == Some(wanted) { found } else { seen.found.or(found) };
                seen.names.extend(names);
                seen.searched_any |= has_decisions;
                accounts.push(describe_records(bytes, is_whole));
            }
            Err(error) => accounts.push(format!("no records ({error})")),
        }
    }
    seen.description = accounts.join(" and ");
    if names_source.is_some() {
        seen.description.push_str("; other replicas were not asked");
    }
    seen
}

fn describe_records(bytes: u64, is_whole: bool) -> String {
    let size = match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{} KiB", bytes / 1024),
        _ => format!("{} MiB", bytes / 1_048_576),
    };
    match is_whole {
        true => format!("all records here ({size})"),
        false => format!("the newest {size} of the records here (older ones were not looked at)"),
    }
}

/// Searches one chain, and collects its names of the wanted kind for a suggestion.
fn search_chain(wanted: CredentialKind, name: &str, chain: &VerifiedChain, seen: &mut CredentialSearch) {
    for credential in CredentialKind::ALL {
        let mut found = false;
        credential.visit_names(chain, &mut |other| {
            found |= other == name;
            if credential == wanted && seen.names.len() < NAMES_MAX {
                seen.names.insert(other.to_owned());
            }
        });
        if found {
            seen.found = if credential == wanted { Some(wanted) } else { seen.found.or(Some(credential)) };
        }
    }
}

/// Looks up a name in documents. A name of another kind is unknown, but it is suggested as a target of that kind.
fn look_up_document(kind: &'static str, id: &str, documents: &dyn DocumentNames) -> TargetLookup {
    if documents.has_document(kind, id) {
        return TargetLookup::known("");
    }
    let target = |kind: &str, id: String| match kind {
        "agent" => RevocationTarget::Agent(id),
        "application" => RevocationTarget::Application(id),
        _ => RevocationTarget::Tool(id),
    };
    if let Some(other) = ["agent", "application", "tool"].into_iter().find(|other| documents.has_document(other, id)) {
        let note = format!("`{id}` is the name of a document of kind `{other}`, and of none of kind `{kind}`");
        return TargetLookup::unknown(note, Some(target(other, id.to_owned())));
    }
    let near = nearest_document(documents, kind, id).map(|near| target(kind, near));
    TargetLookup::unknown(format!("no document names {kind} `{id}`"), near)
}

fn nearest_document(documents: &dyn DocumentNames, kind: &str, id: &str) -> Option<String> {
    if documents.has_document(kind, id) {
        return None;
    }
    let ids = documents.ids_of_kind(kind, NAMES_MAX);
    nearest_name(id, ids.iter().map(String::as_str)).map(str::to_owned)
}

/// The operator who has a key; `None` if no operator does.
async fn operator_with_key(store: &dyn Store, thumbprint: &str) -> Result<Option<String>, store::Error> {
    let operators = store.documents(Some("operator")).await?.documents;
    let has = |document: &Document| match &document.body {
        DocumentBody::Operator(operator) => operator.keys.iter().any(|key| key.thumbprint().as_str() == thumbprint),
        _ => false,
    };
    let documents = operators.iter().filter_map(|stored| Document::from_row(&stored.row).ok());
    Ok(documents.into_iter().find(has).map(|document| document.key.id))
}

/// The names of the stored documents, for a process without a server.
struct StoredDocumentNames(Vec<Document>);

impl StoredDocumentNames {
    /// Reads the documents of the kinds that a target can name.
    async fn read(store: &dyn Store, target: &RevocationTarget) -> Result<Self, store::Error> {
        let kinds: &[&str] = match target {
            RevocationTarget::Agent(_) | RevocationTarget::Application(_) | RevocationTarget::Tool(_) => {
                &["application", "tool", "server", "agent"]
            }
            RevocationTarget::Key(_) => &["issuer", "agent"],
            RevocationTarget::User { .. } => &["issuer"],
            RevocationTarget::Delegation { .. } => &["issuer", "agent"],
            _ => &[],
        };
        let mut documents = Vec::new();
        for kind in kinds {
            let stored = store.documents(Some(kind)).await?.documents;
            documents.extend(stored.iter().filter_map(|stored| Document::from_row(&stored.row).ok()));
        }
        Ok(Self(documents))
    }

    fn names<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = String> + 'a {
        self.0.iter().flat_map(move |document| match &document.body {
            DocumentBody::Server(server) if kind == "tool" => {
                server.tools.keys().map(|name| format!("{}/{name}", server.id)).collect()
            }
            body if body.kind() == kind => vec![document.key.id.clone()],
            _ => Vec::new(),
        })
    }
}

impl DocumentNames for StoredDocumentNames {
    fn has_document(&self, kind: &str, id: &str) -> bool {
        self.names(kind).any(|name| name == id)
    }

    fn ids_of_kind(&self, kind: &str, ids_max: usize) -> Vec<String> {
        self.names(kind).take(ids_max).collect()
    }

    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)> {
        self.0.iter().find_map(|document| {
            let (kind, has) = match &document.body {
                DocumentBody::Issuer(issuer) => {
                    ("issuer", issuer.keys.iter().any(|named| named.key.thumbprint().as_str() == thumbprint))
                }
                DocumentBody::Agent(agent) => ("agent", agent.keys.iter().any(|key| key.as_str() == thumbprint)),
                _ => return None,
            };
            has.then(|| (kind, document.key.id.clone()))
        })
    }
}
