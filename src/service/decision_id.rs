//! Generates decision ids: UUIDv7 (RFC 9562, section 5.7). One system call draws the randomness of many ids.
//!
//! Look next at `service.rs`, where an answer gets its id.

use std::cell::RefCell;

use ring::rand::{SecureRandom as _, SystemRandom};
use uuid::Builder;

use crate::model::time::ClockReading;

/// Random bytes of one id.
const ID_BYTES: usize = 10;
/// Ids per system call. One call per id would cost more than the decision.
const IDS_PER_DRAW: usize = 256;

thread_local! {
    static RANDOM_POOL: RefCell<Vec<[u8; ID_BYTES]>> = const { RefCell::new(Vec::new()) };
}

/// Generates an id. It carries the time of the decision.
pub(super) fn new(now: ClockReading) -> String {
    let random = RANDOM_POOL.with_borrow_mut(|drawn| {
        if drawn.is_empty() {
            refill_pool(drawn);
        }
        drawn.pop()
    });
    match random {
        Some(random) => Builder::from_unix_timestamp_millis(now.unix_ms().unsigned_abs(), &random).into_uuid().to_string(),
        // The system gave no randomness to `ring`. The `uuid` library asks in its own way.
        None => uuid::Uuid::now_v7().to_string(),
    }
}

fn refill_pool(drawn: &mut Vec<[u8; ID_BYTES]>) {
    let mut bytes = [0; ID_BYTES * IDS_PER_DRAW];
    if SystemRandom::new().fill(&mut bytes).is_ok() {
        drawn.extend_from_slice(bytes.as_chunks::<ID_BYTES>().0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::time::{Clock as _, ManualClock};

    #[test]
    fn ids_are_version_7_of_their_time_and_differ() {
        let now = ManualClock::at_unix_s(1_700_000_000).now();
        let ids: HashSet<String> = (0..3 * IDS_PER_DRAW).map(|_| new(now)).collect();
        assert_eq!(ids.len(), 3 * IDS_PER_DRAW);
        for id in &ids {
            let id: uuid::Uuid = id.parse().unwrap();
            assert_eq!(id.get_version_num(), 7);
            assert_eq!(id.get_timestamp().unwrap().to_unix().0, 1_700_000_000);
        }
    }
}
