//! A presentation is refused or taken apart; read again as JSON it is the same. `cargo +nightly fuzz run presentation`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::json::write_string;
use portcullis::token::{Presentation, UnverifiedChain};

fuzz_target!(|data: &[u8]| {
    let Ok(presentation) = Presentation::parse(data) else { return };
    assert!(!presentation.chain.is_empty());
    if let Ok(chain) = UnverifiedChain::parse(&presentation.chain) {
        assert!(!chain.describe().contains('\n'));
    }
    let Ok(tokens) = presentation.chain.iter().map(|token| std::str::from_utf8(token)).collect::<Result<Vec<_>, _>>() else {
        return;
    };
    let mut json = String::from("{\"aat_chain\":[");
    for (index, token) in tokens.into_iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        write_string(token, &mut json);
    }
    json.push(']');
    if let Some(Ok(proof)) = presentation.proof.as_deref().map(std::str::from_utf8) {
        json.push_str(",\"aat_pop\":");
        write_string(proof, &mut json);
    }
    json.push('}');
    if let Ok(again) = Presentation::parse(json.as_bytes()) {
        assert!(again == presentation);
    }
});
