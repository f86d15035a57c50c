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

use super::Admin;
use crate::audit::search::{self, Searched};
use crate::model::ids::UserId;
use crate::model::records::Target;
use crate::model::revision::Revision;
use crate::model::time::Clock;
use crate::policy::diagnostic::nearest;
use crate::policy::document::{Body, Document};
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
pub struct Recognition {
    /// Whether the name is known.
    pub standing: Standing,
    /// A similar target, if the name is unknown.
    pub nearest: Option<Target>,
    /// The findings, and the sources that were searched or not, as text.
    pub note: String,
}

/// Whether any source knows a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A document, a chain or a record contains the name.
    Known,
    /// No searched source contains the name.
    Unknown,
    /// No source could be searched.
    NotLooked,
}

impl Recognition {
    fn known(note: impl Into<String>) -> Self {
        Self { standing: Standing::Known, nearest: None, note: note.into() }
    }

    fn unknown(note: impl Into<String>, nearest: Option<Target>) -> Self {
        Self { standing: Standing::Unknown, nearest, note: note.into() }
    }

    fn not_looked(note: impl Into<String>) -> Self {
        Self { standing: Standing::NotLooked, nearest: None, note: note.into() }
    }
}

/// The knowledge of a running server besides its store; `app` provides it.
#[async_trait]
pub trait Sightings: Send + Sync {
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
    fn has(&self, kind: &str, id: &str) -> bool;

    /// The ids of a kind, at most `ids_max`.
    fn ids(&self, kind: &str, ids_max: usize) -> Vec<String>;

    /// The document that lists a key, as kind and id.
    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)>;
}

/// The sources of a lookup besides the store.
#[derive(Default)]
pub(super) struct Sources {
    sightings: OnceLock<Arc<dyn Sightings>>,
    records: OnceLock<PathBuf>,
}

impl Admin {
    /// Sets the server that lookups ask. Without one, they read the documents of the store. Only the first call has an effect.
    pub fn set_sightings(&self, sightings: Arc<dyn Sightings>) {
        let _ = self.sources.sightings.set(sightings);
    }

    /// Sets the directory of audit records that lookups search. Only the first call has an effect.
    pub fn set_records(&self, directory: &Path) {
        let _ = self.sources.records.set(directory.to_owned());
    }

    /// Looks up the name of a target, as of a revision. It takes at most [`LOOK_UP_TIMEOUT`].
    pub async fn recognize(&self, target: &Target, at: &Revision) -> Recognition {
        match tokio::time::timeout(LOOK_UP_TIMEOUT, self.look_up(target, at)).await {
            Ok(recognition) => recognition,
            Err(_) => Recognition::not_looked(format!("the look-up took more than {} ms", LOOK_UP_TIMEOUT.as_millis())),
        }
    }

    /// The target with the most similar document name; `None` if no name is similar.
    pub(super) async fn nearest(&self, target: &Target) -> Option<Target> {
        let looked = async {
            let documents = match self.sources.sightings.get() {
                Some(sightings) => sightings.documents(None).await.ok()?,
                None => Arc::new(StoredNames::read(&*self.store, target).await.ok()?),
            };
            match target {
                Target::Agent(id) | Target::Application(id) | Target::Tool(id) => {
                    of_document(target.kind(), id, &*documents).nearest
                }
                _ => None,
            }
        };
        tokio::time::timeout(LOOK_UP_TIMEOUT, looked).await.ok().flatten()
    }

    /// Looks up a target without the time limit.
    async fn look_up(&self, target: &Target, at: &Revision) -> Recognition {
        if *target == Target::All {
            return Recognition::known("");
        }
        let documents = match self.document_names(target, at).await {
            Ok(documents) => documents,
            Err(why) => return Recognition::not_looked(why),
        };
        match target {
            Target::Agent(id) | Target::Application(id) | Target::Tool(id) => of_document(target.kind(), id, &*documents),
            Target::Key(thumbprint) => self.of_key(thumbprint, &*documents).await,
            Target::User { issuer, subject } => self.of_user([issuer, subject], None, &*documents).await,
            Target::Delegation { issuer, subject, agent } => self.of_user([issuer, subject], Some(agent), &*documents).await,
            Target::Session(id) => self.of_credential(Credential::Session, id).await,
            Target::Task(id) => self.of_credential(Credential::Task, id).await,
            Target::Token(id) => self.of_credential(Credential::Token, id).await,
            Target::Hop(id) => self.of_credential(Credential::Hop, id).await,
            Target::All => Recognition::known(""),
        }
    }

    /// The names in documents, from the server or the store. An unknown name waits for the documents of revision `at`.
    async fn document_names(&self, target: &Target, at: &Revision) -> Result<Arc<dyn DocumentNames>, String> {
        let Some(sightings) = self.sources.sightings.get() else {
            return Ok(Arc::new(StoredNames::read(&*self.store, target).await.map_err(|error| error.to_string())?));
        };
        let documents = sightings.documents(None).await?;
        // A name that is already known needs no wait. An unknown name may be in a document that was just committed.
        let is_known = match target {
            Target::Agent(id) | Target::Application(id) | Target::Tool(id) => documents.has(target.kind(), id),
            Target::Key(thumbprint) => documents.key_holder(thumbprint).is_some(),
            Target::User { issuer, .. } => documents.has("issuer", issuer),
            Target::Delegation { issuer, agent, .. } => documents.has("issuer", issuer) && documents.has("agent", agent),
            _ => true,
        };
        if is_known { Ok(documents) } else { sightings.documents(Some(at)).await }
    }

    /// Looks up a key in documents first, then in chains and records.
    async fn of_key(&self, thumbprint: &str, documents: &dyn DocumentNames) -> Recognition {
        if let Some((kind, id)) = documents.key_holder(thumbprint) {
            return Recognition::known(format!("it is a key of {kind} `{id}`"));
        }
        match operator_with(&*self.store, thumbprint).await {
            Ok(Some(operator)) => return Recognition::known(format!("it is a key of operator `{operator}`")),
            Ok(None) => {}
            Err(error) => return Recognition::not_looked(error.to_string()),
        }
        let seen = self.of_credential(Credential::Key, thumbprint).await;
        match seen.standing {
            Standing::Known => seen,
            standing => {
                let note = format!("no document of an agent, issuer or operator lists key `{thumbprint}`, and {}", seen.note);
                // An unused key appears in documents only, and those were searched. So it is unknown even if no chain could be
                // searched.
                let standing = if standing == Standing::NotLooked { Standing::Unknown } else { standing };
                Recognition { standing, note, ..seen }
            }
        }
    }

    /// Looks up a user, or a delegation from a user to an agent. The note names every unknown part.
    async fn of_user(&self, [issuer, subject]: [&str; 2], agent: Option<&str>, documents: &dyn DocumentNames) -> Recognition {
        let target = |issuer: &str, subject: &str, agent: Option<&str>| match agent {
            None => Target::User { issuer: issuer.to_owned(), subject: subject.to_owned() },
            Some(agent) => Target::Delegation { issuer: issuer.to_owned(), subject: subject.to_owned(), agent: agent.to_owned() },
        };
        if !documents.has("issuer", issuer) && documents.has("issuer", subject) {
            let note = format!("`{subject}` is an issuer and `{issuer}` is none: the issuer comes first, then the subject");
            return Recognition::unknown(note, Some(target(subject, issuer, agent)));
        }
        let user = UserId::new(issuer, subject).to_string();
        let seen = self.of_credential(Credential::User, &user).await;
        let near_user = match &seen.nearest {
            Some(Target::User { subject, .. }) => Some(subject.clone()),
            _ => None,
        };
        let (mut wrong, mut unsure) = (Vec::new(), Vec::new());
        let near_issuer = near(documents, "issuer", issuer);
        if !documents.has("issuer", issuer) && seen.standing != Standing::Known {
            wrong.push(format!("no document names issuer `{issuer}`"));
        }
        match seen.standing {
            Standing::Known => {}
            Standing::Unknown => wrong.push(seen.note),
            Standing::NotLooked => unsure.push(seen.note),
        }
        let mut near_agent = None;
        if let Some(agent) = agent.filter(|agent| !documents.has("agent", agent)) {
            wrong.push(format!("no document names agent `{agent}`"));
            near_agent = near(documents, "agent", agent);
        }
        if wrong.is_empty() {
            return match unsure.is_empty() {
                true => Recognition::known(""),
                false => Recognition::not_looked(unsure.join("; ")),
            };
        }
        let is_near = near_user.is_some() || near_agent.is_some() || near_issuer.is_some();
        let meant = is_near.then(|| {
            let issuer = near_issuer.as_deref().unwrap_or(issuer);
            let subject = near_user.as_deref().unwrap_or(subject);
            target(issuer, subject, agent.map(|agent| near_agent.as_deref().unwrap_or(agent)))
        });
        Recognition::unknown([wrong, unsure].concat().join("; "), meant)
    }

    /// Looks up a name in chains and records.
    async fn of_credential(&self, wanted: Credential, name: &str) -> Recognition {
        let (sightings, records) = (self.sources.sightings.get().cloned(), self.sources.records.get().cloned());
        let (clock, owned) = (self.clock.clone(), name.to_owned());
        let looked = tokio::task::spawn_blocking(move || look(wanted, &owned, sightings.as_deref(), records.as_deref(), &*clock));
        let Ok(seen) = looked.await else {
            return Recognition::not_looked("the look-up ended early");
        };
        match seen.found {
            Some(found) if found == wanted => return Recognition::known(""),
            Some(other) => {
                let note = format!("`{name}` is the name of a {}, and of no {} that was seen", other.noun(), wanted.noun());
                return Recognition::unknown(note, other.target(name));
            }
            None => {}
        }
        if !seen.looked_anywhere {
            let note = "no chain and no record of a decision is at hand here, so nobody can say whether anything bears that name";
            return Recognition::not_looked(note);
        }
        Recognition::unknown(
            format!("no {} `{name}` was seen; looked at {}", wanted.noun(), seen.account),
            wanted.near(name, &seen.names),
        )
    }
}

/// The kinds of names in a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Credential {
    Session,
    Task,
    Token,
    Hop,
    Key,
    User,
}

impl Credential {
    const ALL: [Credential; 6] =
        [Credential::Session, Credential::Task, Credential::Token, Credential::Hop, Credential::Key, Credential::User];

    fn noun(self) -> &'static str {
        match self {
            Credential::Session => "session",
            Credential::Task => "task",
            Credential::Token => "token",
            Credential::Hop => "hop",
            Credential::Key => "key",
            Credential::User => "user",
        }
    }

    /// The path of the name in an audit record.
    fn member(self) -> &'static str {
        match self {
            Credential::Session => "principals.session.id",
            Credential::Task => "principals.task.id",
            Credential::Token => "chain.jti",
            Credential::Hop => "chain.hop_hash",
            Credential::Key => "chain.holder_thumbprint",
            Credential::User => "principals.user.id",
        }
    }

    fn target(self, name: &str) -> Option<Target> {
        let name = name.to_owned();
        Some(match self {
            Credential::Session => Target::Session(name),
            Credential::Task => Target::Task(name),
            Credential::Token => Target::Token(name),
            Credential::Hop => Target::Hop(name),
            Credential::Key => Target::Key(name),
            Credential::User => {
                let (issuer, subject) = user_of(&name)?;
                Target::User { issuer, subject }
            }
        })
    }

    /// The target with the most similar name of this kind.
    fn near(self, name: &str, names: &BTreeSet<String>) -> Option<Target> {
        if self != Credential::User {
            return nearest(name, names.iter().map(String::as_str)).and_then(|near| self.target(near));
        }
        // Only the subjects of users are compared. In the full text, every short subject would be similar to every other one.
        let (issuer, subject) = user_of(name)?;
        let users: Vec<(String, String)> = names.iter().filter_map(|user| user_of(user)).collect();
        let subjects = || users.iter().map(|(_, subject)| subject.as_str());
        let of_issuer = users.iter().filter(|(own, _)| *own == issuer).map(|(_, subject)| subject.as_str());
        let near = nearest(&subject, of_issuer).or_else(|| nearest(&subject, subjects()))?;
        let issuer = users.iter().find(|(own, subject)| *own == issuer && subject == near).map_or_else(
            || users.iter().find(|(_, subject)| subject == near).map(|(own, _)| own.clone()),
            |(own, _)| Some(own.clone()),
        )?;
        Some(Target::User { issuer, subject: near.to_owned() })
    }

    /// Visits the names of this kind in a chain.
    fn names(self, chain: &VerifiedChain, visit: &mut dyn FnMut(&str)) {
        let Some(subject) = chain.subject() else { return };
        match self {
            Credential::Session => visit(subject.session.as_str()),
            Credential::Task => visit(subject.task.as_str()),
            Credential::User => visit(&subject.user.to_string()),
            Credential::Token => chain.levels().iter().for_each(|level| visit(&level.jti)),
            Credential::Hop => chain.levels().iter().for_each(|level| visit(&level.hop_hash())),
            Credential::Key => {
                chain.levels().iter().for_each(|level| visit(level.holder.thumbprint().as_str()));
                visit(chain.issuer_key());
            }
        }
    }
}

/// Parses the wire form of a user, `["iss","sub"]`.
fn user_of(name: &str) -> Option<(String, String)> {
    serde_json::from_str(name).ok()
}

/// The findings in chains and records.
#[derive(Debug, Default)]
struct Seen {
    /// The kind of the name that was found. The wanted kind takes precedence over others.
    found: Option<Credential>,
    /// Other names of the wanted kind.
    names: BTreeSet<String>,
    /// The searched sources, as text.
    account: String,
    looked_anywhere: bool,
}

/// Searches the cached chains, and then the records unless the wanted kind was found. It blocks, so it runs on its own thread.
fn look(wanted: Credential, name: &str, sightings: Option<&dyn Sightings>, records: Option<&Path>, clock: &dyn Clock) -> Seen {
    let (mut seen, mut accounts) = (Seen::default(), Vec::new());
    if let Some(sightings) = sightings {
        let mut count = 0_usize;
        let all = sightings.chains(CHAINS_MAX, &mut |chain| {
            count += 1;
            look_at_chain(wanted, name, chain, &mut seen);
        });
        let (s, rest) = (if count == 1 { "" } else { "s" }, if all { "" } else { " (there are more)" });
        accounts.push(format!("{count} chain{s} in this server's memory{rest}"));
        seen.looked_anywhere = true;
    }
    if seen.found != Some(wanted)
        && let Some(directory) = records
    {
        let others = Credential::ALL.into_iter().filter(|other| *other != wanted);
        let order: Vec<Credential> = std::iter::once(wanted).chain(others).collect();
        let members: Vec<&str> = order.iter().map(|credential| credential.member()).collect();
        let began = clock.now();
        let stop = || clock.now().ms_waited_since(began) >= RECORDS_MS_MAX;
        match search::search(directory, &members, name, search::Limits::default(), &stop) {
            Ok(Searched { found, names, bytes, has_decisions, is_whole }) => {
                let found = found.and_then(|index| order.get(index)).copied();
                seen.found = if found == Some(wanted) { found } else { seen.found.or(found) };
                seen.names.extend(names);
                seen.looked_anywhere |= has_decisions;
                accounts.push(records_account(bytes, is_whole));
            }
            Err(error) => accounts.push(format!("no records ({error})")),
        }
    }
    seen.account = accounts.join(" and ");
    if sightings.is_some() {
        seen.account.push_str("; other replicas were not asked");
    }
    seen
}

fn records_account(bytes: u64, is_whole: bool) -> String {
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
fn look_at_chain(wanted: Credential, name: &str, chain: &VerifiedChain, seen: &mut Seen) {
    for credential in Credential::ALL {
        let mut found = false;
        credential.names(chain, &mut |other| {
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
fn of_document(kind: &'static str, id: &str, documents: &dyn DocumentNames) -> Recognition {
    if documents.has(kind, id) {
        return Recognition::known("");
    }
    let target = |kind: &str, id: String| match kind {
        "agent" => Target::Agent(id),
        "application" => Target::Application(id),
        _ => Target::Tool(id),
    };
    if let Some(other) = ["agent", "application", "tool"].into_iter().find(|other| documents.has(other, id)) {
        let note = format!("`{id}` is the name of a document of kind `{other}`, and of none of kind `{kind}`");
        return Recognition::unknown(note, Some(target(other, id.to_owned())));
    }
    let near = near(documents, kind, id).map(|near| target(kind, near));
    Recognition::unknown(format!("no document names {kind} `{id}`"), near)
}

fn near(documents: &dyn DocumentNames, kind: &str, id: &str) -> Option<String> {
    if documents.has(kind, id) {
        return None;
    }
    let ids = documents.ids(kind, NAMES_MAX);
    nearest(id, ids.iter().map(String::as_str)).map(str::to_owned)
}

/// The operator who has a key; `None` if no operator does.
async fn operator_with(store: &dyn Store, thumbprint: &str) -> Result<Option<String>, store::Error> {
    let operators = store.documents(Some("operator")).await?.documents;
    let has = |document: &Document| match &document.body {
        Body::Operator(operator) => operator.keys.iter().any(|key| key.thumbprint().as_str() == thumbprint),
        _ => false,
    };
    let documents = operators.iter().filter_map(|stored| Document::from_row(&stored.row).ok());
    Ok(documents.into_iter().find(has).map(|document| document.key.id))
}

/// The names of the stored documents, for a process without a server.
struct StoredNames(Vec<Document>);

impl StoredNames {
    /// Reads the documents of the kinds that a target can name.
    async fn read(store: &dyn Store, target: &Target) -> Result<Self, store::Error> {
        let kinds: &[&str] = match target {
            Target::Agent(_) | Target::Application(_) | Target::Tool(_) => &["application", "tool", "server", "agent"],
            Target::Key(_) => &["issuer", "agent"],
            Target::User { .. } => &["issuer"],
            Target::Delegation { .. } => &["issuer", "agent"],
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
            Body::Server(server) if kind == "tool" => server.tools.keys().map(|name| format!("{}/{name}", server.id)).collect(),
            body if body.kind() == kind => vec![document.key.id.clone()],
            _ => Vec::new(),
        })
    }
}

impl DocumentNames for StoredNames {
    fn has(&self, kind: &str, id: &str) -> bool {
        self.names(kind).any(|name| name == id)
    }

    fn ids(&self, kind: &str, ids_max: usize) -> Vec<String> {
        self.names(kind).take(ids_max).collect()
    }

    fn key_holder(&self, thumbprint: &str) -> Option<(&'static str, String)> {
        self.0.iter().find_map(|document| {
            let (kind, has) = match &document.body {
                Body::Issuer(issuer) => ("issuer", issuer.keys.iter().any(|named| named.key.thumbprint().as_str() == thumbprint)),
                Body::Agent(agent) => ("agent", agent.keys.iter().any(|key| key.as_str() == thumbprint)),
                _ => return None,
            };
            has.then(|| (kind, document.key.id.clone()))
        })
    }
}
