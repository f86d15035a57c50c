//! Renders policy diagnostics for people: position, severity, message, the underlined source line, and the help.
//!
//! ```text
//! agents.yaml:12:3: error: unknown key `aloww`
//!    |
//! 12 |   aloww: [crm/*]
//!    |   ^^^^^
//!    = help: did you mean `allow`?
//! ```
//!
//! Editors and `grep` understand the format of the first line. Look next at `policy::excerpt`.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};

use super::output::{bold, paint};
use crate::policy::diagnostic::{Diagnostic, Severity};
use crate::policy::excerpt::{SourceLines, printable};

/// Most diagnostics shown to people. A script gets all of them.
const SHOWN_MAX: usize = 100;

/// Renders the diagnostics, errors first if there are more than can be shown. Empty if there are none.
pub(super) fn render(diagnostics: &[Diagnostic], sources: &SourceLines<'_>) -> String {
    let mut shown: Vec<&Diagnostic> = diagnostics.iter().collect();
    if shown.len() > SHOWN_MAX {
        // The sort is stable, so each severity keeps the order of its positions.
        shown.sort_by_key(|diagnostic| diagnostic.severity);
        shown.truncate(SHOWN_MAX);
    }
    let mut text = String::new();
    for diagnostic in &shown {
        text.push_str(&render_one(diagnostic, sources));
    }
    let left = diagnostics.len() - shown.len();
    if left > 0 {
        let _ = writeln!(text, "… and {left} more: `--json` lists them");
    }
    text
}

fn render_one(diagnostic: &Diagnostic, sources: &SourceLines<'_>) -> String {
    let color = match diagnostic.severity {
        Severity::Error => AnsiColor::Red,
        Severity::Warning => AnsiColor::Yellow,
    };
    let strong = Style::new().fg_color(Some(color.into())).bold();
    let quiet = Style::new().fg_color(Some(AnsiColor::Blue.into())).bold();
    let path = if diagnostic.path.is_empty() { "(stored)" } else { &diagnostic.path };
    // A diagnostic for a whole folder has no position.
    let location = match diagnostic.line {
        0 => String::new(),
        line => paint(&format!("{}:{line}:{}:", printable(path), diagnostic.column), bold()) + " ",
    };
    let severity = paint(&format!("{}:", diagnostic.severity.as_str()), strong);
    let mut text = format!("{location}{severity} {}\n", paint(&printable(&diagnostic.message), bold()));
    // Writing to a string cannot fail.
    let number = diagnostic.line.to_string();
    let margin = " ".repeat(number.len());
    if let Some(excerpt) = sources.excerpt(&diagnostic.path, diagnostic.line, diagnostic.column) {
        let bar = paint("|", quiet);
        let underline = format!("{}{}", " ".repeat(excerpt.offset), paint(&"^".repeat(excerpt.width), strong));
        let _ = write!(text, "{margin} {bar}\n{} {bar} {}\n{margin} {bar} {underline}\n", paint(&number, quiet), excerpt.text);
    }
    if let Some(help) = &diagnostic.help {
        let _ = writeln!(text, "{margin} {} {} {}", paint("=", quiet), paint("help:", bold()), printable(help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::diagnostic::SourcePosition;

    fn plain(diagnostics: &[Diagnostic], source: &str) -> String {
        let text = render(diagnostics, &SourceLines::new([("agents.yaml", source.as_bytes())]));
        anstream::adapter::strip_str(&text).to_string()
    }

    fn error(line: u32, column: u32) -> Diagnostic {
        Diagnostic::new(Severity::Error, "agents.yaml", SourcePosition { line, column }, "unknown key `aloww`")
    }

    #[test]
    fn the_line_is_shown_and_underlined() {
        let source = format!("{}  aloww: [crm/*]\n", "\n".repeat(11));
        let found = error(12, 3).with_help(Some("did you mean `allow`?".to_owned()));
        let expected = "\
agents.yaml:12:3: error: unknown key `aloww`
   |
12 |   aloww: [crm/*]
   |   ^^^^^
   = help: did you mean `allow`?
";
        assert_eq!(plain(std::slice::from_ref(&found), &source), expected);
        // Without the source file, only the first line can be shown.
        assert_eq!(plain(&[error(12, 3)], ""), "agents.yaml:12:3: error: unknown key `aloww`\n");
        assert!(render(&[found], &SourceLines::default()).contains("\u{1b}["));
    }

    /// A file name, a Cedar error or a help text may contain anything that its author wrote.
    #[test]
    fn a_terminal_is_shown_nothing_it_obeys() {
        let found = Diagnostic::new(Severity::Error, "a\u{1b}[2J.yaml", SourcePosition::START, "x\u{1b}]0;y\u{7}\nz");
        let text = render(&[found.with_help(Some("\u{202e}h".to_owned()))], &SourceLines::default());
        let plain = anstream::adapter::strip_str(&text).to_string();
        assert_eq!(plain, "a\u{fffd}[2J.yaml:1:1: error: x\u{fffd}]0;y\u{fffd}\u{fffd}z\n  = help: \u{fffd}h\n");
    }

    #[test]
    fn many_findings_stay_readable_and_errors_come_first() {
        let warning = |line| Diagnostic::new(Severity::Warning, "agents.yaml", SourcePosition { line, column: 1 }, "w");
        let many: Vec<Diagnostic> = (1..=500).map(warning).chain([error(501, 1)]).collect();
        let text = plain(&many, "");
        assert!(text.starts_with("agents.yaml:501:1: error"), "{text}");
        assert_eq!(text.lines().count(), SHOWN_MAX + 1);
        assert!(text.ends_with("… and 401 more: `--json` lists them\n"), "{text}");
    }
}
