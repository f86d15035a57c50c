//! What is wrong with a policy, where, and what was probably meant.
//!
//! A diagnostic is data for `policy check`, `apply` and editors alike; nothing here decides what is wrong. Look next at
//! `validate.rs`.

use std::fmt;

/// Diagnostics of one run; what comes after tells no one anything.
pub const DIAGNOSTICS_MAX: usize = 1000;

/// Names compared for a suggestion; a fleet of a million agents is not searched for one typo.
const CANDIDATES_MAX: usize = 20_000;

/// Whether a policy with it may be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The policy is refused.
    Error,
    /// The policy is taken, but probably does not say what was meant.
    Warning,
}

impl Severity {
    /// The name in JSON and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// A place in a file; both are 1-based, columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl Position {
    /// Where a file, or a document without a file, begins.
    pub const START: Position = Position { line: 1, column: 1 };
}

/// One finding, written `agents.yaml:12:5: error: unknown key `aloww` (did you mean `allow`?)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// The file, relative to the policy folder; empty for what has no file.
    pub path: String,
    /// 1-based; 0 where the folder as a whole is meant.
    pub line: u32,
    /// 1-based.
    pub column: u32,
    /// What is wrong: one line, user input in backticks.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// A finding.
    pub fn new(severity: Severity, path: &str, at: Position, message: impl Into<String>) -> Self {
        Self { severity, path: path.to_owned(), line: at.line, column: at.column, message: message.into(), help: None }
    }

    /// A finding about a folder as a whole.
    pub fn of_folder(severity: Severity, message: impl Into<String>) -> Self {
        Self::new(severity, "", Position { line: 0, column: 0 }, message)
    }

    /// The same finding with advice, if there is any.
    pub fn with_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    /// Whether it refuses the policy.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let path = if self.path.is_empty() { "(stored)" } else { &self.path };
        match self.line {
            0 => write!(f, "{severity}: {}", self.message)?,
            line => write!(f, "{path}:{line}:{}: {severity}: {}", self.column, self.message)?,
        }
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

/// Sorts findings as a reader goes through the files and drops what is over the limit or said twice.
pub(super) fn arranged(mut diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
    diagnostics.sort_by(|a, b| {
        (&a.path, a.line, a.column, a.severity, &a.message).cmp(&(&b.path, b.line, b.column, b.severity, &b.message))
    });
    diagnostics.dedup();
    // INVARIANT: cutting the list never loses the only error.
    if diagnostics.len() > DIAGNOSTICS_MAX {
        diagnostics.sort_by_key(|diagnostic| diagnostic.severity);
        diagnostics.truncate(DIAGNOSTICS_MAX);
    }
    diagnostics
}

/// ``did you mean `x`?`` for the candidate nearest to `name`, if one is near.
pub(super) fn suggestion<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(name, candidates).map(|candidate| format!("did you mean `{candidate}`?"))
}

/// The candidate nearest to `name`, if one is near: one letter away in a name of up to 3, two in one of up to 11, else three. Of
/// many candidates only the first 20,000 are compared.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let letters: Vec<char> = name.chars().take(128).collect();
    let near = match letters.len() {
        0..=3 => 1,
        4..=11 => 2,
        _ => 3,
    };
    candidates
        .into_iter()
        .take(CANDIDATES_MAX)
        .filter(|candidate| candidate.len().abs_diff(name.len()) <= 4 * near)
        .map(|candidate| (distance(&letters, candidate), candidate))
        .filter(|(distance, _)| *distance <= near)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edit distance where swapping two neighbours counts one (optimal string alignment).
fn distance(a: &[char], b: &str) -> usize {
    let width = a.len() + 1;
    let mut before_last: Vec<usize> = vec![0; width];
    let mut last: Vec<usize> = (0..width).collect();
    let mut previous = None;
    for (row, letter) in b.chars().take(128).enumerate() {
        let mut current = Vec::with_capacity(width);
        current.push(row + 1);
        for (column, other) in a.iter().enumerate() {
            let at = |values: &[usize], index: usize| values.get(index).copied().unwrap_or(usize::MAX / 2);
            let substituted = at(&last, column) + usize::from(*other != letter);
            let mut best = substituted.min(at(&last, column + 1) + 1).min(at(&current, column) + 1);
            let swapped = column.checked_sub(1).filter(|left| a.get(*left) == Some(&letter) && previous == Some(*other));
            if let Some(left) = swapped {
                best = best.min(at(&before_last, left) + 1);
            }
            current.push(best);
        }
        before_last = std::mem::replace(&mut last, current);
        previous = Some(letter);
    }
    last.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display() {
        let plain = Diagnostic::new(Severity::Error, "agents.yaml", Position { line: 12, column: 5 }, "unknown key `aloww`");
        assert_eq!(plain.to_string(), "agents.yaml:12:5: error: unknown key `aloww`");
        let help = suggestion("aloww", ["deny", "allow"]);
        assert_eq!(plain.with_help(help).to_string(), "agents.yaml:12:5: error: unknown key `aloww` (did you mean `allow`?)");
    }

    #[test]
    fn distances() {
        for (a, b, expected) in [
            ("", "", 0),
            ("a", "", 1),
            ("", "ab", 2),
            ("abc", "abc", 0),
            ("abc", "acb", 1),
            ("allow", "aloww", 2),
            ("crm", "hr", 2),
        ] {
            assert_eq!(distance(&a.chars().collect::<Vec<_>>(), b), expected, "{a} {b}");
        }
        assert_eq!(
            suggestion("payments/refnud", ["payments/refund", "payments/read"]).unwrap(),
            "did you mean `payments/refund`?"
        );
        assert_eq!(suggestion("x", ["completely", "different"]), None);
    }

    #[test]
    fn an_error_survives_the_limit() {
        let warning = |line| Diagnostic::new(Severity::Warning, "a", Position { line, column: 1 }, "w");
        let mut all: Vec<_> = (1..=2000).map(warning).collect();
        all.push(Diagnostic::new(Severity::Error, "z", Position::START, "e"));
        let kept = arranged(all);
        assert_eq!(kept.len(), DIAGNOSTICS_MAX);
        assert!(kept.iter().any(Diagnostic::is_error));
    }
}
