//! Merges denials of unverified callers: some are recorded one by one, the others are counted, one line per second and kind.
//!
//! A client that can merely connect can cause millions of such denials, and one record each would fill the disk. Therefore each
//! caller and address prefix has a rate, and all of them share a budget of bytes. Denials beyond the rate are counted by caller,
//! prefix, method and reason. Denials beyond the budget, or beyond the size of the table, are counted by method and reason alone.
//!
//! INVARIANT: a denial is either recorded by itself or counted in exactly one line. Nothing else is ever merged.
//!
//! Look next at `recorder.rs`, which decides when to write.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use crate::model::limits::{
    STRANGER_BYTES_BURST, STRANGER_BYTES_PER_S, STRANGER_MERGE_MS, STRANGER_RECORDS_BURST, STRANGER_RECORDS_PER_S,
    STRANGER_TEXT_BYTES_MAX, STRANGERS_KNOWN_MAX,
};
use crate::model::time::Now;

use super::line;

/// The origin of a call, as far as origins are distinguished. A client can take any address in its own network, so addresses are
/// grouped by network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Origin {
    /// An IPv4 network of 24 bits.
    V4([u8; 3]),
    /// An IPv6 network of 64 bits.
    V6([u8; 8]),
    /// A caller identified by name.
    Named(Box<str>),
    /// All callers together.
    Any,
}

impl Origin {
    /// The origin of a caller, which is given by its address, with or without a port, or by its name.
    pub(super) fn of(caller: &str) -> Self {
        let address = caller.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| caller.parse::<IpAddr>());
        match address.map(|address| address.to_canonical()) {
            Ok(IpAddr::V4(address)) => {
                let [a, b, c, _] = address.octets();
                Origin::V4([a, b, c])
            }
            Ok(IpAddr::V6(address)) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Origin::V6([a, b, c, d, e, f, g, h])
            }
            Err(_) => Origin::Named(line::capped(caller, STRANGER_TEXT_BYTES_MAX).into()),
        }
    }

    /// The address prefix, or `*` for all callers; a named caller has none.
    fn prefix(&self) -> Option<String> {
        match self {
            Origin::V4([a, b, c]) => Some(format!("{a}.{b}.{c}.0/24")),
            Origin::V6(bytes) => {
                let mut octets = [0; 16];
                octets.iter_mut().zip(bytes).for_each(|(octet, byte)| *octet = *byte);
                Some(format!("{}/64", IpAddr::from(octets)))
            }
            Origin::Named(_) => None,
            Origin::Any => Some("*".to_owned()),
        }
    }
}

/// The kind of record that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Of {
    /// Denied decisions.
    Decisions,
    /// Refused acts.
    Acts,
}

/// One denial to be counted.
pub(super) struct Denial<'a> {
    pub(super) of: Of,
    pub(super) origin: Origin,
    pub(super) method: Cow<'static, str>,
    pub(super) reason: &'static str,
    /// Empty for a refused act.
    pub(super) decision_id: &'a str,
    pub(super) time_unix_ns: i64,
}

/// The key of one line: denials with the same key are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    of: Of,
    origin: Origin,
    method: Cow<'static, str>,
    reason: &'static str,
}

/// The counts of one line.
#[derive(Clone, Debug, Default)]
struct Count {
    count: u64,
    first_unix_ns: i64,
    last_unix_ns: i64,
    first_decision_id: String,
    last_decision_id: String,
}

/// A token bucket: an allowance that refills over time.
struct Allowance {
    left: i64,
    at: Now,
    per_s: u64,
    burst: i64,
}

/// The rates, the budget, and the counts that are not written yet.
#[derive(Default)]
pub(super) struct Merger {
    counts: HashMap<Key, Count>,
    rates: HashMap<Origin, Allowance>,
    /// When idle rates were last removed.
    forgot: Option<Now>,
    bytes: Option<Allowance>,
    /// When the first of the pending counts was made.
    since: Option<Now>,
}

impl Merger {
    /// Whether a denial of that origin may have a line of its own. It counts against the rate; the caller must then
    /// [spend](Self::spend) its bytes.
    pub(super) fn admits(&mut self, origin: &Origin, now: Now) -> bool {
        if self.bytes(now).left <= 0 {
            return false;
        }
        if self.rates.len() >= STRANGERS_KNOWN_MAX && !self.rates.contains_key(origin) {
            self.forget(now);
            if self.rates.len() >= STRANGERS_KNOWN_MAX {
                return false;
            }
        }
        let full = || Allowance::full(STRANGER_RECORDS_PER_S, STRANGER_RECORDS_BURST, now);
        let rate = self.rates.entry(origin.clone()).or_insert_with(full);
        rate.fill(now);
        let is_within = rate.left > 0;
        rate.left -= i64::from(is_within);
        is_within
    }

    /// Removes rates that are full again, because such an origin needs no entry. Runs at most once a second, because it visits
    /// every entry.
    fn forget(&mut self, now: Now) {
        if self.forgot.is_some_and(|forgot| now.ms_since(forgot) < STRANGER_MERGE_MS) {
            return;
        }
        self.forgot = Some(now);
        self.rates.retain(|_, rate| {
            rate.fill(now);
            rate.left < rate.burst
        });
    }

    /// Takes the bytes of a written line from the budget.
    pub(super) fn spend(&mut self, bytes: usize, now: Now) {
        let budget = self.bytes(now);
        budget.left = budget.left.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Counts a denial.
    pub(super) fn count(&mut self, denial: Denial<'_>, now: Now) {
        self.since.get_or_insert(now);
        let Denial { of, origin, method, reason, decision_id, time_unix_ns } = denial;
        let mut key = Key { of, origin, method, reason };
        if self.counts.len() >= STRANGERS_KNOWN_MAX && !self.counts.contains_key(&key) {
            key = key.for_all();
        }
        self.counts.entry(key).or_default().add(1, (time_unix_ns, decision_id), (time_unix_ns, decision_id));
    }

    fn add(&mut self, key: Key, more: &Count) {
        self.counts.entry(key).or_default().add_all(more);
    }

    /// Whether the pending counts are old enough to be written.
    pub(super) fn is_due(&self, now: Now) -> bool {
        self.since.is_some_and(|since| now.ms_since(since) >= STRANGER_MERGE_MS)
    }

    /// Number of denials that are counted but not written yet.
    pub(super) fn waiting(&self) -> u64 {
        self.counts.values().map(|count| count.count).sum()
    }

    /// Appends the lines of the pending counts, as far as `out` may grow; counts without room stay pending. If the budget has no
    /// bytes for a line, its counts are merged into the line for all callers, of which there are few. Returns the number of
    /// lines.
    pub(super) fn write(&mut self, node: &str, out: &mut Vec<u8>, bytes_max: usize, now: Now) -> u64 {
        let mut lines = 0;
        let mut left: Vec<(Key, Count)> = self.counts.drain().collect();
        // Sorted, because the order of a hash table is arbitrary.
        left.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut for_all: Vec<(Key, Count)> = Vec::new();
        for (key, count) in left {
            if key.origin != Origin::Any && self.bytes(now).left > 0 && self.put(&key, &count, node, out, bytes_max, now) {
                lines += 1;
                continue;
            }
            let wide = key.for_all();
            match for_all.iter_mut().find(|(other, _)| *other == wide) {
                Some((_, sum)) => sum.add_all(&count),
                None => for_all.push((wide, count)),
            }
        }
        for (key, count) in for_all {
            match self.put(&key, &count, node, out, bytes_max, now) {
                true => lines += 1,
                false => self.add(key, &count),
            }
        }
        self.since = (!self.counts.is_empty()).then_some(now);
        lines
    }

    /// Appends one line if `out` has room for it. Returns whether it had.
    fn put(&mut self, key: &Key, count: &Count, node: &str, out: &mut Vec<u8>, bytes_max: usize, now: Now) -> bool {
        let before = out.len();
        write_line(key, count, node, out);
        if out.len() > bytes_max {
            out.truncate(before);
            return false;
        }
        self.spend(out.len() - before, now);
        true
    }

    /// The refilled budget of bytes.
    fn bytes(&mut self, now: Now) -> &mut Allowance {
        let budget = self.bytes.get_or_insert_with(|| Allowance::full(STRANGER_BYTES_PER_S, STRANGER_BYTES_BURST, now));
        budget.fill(now);
        budget
    }
}

impl Key {
    /// The same key for all callers together. The method of an act is dropped, because the caller chose it.
    fn for_all(&self) -> Self {
        let method = if self.of == Of::Acts { Cow::Borrowed("*") } else { self.method.clone() };
        Self { origin: Origin::Any, method, ..*self }
    }
}

impl Count {
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

    fn add_all(&mut self, more: &Count) {
        let Count { count, first_unix_ns, last_unix_ns, first_decision_id, last_decision_id } = more;
        self.add(*count, (*first_unix_ns, first_decision_id), (*last_unix_ns, last_decision_id));
    }
}

impl Allowance {
    fn full(per_s: u64, burst: u64, now: Now) -> Self {
        let burst = i64::try_from(burst).unwrap_or(i64::MAX);
        Self { left: burst, at: now, per_s, burst }
    }

    fn fill(&mut self, now: Now) {
        let more = now.ms_since(self.at).saturating_mul(self.per_s) / 1_000;
        // Fractions of a unit are kept, because the time of the last refill stays.
        if more > 0 {
            self.left = self.left.saturating_add(i64::try_from(more).unwrap_or(i64::MAX)).min(self.burst);
            self.at = now;
        }
    }
}

fn write_line(key: &Key, count: &Count, node: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"kind\":\"merged\"");
    line::number_member(out, "time_unix_ns", count.last_unix_ns);
    line::text_member(out, "node", node);
    let (of, effect) = match key.of {
        Of::Decisions => ("decision", "DENY"),
        Of::Acts => ("act", "REFUSED"),
    };
    line::text_member(out, "of", of);
    line::text_member(out, "method", &key.method);
    line::text_member(out, "effect", effect);
    line::text_member(out, "reason", key.reason);
    if let Origin::Named(name) = &key.origin {
        line::text_member(out, "gateway", name);
    }
    line::optional_member(out, "prefix", key.origin.prefix().as_deref());
    line::number_member(out, "count", count.count);
    line::number_member(out, "first_unix_ns", count.first_unix_ns);
    line::number_member(out, "last_unix_ns", count.last_unix_ns);
    let ids = [("first_decision_id", &count.first_decision_id), ("last_decision_id", &count.last_decision_id)];
    for (member, id) in ids {
        line::optional_member(out, member, Some(id.as_str()).filter(|id| !id.is_empty()));
    }
    out.extend_from_slice(b"}\n");
}
