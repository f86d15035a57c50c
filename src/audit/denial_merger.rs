//! Keeps denials of callers who proved nothing from filling the disk: up to a rate each gets a line of its own, and beyond it they are
//! counted, in one line per second and kind.
//!
//! A client that can merely connect can cause millions of such records, and one line each would fill the disk. A client that
//! overheard a chain or an act can do the same. Therefore each origin has a rate, and all of them share a budget of bytes. The origin is the leaf agent
//! of a verified chain, the operator of a verified signature, or else the caller or address prefix. Records beyond the rate are counted
//! by origin, method, effect and reason. Those beyond the budget, or beyond the size of the table, are counted for all origins together.
//!
//! INVARIANT: such a record is either written by itself or counted in exactly one line. Nothing else is ever merged.
//!
//! Look next at `recorder.rs`, which decides when to write.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::model::limits::{
    UNVERIFIED_BYTES_BURST, UNVERIFIED_BYTES_PER_S, UNVERIFIED_CALLERS_TRACKED_MAX, UNVERIFIED_MERGE_INTERVAL_MS,
    UNVERIFIED_RECORDS_BURST, UNVERIFIED_RECORDS_PER_S, UNVERIFIED_TEXT_BYTES_MAX,
};
use crate::model::time::ClockReading;

use super::json_line;

/// The origin of a call, as far as origins are distinguished. A client can take any address in its own network, so addresses are
/// grouped by network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum CallerOrigin {
    /// An IPv4 network of 24 bits.
    V4([u8; 3]),
    /// An IPv6 network of 64 bits.
    V6([u8; 8]),
    /// A caller identified by name.
    Named(Box<str>),
    /// The leaf agent of a verified chain, which anybody may have sent.
    Agent(Box<str>),
    /// The operator of a verified signature, which anybody may have sent again.
    Operator(Box<str>),
    /// All callers together.
    Any,
}

impl CallerOrigin {
    /// The origin of a caller, which is given by its address, with or without a port, or by its name.
    pub(super) fn from_caller(caller: &str) -> Self {
        let address = caller.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| caller.parse::<IpAddr>());
        match address.map(|address| address.to_canonical()) {
            Ok(IpAddr::V4(address)) => {
                let [a, b, c, _] = address.octets();
                CallerOrigin::V4([a, b, c])
            }
            Ok(IpAddr::V6(address)) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                CallerOrigin::V6([a, b, c, d, e, f, g, h])
            }
            Err(_) => CallerOrigin::Named(json_line::truncate_text(caller, UNVERIFIED_TEXT_BYTES_MAX).into()),
        }
    }

    /// The address prefix, or `*` for all callers; a named origin has none.
    fn prefix(&self) -> Option<String> {
        match self {
            CallerOrigin::V4([a, b, c]) => Some(format!("{a}.{b}.{c}.0/24")),
            CallerOrigin::V6(bytes) => {
                let mut octets = [0; 16];
                octets.iter_mut().zip(bytes).for_each(|(octet, byte)| *octet = *byte);
                Some(format!("{}/64", IpAddr::from(octets)))
            }
            CallerOrigin::Named(_) | CallerOrigin::Agent(_) | CallerOrigin::Operator(_) => None,
            CallerOrigin::Any => Some("*".to_owned()),
        }
    }
}

/// The kind of record that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum MergedKind {
    /// Decisions that permit nothing.
    Decisions,
    /// Refused acts.
    Acts,
}

/// One record to be counted.
pub(super) struct MergeableRecord<'a> {
    pub(super) kind: MergedKind,
    pub(super) origin: CallerOrigin,
    pub(super) method: Cow<'static, str>,
    pub(super) effect: &'static str,
    pub(super) reason: &'static str,
    /// Empty for a refused act.
    pub(super) decision_id: &'a str,
    pub(super) time_unix_ns: i64,
}

/// The key of one line: denials with the same key are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct MergeKey {
    kind: MergedKind,
    origin: CallerOrigin,
    method: Cow<'static, str>,
    effect: &'static str,
    reason: &'static str,
}

/// The counts of one line.
#[derive(Clone, Debug, Default)]
struct MergeCount {
    count: u64,
    first_unix_ns: i64,
    last_unix_ns: i64,
    first_decision_id: String,
    last_decision_id: String,
}

/// A token bucket: an allowance that refills over time.
struct TokenBucket {
    left: i64,
    at: ClockReading,
    per_s: u64,
    burst: i64,
}

/// The rates, the budget, and the counts that are not written yet.
#[derive(Default)]
pub(super) struct DenialMerger {
    counts: HashMap<MergeKey, MergeCount>,
    rates: HashMap<CallerOrigin, TokenBucket>,
    /// When idle rates were last removed.
    forgot_at: Option<ClockReading>,
    byte_budget: Option<TokenBucket>,
    /// When the first of the pending counts was made.
    since: Option<ClockReading>,
}

impl DenialMerger {
    /// Whether a denial of that origin may have a line of its own. It counts against the rate; the caller must then
    /// [spend](Self::spend_bytes) its bytes.
    pub(super) fn admits(&mut self, origin: &CallerOrigin, now: ClockReading) -> bool {
        if self.byte_budget(now).left <= 0 {
            return false;
        }
        if self.rates.len() >= UNVERIFIED_CALLERS_TRACKED_MAX && !self.rates.contains_key(origin) {
            self.forget_idle_origins(now);
            if self.rates.len() >= UNVERIFIED_CALLERS_TRACKED_MAX {
                return false;
            }
        }
        let full = || TokenBucket::new_full(UNVERIFIED_RECORDS_PER_S, UNVERIFIED_RECORDS_BURST, now);
        let rate = self.rates.entry(origin.clone()).or_insert_with(full);
        rate.refill(now);
        let is_within = rate.left > 0;
        rate.left -= i64::from(is_within);
        is_within
    }

    /// Removes rates that are full again, because such an origin needs no entry. Runs at most once a second, because it visits
    /// every entry.
    fn forget_idle_origins(&mut self, now: ClockReading) {
        if self.forgot_at.is_some_and(|forgot| now.elapsed_ms_since(forgot) < UNVERIFIED_MERGE_INTERVAL_MS) {
            return;
        }
        self.forgot_at = Some(now);
        self.rates.retain(|_, rate| {
            rate.refill(now);
            rate.left < rate.burst
        });
    }

    /// Takes the bytes of a written line from the budget.
    pub(super) fn spend_bytes(&mut self, bytes: usize, now: ClockReading) {
        let budget = self.byte_budget(now);
        budget.left = budget.left.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Counts a record.
    pub(super) fn count_denial(&mut self, record: MergeableRecord<'_>, now: ClockReading) {
        self.since.get_or_insert(now);
        let MergeableRecord { kind, origin, method, effect, reason, decision_id, time_unix_ns } = record;
        let mut key = MergeKey { kind, origin, method, effect, reason };
        if self.counts.len() >= UNVERIFIED_CALLERS_TRACKED_MAX && !self.counts.contains_key(&key) {
            key = key.for_all_callers();
        }
        self.counts.entry(key).or_default().add(1, (time_unix_ns, decision_id), (time_unix_ns, decision_id));
    }

    fn add_count(&mut self, key: MergeKey, more: &MergeCount) {
        self.counts.entry(key).or_default().add_all(more);
    }

    /// Whether the pending counts are old enough to be written.
    pub(super) fn is_due(&self, now: ClockReading) -> bool {
        self.since.is_some_and(|since| now.elapsed_ms_since(since) >= UNVERIFIED_MERGE_INTERVAL_MS)
    }

    /// Number of denials that are counted but not written yet.
    pub(super) fn waiting_denials(&self) -> u64 {
        self.counts.values().map(|count| count.count).sum()
    }

    /// Appends the lines of the pending counts, as far as `out` may grow; counts without room stay pending. If the budget has no
    /// bytes for a line, its counts are merged into the line for all callers, of which there are few. Returns the number of
    /// lines.
    pub(super) fn write_lines(&mut self, node: &str, out: &mut Vec<u8>, bytes_max: usize, now: ClockReading) -> u64 {
        let mut lines = 0;
        let mut left: Vec<(MergeKey, MergeCount)> = self.counts.drain().collect();
        // Sorted, because the order of a hash table is arbitrary.
        left.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut for_all: Vec<(MergeKey, MergeCount)> = Vec::new();
        for (key, count) in left {
            if key.origin != CallerOrigin::Any
                && self.byte_budget(now).left > 0
                && self.put_line(&key, &count, node, out, bytes_max, now)
            {
                lines += 1;
                continue;
            }
            let merged_key = key.for_all_callers();
            match for_all.iter_mut().find(|(other, _)| *other == merged_key) {
                Some((_, sum)) => sum.add_all(&count),
                None => for_all.push((merged_key, count)),
            }
        }
        for (key, count) in for_all {
            match self.put_line(&key, &count, node, out, bytes_max, now) {
                true => lines += 1,
                false => self.add_count(key, &count),
            }
        }
        self.since = (!self.counts.is_empty()).then_some(now);
        lines
    }

    /// Appends one line if `out` has room for it. Returns whether it had.
    fn put_line(
        &mut self,
        key: &MergeKey,
        count: &MergeCount,
        node: &str,
        out: &mut Vec<u8>,
        bytes_max: usize,
        now: ClockReading,
    ) -> bool {
        let before = out.len();
        write_line(key, count, node, out);
        if out.len() > bytes_max {
            out.truncate(before);
            return false;
        }
        self.spend_bytes(out.len() - before, now);
        true
    }

    /// The refilled budget of bytes.
    fn byte_budget(&mut self, now: ClockReading) -> &mut TokenBucket {
        let budget =
            self.byte_budget.get_or_insert_with(|| TokenBucket::new_full(UNVERIFIED_BYTES_PER_S, UNVERIFIED_BYTES_BURST, now));
        budget.refill(now);
        budget
    }
}

impl MergeKey {
    /// The same key for all callers together. The method of an act is dropped, because the caller chose it.
    fn for_all_callers(&self) -> Self {
        let method = if self.kind == MergedKind::Acts { Cow::Borrowed("*") } else { self.method.clone() };
        Self { origin: CallerOrigin::Any, method, ..*self }
    }
}

impl MergeCount {
    /// Adds `count` denials, with the time and id of the first and of the last of them.
    fn add(&mut self, count: u64, first: (i64, &str), last: (i64, &str)) {
        let is_empty = self.count == 0;
        self.count = self.count.saturating_add(count);
        if is_empty || first.0 < self.first_unix_ns {
            self.first_unix_ns = first.0;
            first.1.clone_into(&mut self.first_decision_id);
        }
        if is_empty || last.0 >= self.last_unix_ns {
            self.last_unix_ns = last.0;
            last.1.clone_into(&mut self.last_decision_id);
        }
    }

    fn add_all(&mut self, more: &MergeCount) {
        let MergeCount { count, first_unix_ns, last_unix_ns, first_decision_id, last_decision_id } = more;
        self.add(*count, (*first_unix_ns, first_decision_id), (*last_unix_ns, last_decision_id));
    }
}

impl TokenBucket {
    fn new_full(per_s: u64, burst: u64, now: ClockReading) -> Self {
        let burst = i64::try_from(burst).unwrap_or(i64::MAX);
        Self { left: burst, at: now, per_s, burst }
    }

    fn refill(&mut self, now: ClockReading) {
        let more = now.elapsed_ms_since(self.at).saturating_mul(self.per_s) / 1_000;
        // Fractions of a unit are kept, because the time of the last refill stays.
        if more > 0 {
            self.left = self.left.saturating_add(i64::try_from(more).unwrap_or(i64::MAX)).min(self.burst);
            self.at = now;
        }
    }
}

fn write_line(key: &MergeKey, count: &MergeCount, node: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"kind\":\"merged\"");
    json_line::write_number_member(out, "time_unix_ns", count.last_unix_ns);
    json_line::write_text_member(out, "node", node);
    let of = match key.kind {
        MergedKind::Decisions => "decision",
        MergedKind::Acts => "act",
    };
    json_line::write_text_member(out, "of", of);
    json_line::write_text_member(out, "method", &key.method);
    json_line::write_text_member(out, "effect", key.effect);
    json_line::write_text_member(out, "reason", key.reason);
    match &key.origin {
        CallerOrigin::Named(name) => json_line::write_text_member(out, "gateway", name),
        CallerOrigin::Agent(agent) => json_line::write_text_member(out, "agent", agent),
        CallerOrigin::Operator(operator) => json_line::write_text_member(out, "operator", operator),
        CallerOrigin::V4(_) | CallerOrigin::V6(_) | CallerOrigin::Any => {}
    }
    json_line::write_optional_member(out, "prefix", key.origin.prefix().as_deref());
    json_line::write_number_member(out, "count", count.count);
    json_line::write_number_member(out, "first_unix_ns", count.first_unix_ns);
    json_line::write_number_member(out, "last_unix_ns", count.last_unix_ns);
    let ids = [("first_decision_id", &count.first_decision_id), ("last_decision_id", &count.last_decision_id)];
    for (member, id) in ids {
        json_line::write_optional_member(out, member, Some(id.as_str()).filter(|id| !id.is_empty()));
    }
    out.extend_from_slice(b"}\n");
}
