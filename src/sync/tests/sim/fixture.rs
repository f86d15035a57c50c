//! What a simulation is about: a few users, agents and real signed chains, their policy, and who may what as the rows say.
//!
//! [`Fixture::permitted`] is the naive reference: it reads the store's rows and nothing that decides.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bytes::Bytes;

use super::START_UNIX_S;
use super::rng::Rng;
use crate::model::json::Object;
use crate::model::records::{DocumentKey, DocumentRow, Meaning, Origin, RevocationRow, Target, Write};
use crate::model::time::Now;
use crate::policy::source::{SourceFile, parse};
use crate::store::StoredDocument;
use crate::token::{PrivateKey, ProofOf, issue};

pub(super) const TOOLS: [&str; 2] = ["t/read", "t/drop"];
/// The place of the tool that needs a proof and a fresh replica.
pub(super) const DESTRUCTIVE: usize = 1;
pub(super) const AUDIENCE: &str = "https://gateway";
const ISSUER: &str = "https://i";
const AGENTS: usize = 3;
const USERS: usize = 2;
pub(super) const CHAINS: usize = 6;
const ROOT_IAT_S: i64 = START_UNIX_S - 1_000;
/// What an agent may in each version of its document: all, less, nothing of what is asked.
const ALLOWED: [&str; 3] = ["t/*", "t/read", "t/other"];

/// One delegation.
pub(super) struct Chain {
    agent: usize,
    pub(super) tokens: Vec<Bytes>,
    /// What would kill it.
    targets: Vec<Target>,
}

/// All that does not change between simulations.
pub(super) struct Fixture {
    agents: Vec<PrivateKey>,
    pub(super) chains: Vec<Chain>,
    /// The rows of everything but the agents, and the agents' in each version.
    others: Vec<DocumentRow>,
    versions: Vec<[DocumentRow; ALLOWED.len()]>,
}

/// Made once: keys and signatures come from fixed seeds.
pub(super) static FIXTURE: LazyLock<Fixture> = LazyLock::new(Fixture::new);

fn agent_id(agent: usize) -> String {
    format!("spiffe://a/{agent}")
}

fn rows(policy: String) -> Vec<DocumentRow> {
    let parsed = parse(&[SourceFile { path: "p.yaml".to_owned(), content: policy.into_bytes() }]);
    assert_eq!(parsed.diagnostics, []);
    parsed.documents.iter().map(|document| document.to_row(Origin::Folder)).collect()
}

impl Fixture {
    fn new() -> Self {
        let issuer = PrivateKey::from_seed([100; 32]).unwrap();
        let agents: Vec<_> = (0..AGENTS).map(|agent| PrivateKey::from_seed([agent as u8 + 1; 32]).unwrap()).collect();
        let others = rows(format!(
            "{{kind: issuer, id: '{ISSUER}', keys: {{jwks: {{keys: [{}]}}}}, audiences: ['{AUDIENCE}'], groups: [g], applications: [p]}}\n---\n\
             {{kind: application, id: p, allow: ['*']}}\n---\n{{kind: group, id: g, allow: ['*']}}\n---\n\
             {{kind: tool, id: t/read, risk: read, proof: none}}\n---\n{{kind: tool, id: t/other, risk: read, proof: none}}\n---\n\
             {{kind: tool, id: t/drop, risk: destructive}}\n",
            issuer.public_key().to_jwk(),
        ));
        let version = |agent: usize, allowed: &str| {
            let key = agents[agent].public_key().thumbprint();
            let policy = format!(
                "{{kind: agent, id: '{}', keys: [{key}], applications: [p], acts_for: [g], allow: ['{allowed}']}}\n",
                agent_id(agent)
            );
            rows(policy).remove(0)
        };
        let versions = (0..AGENTS).map(|agent| ALLOWED.map(|allowed| version(agent, allowed))).collect();
        let chains = (0..CHAINS).map(|chain| Self::chain(chain, &issuer, &agents)).collect();
        Self { agents, chains, others, versions }
    }

    fn chain(chain: usize, issuer: &PrivateKey, agents: &[PrivateKey]) -> Chain {
        let (agent, user) = (chain % AGENTS, format!("u{}", chain % USERS));
        let claims = format!(
            r#"{{"iss":"{ISSUER}","aud":"{AUDIENCE}","sub":"{user}","sub_profile":"user","groups":["g"],"client_id":"p",
            "sid":"s{chain}","txn":"x{}","jti":"j{chain}","act":{{"iss":"{ISSUER}","sub":"{}"}},"iat":{ROOT_IAT_S},"exp":{},
            "cnf":{{"jwk":{}}},"del_max_depth":0,
            "authorization_details":[{{"type":"attenuating_agent_token","tools":{{"t/read":{{}},"t/drop":{{}}}}}}]}}"#,
            chain / 2,
            agent_id(agent),
            START_UNIX_S + 1_500,
            agents[agent].public_key().to_jwk(),
        );
        let root = issue::issue_root(issuer, &claims, Now { unix_ns: 0, boot_ns: 0 }).unwrap();
        let targets = vec![
            Target::All,
            Target::User { issuer: ISSUER.into(), subject: user.clone() },
            Target::Application("p".into()),
            Target::Agent(agent_id(agent)),
            Target::Delegation { issuer: ISSUER.into(), subject: user, agent: agent_id(agent) },
            Target::Session(format!("s{chain}")),
            Target::Task(format!("x{}", chain / 2)),
            Target::Key(agents[agent].public_key().thumbprint().to_string()),
            Target::Token(format!("j{chain}")),
            Target::Hop(issue::token_hash(&root)),
        ];
        Chain { agent, tokens: vec![root.into()], targets }
    }

    /// The policy that the first commit puts.
    pub(super) fn policy(&self) -> Vec<Write> {
        let agents = self.versions.iter().map(|versions| &versions[0]);
        self.others.iter().chain(agents).cloned().map(Write::PutDocument).collect()
    }

    /// Whether each chain may call each tool, by the rows alone.
    pub(super) fn permitted(
        &self,
        documents: &BTreeMap<DocumentKey, StoredDocument>,
        revocations: &BTreeMap<Target, RevocationRow>,
    ) -> Vec<bool> {
        let revoked = |target: &Target| {
            revocations
                .get(target)
                .is_some_and(|row| row.dead || row.suspended || row.watermark_unix_s.is_some_and(|second| ROOT_IAT_S <= second))
        };
        let allowed = |agent: usize, tool: usize| {
            let stored = documents.get(&self.versions[agent][0].key).map(|stored| stored.row.json.as_str());
            let version = self.versions[agent].iter().position(|version| Some(version.json.as_str()) == stored);
            version == Some(0) || version == Some(1) && tool != DESTRUCTIVE
        };
        let tools = |chain: &Chain| {
            let alive = !chain.targets.iter().any(revoked);
            [0, 1].map(|tool| alive && allowed(chain.agent, tool) && !revoked(&Target::Tool(TOOLS[tool].into())))
        };
        self.chains.iter().flat_map(tools).collect()
    }

    /// The place of a chain and a tool in what [`Fixture::permitted`] says.
    pub(super) fn pair(chain: usize, tool: usize) -> usize {
        chain * TOOLS.len() + tool
    }

    /// A proof of one call of a destructive tool.
    pub(super) fn proof(&self, chain: usize, tool: usize, now: Now) -> Bytes {
        let call = ProofOf { tool: TOOLS[tool], arguments: &Object::default(), audience: Some(AUDIENCE) };
        let chain = &self.chains[chain];
        issue::prove(&self.agents[chain.agent], &chain.tokens, &call, None, now).unwrap().into()
    }

    /// What an operator does next, and what concerns nobody here but makes the commit like no other.
    pub(super) fn act(&self, rng: &mut Rng, words: &str) -> Vec<Write> {
        let other = Target::Token(format!("other-{words}"));
        let other = Write::Revoke { target: other, meaning: Meaning::Dead, reason: words.to_owned() };
        let count = 1 + rng.below(6) / 5;
        (0..count).map(|place| self.write(rng, &format!("{words}.{place}"))).chain([other]).collect()
    }

    fn write(&self, rng: &mut Rng, words: &str) -> Write {
        let reason = words.to_owned();
        let chain = &self.chains[rng.below(CHAINS)];
        let of_kind = |kind: &str| chain.targets.iter().find(|target| target.kind() == kind).unwrap().clone();
        let choice = rng.below(100);
        let target = match choice {
            0..16 => return self.put(rng, words),
            16..18 => of_kind("all"),
            18..20 => of_kind("application"),
            20..45 => of_kind("agent"),
            45..58 => of_kind("user"),
            58..72 => of_kind("delegation"),
            72..86 => Target::Tool(TOOLS[rng.below(TOOLS.len())].into()),
            86..89 => of_kind(["session", "token", "hop"][rng.below(3)]),
            89..90 => of_kind(["key", "task"][rng.below(2)]),
            _ => Target::Token(format!("other-{words}")),
        };
        if !target.can_suspend() {
            Write::Revoke { target, meaning: Meaning::Dead, reason }
        } else if rng.percent(50) {
            Write::Reinstate { target, reason }
        } else {
            let meaning = if target.can_watermark() && rng.percent(3) { Meaning::Watermark } else { Meaning::Suspend };
            Write::Revoke { target, meaning, reason }
        }
    }

    fn put(&self, rng: &mut Rng, words: &str) -> Write {
        let version = &self.versions[rng.below(AGENTS)][rng.below(ALLOWED.len())];
        Write::PutDocument(DocumentRow { path: format!("{words}.yaml"), ..version.clone() })
    }
}
