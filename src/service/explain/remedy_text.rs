//! The text of the remedies for a denial: without document contents for a gateway, with locations and entries for an administrator.
//!
//! It must not decide; it only describes the findings of `pdp`. Look next at `pdp/explain.rs`, which finds them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::constraint::escape_unprintable;
use crate::model::decision::PolicyEntryRef;
use crate::model::ids::GroupId;
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::DelegationSubject;
use crate::model::rows::DocumentKey;
use crate::pdp::{FindingRemedy, LayerFinding, LayerRemedy, PermitRequirement};
use crate::service::request::DecisionRequest;

/// The locations of documents: path and line.
pub type DocumentLocations = BTreeMap<DocumentKey, (String, u32)>;

/// The facts that the text of a remedy mentions.
#[derive(Clone, Debug)]
pub(super) struct RemedyFacts {
    tool: String,
    schema_sha256: Option<[u8; 32]>,
    /// The kind and id of the document that registers the tool.
    registered_by: Option<(&'static str, String)>,
    subject: Option<Arc<DelegationSubject>>,
}

impl RemedyFacts {
    pub(super) fn new(
        request: &DecisionRequest,
        subject: Option<Arc<DelegationSubject>>,
        registered_by: Option<(&'static str, String)>,
    ) -> Self {
        Self { tool: request.tool.clone(), schema_sha256: request.tool_schema_sha256, registered_by, subject }
    }

    /// The name of the agent or application of a layer; empty for other layers.
    pub(super) fn layer_subject(&self, layer: DecisionLayer, hop: Option<usize>) -> String {
        match (layer, &self.subject) {
            (DecisionLayer::Agent, Some(_)) => self.agent_id(hop),
            (DecisionLayer::Application, Some(subject)) => subject.application.to_string(),
            _ => String::new(),
        }
    }

    /// The documents that a finding mentions.
    pub(super) fn finding_documents(&self, finding: &LayerFinding) -> Vec<DocumentKey> {
        let key = |kind: &str, id: &str| DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
        let of_entry = |entry: &PolicyEntryRef| key(entry.kind, &entry.id);
        let mut keys: Vec<DocumentKey> = finding.answer.matched.iter().map(of_entry).collect();
        match &finding.remedy {
            Some(FindingRemedy::Policy(LayerRemedy::ChangeEntries { owners, remove, requirement: need })) => {
                keys.extend(owners.iter().map(|(kind, id)| key(kind, id)));
                keys.extend(remove.iter().map(|(_, entry)| of_entry(entry)));
                if let PermitRequirement::Arguments(entry, _) | PermitRequirement::Condition(entry, _) = need {
                    keys.push(of_entry(entry));
                }
            }
            Some(FindingRemedy::Policy(LayerRemedy::ChangeGuardrails(guardrails))) => {
                keys.extend(guardrails.iter().map(of_entry))
            }
            Some(FindingRemedy::Policy(LayerRemedy::ExtendAgentList)) => {
                keys.push(key("agent", &self.agent_id(finding.answer.hop)))
            }
            Some(FindingRemedy::Policy(LayerRemedy::MatchSchema)) => {
                keys.extend(self.registered_by.iter().map(|(kind, id)| key(kind, id)))
            }
            _ => {}
        }
        keys
    }

    /// Describes the change that would turn a finding.
    pub(super) fn describe_remedy(&self, finding: &LayerFinding, locations: Option<&DocumentLocations>) -> String {
        let answer = &finding.answer;
        match (&finding.remedy, locations) {
            (None, _) => match &answer.approval {
                Some(need) => format!("an operator in {} would have to approve this call", list_groups(&need.approver_groups)),
                None => String::new(),
            },
            (Some(FindingRemedy::Credential), _) => credential_remedy(answer.reason).to_owned(),
            (Some(FindingRemedy::Reinstate), None) => format!("{} would have to be reinstated", self.revoked_subject(finding)),
            (Some(FindingRemedy::Reinstate), Some(_)) => self.describe_reinstatement(finding),
            (Some(FindingRemedy::NewerChain), _) => {
                format!("a new chain that begins after the revocation: {} has void credentials", self.revoked_subject(finding))
            }
            (Some(FindingRemedy::Prepare), None) => {
                "another call with the same arguments would have to be approved first".to_owned()
            }
            (Some(FindingRemedy::Prepare), Some(_)) => match answer.prepared.first() {
                Some(need) => {
                    format!("a call of `{}` with the same arguments must be approved first and not be used yet", need.tool)
                }
                None => "a call must be approved first".to_owned(),
            },
            (Some(FindingRemedy::Wait), _) => "ask another replica, or this one again in a moment".to_owned(),
            (Some(FindingRemedy::Irrevocable), _) => "nothing: it is revoked for good".to_owned(),
            (Some(FindingRemedy::Policy(remedy)), None) => self.describe_for_gateway(finding, remedy),
            (Some(FindingRemedy::Policy(remedy)), Some(locations)) => self.describe_for_operator(finding, remedy, locations),
        }
    }

    /// Describes a policy change to a gateway. It reveals the reason, the layer and the caller's own tokens, and nothing of a document.
    fn describe_for_gateway(&self, finding: &LayerFinding, remedy: &LayerRemedy) -> String {
        let answer = &finding.answer;
        let agent = self.agent_id(answer.hop);
        let policy = match answer.layer {
            DecisionLayer::User => "the policy of the user's groups".to_owned(),
            DecisionLayer::Application => "the application's policy".to_owned(),
            _ => format!("the policy of agent {agent}"),
        };
        match (remedy, answer.reason) {
            (LayerRemedy::RegisterDocument, Reason::ApplicationUnknown) => {
                "the application would have to be registered".to_owned()
            }
            (LayerRemedy::RegisterDocument, _) => "the tool would have to be registered".to_owned(),
            (LayerRemedy::MatchSchema, _) => "the tool's schema would have to be the registered one".to_owned(),
            (LayerRemedy::ExtendAgentList, Reason::ApplicationNotServed) => {
                format!("{policy} would have to let it run inside the application")
            }
            (LayerRemedy::ExtendAgentList, Reason::UserNotServed) => format!("{policy} would have to let it act for this user"),
            (LayerRemedy::ExtendAgentList, _) => format!("{policy} would have to let it delegate to the agent that follows"),
            (LayerRemedy::ExtendGrant(_), _) => self.describe_grant(finding, remedy),
            (LayerRemedy::ChangeGuardrails(_), _) => "a guardrail would have to let this call pass".to_owned(),
            (LayerRemedy::ChangeEntries { .. }, Reason::ConditionError) => {
                format!(
                    "{policy} has a condition that cannot be evaluated for this call: the call or the policy would have to change"
                )
            }
            (LayerRemedy::ChangeEntries { .. }, _) => format!("{policy} would have to allow the tool with these arguments"),
        }
    }

    /// Describes a policy change to an administrator, with documents, their locations and their entries.
    fn describe_for_operator(&self, finding: &LayerFinding, remedy: &LayerRemedy, locations: &DocumentLocations) -> String {
        let answer = &finding.answer;
        let agent = self.agent_id(answer.hop);
        let tool = escape_unprintable(&self.tool);
        match (remedy, answer.reason) {
            (LayerRemedy::RegisterDocument, Reason::ApplicationUnknown) => {
                let id = self.subject.as_ref().map(|subject| subject.application.to_string()).unwrap_or_default();
                format!("add a document `kind: application`, `id: {}` that allows `{tool}`", escape_unprintable(&id))
            }
            (LayerRemedy::RegisterDocument, _) => format!("register the tool: add a document `kind: tool`, `id: {tool}`"),
            (LayerRemedy::MatchSchema, _) => {
                let sent = self
                    .schema_sha256
                    .map_or_else(|| "none was sent".to_owned(), |hash| format!("the call's is {}", bytes_to_hex(&hash)));
                let owner = self.registered_by.as_ref().map(|(kind, id)| document_label(kind, id, locations)).unwrap_or_default();
                format!("`schema_sha256` of {owner} must be that of the tool's schema: {sent}")
            }
            (LayerRemedy::ExtendAgentList, reason) => self.describe_serve(reason, &agent, answer.hop, locations),
            (LayerRemedy::ExtendGrant(_), _) => self.describe_grant(finding, remedy),
            (LayerRemedy::ChangeGuardrails(guardrails), _) => {
                let named = guardrails.iter().map(|guardrail| {
                    format!(
                        "{}: `{}`",
                        document_label(guardrail.kind, &guardrail.id, locations),
                        escape_unprintable(&guardrail.entry)
                    )
                });
                format!("narrow or remove {}", named.collect::<Vec<_>>().join(" and "))
            }
            (LayerRemedy::ChangeEntries { owners, remove, requirement: need }, _) => {
                self.describe_entries(owners, remove, need, locations)
            }
        }
    }

    fn describe_entries(
        &self,
        owners: &[(&'static str, String)],
        remove: &[(&'static str, PolicyEntryRef)],
        need: &PermitRequirement,
        locations: &DocumentLocations,
    ) -> String {
        let mut steps: Vec<String> = Vec::new();
        for (list, entry) in remove {
            let what =
                format!("`{list}: {}` of {}", escape_unprintable(&entry.entry), document_label(entry.kind, &entry.id, locations));
            steps.push(format!("remove or narrow {what}"));
        }
        let tool = escape_unprintable(&self.tool);
        let of = |entry: &PolicyEntryRef| {
            format!("(entry `{}` of {})", escape_unprintable(&entry.entry), document_label(entry.kind, &entry.id, locations))
        };
        match need {
            PermitRequirement::Nothing => {}
            PermitRequirement::Arguments(entry, lacks) => steps.push(format!("{lacks} {}", of(entry))),
            PermitRequirement::Condition(entry, condition) => {
                steps.push(format!("the condition `{}` must hold {}", escape_unprintable(condition), of(entry)))
            }
            PermitRequirement::Allow => match owners {
                [] => steps
                    .push(format!("put the user in a group whose document allows `{tool}`, or add one for a group of theirs")),
                [(kind, id)] => steps.push(format!("add `- {tool}` to `allow` of {}", document_label(kind, id, locations))),
                many => {
                    let named: Vec<String> = many.iter().map(|(kind, id)| document_label(kind, id, locations)).collect();
                    steps.push(format!("add `- {tool}` to `allow` of one of {}", named.join(", ")));
                }
            },
        }
        steps.join("; and ")
    }

    fn describe_serve(&self, reason: Reason, agent: &str, hop: Option<usize>, locations: &DocumentLocations) -> String {
        let document = document_label("agent", agent, locations);
        let Some(subject) = &self.subject else { return String::new() };
        match reason {
            Reason::ApplicationNotServed => {
                format!("add `{}` to `applications` of {document}", escape_unprintable(subject.application.as_str()))
            }
            Reason::UserNotServed if subject.groups.is_empty() => {
                format!("put the user in a group that `acts_for` of {document} names")
            }
            Reason::UserNotServed => format!("add {} to `acts_for` of {document}", list_groups(&subject.groups)),
            _ => {
                let next = hop.and_then(|hop| subject.agents.get(hop + 1)).map(ToString::to_string).unwrap_or_default();
                format!("add `{}` to `delegates_to` of {document}", escape_unprintable(&next))
            }
        }
    }

    /// Describes a missing grant. The caller may see it, because it may read its own token.
    fn describe_grant(&self, finding: &LayerFinding, remedy: &LayerRemedy) -> String {
        let agent = self.agent_id(finding.answer.hop);
        match remedy {
            LayerRemedy::ExtendGrant(Some(lacks)) => {
                format!("{lacks} (as the token of agent {agent} grants it), or a new chain that grants more")
            }
            _ => format!("a new chain: the token of agent {agent} would have to grant `{}`", escape_unprintable(&self.tool)),
        }
    }

    fn agent_id(&self, hop: Option<usize>) -> String {
        let agents = self.subject.as_ref().map(|subject| subject.agents.as_slice()).unwrap_or_default();
        hop.and_then(|hop| agents.get(hop)).map(ToString::to_string).unwrap_or_default()
    }

    /// Names the revoked subject of a finding.
    fn revoked_subject(&self, finding: &LayerFinding) -> String {
        match finding.answer.reason {
            Reason::AgentSuspended | Reason::RevokedAgent => format!("agent {}", self.agent_id(finding.answer.hop)),
            Reason::RevokedDelegation => format!("the user's delegation to agent {}", self.agent_id(finding.answer.hop)),
            Reason::UserSuspended | Reason::RevokedUser => "the user".to_owned(),
            Reason::ApplicationSuspended | Reason::RevokedApplication => "the application".to_owned(),
            Reason::ToolSuspended => "the tool".to_owned(),
            Reason::RevokedAll => "everything".to_owned(),
            _ => "it".to_owned(),
        }
    }

    fn describe_reinstatement(&self, finding: &LayerFinding) -> String {
        let Some(subject) = &self.subject else { return String::new() };
        let agent = self.agent_id(finding.answer.hop);
        let user =
            || format!("{} {}", escape_unprintable(subject.user.issuer.as_str()), escape_unprintable(&subject.user.subject));
        let target = match finding.answer.reason {
            Reason::AgentSuspended => format!("agent {agent}"),
            Reason::RevokedDelegation => format!("delegation {} {agent}", user()),
            Reason::UserSuspended => format!("user {}", user()),
            Reason::ApplicationSuspended => format!("application {}", escape_unprintable(subject.application.as_str())),
            Reason::ToolSuspended => format!("tool {}", escape_unprintable(&self.tool)),
            _ => "all".to_owned(),
        };
        format!("reinstate it: `portcullis reinstate {target}`")
    }
}

/// Describes the credential that the caller must bring instead.
fn credential_remedy(reason: Reason) -> &'static str {
    match reason {
        Reason::TokenExpired => "a new chain: this one has expired",
        Reason::TokenNotYetValid => "wait until the chain is valid, or remedy the clock of who issued it",
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

fn list_groups(groups: &[GroupId]) -> String {
    let named: Vec<String> = groups.iter().map(|group| format!("`{}`", escape_unprintable(group.as_str()))).collect();
    if named.len() > 1 { format!("one of {}", named.join(", ")) } else { named.concat() }
}

/// A document with its location.
fn document_label(kind: &str, id: &str, locations: &DocumentLocations) -> String {
    let key = DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
    let location = match locations.get(&key) {
        Some((path, line)) if !path.is_empty() => format!(" ({}:{line})", escape_unprintable(path)),
        _ => String::new(),
    };
    format!("{} {}{location}", kind.replace('_', " "), escape_unprintable(id))
}

fn bytes_to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::decision::{ApprovalNeed, PreparationNeed};
    use crate::model::ids::UserId;

    const CREDENTIAL_REASONS: &[(Reason, &str)] = &[
        (Reason::TokenExpired, "expired"),
        (Reason::TokenNotYetValid, "wait"),
        (Reason::TokenLifetime, "lives no longer"),
        (Reason::TokenTooLarge, "shorter"),
        (Reason::ChainTooDeep, "shorter"),
        (Reason::ChainWidened, "grant no more"),
        (Reason::IssuerUnknown, "trusted"),
        (Reason::IssuerNotEntitled, "vouch"),
        (Reason::AgentUnknown, "agent would have to be registered"),
        (Reason::AgentKeyUnknown, "register the key"),
        (Reason::AudienceMismatch, "audience"),
        (Reason::ProofMissing, "a proof of possession"),
        (Reason::ProofInvalid, "this very call"),
        (Reason::ProofReplayed, "a new proof"),
        (Reason::ProofStale, "a new proof"),
        (Reason::HandleUnknown, "instead of the handle"),
        (Reason::ArgumentRefused, "one JSON object"),
        (Reason::TokenSignature, "not sound"),
        (Reason::ChainBroken, "not sound"),
    ];

    /// A chain of two agents, for a tool that a document of kind `server` registers.
    fn facts(groups: &[&str]) -> RemedyFacts {
        let subject = DelegationSubject {
            user: UserId::new("https://i", "ana"),
            groups: groups.iter().map(|group| (*group).into()).collect(),
            application: "portal".into(),
            agents: vec!["a1".into(), "a2".into()],
            scopes: Vec::new(),
            session: "s".into(),
            task: "t".into(),
        };
        RemedyFacts {
            tool: "crm/read".to_owned(),
            schema_sha256: None,
            registered_by: Some(("server", "crm".to_owned())),
            subject: Some(Arc::new(subject)),
        }
    }

    fn locations() -> DocumentLocations {
        let place =
            |kind: &str, id: &str, line| (DocumentKey { kind: kind.to_owned(), id: id.to_owned() }, ("p.yaml".to_owned(), line));
        let unplaced = (DocumentKey { kind: "group".to_owned(), id: "sales".to_owned() }, (String::new(), 9));
        [place("agent", "a1", 3), place("server", "crm", 5), unplaced].into()
    }

    fn entry(kind: &'static str, id: &str, entry: &str) -> PolicyEntryRef {
        PolicyEntryRef { kind, id: id.into(), entry: entry.into() }
    }

    fn policy(layer: DecisionLayer, reason: Reason, remedy: LayerRemedy) -> LayerFinding {
        LayerFinding::denial(layer, Some(0), reason, FindingRemedy::Policy(remedy))
    }

    fn entries(
        remove: &[(&'static str, PolicyEntryRef)],
        owners: &[(&'static str, &str)],
        need: PermitRequirement,
    ) -> LayerRemedy {
        let owners = owners.iter().map(|(kind, id)| (*kind, (*id).to_owned())).collect();
        LayerRemedy::ChangeEntries { owners, remove: remove.to_vec(), requirement: need }
    }

    /// The step for a gateway and the one for administration.
    fn check(facts: &RemedyFacts, finding: &LayerFinding, for_gateway: &str, for_administration: &str) {
        assert_eq!(facts.describe_remedy(finding, None), for_gateway);
        assert_eq!(facts.describe_remedy(finding, Some(&locations())), for_administration);
    }

    #[test]
    fn each_reason_of_a_credential_says_what_to_bring() {
        for (reason, says) in CREDENTIAL_REASONS {
            let finding = LayerFinding::denial(DecisionLayer::Identity, None, *reason, FindingRemedy::Credential);
            let step = facts(&[]).describe_remedy(&finding, None);
            assert!(step.contains(says), "{reason:?}: {step}");
            assert_eq!(facts(&[]).describe_remedy(&finding, Some(&locations())), step);
        }
    }

    #[test]
    fn what_is_revoked_is_named_with_its_remedy() {
        for (reason, revoked, target) in [
            (Reason::AgentSuspended, "agent a2", "agent a2"),
            (Reason::RevokedDelegation, "the user's delegation to agent a2", "delegation https://i ana a2"),
            (Reason::UserSuspended, "the user", "user https://i ana"),
            (Reason::ApplicationSuspended, "the application", "application portal"),
            (Reason::ToolSuspended, "the tool", "tool crm/read"),
            (Reason::RevokedAll, "everything", "all"),
        ] {
            let finding = LayerFinding::denial(DecisionLayer::Revocation, Some(1), reason, FindingRemedy::Reinstate);
            let gateway = format!("{revoked} would have to be reinstated");
            check(&facts(&[]), &finding, &gateway, &format!("reinstate it: `portcullis reinstate {target}`"));
        }
        for (reason, revoked) in [
            (Reason::RevokedAgent, "agent a1"),
            (Reason::RevokedUser, "the user"),
            (Reason::RevokedApplication, "the application"),
            (Reason::RevokedSession, "it"),
        ] {
            let finding = LayerFinding::denial(DecisionLayer::Revocation, Some(0), reason, FindingRemedy::NewerChain);
            let step = format!("a new chain that begins after the revocation: {revoked} has void credentials");
            check(&facts(&[]), &finding, &step, &step);
        }
    }

    /// What passes by itself, what never does, and what waits for a person.
    #[test]
    fn steps_that_are_not_of_policy() {
        let denial = |turn| LayerFinding::denial(DecisionLayer::Agent, Some(0), Reason::ApprovalRequired, turn);
        let wait = "ask another replica, or this one again in a moment";
        check(&facts(&[]), &denial(FindingRemedy::Wait), wait, wait);
        let never = "nothing: it is revoked for good";
        check(&facts(&[]), &denial(FindingRemedy::Irrevocable), never, never);
        let mut prepare = denial(FindingRemedy::Prepare);
        let first = "another call with the same arguments would have to be approved first";
        check(&facts(&[]), &prepare, first, "a call must be approved first");
        prepare.answer.prepared = vec![PreparationNeed { layer: DecisionLayer::Agent, hop: Some(0), tool: "pay/quote".into() }];
        let by_tool = "a call of `pay/quote` with the same arguments must be approved first and not be used yet";
        check(&facts(&[]), &prepare, first, by_tool);
        let mut asks = LayerFinding::permit(DecisionLayer::Agent);
        check(&facts(&[]), &asks, "", "");
        for (groups, who) in [(&["leads"][..], "`leads`"), (&["leads", "chiefs"], "one of `leads`, `chiefs`")] {
            let by = groups.iter().map(|group| (*group).into()).collect();
            asks.answer.approval =
                Some(ApprovalNeed { layer: DecisionLayer::Agent, hop: Some(0), approver_groups: by, expires_in_ms: 1 });
            let step = format!("an operator in {who} would have to approve this call");
            check(&facts(&[]), &asks, &step, &step);
        }
    }

    #[test]
    fn what_must_be_registered_or_served() {
        let facts = facts(&["sales", "staff"]);
        let application = policy(DecisionLayer::Application, Reason::ApplicationUnknown, LayerRemedy::RegisterDocument);
        let add = "add a document `kind: application`, `id: portal` that allows `crm/read`";
        check(&facts, &application, "the application would have to be registered", add);
        let tool = policy(DecisionLayer::Tool, Reason::ToolUnknown, LayerRemedy::RegisterDocument);
        let add = "register the tool: add a document `kind: tool`, `id: crm/read`";
        check(&facts, &tool, "the tool would have to be registered", add);
        let schema = policy(DecisionLayer::Tool, Reason::ToolChanged, LayerRemedy::MatchSchema);
        let must = "`schema_sha256` of server crm (p.yaml:5) must be that of the tool's schema: ";
        let for_gateway = "the tool's schema would have to be the registered one";
        check(&facts, &schema, for_gateway, &format!("{must}none was sent"));
        let sent = RemedyFacts { schema_sha256: Some([0x0a; 32]), ..facts.clone() };
        check(&sent, &schema, for_gateway, &format!("{must}the call's is {}", "0a".repeat(32)));
        for (reason, for_gateway, for_administration) in [
            (
                Reason::ApplicationNotServed,
                "let it run inside the application",
                "add `portal` to `applications` of agent a1 (p.yaml:3)",
            ),
            (
                Reason::UserNotServed,
                "let it act for this user",
                "add one of `sales`, `staff` to `acts_for` of agent a1 (p.yaml:3)",
            ),
            (
                Reason::DelegationNotAllowed,
                "let it delegate to the agent that follows",
                "add `a2` to `delegates_to` of agent a1 (p.yaml:3)",
            ),
        ] {
            let finding = policy(DecisionLayer::Agent, reason, LayerRemedy::ExtendAgentList);
            check(&facts, &finding, &format!("the policy of agent a1 would have to {for_gateway}"), for_administration);
        }
        let nobody = self::facts(&[]);
        let step = nobody.describe_remedy(
            &policy(DecisionLayer::Agent, Reason::UserNotServed, LayerRemedy::ExtendAgentList),
            Some(&locations()),
        );
        assert_eq!(step, "put the user in a group that `acts_for` of agent a1 (p.yaml:3) names");
    }

    #[test]
    fn what_tokens_guardrails_and_entries_must_say() {
        let facts = facts(&[]);
        let grant = policy(DecisionLayer::Hop, Reason::ToolNotGranted, LayerRemedy::ExtendGrant(None));
        let step = "a new chain: the token of agent a1 would have to grant `crm/read`";
        check(&facts, &grant, step, step);
        let lacks = policy(
            DecisionLayer::Hop,
            Reason::ArgumentRefused,
            LayerRemedy::ExtendGrant(Some("argument `n` must be <= 5".to_owned())),
        );
        let step = "argument `n` must be <= 5 (as the token of agent a1 grants it), or a new chain that grants more";
        check(&facts, &lacks, step, step);
        let guardrails =
            LayerRemedy::ChangeGuardrails(vec![entry("guardrail", "office", "r1"), entry("guardrail", "night", "r2")]);
        let narrow = "narrow or remove guardrail office: `r1` and guardrail night: `r2`";
        check(
            &facts,
            &policy(DecisionLayer::Tool, Reason::GuardrailDenies, guardrails),
            "a guardrail would have to let this call pass",
            narrow,
        );

        let denied = [("deny", entry("agent", "a1", "crm/*"))];
        let narrower = entry("permission_set", "sales\u{202e}", "crm/read");
        for (remedy, for_administration) in [
            (entries(&denied, &[], PermitRequirement::Nothing), "remove or narrow `deny: crm/*` of agent a1 (p.yaml:3)"),
            (
                entries(&denied, &[("agent", "a1")], PermitRequirement::Allow),
                "remove or narrow `deny: crm/*` of agent a1 (p.yaml:3); and add `- crm/read` to `allow` of agent a1 (p.yaml:3)",
            ),
            (
                entries(&[], &[], PermitRequirement::Allow),
                "put the user in a group whose document allows `crm/read`, or add one for a group of theirs",
            ),
            (
                entries(&[], &[("group", "sales"), ("agent", "a1")], PermitRequirement::Allow),
                "add `- crm/read` to `allow` of one of group sales, agent a1 (p.yaml:3)",
            ),
            (
                entries(&[], &[], PermitRequirement::Arguments(narrower.clone(), "argument `n` must be = 1".to_owned())),
                r"argument `n` must be = 1 (entry `crm/read` of permission set sales\u{202e})",
            ),
            (
                entries(&[], &[], PermitRequirement::Condition(narrower.clone(), "context.n < 5".to_owned())),
                r"the condition `context.n < 5` must hold (entry `crm/read` of permission set sales\u{202e})",
            ),
        ] {
            for (layer, whose) in [
                (DecisionLayer::User, "the policy of the user's groups"),
                (DecisionLayer::Application, "the application's policy"),
                (DecisionLayer::Agent, "the policy of agent a1"),
            ] {
                let gateway = format!("{whose} would have to allow the tool with these arguments");
                check(&facts, &policy(layer, Reason::AgentDenies, remedy.clone()), &gateway, for_administration);
            }
            let fails = policy(DecisionLayer::User, Reason::ConditionError, remedy);
            assert!(facts.describe_remedy(&fails, None).contains("a condition that cannot be evaluated"));
        }
    }

    /// A step speaks only of documents whose locations are looked up.
    #[test]
    fn the_documents_of_a_finding() {
        let facts = facts(&[]);
        let (own, other) = (entry("agent", "a1", "x"), entry("group", "g", "y"));
        let check = |turn: Option<FindingRemedy>, matched: Option<&PolicyEntryRef>, expected: &[&str]| {
            let mut finding = LayerFinding::denial(DecisionLayer::Agent, Some(1), Reason::AgentDenies, FindingRemedy::Wait);
            (finding.remedy, finding.answer.matched) = (turn, matched.cloned());
            let found: Vec<String> =
                facts.finding_documents(&finding).iter().map(|key| format!("{} {}", key.kind, key.id)).collect();
            assert_eq!(found, expected);
        };
        check(None, None, &[]);
        check(Some(FindingRemedy::Wait), Some(&own), &["agent a1"]);
        check(Some(FindingRemedy::Policy(LayerRemedy::ExtendAgentList)), None, &["agent a2"]);
        check(Some(FindingRemedy::Policy(LayerRemedy::MatchSchema)), None, &["server crm"]);
        check(Some(FindingRemedy::Policy(LayerRemedy::ChangeGuardrails(vec![other.clone()]))), None, &["group g"]);
        let removed = [("deny", own.clone())];
        check(
            Some(FindingRemedy::Policy(entries(
                &removed,
                &[("group", "h")],
                PermitRequirement::Arguments(other.clone(), String::new()),
            ))),
            None,
            &["group h", "agent a1", "group g"],
        );
        check(
            Some(FindingRemedy::Policy(entries(&[], &[], PermitRequirement::Condition(other, String::new())))),
            None,
            &["group g"],
        );
        for (layer, hop, name) in [
            (DecisionLayer::Agent, Some(1), "a2"),
            (DecisionLayer::Agent, Some(2), ""),
            (DecisionLayer::Application, None, "portal"),
            (DecisionLayer::User, None, ""),
        ] {
            assert_eq!(facts.layer_subject(layer, hop), name);
        }
    }
}
