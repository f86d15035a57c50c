//! A bounded feed of the revisions that this replica has applied, newest last. Readers use it to report revocations when they take effect.
//!
//! All readers share one ring. Each reader remembers the last number that it read and requests the revisions after it. A reader
//! that is too slow learns that the ring no longer holds them. The follower never waits for a reader. Look next at
//! `api/revocation_feed.rs`, a reader.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::revision::Revision;
use crate::model::rows::{RevocationRow, RowChange};

/// Limit of the revisions in the ring.
const FEED_REVISIONS_MAX: usize = 4_096;
/// Limit of the entries of all revisions together.
const FEED_ENTRIES_MAX: usize = 65_536;
/// Limit of the entries of one revision. A revision with more entries is reported without them.
const ENTRIES_PER_REVISION_MAX: usize = 10_000;

/// A revision that this replica has applied.
#[derive(Debug, PartialEq, Eq)]
pub struct AppliedRevision {
    /// The history and the number.
    pub revision: Revision,
    /// The commit time by the store's clock; 0 if it is not known.
    pub unix_ms: i64,
    /// The revocations and reinstatements of this revision.
    pub entries: Vec<RevocationRow>,
    /// Whether the changes up to this revision are not listed in `entries`.
    pub entries_omitted: bool,
}

/// The answer to a reader.
#[derive(Debug, PartialEq, Eq)]
pub enum FeedPage {
    /// The revisions after the reader's number, in order and without a gap. Empty if there is nothing new.
    Revisions(Vec<Arc<AppliedRevision>>),
    /// The ring no longer holds the revisions after the reader's number. The value is the newest revision.
    Lagged(Revision),
}

/// The ring that the follower writes and all readers share.
#[derive(Debug, Default)]
pub struct RevocationFeed(Mutex<FeedRing>);

#[derive(Debug, Default)]
struct FeedRing {
    newest: Option<Revision>,
    revisions: VecDeque<Arc<AppliedRevision>>,
    entries: usize,
    /// The ring is complete after this number: it holds every later revision, with its entries or with the mark that they are omitted.
    complete_after: u64,
}

impl RevocationFeed {
    /// The newest applied revision; `None` before the first.
    pub fn newest(&self) -> Option<Revision> {
        self.lock_ring().newest.clone()
    }

    /// The revisions after a number of the followed history, at most `count_max` of them.
    pub fn read_after(&self, number: u64, count_max: usize) -> FeedPage {
        let ring = self.lock_ring();
        let Some(newest) = &ring.newest else { return FeedPage::Revisions(Vec::new()) };
        if number < ring.complete_after {
            return FeedPage::Lagged(newest.clone());
        }
        let skipped = ring.revisions.partition_point(|applied| applied.revision.number <= number);
        FeedPage::Revisions(ring.revisions.iter().skip(skipped).take(count_max).cloned().collect())
    }

    /// Adds a commit that was applied.
    pub(in crate::sync) fn push(&self, revision: Revision, unix_ms: i64, changes: &[RowChange]) {
        let is_entry = |change: &&RowChange| matches!(change, RowChange::Revocation(_));
        let everything = changes.iter().filter(is_entry).count() > ENTRIES_PER_REVISION_MAX;
        let entries = changes.iter().filter_map(|change| match change {
            RowChange::Revocation(row) if !everything => Some(row.clone()),
            _ => None,
        });
        let applied = AppliedRevision { revision, unix_ms, entries: entries.collect(), entries_omitted: everything };
        self.lock_ring().push(applied);
    }

    /// Clears the ring for a full state, whose changes are not known row by row.
    pub(in crate::sync) fn replace(&self, revision: Revision) {
        let mut ring = self.lock_ring();
        *ring = FeedRing::default();
        ring.push(AppliedRevision { revision, unix_ms: 0, entries: Vec::new(), entries_omitted: true });
    }

    fn lock_ring(&self) -> MutexGuard<'_, FeedRing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FeedRing {
    fn push(&mut self, applied: AppliedRevision) {
        self.newest = Some(applied.revision.clone());
        self.entries = self.entries.saturating_add(applied.entries.len());
        self.revisions.push_back(Arc::new(applied));
        while self.revisions.len() > FEED_REVISIONS_MAX || self.entries > FEED_ENTRIES_MAX {
            let Some(oldest) = self.revisions.pop_front() else { return };
            self.entries = self.entries.saturating_sub(oldest.entries.len());
            self.complete_after = oldest.revision.number;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::revision::HistoryId;
    use crate::model::rows::RevocationTarget;

    fn revision(number: u64) -> Revision {
        Revision { history: HistoryId::new("h".to_owned()), number }
    }

    fn kill(number: u64) -> RowChange {
        RowChange::Revocation(RevocationRow {
            target: RevocationTarget::Session(format!("s{number}")),
            dead: true,
            suspended: false,
            watermark_unix_s: None,
            expires_at_unix_s: None,
            reason: String::new(),
            revision: number,
        })
    }

    fn numbers(next: FeedPage) -> Vec<(u64, usize, bool)> {
        match next {
            FeedPage::Revisions(applied) => {
                applied.iter().map(|one| (one.revision.number, one.entries.len(), one.entries_omitted)).collect()
            }
            FeedPage::Lagged(newest) => panic!("lost at {newest}"),
        }
    }

    #[test]
    fn readers_get_what_came_after() {
        let feed = RevocationFeed::default();
        assert_eq!((feed.newest(), numbers(feed.read_after(0, 9))), (None, vec![]));
        feed.replace(revision(5));
        assert_eq!(numbers(feed.read_after(3, 9)), [(5, 0, true)], "what a full state changed is not known");
        assert_eq!(numbers(feed.read_after(5, 9)), []);
        (6..9).for_each(|number| feed.push(revision(number), 1, &[kill(number)]));
        assert_eq!(numbers(feed.read_after(5, 9)), [(6, 1, false), (7, 1, false), (8, 1, false)]);
        assert_eq!(numbers(feed.read_after(5, 2)), [(6, 1, false), (7, 1, false)]);
        assert_eq!(numbers(feed.read_after(7, 9)), [(8, 1, false)]);
        assert_eq!(numbers(feed.read_after(4, 1)), [(5, 0, true)]);
        assert_eq!(numbers(feed.read_after(99, 9)), [], "a reader that was further along waits");
    }

    /// The ring stays bounded for any number of revisions and entries, and a slow reader learns that it has lagged.
    #[test]
    fn the_ring_is_bounded() {
        let feed = RevocationFeed::default();
        feed.replace(revision(0));
        let last = FEED_REVISIONS_MAX as u64 + 10;
        (1..=last).for_each(|number| feed.push(revision(number), 1, &[]));
        assert_eq!(feed.read_after(9, 1), FeedPage::Lagged(revision(last)));
        assert_eq!(numbers(feed.read_after(10, 1)), [(11, 0, false)]);

        let many: Vec<RowChange> = (0..ENTRIES_PER_REVISION_MAX as u64).map(kill).collect();
        (1..=20).for_each(|more| feed.push(revision(last + more), 1, &many));
        assert!(feed.lock_ring().entries <= FEED_ENTRIES_MAX);
        assert_eq!(feed.read_after(last, 1), FeedPage::Lagged(revision(last + 20)));
        let more: Vec<RowChange> = (0..=ENTRIES_PER_REVISION_MAX as u64).map(kill).collect();
        feed.push(revision(last + 21), 1, &more);
        assert_eq!(numbers(feed.read_after(last + 20, 9)), [(last + 21, 0, true)]);
    }
}
