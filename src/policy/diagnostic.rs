//! Diagnostics: a mistake in a policy, its position, and a suggestion.
//!
//! A diagnostic is data for `policy check`, `apply` and editors. This file does not look for mistakes. Look next at
//! `validate.rs`, which does.

use std::fmt;

/// The maximum number of diagnostics of one run. A longer list helps no reader.
pub const DIAGNOSTICS_MAX: usize = 1000;

/// The maximum number of names that are compared for a suggestion. A fleet of a million agents is not searched for one typo.
const CANDIDATES_MAX: usize = 20_000;

/// Whether a diagnostic refuses the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The policy is refused.
    Error,
    /// The policy is accepted but probably does not mean what its author intended.
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

/// A position in a file. Lines and columns are 1-based, and columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourcePosition {
    /// The line.
    pub line: u32,
    /// The column.
    pub column: u32,
}

impl SourcePosition {
    /// The start of a file, or of a document without a file.
    pub const START: SourcePosition = SourcePosition { line: 1, column: 1 };
}

/// One mistake, displayed as `agents.yaml:12:5: error: unknown key `aloww` (did you mean `allow`?)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// The file, relative to the policy folder. Empty if there is no file.
    pub path: String,
    /// The line, 1-based; 0 for the folder as a whole.
    pub line: u32,
    /// The column, 1-based.
    pub column: u32,
    /// The mistake: one line, with user input in backticks.
    pub message: String,
    /// A suggestion, if there is one.
    pub help: Option<String>,
}

impl Diagnostic {
    /// Creates a diagnostic without a suggestion.
    pub fn new(severity: Severity, path: &str, at: SourcePosition, message: impl Into<String>) -> Self {
        Self { severity, path: path.to_owned(), line: at.line, column: at.column, message: message.into(), help: None }
    }

    /// Creates a diagnostic about the folder as a whole.
    pub fn for_folder(severity: Severity, message: impl Into<String>) -> Self {
        Self::new(severity, "", SourcePosition { line: 0, column: 0 }, message)
    }

    /// Sets the suggestion.
    pub fn with_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    /// Whether the diagnostic refuses the policy.
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

/// Sorts diagnostics by file and position, and drops duplicates and those beyond the limit.
pub(super) fn sort_and_limit(mut diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
    diagnostics.sort_by(|a, b| {
        (&a.path, a.line, a.column, a.severity, &a.message).cmp(&(&b.path, b.line, b.column, b.severity, &b.message))
    });
    diagnostics.dedup();
    // INVARIANT: truncation never loses the only error.
    if diagnostics.len() > DIAGNOSTICS_MAX {
        diagnostics.sort_by_key(|diagnostic| diagnostic.severity);
        diagnostics.truncate(DIAGNOSTICS_MAX);
    }
    diagnostics
}

/// ``did you mean `x`?`` with the candidate nearest to `name`; `None` if no candidate is near.
pub(super) fn suggest_name<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest_name(name, candidates).map(|candidate| format!("did you mean `{candidate}`?"))
}

/// The candidate nearest to `name`, by edit distance. The distance may be 1 for names of up to 3 characters, 2 for up to 11, else
/// 3. Only the first 20,000 candidates are compared.
pub fn nearest_name<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
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
        .map(|candidate| (edit_distance(&letters, candidate), candidate))
        .filter(|(distance, _)| *distance <= near)
        .min()
        .map(|(_, candidate)| candidate)
}

/// The edit distance, where a swap of two neighbours counts as one edit (optimal string alignment).
fn edit_distance(a: &[char], b: &str) -> usize {
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
        let plain =
            Diagnostic::new(Severity::Error, "agents.yaml", SourcePosition { line: 12, column: 5 }, "unknown key `aloww`");
        assert_eq!(plain.to_string(), "agents.yaml:12:5: error: unknown key `aloww`");
        let help = suggest_name("aloww", ["deny", "allow"]);
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
            assert_eq!(edit_distance(&a.chars().collect::<Vec<_>>(), b), expected, "{a} {b}");
        }
        assert_eq!(
            suggest_name("payments/refnud", ["payments/refund", "payments/read"]).unwrap(),
            "did you mean `payments/refund`?"
        );
        assert_eq!(suggest_name("x", ["completely", "different"]), None);
    }

    #[test]
    fn an_error_survives_the_limit() {
        let warning = |line| Diagnostic::new(Severity::Warning, "a", SourcePosition { line, column: 1 }, "w");
        let mut all: Vec<_> = (1..=2000).map(warning).collect();
        all.push(Diagnostic::new(Severity::Error, "z", SourcePosition::START, "e"));
        let kept = sort_and_limit(all);
        assert_eq!(kept.len(), DIAGNOSTICS_MAX);
        assert!(kept.iter().any(Diagnostic::is_error));
    }
}
