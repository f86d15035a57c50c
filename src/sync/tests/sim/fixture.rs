//! The subject of a simulation: a few users, agents and real signed chains, their policy, and the calls that the rows permit.
//!
//! [`RevocationModel`] and [`SimFixture::allowed`] are the naive reference. They read the acts alone and never the code that decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use bytes::Bytes;

use super::START_UNIX_S;
use super::rng::Rng;
use crate::model::json::JsonObject;
use crate::model::revision::Revision;
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, RevocationTarget, StoreWrite};
use crate::model::time::ClockReading;
use crate::policy::source::{SourceFile, parse_files};
use crate::service::{AgentCredential, DecisionRequest};
use crate::store::StoredDocument;
use crate::token::{PrivateKey, ProofCall, issue};

const TOOLS: [&str; 2] = ["t/read", "t/drop"];
/// The index of the tool that needs a proof and a fresh replica.
pub(super) const DESTRUCTIVE: usize = 1;
const AUDIENCE: &str = "https://gateway";
const ISSUER: &str = "https://i";
const AGENTS: usize = 3;
const USERS: usize = 2;
pub(super) const CHAINS: usize = 6;
const ROOT_IAT_S: i64 = START_UNIX_S - 1_000;
/// The tools that each version of an agent's document allows: all, fewer, none of the called ones. The last version cannot be compiled.
const ALLOWED: [&str; 4] = ["t/*", "t/read", "t/other", "t/*"];
const BROKEN: usize = 3;
/// The operators. Two of them together may reinstate everything.
const ADMINISTRATORS: [&str; 3] = ["ann", "bob", "cy"];

/// One delegation.
pub(super) struct SimChain {
    agent: usize,
    pub(super) tokens: Vec<Bytes>,
    /// The targets whose revocation denies it.
    targets: Vec<RevocationTarget>,
}

/// All that stays the same between simulations.
pub(super) struct SimFixture {
    agents: Vec<PrivateKey>,
    pub(super) chains: Vec<SimChain>,
    /// The rows of all documents but the agents, and of each version of the agents.
    others: Vec<DocumentRow>,
    versions: Vec<[DocumentRow; ALLOWED.len()]>,
    /// A document that compiles and one that does not, under the same key.
    note: [DocumentRow; 2],
}

/// The revocations that are not lifted, computed from the acts alone. A store may prune an expired row; this model never does.
#[derive(Clone, Debug, Default)]
pub(super) struct RevocationModel {
    dead: BTreeSet<RevocationTarget>,
    suspended: BTreeSet<RevocationTarget>,
    marked: BTreeMap<RevocationTarget, i64>,
}

impl RevocationModel {
    pub(super) fn revoked(&mut self, target: &RevocationTarget, meaning: RevocationKind, watermark_unix_s: i64) {
        match meaning {
            RevocationKind::Dead => drop(self.dead.insert(target.clone())),
            RevocationKind::Suspend => drop(self.suspended.insert(target.clone())),
            RevocationKind::Watermark => {
                let mark = self.marked.entry(target.clone()).or_insert(watermark_unix_s);
                *mark = watermark_unix_s.max(*mark);
            }
        }
    }

    pub(super) fn reinstated(&mut self, target: &RevocationTarget) {
        self.suspended.remove(target);
    }

    fn hits(&self, target: &RevocationTarget) -> bool {
        let marked = self.marked.get(target).is_some_and(|second| ROOT_IAT_S <= *second);
        marked || self.dead.contains(target) || self.suspended.contains(target)
    }
}

/// Made once. Keys and signatures come from fixed seeds.
pub(super) static FIXTURE: LazyLock<SimFixture> = LazyLock::new(SimFixture::new);

fn agent_id(agent: usize) -> String {
    format!("spiffe://a/{agent}")
}

fn rows(policy: String) -> Vec<DocumentRow> {
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: policy.into_bytes() }]);
    assert_eq!(parsed.diagnostics, []);
    parsed.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect()
}

impl SimFixture {
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
        let version = |agent: usize, version: usize| {
            let key = agents[agent].public_key().thumbprint();
            // An application that does not exist cannot be compiled.
            let (allowed, application) = (ALLOWED[version], if version == BROKEN { "nowhere" } else { "p" });
            let policy = format!(
                "{{kind: agent, id: '{}', keys: [{key}], applications: [{application}], acts_for: [g], allow: ['{allowed}']}}\n",
                agent_id(agent)
            );
            rows(policy).remove(0)
        };
        let versions = (0..AGENTS).map(|agent| std::array::from_fn(|place| version(agent, place))).collect();
        let chains = (0..CHAINS).map(|chain| Self::chain(chain, &issuer, &agents)).collect();
        let note = rows("{kind: tool, id: t/note, risk: read, proof: none}\n".to_owned()).remove(0);
        let note = [note.clone(), DocumentRow { json: "{\"of\": \"a version to come\"}".to_owned(), ..note }];
        Self { agents, chains, others, versions, note }
    }

    fn chain(chain: usize, issuer: &PrivateKey, agents: &[PrivateKey]) -> SimChain {
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
        let root = issue::issue_root(issuer, &claims, ClockReading { unix_ns: 0, boot_ns: 0 }).unwrap();
        let targets = vec![
            RevocationTarget::All,
            RevocationTarget::User { issuer: ISSUER.into(), subject: user.clone() },
            RevocationTarget::Application("p".into()),
            RevocationTarget::Agent(agent_id(agent)),
            RevocationTarget::Delegation { issuer: ISSUER.into(), subject: user, agent: agent_id(agent) },
            RevocationTarget::Session(format!("s{chain}")),
            RevocationTarget::Task(format!("x{}", chain / 2)),
            RevocationTarget::Key(agents[agent].public_key().thumbprint().to_string()),
            RevocationTarget::Token(format!("j{chain}")),
            RevocationTarget::Hop(issue::token_hash(&root)),
        ];
        SimChain { agent, tokens: vec![root.into()], targets }
    }

    /// The writes of a working policy.
    pub(super) fn policy(&self) -> Vec<StoreWrite> {
        let agents = self.versions.iter().map(|versions| &versions[0]);
        self.others.iter().chain(agents).chain([&self.note[0]]).cloned().map(StoreWrite::PutDocument).collect()
    }

    /// The commits before the run: the policy, and revocations that were lifted again before any root was issued.
    pub(super) fn past(&self) -> [Vec<StoreWrite>; 3] {
        let targets = self.chains.iter().flat_map(|chain| &chain.targets);
        let targets: BTreeSet<RevocationTarget> =
            targets.filter(|target| target.can_suspend() && **target != RevocationTarget::All).cloned().collect();
        let reason = || "long ago".to_owned();
        let revoke = |target: RevocationTarget, meaning| StoreWrite::Revoke { target, kind: meaning, reason: reason() };
        let mut revoked: Vec<_> = targets.iter().cloned().map(|target| revoke(target, RevocationKind::Suspend)).collect();
        let marked = targets.iter().filter(|target| target.can_watermark());
        revoked.extend(marked.cloned().map(|target| revoke(target, RevocationKind::Watermark)));
        revoked.extend((0..4).map(|token| revoke(RevocationTarget::Token(format!("old-{token}")), RevocationKind::Dead)));
        let reinstated = targets.into_iter().map(|target| StoreWrite::Reinstate { target, reason: reason() }).collect();
        [self.policy(), revoked, reinstated]
    }

    /// The write that repairs the policy.
    pub(super) fn policy_repair(&self) -> Vec<StoreWrite> {
        let agents = self.versions.iter().map(|versions| &versions[0]);
        agents.chain([&self.note[0]]).cloned().map(StoreWrite::PutDocument).collect()
    }

    /// For each pair of chain and tool: whether a revocation denies it.
    pub(super) fn revoked(&self, memory: &RevocationModel) -> Vec<bool> {
        let tools = |chain: &SimChain| {
            let dead = chain.targets.iter().any(|target| memory.hits(target));
            [0, 1].map(|tool| dead || memory.hits(&RevocationTarget::Tool(TOOLS[tool].into())))
        };
        self.chains.iter().flat_map(tools).collect()
    }

    /// For each pair of chain and tool: whether policy allows it, by the documents alone.
    pub(super) fn allowed(&self, documents: &BTreeMap<DocumentKey, StoredDocument>) -> Vec<bool> {
        let allowed = |agent: usize, tool: usize| {
            let version = self.version(agent, documents);
            version == Some(0) || version == Some(1) && tool != DESTRUCTIVE
        };
        self.chains.iter().flat_map(|chain| [0, 1].map(|tool| allowed(chain.agent, tool))).collect()
    }

    /// Whether the documents can be built.
    pub(super) fn builds(&self, documents: &BTreeMap<DocumentKey, StoredDocument>) -> bool {
        let unread = documents.get(&self.note[1].key).is_some_and(|stored| stored.row.json == self.note[1].json);
        !unread && (0..AGENTS).all(|agent| self.version(agent, documents) != Some(BROKEN))
    }

    fn version(&self, agent: usize, documents: &BTreeMap<DocumentKey, StoredDocument>) -> Option<usize> {
        let stored = &documents.get(&self.versions[agent][0].key)?.row.json;
        self.versions[agent].iter().position(|version| version.json == *stored)
    }

    /// The index of a chain and a tool in the results of [`SimFixture::revoked`] and [`SimFixture::allowed`].
    pub(super) fn pair(chain: usize, tool: usize) -> usize {
        chain * TOOLS.len() + tool
    }

    /// A proof of one call of a destructive tool.
    pub(super) fn proof(&self, chain: usize, tool: usize, now: ClockReading) -> Bytes {
        let call = ProofCall { tool: TOOLS[tool], arguments: &JsonObject::default(), audience: Some(AUDIENCE) };
        let chain = &self.chains[chain];
        issue::sign_proof(&self.agents[chain.agent], &chain.tokens, &call, None, now).unwrap().into()
    }

    /// The next writes of an operator, with a write that makes the commit unique.
    pub(super) fn act(&self, rng: &mut Rng, words: &str) -> Vec<StoreWrite> {
        if rng.percent(9) {
            return vec![StoreWrite::Prune { before_unix_s: i64::MAX, rows_max: 1 + rng.below(3) }];
        }
        let other = RevocationTarget::Token(format!("other-{words}"));
        let other = StoreWrite::Revoke { target: other, kind: RevocationKind::Dead, reason: words.to_owned() };
        let count = 1 + rng.below(6) / 5;
        (0..count).map(|place| self.write(rng, &format!("{words}.{place}"))).chain([other]).collect()
    }

    fn write(&self, rng: &mut Rng, words: &str) -> StoreWrite {
        let reason = words.to_owned();
        let chain = &self.chains[rng.below(CHAINS)];
        let of_kind = |kind: &str| chain.targets.iter().find(|target| target.kind() == kind).unwrap().clone();
        let choice = rng.below(100);
        let target = match choice {
            0..20 => return self.put(rng, words),
            20..22 => of_kind("all"),
            22..23 => of_kind("application"),
            23..45 => of_kind("agent"),
            45..58 => of_kind("user"),
            58..72 => of_kind("delegation"),
            72..86 => RevocationTarget::Tool(TOOLS[rng.below(TOOLS.len())].into()),
            86..89 => of_kind(["session", "token", "hop"][rng.below(3)]),
            89..90 => of_kind(["key", "task"][rng.below(2)]),
            _ => RevocationTarget::Token(format!("other-{words}")),
        };
        if target == RevocationTarget::All && rng.percent(85) {
            let (operator, administrators) = (ADMINISTRATORS[rng.below(3)].to_owned(), ADMINISTRATORS.map(str::to_owned).into());
            StoreWrite::ReinstateByTwo { target, reason, key: operator.clone(), operator, administrators }
        } else if !target.can_suspend() {
            StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason }
        } else if rng.percent(50) {
            StoreWrite::Reinstate { target, reason }
        } else {
            let meaning =
                if target.can_watermark() && rng.percent(3) { RevocationKind::Watermark } else { RevocationKind::Suspend };
            StoreWrite::Revoke { target, kind: meaning, reason }
        }
    }

    /// A revocation that a waiting operator makes, with a write that makes the commit unique.
    pub(super) fn kill(&self, rng: &mut Rng, words: &str) -> Vec<StoreWrite> {
        let targets = &self.chains[rng.below(CHAINS)].targets;
        let of_kind = |kind: &str| targets.iter().find(|target| target.kind() == kind).unwrap().clone();
        let target = match rng.below(20) {
            0 => RevocationTarget::All,
            1..8 => of_kind("agent"),
            8..14 => of_kind("delegation"),
            14..17 => of_kind("user"),
            _ => RevocationTarget::Tool(TOOLS[rng.below(TOOLS.len())].into()),
        };
        let dead = RevocationTarget::Token(format!("other-{words}"));
        [(target, RevocationKind::Suspend), (dead, RevocationKind::Dead)]
            .map(|(target, meaning)| StoreWrite::Revoke { target, kind: meaning, reason: words.to_owned() })
            .into()
    }

    fn put(&self, rng: &mut Rng, words: &str) -> StoreWrite {
        // Now and then the policy is broken for a while.
        let version = match rng.below(20) {
            0 => &self.note[1],
            1..4 => &self.note[0],
            4 => &self.versions[rng.below(AGENTS)][BROKEN],
            _ => &self.versions[rng.below(AGENTS)][rng.below(BROKEN)],
        };
        StoreWrite::PutDocument(DocumentRow { path: format!("{words}.yaml"), ..version.clone() })
    }
}

/// A call of a chain.
pub(super) fn request(chain: usize, tool: usize, proof: Option<Bytes>, at_least: Option<Revision>) -> DecisionRequest {
    DecisionRequest {
        proof,
        audience: Some(AUDIENCE.to_owned()),
        at_least,
        ..DecisionRequest::new(AgentCredential::Chain(FIXTURE.chains[chain].tokens.clone()), TOOLS[tool])
    }
}

/// The one call of the tests of `at_least`, with the writes that permit and deny it in turn.
pub(in crate::sync::tests) struct AlternatingPolicy;

impl AlternatingPolicy {
    pub(in crate::sync::tests) fn policy() -> Vec<StoreWrite> {
        FIXTURE.policy()
    }

    /// The writes of the commit with this number, from 2 on, and whether the call is permitted after it.
    pub(in crate::sync::tests) fn turn(number: u64) -> (Vec<StoreWrite>, bool) {
        let (target, reason) = (RevocationTarget::Agent(agent_id(0)), String::new());
        let put = |version: usize| StoreWrite::PutDocument(FIXTURE.versions[0][version].clone());
        match number % 4 {
            2 => (vec![StoreWrite::Revoke { target, kind: RevocationKind::Suspend, reason }], false),
            3 => (vec![StoreWrite::Reinstate { target, reason }], true),
            0 => (vec![put(2)], false),
            _ => (vec![put(0)], true),
        }
    }

    pub(in crate::sync::tests) fn request(at_least: Revision) -> DecisionRequest {
        request(0, 0, None, Some(at_least))
    }
}
