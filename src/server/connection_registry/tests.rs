//! Which connections are cut when a listener is full, and for which causes.

use super::*;

const RULES: ConnectionLimits = ConnectionLimits {
    connections_max: 3,
    reserved_max: 0,
    idle_timeout: Duration::from_secs(600),
    unsigned_timeout: None,
    grace: Duration::ZERO,
    stall_timeout: Duration::from_secs(30),
    window_bytes_max: 1024 * 1024,
    own_bytes: 10,
    connection_bytes_max: 20,
    pool_bytes_max: 30,
};

fn registry(rules: ConnectionLimits) -> Arc<ConnectionRegistry> {
    ConnectionRegistry::new(rules, Arc::default())
}

fn peer(last: u8) -> IpAddr {
    IpAddr::from([127, 0, 0, last])
}

fn admit(registry: &Arc<ConnectionRegistry>, id: u64) -> Option<ConnectionSlot> {
    registry.admit(id, peer(1)).ok()
}

fn admit_all(registry: &Arc<ConnectionRegistry>, ids: std::ops::Range<u64>) -> Vec<ConnectionSlot> {
    ids.map(|id| admit(registry, id).unwrap()).collect()
}

fn cut_ids(places: &[ConnectionSlot]) -> Vec<u64> {
    places.iter().filter(|place| place.connection.is_cut()).map(|place| place.connection.id).collect()
}

async fn advance_clock(seconds: u64) {
    tokio::time::advance(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn the_oldest_idle_one_goes_first() {
    let registry = registry(RULES);
    let mut places = Vec::new();
    for id in 0..3 {
        places.push(admit(&registry, id).unwrap());
        advance_clock(1).await;
    }
    places[0].connection.begin_call();
    places.push(admit(&registry, 3).unwrap());
    assert_eq!(cut_ids(&places), [1]);
    assert_eq!(places[1].connection.wait_until_cut().await, CutCause::Displaced);
    places[2].connection.verified_signature.set();
    // Two connections have proved nothing: the idle one is cut, then the busy one, then the idle one that has proved something.
    places.push(admit(&registry, 4).unwrap());
    assert_eq!(cut_ids(&places), [1, 3]);
    for place in &places[4..] {
        place.connection.verified_signature.set();
        place.connection.begin_call();
    }
    places.push(admit(&registry, 5).unwrap());
    assert_eq!(cut_ids(&places), [0, 1, 3]);
    places[5].connection.verified_signature.set();
    places[5].connection.begin_call();
    places.push(admit(&registry, 6).unwrap());
    assert_eq!(cut_ids(&places), [0, 1, 2, 3]);
    places[6].connection.verified_signature.set();
    places[6].connection.begin_call();
    // All are busy and have proved something. One of them yields, and then the newcomer does.
    places.push(admit(&registry, 7).unwrap());
    assert_eq!(cut_ids(&places), [0, 1, 2, 3, 4]);
    places.push(admit(&registry, 8).unwrap());
    assert_eq!(cut_ids(&places), [0, 1, 2, 3, 4, 7]);
    assert_eq!(registry.lock().cut_pending, 6);
    drop(places);
    let table = registry.lock();
    assert_eq!((table.connections.len(), table.index_by_id.len(), table.count_by_peer.len(), table.cut_pending), (0, 0, 0, 0));
}

/// Whoever holds a key takes no place for good: of busy connections, the one that proved nothing for the longest time yields.
#[tokio::test(start_paused = true)]
async fn of_busy_ones_the_oldest_signature_yields() {
    let registry = registry(RULES);
    let places = admit_all(&registry, 0..3);
    for place in &places {
        place.connection.begin_call();
        place.connection.verified_signature.set();
    }
    registry.sweep(false);
    advance_clock(1).await;
    for place in [&places[0], &places[2]] {
        place.connection.verified_signature.set();
    }
    registry.sweep(false);
    let late = admit(&registry, 3).unwrap();
    assert_eq!(cut_ids(&places), [1]);
    drop(late);
}

/// A newcomer has time to prove something, whoever else comes, and whatever streams the others keep open.
#[tokio::test(start_paused = true)]
async fn a_newcomer_is_not_cut_before_its_first_call() {
    let grace = Duration::from_secs(2);
    for unsigned_timeout in [None, Some(Duration::from_secs(60))] {
        let registry = registry(ConnectionLimits { grace, unsigned_timeout, ..RULES });
        let strangers = admit_all(&registry, 0..2);
        for stranger in &strangers {
            stranger.connection.begin_call();
        }
        advance_clock(2).await;
        let newcomer = admit(&registry, 2).unwrap();
        // Each flooding connection costs a stranger's, although they have an open stream and the newcomer has none yet.
        let flood = admit_all(&registry, 3..5);
        assert_eq!(cut_ids(&strangers), [0, 1]);
        drop(strangers);
        assert_eq!(registry.admit(5, peer(1)).err(), Some(AdmissionError::New), "the next one waits");
        newcomer.connection.verified_signature.set();
        advance_clock(2).await;
        let more = admit_all(&registry, 6..8);
        assert_eq!((cut_ids(&flood), newcomer.connection.is_cut()), (vec![3, 4], false));
        drop(more);
    }
}

/// Where calls are signed, an open stream that nobody signed is no use of the listener, and calls without end are none either.
#[tokio::test(start_paused = true)]
async fn an_unsigned_stream_makes_nobody_busy() {
    let registry = registry(ConnectionLimits { unsigned_timeout: Some(Duration::from_secs(60)), ..RULES });
    let streaming = admit(&registry, 0).unwrap();
    streaming.connection.begin_call();
    advance_clock(1).await;
    let idle = admit_all(&registry, 1..3);
    registry.sweep(false);
    let late = admit(&registry, 3).unwrap();
    assert!(streaming.connection.is_cut());
    assert_eq!(cut_ids(&idle), [] as [u64; 0]);
    drop(late);
}

#[tokio::test(start_paused = true)]
async fn who_has_the_most_loses_first() {
    let registry = registry(ConnectionLimits { connections_max: 4, ..RULES });
    let first = registry.admit(0, peer(1)).unwrap();
    let many: Vec<_> = (1..4).map(|id| registry.admit(id, peer(2)).unwrap()).collect();
    let late = registry.admit(4, peer(3)).unwrap();
    assert!(!first.connection.is_cut() && !late.connection.is_cut());
    assert_eq!(cut_ids(&many), [1]);
}

#[tokio::test(start_paused = true)]
async fn places_are_kept_for_who_signed() {
    let registry = registry(ConnectionLimits { connections_max: 8, reserved_max: 2, ..RULES });
    let signed = admit(&registry, 0).unwrap();
    signed.connection.verified_signature.set();
    registry.sweep(false);
    let strangers = admit_all(&registry, 1..20);
    assert_eq!(cut_ids(&strangers), (1..14).collect::<Vec<_>>(), "six of eight are left to strangers");
    assert!(!signed.connection.is_cut());
    let another = &strangers[18];
    another.connection.verified_signature.set();
    let more = admit_all(&registry, 20..23);
    assert!(!another.connection.is_cut() && !signed.connection.is_cut());
    assert_eq!(cut_ids(&more), [] as [u64; 0]);
    advance_clock(61).await;
    registry.sweep(false);
    advance_clock(61).await;
    let late = admit_all(&registry, 23..30);
    assert!(signed.connection.is_cut(), "it signed more than a minute ago, and was idle since");
    assert_eq!(cut_ids(&late), [] as [u64; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_let_in_no_faster_than_the_cut_leave() {
    let registry = registry(RULES);
    let places = admit_all(&registry, 0..3 + CUT_PENDING_MAX as u64);
    assert_eq!(registry.admit(100, peer(1)).err(), Some(AdmissionError::CutPending));
    drop(places);
    assert!(admit(&registry, 101).is_some());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_nothing_is_cut() {
    let registry = registry(ConnectionLimits { connections_max: 10, unsigned_timeout: None, ..RULES });
    let places = admit_all(&registry, 0..3);
    places[1].connection.begin_call();
    advance_clock(599).await;
    places[2].connection.begin_call();
    places[2].connection.end_call();
    registry.sweep(false);
    assert_eq!(cut_ids(&places), [] as [u64; 0]);
    advance_clock(1).await;
    registry.sweep(false);
    assert_eq!(cut_ids(&places), [0], "one has a call, one had one a second ago");
    assert_eq!(places[0].connection.wait_until_cut().await, CutCause::Idle);
}

#[tokio::test(start_paused = true)]
async fn who_signs_nothing_is_cut() {
    let registry = registry(ConnectionLimits { connections_max: 10, unsigned_timeout: Some(Duration::from_secs(60)), ..RULES });
    let places = admit_all(&registry, 0..4);
    places[1].connection.begin_call();
    places[2].connection.verified_signature.set();
    places[3].connection.verified_signature.set();
    places[3].connection.begin_call();
    advance_clock(1).await;
    registry.sweep(false);
    advance_clock(59).await;
    registry.sweep(false);
    assert_eq!(cut_ids(&places), [0, 1], "a call that is not signed keeps nobody");
    assert_eq!(places[1].connection.wait_until_cut().await, CutCause::Unsigned);
    advance_clock(1).await;
    registry.sweep(false);
    assert_eq!(cut_ids(&places), [0, 1, 2], "an act that takes long is not cut off");
    assert_eq!(places[2].connection.wait_until_cut().await, CutCause::Idle);
}

#[tokio::test(start_paused = true)]
async fn who_takes_no_reply_is_cut() {
    let registry = registry(ConnectionLimits { connections_max: 10, ..RULES });
    let places = admit_all(&registry, 0..2);
    let waits = places[0].connection.begin_reply_wait();
    let other = places[1].connection.begin_reply_wait();
    for _ in 0..3 {
        registry.sweep(true);
        assert_eq!(cut_ids(&places), [] as [u64; 0]);
    }
    places[1].connection.end_reply_wait(other);
    registry.sweep(false);
    registry.sweep(true);
    assert_eq!(cut_ids(&places), [0]);
    assert_eq!(places[0].connection.wait_until_cut().await, CutCause::Stalled);
    places[0].connection.end_reply_wait(waits);
    assert!(places[0].connection.waiting_replies.iter().all(|waiting| waiting.load(Ordering::Relaxed) == 0));
}

#[tokio::test(start_paused = true)]
async fn windows_shrink_as_connections_grow() {
    let registry = registry(ConnectionLimits { connections_max: 5000, ..RULES });
    let places = admit_all(&registry, 0..4096);
    let windows: Vec<usize> = places.iter().map(|place| place.connection.window_bytes as usize).collect();
    assert_eq!((windows[0], windows[63], windows[4095]), (1024 * 1024, 1024 * 1024, 65_535));
    assert!(windows.iter().sum::<usize>() < 512 * 1024 * 1024);
}

/// A connection of a registry of its own.
pub(in crate::server) fn tracked() -> Arc<TrackedConnection> {
    Arc::clone(&registry(RULES).admit(1, peer(1)).unwrap().connection)
}
