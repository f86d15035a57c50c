//! Vectors from other projects: the 79 chains of the drafts, and Wycheproof's attacks on Ed25519, JWK and JWS.

use std::path::Path;

use bytes::Bytes;
use portcullis::model::json::{self, JsonObject};
use portcullis::model::jwk::{NamedKey, PublicKey};
use portcullis::model::time::ClockReading;
use portcullis::token::trust::{AllowList, TrustTable, TrustedIssuer};
use portcullis::token::{ProofCall, RegistryMode, Rejection, VerificationOptions, verify, verify_proof};
use serde_json::Value;

use crate::external_suites;

#[test]
fn the_drafts_vectors_are_decided_as_published() {
    let Some(folder) = external_suites::folder("vectors") else { return };
    let suite = read(&folder.join("aat/aat_vectors.json"));
    let trust = trust(&suite["params"]);
    let vectors = suite["vectors"].as_array().unwrap();
    let wrong: Vec<String> = vectors
        .iter()
        .filter_map(|vector| {
            let decided = decide(vector, &suite["params"], &trust);
            let verdict = if decided.is_ok() { "PERMIT" } else { "DENY" };
            (vector["expected"]["verdict"] != verdict).then(|| format!("{} {}: {decided:?}", vector["id"], vector["title"]))
        })
        .collect();
    assert_eq!((vectors.len(), wrong), (79, Vec::new()));
}

#[test]
fn wycheproof_ed25519() {
    let Some(folder) = external_suites::folder("vectors") else { return };
    let suite = read(&folder.join("wycheproof/ed25519_test.json"));
    let mut count = 0;
    for group in suite["testGroups"].as_array().unwrap() {
        let key = PublicKey::from_jwk(&object(&group["publicKeyJwk"]));
        for test in group["tests"].as_array().unwrap() {
            let verifies = key.as_ref().is_ok_and(|key| {
                key.verifies_signature(&hex(test["msg"].as_str().unwrap()), &hex(test["sig"].as_str().unwrap()))
            });
            assert_eq!(verifies, test["result"] == "valid", "test {}: {}", test["tcId"], test["comment"]);
            count += 1;
        }
    }
    assert_eq!(count, 151);
}

/// None of these keys is a public Ed25519 key, so no issuer and no holder may have one.
#[test]
fn wycheproof_keys_of_other_kinds_are_refused() {
    let Some(folder) = external_suites::folder("vectors") else { return };
    let mut count = 0;
    for file in ["json_web_key_test.json", "json_web_signature_test.json"] {
        for group in read(&folder.join("wycheproof").join(file))["testGroups"].as_array().unwrap() {
            for side in ["private", "public"] {
                let keys = match &group[side] {
                    Value::Null => continue,
                    set if set["keys"].is_array() => set["keys"].as_array().unwrap().clone(),
                    key => vec![key.clone()],
                };
                for key in keys {
                    assert!(NamedKey::from_jwk(&object(&key)).is_err(), "{file}: {key}");
                    count += 1;
                }
            }
        }
    }
    assert!(count > 80, "{count} keys");
}

/// Every JWS of Wycheproof has another algorithm or is no JWS. None is a token or a proof, even if it is valid for its own key.
#[test]
fn wycheproof_signatures_of_other_kinds_are_refused() {
    let Some(folder) = external_suites::folder("vectors") else { return };
    let params = &read(&folder.join("aat/aat_vectors.json"))["params"];
    let suite = read(&folder.join("aat/aat_vectors.json"));
    let trust = trust(params);
    let options =
        VerificationOptions { registry: RegistryMode::Off, require_chain_audience: false, ..VerificationOptions::default() };
    let now = at(params["now"].as_i64().unwrap());
    let chain = [Bytes::from(suite["vectors"][0]["chain"][0].as_str().unwrap().to_owned())];
    let chain = verify(&chain, &trust, &options, now).unwrap();
    let (none, mut count) = (JsonObject::default(), 0);
    for file in ["json_web_key_test.json", "json_web_signature_test.json"] {
        for group in read(&folder.join("wycheproof").join(file))["testGroups"].as_array().unwrap() {
            for test in group["tests"].as_array().unwrap() {
                let jws = test["jws"].as_str().map_or_else(|| test["jws"].to_string(), str::to_owned);
                let refused = verify(&[Bytes::from(jws.clone())], &trust, &options, now);
                assert!(refused.is_err(), "{file} {}: {jws}", test["tcId"]);
                let expected = ProofCall { tool: "t", arguments: &none, audience: None };
                assert!(verify_proof(&chain, jws.as_bytes(), &expected, &options, now).is_err(), "{file} {}", test["tcId"]);
                count += 1;
            }
        }
    }
    assert_eq!(count, 26 + 401);
}

fn decide(vector: &Value, params: &Value, trust: &TrustTable) -> Result<(), Rejection> {
    let policy = &vector["policy"];
    let options = VerificationOptions {
        registry: RegistryMode::Off,
        require_chain_audience: policy["require_chain_aud"] == true,
        require_proof_audience: policy["require_pop_aud"] == true,
        nonce: policy["nonce"].as_str().map(str::to_owned),
        ..VerificationOptions::default()
    };
    let now = at(vector["now"].as_i64().unwrap());
    let audience = params["audience"].as_str();
    let chain: Vec<Bytes> =
        vector["chain"].as_array().unwrap().iter().map(|token| Bytes::from(token.as_str().unwrap().to_owned())).collect();
    let tool = vector["tool"].as_str().unwrap();
    let arguments = object(&vector["args"]);
    let chain = verify(&chain, trust, &options, now)?;
    chain.check_audience(audience, &options)?;
    let proof = vector["pop"].as_str().unwrap_or_default().as_bytes();
    verify_proof(&chain, proof, &ProofCall { tool, arguments: &arguments, audience }, &options, now)?;
    chain.check_call(tool, &arguments)
}

fn trust(params: &Value) -> TrustTable {
    let mut trust = TrustTable::new();
    for anchor in params["trust_anchors"].as_array().unwrap() {
        let key = NamedKey::from_jwk(&object(&anchor["jwk"])).unwrap();
        let lifetime_max_s = params["max_token_lifetime"].as_i64().unwrap();
        trust
            .put_issuer(TrustedIssuer {
                audiences: [params["audience"].as_str().unwrap().to_owned()].into(),
                applications: AllowList::All,
                lifetime_max_s,
                hop_lifetime_max_s: lifetime_max_s,
                ..TrustedIssuer::new(anchor["iss"].as_str().unwrap().into(), vec![key])
            })
            .unwrap();
    }
    trust
}

fn read(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn object(value: &Value) -> JsonObject {
    json::parse_object(value.to_string().as_bytes()).unwrap()
}

fn at(unix_s: i64) -> ClockReading {
    ClockReading { unix_ns: unix_s * 1_000_000_000, boot_ns: 0 }
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|start| u8::from_str_radix(&text[start..start + 2], 16).unwrap()).collect()
}
