//! Builds the vectors: fixed keys, one valid chain, and the functions that spoil it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis::token::{PrivateKey, issue};
use serde_json::{Value, json};

pub(super) const NOW: i64 = 1_704_067_500;
pub(super) const ISSUER: &str = "https://login.acme.example";
pub(super) const OTHER_ISSUER: &str = "https://login.other.example";
pub(super) const GATEWAY: &str = "https://gateway.acme.example";
pub(super) const TOOL: &str = "crm/leads.read";

/// The seeds of the keys.
pub(super) const ISSUER_KEY: u8 = 1;
pub(super) const ISSUER_KEY_2: u8 = 2;
pub(super) const OTHER_ISSUER_KEY: u8 = 3;
/// The holders of the valid chain's tokens: sales-assistant, research, summary. Each is registered.
pub(super) const HOLDERS: [u8; 3] = [10, 11, 12];
/// A key that is not registered.
pub(super) const STRANGER_KEY: u8 = 99;

/// The agent of a holder's key: one of the valid chain's three, then `worker-N`.
pub(super) fn agent(holder: u8) -> String {
    let name = match holder {
        10 => "sales-assistant".to_owned(),
        11 => "research".to_owned(),
        12 => "summary".to_owned(),
        other => format!("worker-{other}"),
    };
    format!("spiffe://acme.example/agent/{name}")
}

pub(super) fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).unwrap()
}

pub(super) fn params() -> Value {
    let jwk = |seed: u8, kid: Option<&str>| {
        let mut jwk: Value = serde_json::from_str(&key(seed).public_key().to_jwk()).unwrap();
        if let Some(kid) = kid {
            jwk["kid"] = kid.into();
        }
        jwk
    };
    let agents: Vec<Value> = (10..=20_u8)
        .map(|holder| json!({"id": agent(holder), "keys": [key(holder).public_key().thumbprint().as_str()]}))
        .chain([json!({"id": "spiffe://acme.example/agent/keyless", "keys": []})])
        .collect();
    json!({
        "now": NOW,
        "iat_skew_s": 30,
        "proof_window_s": 30,
        "token_bytes_max": 8192,
        "chain_bytes_max": 32768,
        "proof_bytes_max": 73728,
        "delegation_depth_max": 8,
        "constraint_nesting_max": 32,
        "trust": {
            "issuers": [
                {
                    "id": ISSUER, "keys": [jwk(ISSUER_KEY, Some("k1")), jwk(ISSUER_KEY_2, Some("k2"))],
                    "audiences": [GATEWAY, "https://batch.acme.example"], "groups": ["sales"], "applications": ["crm-portal"],
                    "typ": ["aat+jwt"], "lifetime_max_s": 28800, "hop_lifetime_max_s": 3600,
                },
                {
                    "id": OTHER_ISSUER, "keys": [jwk(OTHER_ISSUER_KEY, None)],
                    "audiences": [GATEWAY], "groups": ["*"], "applications": ["*"],
                    "typ": ["aat+jwt", "at+jwt"], "lifetime_max_s": 600, "hop_lifetime_max_s": 300,
                },
                {
                    "id": "https://login.access.example", "keys": [jwk(4, None)],
                    "audiences": [GATEWAY], "groups": [], "applications": ["*"],
                    "typ": ["at+jwt"], "lifetime_max_s": 600, "hop_lifetime_max_s": 300,
                },
            ],
            "agents": agents,
            "groups": ["sales", "support"],
        },
    })
}

/// A token before it is signed.
pub(super) struct TokenDraft {
    pub(super) header: Value,
    pub(super) claims: Value,
    /// The seed of the signing key.
    pub(super) signer: u8,
    /// Replacements in the text of the header and of the payload.
    pub(super) replace: Vec<(String, String)>,
}

impl TokenDraft {
    pub(super) fn set(&mut self, pointer: &str, value: Value) {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        self.claims.pointer_mut(parent).unwrap().as_object_mut().unwrap().insert(name.to_owned(), value);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.claims.as_object_mut().unwrap().remove(name).unwrap();
    }

    /// Sets the holder and its agent.
    pub(super) fn hand_to(&mut self, holder: u8) {
        self.set("/cnf/jwk", serde_json::from_str(&key(holder).public_key().to_jwk()).unwrap());
        self.set("/act/sub", agent(holder).into());
    }

    pub(super) fn tools(&mut self, tools: Value) {
        self.claims["authorization_details"][0]["tools"] = tools;
    }

    pub(super) fn replace(&mut self, from: &str, to: &str) {
        self.replace.push((from.to_owned(), to.to_owned()));
    }

    pub(super) fn sign(&self) -> String {
        let text = |json: &Value| {
            let mut json = json.clone();
            // Another crate may enable maps that keep the order of insertion.
            json.sort_all_objects();
            self.replace.iter().fold(json.to_string(), |text, (from, to)| text.replace(from.as_str(), to.as_str()))
        };
        issue::sign_jws(&key(self.signer), &text(&self.header), text(&self.claims).as_bytes())
    }
}

/// The valid root: one hour, three levels, one tool with one constraint and one optional argument.
pub(super) fn root() -> TokenDraft {
    let mut root = TokenDraft {
        header: json!({"alg": "Ed25519", "typ": "aat+jwt"}),
        claims: json!({
            "jti": "018cc251-f400-7000-8000-000000000000", "iss": ISSUER, "iat": NOW - 300, "exp": NOW + 3300,
            "aud": GATEWAY, "del_depth": 0, "del_max_depth": 3, "cnf": {}, "act": {"iss": ISSUER},
            "sub": "ana", "sub_profile": "user", "groups": ["sales"], "client_id": "crm-portal",
            "sid": "session-1", "txn": "task-1",
            "authorization_details": [{"type": "attenuating_agent_token", "tools": {
                "crm/leads.read": {
                    "region": {"constraint_type": "one_of", "values": ["north", "south"]},
                    "limit": {"constraint_type": "range", "min": 1, "max": 100, "optional": true},
                },
                "proposals/draft.create": {},
            }}],
        }),
        signer: ISSUER_KEY,
        replace: Vec::new(),
    };
    root.hand_to(HOLDERS[0]);
    root
}

/// The valid hop below `parent`, which is token `depth - 1` and has the holder `parent_holder`.
pub(super) fn hop(parent: &str, parent_holder: u8, depth: usize, holder: u8) -> TokenDraft {
    let mut hop = TokenDraft {
        header: json!({"alg": "Ed25519", "typ": "aat+jwt"}),
        claims: json!({
            "jti": format!("018cc251-f400-7000-8000-{depth:012}"), "iss": issue::thumbprint_urn(key(parent_holder).public_key()),
            "iat": NOW - 200, "exp": NOW + 1800, "par_hash": issue::token_hash(parent), "del_depth": depth, "del_max_depth": 3,
            "cnf": {}, "act": {"iss": ISSUER},
            "authorization_details": [{"type": "attenuating_agent_token", "tools": {
                "crm/leads.read": {"region": {"constraint_type": "exact", "value": "north"}},
            }}],
        }),
        signer: parent_holder,
        replace: Vec::new(),
    };
    hop.hand_to(holder);
    hop
}

/// The valid chain of this many tokens (at most 3). Each token is edited before it is signed, and later tokens extend the edited
/// one.
pub(super) fn chain(tokens: usize, edit: impl Fn(usize, &mut TokenDraft)) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for level in 0..tokens {
        let mut draft = match chain.last() {
            None => root(),
            Some(parent) => hop(parent, HOLDERS[level - 1], level, HOLDERS[level]),
        };
        edit(level, &mut draft);
        chain.push(draft.sign());
    }
    chain
}

/// A chain of up to eleven tokens, each with a worker of its own as holder, up to the depth limit.
pub(super) fn long_chain(tokens: usize, edit: impl Fn(usize, &mut TokenDraft)) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for (level, holder) in (0..tokens).zip(10_u8..) {
        let mut draft = match chain.last() {
            None => root(),
            Some(parent) => hop(parent, holder - 1, level, holder),
        };
        draft.set("/del_max_depth", 8.into());
        edit(level, &mut draft);
        chain.push(draft.sign());
    }
    chain
}

/// One vector. By default it is the valid call: the tool, its arguments, and a proof by the leaf's holder.
pub(super) struct TokenVector {
    id: String,
    title: String,
    refuses: Option<&'static str>,
    pub(super) chain: Vec<String>,
    pub(super) tool: String,
    pub(super) arguments: Value,
    pub(super) audience: Option<&'static str>,
    pub(super) options: Value,
    pub(super) proof: Option<String>,
    pub(super) proofs_used: Vec<String>,
    expected: (&'static str, Option<usize>),
}

impl TokenVector {
    pub(super) fn new(id: impl Into<String>, title: impl Into<String>, chain: Vec<String>) -> Self {
        let arguments = json!({"region": "north"});
        let proof = (1..=3).contains(&chain.len()).then(|| proof(&chain, HOLDERS[chain.len() - 1], TOOL, &arguments, |_| {}));
        Self {
            id: id.into(),
            title: title.into(),
            refuses: None,
            chain,
            tool: TOOL.to_owned(),
            arguments,
            audience: Some(GATEWAY),
            options: json!({}),
            proof,
            proofs_used: Vec::new(),
            expected: ("OK", None),
        }
    }

    /// Sets the item of the list that this vector covers.
    pub(super) fn item(mut self, item: &'static str) -> Self {
        self.refuses = Some(item);
        self
    }

    pub(super) fn denied(mut self, reason: &'static str, hop: impl Into<Option<usize>>) -> Self {
        self.expected = (reason, hop.into());
        self
    }

    pub(super) fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }

    /// Sets another call, with a valid proof of it by the holder of the leaf.
    pub(super) fn call(mut self, tool: &str, arguments: Value, holder: u8) -> Self {
        self.proof = Some(proof(&self.chain, holder, tool, &arguments, |_| {}));
        self.tool = tool.to_owned();
        self.arguments = arguments;
        self
    }

    pub(super) fn to_json(&self) -> Value {
        let verdict = if self.expected.0 == "OK" { "PERMIT" } else { "DENY" };
        let mut json = json!({
            "id": self.id, "title": self.title, "tool": self.tool, "arguments": self.arguments, "audience": self.audience,
            "options": self.options, "chain": self.chain, "proof": self.proof, "proofs_used": self.proofs_used,
            "expected": {"verdict": verdict, "reason": self.expected.0, "hop": self.expected.1},
        });
        if let Some(item) = self.refuses {
            json["refuses"] = item.into();
        }
        json
    }
}

/// A proof of the chain's last token by `holder`, edited before it is signed.
pub(super) fn proof(chain: &[String], holder: u8, tool: &str, arguments: &Value, edit: impl Fn(&mut TokenDraft)) -> String {
    let leaf = chain.last().unwrap();
    let leaf_jti = claims_of(leaf)["jti"].clone();
    let mut draft = TokenDraft {
        header: json!({"alg": "Ed25519", "typ": "aat-pop+jwt"}),
        claims: json!({
            "jti": "018cc251-f400-7000-9000-000000000001", "iat": NOW, "aat_id": leaf_jti, "aat_hash": issue::token_hash(leaf),
            "aat_tool": tool, "hta": arguments, "aat_aud": GATEWAY,
        }),
        signer: holder,
        replace: Vec::new(),
    };
    edit(&mut draft);
    draft.sign()
}

/// The claims of a token; empty if the token cannot be read.
pub(super) fn claims_of(jws: &str) -> Value {
    let payload = jws.split('.').nth(1).unwrap_or_default();
    URL_SAFE_NO_PAD.decode(payload).ok().and_then(|payload| serde_json::from_slice(&payload).ok()).unwrap_or_default()
}

/// A token with one of its three parts changed, with the old signature.
pub(super) fn with_part(jws: &str, part: usize, change: impl Fn(&str) -> String) -> String {
    let mut parts: Vec<String> = jws.split('.').map(str::to_owned).collect();
    parts[part] = change(&parts[part]);
    parts.join(".")
}
