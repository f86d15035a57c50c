//! The text of the remedies for a denial: without document contents for a gateway, with locations and entries for an administrator.
//!
//! It must not decide; it only describes the findings of `pdp`. Look next at `pdp/explain.rs`, which finds them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::constraint::printable;
use crate::model::decision::EntryRef;
use crate::model::ids::GroupId;
use crate::model::reason::{Layer, Reason};
use crate::model::records::DocumentKey;
use crate::model::request::Subject;
use crate::pdp::{Finding, Mend, Need, Turn};
use crate::service::request::CheckRequest;

/// The locations of documents: path and line.
pub type Places = BTreeMap<DocumentKey, (String, u32)>;

/// The facts that the text of a remedy mentions.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    tool: String,
    schema_sha256: Option<[u8; 32]>,
    /// The kind and id of the document that registers the tool.
    registered_by: Option<(&'static str, String)>,
    subject: Option<Arc<Subject>>,
}

impl Facts {
    pub(super) fn new(
        request: &CheckRequest,
        subject: Option<Arc<Subject>>,
        registered_by: Option<(&'static str, String)>,
    ) -> Self {
        Self { tool: request.tool.clone(), schema_sha256: request.tool_schema_sha256, registered_by, subject }
    }

    /// The name of the agent or application of a layer; empty for other layers.
    pub(super) fn name(&self, layer: Layer, hop: Option<usize>) -> String {
        match (layer, &self.subject) {
            (Layer::Agent, Some(_)) => self.agent(hop),
            (Layer::Application, Some(subject)) => subject.application.to_string(),
            _ => String::new(),
        }
    }

    /// The documents that a finding mentions.
    pub(super) fn documents(&self, finding: &Finding) -> Vec<DocumentKey> {
        let key = |kind: &str, id: &str| DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
        let of_entry = |entry: &EntryRef| key(entry.kind, &entry.id);
        let mut keys: Vec<DocumentKey> = finding.answer.matched.iter().map(of_entry).collect();
        match &finding.turn {
            Some(Turn::Policy(Mend::Entries { owners, remove, need })) => {
                keys.extend(owners.iter().map(|(kind, id)| key(kind, id)));
                keys.extend(remove.iter().map(|(_, entry)| of_entry(entry)));
                if let Need::Arguments(entry, _) | Need::Condition(entry, _) = need {
                    keys.push(of_entry(entry));
                }
            }
            Some(Turn::Policy(Mend::Guardrails(rails))) => keys.extend(rails.iter().map(of_entry)),
            Some(Turn::Policy(Mend::Serve)) => keys.push(key("agent", &self.agent(finding.answer.hop))),
            Some(Turn::Policy(Mend::Schema)) => keys.extend(self.registered_by.iter().map(|(kind, id)| key(kind, id))),
            _ => {}
        }
        keys
    }

    /// Describes the change that would turn a finding.
    pub(super) fn step(&self, finding: &Finding, places: Option<&Places>) -> String {
        let answer = &finding.answer;
        match (&finding.turn, places) {
            (None, _) => match &answer.approval {
                Some(need) => format!("an operator in {} would have to approve this call", one_of(&need.by)),
                None => String::new(),
            },
            (Some(Turn::Credential), _) => credential(answer.reason).to_owned(),
            (Some(Turn::Reinstate), None) => format!("{} would have to be reinstated", self.revoked(finding)),
            (Some(Turn::Reinstate), Some(_)) => self.reinstate(finding),
            (Some(Turn::LaterChain), _) => {
                format!("a new chain that begins after the revocation: {} has void credentials", self.revoked(finding))
            }
            (Some(Turn::Prepare), None) => "another call with the same arguments would have to be approved first".to_owned(),
            (Some(Turn::Prepare), Some(_)) => match answer.prepared.first() {
                Some(need) => {
                    format!("a call of `{}` with the same arguments must be approved first and not be used yet", need.tool)
                }
                None => "a call must be approved first".to_owned(),
            },
            (Some(Turn::Wait), _) => "ask another replica, or this one again in a moment".to_owned(),
            (Some(Turn::Never), _) => "nothing: it is revoked for good".to_owned(),
            (Some(Turn::Policy(mend)), None) => self.for_gateway(finding, mend),
            (Some(Turn::Policy(mend)), Some(places)) => self.for_administration(finding, mend, places),
        }
    }

    /// Describes a policy change to a gateway. It reveals the reason, the layer and the caller's own tokens, and nothing of a document.
    fn for_gateway(&self, finding: &Finding, mend: &Mend) -> String {
        let answer = &finding.answer;
        let agent = self.agent(answer.hop);
        let policy = match answer.layer {
            Layer::User => "the policy of the user's groups".to_owned(),
            Layer::Application => "the application's policy".to_owned(),
            _ => format!("the policy of agent {agent}"),
        };
        match (mend, answer.reason) {
            (Mend::Register, Reason::ApplicationUnknown) => "the application would have to be registered".to_owned(),
            (Mend::Register, _) => "the tool would have to be registered".to_owned(),
            (Mend::Schema, _) => "the tool's schema would have to be the registered one".to_owned(),
            (Mend::Serve, Reason::ApplicationNotServed) => format!("{policy} would have to let it run inside the application"),
            (Mend::Serve, Reason::UserNotServed) => format!("{policy} would have to let it act for this user"),
            (Mend::Serve, _) => format!("{policy} would have to let it delegate to the agent that follows"),
            (Mend::Grant(_), _) => self.grant(finding, mend),
            (Mend::Guardrails(_), _) => "a guardrail would have to let this call pass".to_owned(),
            (Mend::Entries { .. }, Reason::ConditionError) => {
                format!(
                    "{policy} has a condition that cannot be evaluated for this call: the call or the policy would have to change"
                )
            }
            (Mend::Entries { .. }, _) => format!("{policy} would have to allow the tool with these arguments"),
        }
    }

    /// Describes a policy change to an administrator, with documents, their locations and their entries.
    fn for_administration(&self, finding: &Finding, mend: &Mend, places: &Places) -> String {
        let answer = &finding.answer;
        let agent = self.agent(answer.hop);
        let tool = printable(&self.tool);
        match (mend, answer.reason) {
            (Mend::Register, Reason::ApplicationUnknown) => {
                let id = self.subject.as_ref().map(|subject| subject.application.to_string()).unwrap_or_default();
                format!("add a document `kind: application`, `id: {}` that allows `{tool}`", printable(&id))
            }
            (Mend::Register, _) => format!("register the tool: add a document `kind: tool`, `id: {tool}`"),
            (Mend::Schema, _) => {
                let sent =
                    self.schema_sha256.map_or_else(|| "none was sent".to_owned(), |hash| format!("the call's is {}", hex(&hash)));
                let owner = self.registered_by.as_ref().map(|(kind, id)| document(kind, id, places)).unwrap_or_default();
                format!("`schema_sha256` of {owner} must be that of the tool's schema: {sent}")
            }
            (Mend::Serve, reason) => self.serve(reason, &agent, answer.hop, places),
            (Mend::Grant(_), _) => self.grant(finding, mend),
            (Mend::Guardrails(rails), _) => {
                let named =
                    rails.iter().map(|rail| format!("{}: `{}`", document(rail.kind, &rail.id, places), printable(&rail.entry)));
                format!("narrow or remove {}", named.collect::<Vec<_>>().join(" and "))
            }
            (Mend::Entries { owners, remove, need }, _) => self.entries(owners, remove, need, places),
        }
    }

    fn entries(
        &self,
        owners: &[(&'static str, String)],
        remove: &[(&'static str, EntryRef)],
        need: &Need,
        places: &Places,
    ) -> String {
        let mut steps: Vec<String> = Vec::new();
        for (list, entry) in remove {
            let what = format!("`{list}: {}` of {}", printable(&entry.entry), document(entry.kind, &entry.id, places));
            steps.push(format!("remove or narrow {what}"));
        }
        let tool = printable(&self.tool);
        let of =
            |entry: &EntryRef| format!("(entry `{}` of {})", printable(&entry.entry), document(entry.kind, &entry.id, places));
        match need {
            Need::Nothing => {}
            Need::Arguments(entry, lacks) => steps.push(format!("{lacks} {}", of(entry))),
            Need::Condition(entry, condition) => {
                steps.push(format!("the condition `{}` must hold {}", printable(condition), of(entry)))
            }
            Need::Allow => match owners {
                [] => steps
                    .push(format!("put the user in a group whose document allows `{tool}`, or add one for a group of theirs")),
                [(kind, id)] => steps.push(format!("add `- {tool}` to `allow` of {}", document(kind, id, places))),
                many => {
                    let named: Vec<String> = many.iter().map(|(kind, id)| document(kind, id, places)).collect();
                    steps.push(format!("add `- {tool}` to `allow` of one of {}", named.join(", ")));
                }
            },
        }
        steps.join("; and ")
    }

    fn serve(&self, reason: Reason, agent: &str, hop: Option<usize>, places: &Places) -> String {
        let document = document("agent", agent, places);
        let Some(subject) = &self.subject else { return String::new() };
        match reason {
            Reason::ApplicationNotServed => {
                format!("add `{}` to `applications` of {document}", printable(subject.application.as_str()))
            }
            Reason::UserNotServed if subject.groups.is_empty() => {
                format!("put the user in a group that `acts_for` of {document} names")
            }
            Reason::UserNotServed => format!("add {} to `acts_for` of {document}", one_of(&subject.groups)),
            _ => {
                let next = hop.and_then(|hop| subject.agents.get(hop + 1)).map(ToString::to_string).unwrap_or_default();
                format!("add `{}` to `delegates_to` of {document}", printable(&next))
            }
        }
    }

    /// Describes a missing grant. The caller may see it, because it may read its own token.
    fn grant(&self, finding: &Finding, mend: &Mend) -> String {
        let agent = self.agent(finding.answer.hop);
        match mend {
            Mend::Grant(Some(lacks)) => {
                format!("{lacks} (as the token of agent {agent} grants it), or a new chain that grants more")
            }
            _ => format!("a new chain: the token of agent {agent} would have to grant `{}`", printable(&self.tool)),
        }
    }

    fn agent(&self, hop: Option<usize>) -> String {
        let agents = self.subject.as_ref().map(|subject| subject.agents.as_slice()).unwrap_or_default();
        hop.and_then(|hop| agents.get(hop)).map(ToString::to_string).unwrap_or_default()
    }

    /// Names the revoked subject of a finding.
    fn revoked(&self, finding: &Finding) -> String {
        match finding.answer.reason {
            Reason::AgentSuspended | Reason::RevokedAgent => format!("agent {}", self.agent(finding.answer.hop)),
            Reason::RevokedDelegation => format!("the user's delegation to agent {}", self.agent(finding.answer.hop)),
            Reason::UserSuspended | Reason::RevokedUser => "the user".to_owned(),
            Reason::ApplicationSuspended | Reason::RevokedApplication => "the application".to_owned(),
            Reason::ToolSuspended => "the tool".to_owned(),
            Reason::RevokedAll => "everything".to_owned(),
            _ => "it".to_owned(),
        }
    }

    fn reinstate(&self, finding: &Finding) -> String {
        let Some(subject) = &self.subject else { return String::new() };
        let agent = self.agent(finding.answer.hop);
        let user = || format!("{} {}", printable(subject.user.issuer.as_str()), printable(&subject.user.subject));
        let target = match finding.answer.reason {
            Reason::AgentSuspended => format!("agent {agent}"),
            Reason::RevokedDelegation => format!("delegation {} {agent}", user()),
            Reason::UserSuspended => format!("user {}", user()),
            Reason::ApplicationSuspended => format!("application {}", printable(subject.application.as_str())),
            Reason::ToolSuspended => format!("tool {}", printable(&self.tool)),
            _ => "all".to_owned(),
        };
        format!("reinstate it: `portcullis reinstate {target}`")
    }
}

/// Describes the credential that the caller must bring instead.
fn credential(reason: Reason) -> &'static str {
    match reason {
        Reason::TokenExpired => "a new chain: this one has expired",
        Reason::TokenNotYetValid => "wait until the chain is valid, or mend the clock of who issued it",
        Reason::TokenLifetime => "a new chain that lives no longer than its issuer and its agents allow",
        Reason::TokenTooLarge | Reason::ChainTooDeep => "a new chain, shorter: this one is over a limit",
        Reason::ChainWidened => "a new chain whose hops grant no more than they were given",
        Reason::IssuerUnknown => "a chain of an issuer that is trusted here, or the issuer would have to be registered",
        Reason::IssuerNotEntitled => {
            "a chain that says only what its issuer may vouch for, or the issuer would have to be entitled"
        }
        Reason::AgentUnknown => "the agent would have to be registered",
        Reason::AgentKeyUnknown => {
            "the agent would have to hold a key that is registered for it: register the key, or a new chain"
        }
        Reason::AudienceMismatch => "name an audience that the chain is for and that the caller may claim, or a new chain for it",
        Reason::ProofMissing => "a proof of possession for this call",
        Reason::ProofInvalid => "a proof of possession of this very call, by the key that holds the chain's leaf",
        Reason::ProofReplayed | Reason::ProofStale => "a new proof of possession for this call",
        Reason::HandleUnknown => "send the chain instead of the handle",
        Reason::ArgumentRefused => "send arguments as one JSON object without duplicate members, whose numbers can be compared",
        _ => "a new chain: this one is not sound",
    }
}

fn one_of(groups: &[GroupId]) -> String {
    let named: Vec<String> = groups.iter().map(|group| format!("`{}`", printable(group.as_str()))).collect();
    if named.len() > 1 { format!("one of {}", named.join(", ")) } else { named.concat() }
}

/// A document with its location.
fn document(kind: &str, id: &str, places: &Places) -> String {
    let key = DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
    let place = match places.get(&key) {
        Some((path, line)) if !path.is_empty() => format!(" ({}:{line})", printable(path)),
        _ => String::new(),
    };
    format!("{} {}{place}", kind.replace('_', " "), printable(id))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
