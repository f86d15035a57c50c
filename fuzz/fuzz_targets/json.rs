//! What is read has a canonical form that reads as the same value and is its own canonical form. `cargo +nightly fuzz run json`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::json;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = json::parse(data) else { return };
    let canonical = value.to_jcs();
    let again = json::parse(canonical.as_bytes()).expect("a canonical form is JSON");
    assert!(again == value, "{canonical}");
    assert_eq!(again.to_jcs(), canonical);
});
