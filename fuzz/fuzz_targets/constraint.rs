//! Two argument maps and a call: where the second attenuates the first, it admits no call that the first refuses.
//! The input is three JSON texts, one a line. `cargo +nightly fuzz run constraint`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::constraint::ConstraintMap;
use portcullis::model::json;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let mut map = || ConstraintMap::parse(&json::parse(lines.next()?).ok()?).ok();
    let (Some(parent), Some(child)) = (map(), map()) else { return };
    assert!(parent.check_attenuation(&parent).is_ok(), "every map attenuates itself");
    let Some(Ok(call)) = lines.next().map(json::parse_object) else { return };
    if child.check_attenuation(&parent).is_ok() && child.check_arguments(&call).is_ok() {
        assert!(parent.check_arguments(&call).is_ok());
    }
});
