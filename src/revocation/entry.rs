//! An entry of the index that can be lifted: the effects that hold, the effects that were lifted, and the snapshots that still see them.
//!
//! Each effect carries the number of the first snapshot that no longer sees it. Targets that were only ever dead have no such entry;
//! `index.rs` keeps them in a smaller set.

use super::{RevocationEffect, RevocationHit};
use crate::model::rows::RevocationRow;

/// An effect that no snapshot sees.
const NEVER: u64 = 0;
/// An effect that every snapshot sees.
const ALWAYS: u64 = u64::MAX;

/// The state of one target, including the effects that were lifted.
#[derive(Clone, Copy, Debug)]
pub(super) struct RevocationEntry {
    /// Revision of the newest row.
    revision: u64,
    /// Revision of the row before the last lift. A denial in an older snapshot names it.
    revision_before: u64,
    watermark_unix_s: i64,
    /// The number of the first snapshot that does not see this effect. The next two fields have the same form.
    dead_until: u64,
    suspended_until: u64,
    watermark_until: u64,
}

impl RevocationEntry {
    /// An entry without any effect.
    pub(super) fn new() -> Self {
        Self {
            revision: 0,
            revision_before: 0,
            watermark_unix_s: i64::MIN,
            dead_until: NEVER,
            suspended_until: NEVER,
            watermark_until: NEVER,
        }
    }

    /// An entry that is dead since `revision`, for every snapshot.
    pub(super) fn new_dead(revision: u64) -> Self {
        Self { revision, revision_before: revision, dead_until: ALWAYS, ..Self::new() }
    }

    /// Takes over a row. An effect that the row no longer has is lifted for snapshots from `lifted_at` on. Returns whether an effect was
    /// added.
    pub(super) fn update(&mut self, row: &RevocationRow, lifted_at: u64) -> bool {
        let before = self.revision;
        let dead = set_effect(&mut self.dead_until, row.dead, lifted_at);
        let suspended = set_effect(&mut self.suspended_until, row.suspended, lifted_at);
        let watermark = set_effect(&mut self.watermark_until, row.watermark_unix_s.is_some(), lifted_at);
        // INVARIANT: a watermark never falls.
        let raised = row.watermark_unix_s.is_some_and(|second| second > self.watermark_unix_s);
        if let Some(second) = row.watermark_unix_s {
            self.watermark_unix_s = self.watermark_unix_s.max(second);
        }
        let steps = [dead, suspended, watermark];
        if steps.contains(&EffectChange::Lifted) {
            self.revision_before = before;
        }
        self.revision = row.revision;
        raised || steps.contains(&EffectChange::Added)
    }

    /// Lifts every effect for snapshots from `lifted_at` on.
    pub(super) fn lift(&mut self, lifted_at: u64) {
        let steps = [&mut self.dead_until, &mut self.suspended_until, &mut self.watermark_until];
        if steps.map(|until| set_effect(until, false, lifted_at)).contains(&EffectChange::Lifted) {
            self.revision_before = self.revision;
        }
    }

    /// Whether no snapshot numbered `oldest` or above sees any effect of this entry.
    pub(super) fn is_lifted_for_all(&self, oldest: u64) -> bool {
        [self.dead_until, self.suspended_until, self.watermark_until].iter().all(|until| !is_in_effect(*until, oldest))
    }

    /// Returns the effect on a chain whose root was issued at `root_iat_s`, as snapshot `number` sees it.
    pub(super) fn hit_for(&self, root_iat_s: i64, number: u64) -> Option<RevocationHit> {
        let too_old = root_iat_s <= self.watermark_unix_s;
        let (until, effect) = if is_in_effect(self.dead_until, number) {
            (self.dead_until, RevocationEffect::Dead)
        } else if is_in_effect(self.suspended_until, number) {
            (self.suspended_until, RevocationEffect::Suspended)
        } else if too_old && is_in_effect(self.watermark_until, number) {
            (self.watermark_until, RevocationEffect::Watermark)
        } else {
            return None;
        };
        Some(RevocationHit { effect, revision: if until == ALWAYS { self.revision } else { self.revision_before } })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EffectChange {
    Added,
    Lifted,
    Same,
}

fn set_effect(until: &mut u64, on: bool, lifted_at: u64) -> EffectChange {
    match (on, *until == ALWAYS) {
        (true, false) => {
            *until = ALWAYS;
            EffectChange::Added
        }
        (false, true) => {
            // The value stays below `ALWAYS`, which would mean that the effect was never lifted.
            *until = lifted_at.min(ALWAYS - 1);
            EffectChange::Lifted
        }
        _ => EffectChange::Same,
    }
}

fn is_in_effect(until: u64, number: u64) -> bool {
    until == ALWAYS || number < until
}
