//! Chains, one token a line. Signatures cannot be guessed, so the input is taken twice: as it is, and as the *payloads* of a chain that
//! is signed here with the right keys; what then passes must have kept the rules. `cargo +nightly fuzz run chain`
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use portcullis::model::jwk::NamedKey;
use portcullis::model::time::Now;
use portcullis::token::trust::{Issuer, Listed, Trust};
use portcullis::token::{Options, PrivateKey, Registry, TOKEN_TYPE, issue, verify};

const NOW: Now = Now { unix_ns: 1_704_067_500_000_000_000, boot_ns: 0 };

fuzz_target!(|data: &[u8]| {
    let key = |seed: u8| PrivateKey::from_seed([seed; 32]).expect("a key");
    let mut trust = Trust::new();
    let issuer = Issuer::new("https://i".into(), vec![NamedKey { key: key(1).public_key().clone(), kid: None }]);
    trust.put_issuer(Issuer { applications: Listed::All, ..issuer }).expect("an issuer");
    let options = Options { registry: Registry::Off, require_chain_audience: false, ..Options::default() };
    let lines: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    let raw: Vec<Bytes> = lines.iter().map(|line| Bytes::copy_from_slice(line)).collect();
    assert!(verify(&raw, &trust, &options, NOW).is_err(), "nobody signed this");
    let header = issue::header(TOKEN_TYPE);
    let signed = lines.iter().zip(1..=10_u8).map(|(line, seed)| Bytes::from(issue::sign(&key(seed), &header, line)));
    let signed: Vec<Bytes> = signed.collect();
    let Ok(chain) = verify(&signed, &trust, &options, NOW) else { return };
    assert_eq!(chain.levels().len(), signed.len());
    assert!(chain.check_times(NOW, &options).is_ok());
    for (parent, child) in chain.scopes().iter().zip(chain.scopes().iter().skip(1)) {
        assert!(child.tools.iter().all(|(tool, map)| map.attenuates(&parent.tools[tool]).is_ok()));
    }
    assert!(!chain.sentence().contains('\n'));
});
