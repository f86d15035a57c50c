//! Chains, one token a line. Signatures cannot be guessed, so the input is taken twice: as it is, and as the *payloads* of a chain that
//! is signed here with the right keys; what then passes must have kept the rules. `cargo +nightly fuzz run chain`
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use portcullis::model::jwk::NamedKey;
use portcullis::model::time::ClockReading;
use portcullis::token::trust::{AllowList, TrustTable, TrustedIssuer};
use portcullis::token::{PrivateKey, RegistryMode, TOKEN_TYPE, VerificationOptions, issue, verify};

const NOW: ClockReading = ClockReading { unix_ns: 1_704_067_500_000_000_000, boot_ns: 0 };

fuzz_target!(|data: &[u8]| {
    let key = |seed: u8| PrivateKey::from_seed([seed; 32]).expect("a key");
    let mut trust = TrustTable::new();
    let issuer = TrustedIssuer::new("https://i".into(), vec![NamedKey { key: key(1).public_key().clone(), kid: None }]);
    trust.put_issuer(TrustedIssuer { applications: AllowList::All, ..issuer }).expect("an issuer");
    let options =
        VerificationOptions { registry: RegistryMode::Off, require_chain_audience: false, ..VerificationOptions::default() };
    let lines: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    let raw: Vec<Bytes> = lines.iter().map(|line| Bytes::copy_from_slice(line)).collect();
    assert!(verify(&raw, &trust, &options, NOW).is_err(), "nobody signed this");
    let header = issue::jws_header(TOKEN_TYPE);
    let signed = lines.iter().zip(1..=10_u8).map(|(line, seed)| Bytes::from(issue::sign_jws(&key(seed), &header, line)));
    let signed: Vec<Bytes> = signed.collect();
    let Ok(chain) = verify(&signed, &trust, &options, NOW) else { return };
    assert_eq!(chain.tokens().len(), signed.len());
    assert!(chain.check_times(NOW, &options).is_ok());
    for (parent, child) in chain.scopes().iter().zip(chain.scopes().iter().skip(1)) {
        assert!(child.tools.iter().all(|(tool, map)| map.check_attenuation(&parent.tools[tool]).is_ok()));
    }
    assert!(!chain.describe().contains('\n'));
});
