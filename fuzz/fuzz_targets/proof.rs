//! Proofs: as they come, and the input as the payload of one that the right key signed. `cargo +nightly fuzz run proof`
#![no_main]

use std::sync::OnceLock;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use portcullis::model::json::JsonObject;
use portcullis::model::jwk::NamedKey;
use portcullis::model::time::ClockReading;
use portcullis::token::trust::{TrustTable, TrustedIssuer};
use portcullis::token::{
    PROOF_TYPE, PrivateKey, ProofCall, RegistryMode, VerificationOptions, VerifiedChain, issue, verify, verify_proof,
};

const NOW: ClockReading = ClockReading { unix_ns: 1_704_067_500_000_000_000, boot_ns: 0 };

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).expect("a key")
}

fn options() -> VerificationOptions {
    VerificationOptions {
        registry: RegistryMode::Off,
        require_chain_audience: false,
        require_proof_audience: false,
        ..VerificationOptions::default()
    }
}

fn chain() -> VerifiedChain {
    let mut trust = TrustTable::new();
    let keys = vec![NamedKey { key: key(1).public_key().clone(), kid: None }];
    trust.put_issuer(TrustedIssuer::new("https://i".into(), keys)).expect("an issuer");
    let claims = format!(
        r#"{{"iss":"https://i","jti":"a","iat":1704067400,"exp":1704067600,"del_max_depth":0,"cnf":{{"jwk":{}}},"authorization_details":[{{"type":"attenuating_agent_token","tools":{{}}}}]}}"#,
        key(2).public_key().to_jwk()
    );
    let root = issue::issue_root(&key(1), &claims, NOW).expect("a root");
    verify(&[Bytes::from(root)], &trust, &options(), NOW).expect("a chain")
}

fuzz_target!(|data: &[u8]| {
    static CHAIN: OnceLock<VerifiedChain> = OnceLock::new();
    let chain = CHAIN.get_or_init(chain);
    let arguments = JsonObject::default();
    let call = ProofCall { tool: "t", arguments: &arguments, audience: None };
    assert!(verify_proof(chain, data, &call, &options(), NOW).is_err(), "nobody signed this");
    let signed = issue::sign_jws(&key(2), &issue::jws_header(PROOF_TYPE), data);
    if let Ok(proof) = verify_proof(chain, signed.as_bytes(), &call, &options(), NOW) {
        assert!(proof.iat_s().abs_diff(NOW.unix_s()) <= 30 && !proof.jti().is_empty());
    }
});
