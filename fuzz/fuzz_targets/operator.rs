//! An operator's signature that nobody's key made is never verified. `cargo +nightly fuzz run operator`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::time::ClockReading;
use portcullis::token::PrivateKey;
use portcullis::token::operator_act::{AdminCall, UnverifiedAct};

fuzz_target!(|data: &[u8]| {
    let Ok(act) = UnverifiedAct::parse(data) else { return };
    let key = PrivateKey::from_seed([1; 32]).expect("a key");
    let expected = AdminCall { audience: "h", method: "/m", message: b"" };
    assert!(act.verify(key.public_key(), &expected, ClockReading { unix_ns: 1_704_067_200_000_000_000, boot_ns: 0 }).is_err());
});
