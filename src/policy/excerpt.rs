//! Shows the source line of a diagnostic: the part to underline, a window of a long line, and no character that a terminal obeys.
//!
//! This file maps text to text. It adds no colour and opens no file. A source line is outside input, so characters that move the
//! cursor, or hide or reorder text, are replaced. Look next at [`diagnostic`](super::diagnostic), and at `cli` for the colours.

use std::collections::HashMap;

use super::source::SourceFile;

/// The maximum number of columns of a source line. A longer line is cut around the underlined part.
const WINDOW_COLUMNS: usize = 110;

/// The columns kept before the underlined part of a cut line.
const BEFORE_COLUMNS: usize = 30;

/// The replacement of a tab.
const TAB: &str = "    ";

/// The lines of the source files, split once.
#[derive(Debug, Default)]
pub struct SourceLines<'a> {
    lines: HashMap<&'a str, Vec<&'a str>>,
}

/// A source line with an underlined part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The line, or the part of it that fits. It is safe to print.
    pub text: String,
    /// The columns of `text` before the underlined part.
    pub offset: usize,
    /// The underlined columns, at least one.
    pub width: usize,
    /// The source column after the last underlined character; 1-based, counts characters.
    pub end_column: u32,
}

impl<'a> SourceLines<'a> {
    /// Splits some files into lines. A file that is not UTF-8 has none.
    pub fn new(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let lines = files.into_iter().filter_map(|(path, content)| Some((path, split_lines(std::str::from_utf8(content).ok()?))));
        Self { lines: lines.collect() }
    }

    /// Splits the files of a policy folder into lines.
    pub fn from_files(files: &'a [SourceFile]) -> Self {
        Self::new(files.iter().map(|file| (file.path.as_str(), file.content.as_slice())))
    }

    /// The excerpt for a position; `None` if the file or line does not exist or the line is empty.
    pub fn excerpt(&self, path: &str, line: u32, column: u32) -> Option<Excerpt> {
        let line = self.lines.get(path)?.get(usize::try_from(line.checked_sub(1)?).ok()?)?;
        excerpt_line(line, column)
    }
}

/// A text in a form that is safe to print, on one line.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    text.chars().for_each(|character| push_printable(character, &mut shown));
    shown
}

/// Splits a text into lines as YAML does: a line ends at `\n`, `\r\n` or `\r`. A byte order mark is not part of the first line.
fn split_lines(text: &str) -> Vec<&str> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let pieces = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    pieces.flat_map(|line| line.split('\r')).collect()
}

/// The excerpt of a line. A column beyond the end counts as the end.
fn excerpt_line(line: &str, column: u32) -> Option<Excerpt> {
    let trimmed: Vec<char> = line.trim_end().chars().collect();
    if trimmed.is_empty() {
        return None;
    }
    let wanted = usize::try_from(column.saturating_sub(1)).unwrap_or(usize::MAX);
    let start = wanted.min(trimmed.len());
    let length = token_length(trimmed.get(start..).unwrap_or_default());
    let end = (start + length).min(trimmed.len());
    let columns = |characters: &[char]| characters.iter().map(|character| display_width(*character)).sum::<usize>();
    let part = |from: usize, to: usize| trimmed.get(from..to).unwrap_or_default();

    // The window, in characters. A short line is shown whole. A long one is shown from some columns before the underlined part,
    // as far as it fits.
    let (mut first, mut last) = (0, trimmed.len());
    if columns(&trimmed) > WINDOW_COLUMNS {
        first = start;
        while first > 0 && columns(part(first - 1, start)) <= BEFORE_COLUMNS {
            first -= 1;
        }
        last = first;
        let mut taken = 0;
        while let Some(character) = trimmed.get(last).filter(|character| taken + display_width(**character) <= WINDOW_COLUMNS) {
            taken += display_width(*character);
            last += 1;
        }
    }
    let mut text = String::new();
    if first > 0 {
        text.push('…');
    }
    part(first, last).iter().for_each(|character| push_printable(*character, &mut text));
    if last < trimmed.len() {
        text.push('…');
    }
    Some(Excerpt {
        text,
        offset: columns(part(first, start)) + usize::from(first > 0),
        width: columns(part(start, end.min(last))).max(1),
        end_column: u32::try_from(start + length.max(1) + 1).unwrap_or(u32::MAX),
    })
}

/// The number of characters of the key, scalar or collection at the start of a text. It ends with the line at the latest.
fn token_length(text: &[char]) -> usize {
    let is_break = |character: Option<&char>| character.is_none_or(|character| character.is_whitespace());
    match text.first() {
        None => 0,
        Some(quote @ ('"' | '\'')) => quoted_length(text, *quote),
        Some('[' | '{') => collection_length(text),
        // For a list item or a block scalar, the first character is enough.
        Some('-' | '|' | '>') if is_break(text.get(1)) => 1,
        Some(_) => {
            let mut open = 0usize;
            let ends = text.iter().enumerate().position(|(index, character)| {
                let next = text.get(index + 1);
                match character {
                    '[' | '{' => open += 1,
                    ']' | '}' if open > 0 => open -= 1,
                    ']' | '}' => return true,
                    ':' | ',' => return is_break(next) || (*character == ',' && open == 0),
                    '#' => return index > 0 && text.get(index - 1).is_some_and(|before| before.is_whitespace()),
                    _ => {}
                }
                false
            });
            let plain = text.get(..ends.unwrap_or(text.len())).unwrap_or_default();
            plain.iter().rposition(|character| !character.is_whitespace()).map_or(1, |last| last + 1)
        }
    }
}

/// The length of a quoted scalar with its quotes.
fn quoted_length(text: &[char], quote: char) -> usize {
    let mut index = 1;
    while let Some(character) = text.get(index) {
        match character {
            '\\' if quote == '"' => index += 1,
            _ if *character == quote && quote == '\'' && text.get(index + 1) == Some(&'\'') => index += 1,
            _ if *character == quote => return index + 1,
            _ => {}
        }
        index += 1;
    }
    text.len()
}

/// The length of a flow collection with its brackets.
fn collection_length(text: &[char]) -> usize {
    let (mut open, mut index) = (0usize, 0);
    while let Some(character) = text.get(index) {
        match character {
            '[' | '{' => open += 1,
            ']' | '}' => open -= 1,
            // A quote starts a string only where a scalar may start.
            '"' | '\'' if text.get(index - 1).is_some_and(|before| before.is_whitespace() || "[{,:".contains(*before)) => {
                index += quoted_length(text.get(index..).unwrap_or_default(), *character).saturating_sub(1);
            }
            _ => {}
        }
        if open == 0 {
            return index + 1;
        }
        index += 1;
    }
    text.len()
}

/// Appends a character in a form that is safe to print.
fn push_printable(character: char, text: &mut String) {
    match character {
        '\t' => text.push_str(TAB),
        _ if is_unprintable(character) => text.push('\u{fffd}'),
        _ => text.push(character),
    }
}

/// Whether a character moves the cursor or reorders text so that it reads differently from its meaning (CVE-2021-42574).
fn is_unprintable(character: char) -> bool {
    character.is_control() || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The columns of a character on a terminal, precise enough for an underline.
fn display_width(character: char) -> usize {
    match character {
        '\t' => TAB.len(),
        '\u{300}'..='\u{36f}' | '\u{200b}'..='\u{200d}' | '\u{fe00}'..='\u{fe0f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line, a column, and the expected underline.
    fn check(line: &str, column: u32, expected: &str) {
        let found = excerpt_line(line, column).unwrap();
        let shown = format!("{}{}", " ".repeat(found.offset), "^".repeat(found.width));
        assert_eq!(format!("{}\n{shown}", found.text), expected, "{line} {column}");
    }

    #[test]
    fn what_is_underlined() {
        for (line, column, expected) in [
            ("aloww: [crm/*]", 1, "aloww: [crm/*]\n^^^^^"),
            ("id: sales # who", 5, "id: sales # who\n    ^^^^^"),
            ("id: two words  # who", 5, "id: two words  # who\n    ^^^^^^^^^"),
            ("id: a#b", 5, "id: a#b\n    ^^^"),
            ("allow: [crm/raed, x]", 9, "allow: [crm/raed, x]\n        ^^^^^^^^"),
            ("allow: [x, crm/raed]", 12, "allow: [x, crm/raed]\n           ^^^^^^^^"),
            ("- crm/read: {args: {a: 1}}", 3, "- crm/read: {args: {a: 1}}\n  ^^^^^^^^"),
            ("- crm/read: {args: {a: 1}}", 13, "- crm/read: {args: {a: 1}}\n            ^^^^^^^^^^^^^^"),
            ("- crm/read: {args: {a: 1}}", 24, "- crm/read: {args: {a: 1}}\n                       ^"),
            ("- crm/read", 1, "- crm/read\n^"),
            ("id: https://i:80/x", 5, "id: https://i:80/x\n    ^^^^^^^^^^^^^^"),
            ("id: 'it''s', b", 5, "id: 'it''s', b\n    ^^^^^^^"),
            (r#"id: "a\"b" c"#, 5, "id: \"a\\\"b\" c\n    ^^^^^^"),
            ("id: 'open", 5, "id: 'open\n    ^^^^^"),
            ("a: ['x]', {b: \"}\"}] # c", 4, "a: ['x]', {b: \"}\"}] # c\n   ^^^^^^^^^^^^^^^^"),
            ("a: [it's, b] c", 4, "a: [it's, b] c\n   ^^^^^^^^^"),
            ("a: [1, 2", 4, "a: [1, 2\n   ^^^^^"),
            ("]", 1, "]\n^"),
            ("when: |", 7, "when: |\n      ^"),
            // Beyond the end of the line, where something is missing.
            ("allow: [", 9, "allow: [\n        ^"),
            ("allow: [   ", 99, "allow: [\n        ^"),
            ("\tid: a\tb", 6, "    id: a    b\n        ^^^^^^"),
            ("é: ü, x", 4, "é: ü, x\n   ^"),
            ("名前: 値", 5, "名前: 値\n      ^^"),
        ] {
            check(line, column, expected);
        }
        assert_eq!(excerpt_line("  ", 1), None);
        assert_eq!(excerpt_line("allow: [crm/raed]", 9).unwrap().end_column, 17);
        assert_eq!(excerpt_line("é: ü", 4).unwrap().end_column, 5);
    }

    #[test]
    fn a_long_line_is_cut_around_what_is_underlined() {
        let long = format!("{} wrong {}", "a".repeat(5000), "b".repeat(5000));
        let found = excerpt_line(&long, 5002).unwrap();
        assert_eq!(found.text.chars().count(), WINDOW_COLUMNS + 2);
        assert!(found.text.starts_with('…') && found.text.ends_with('…'));
        assert_eq!(found.offset, BEFORE_COLUMNS + 1);
        assert!(found.offset + found.width <= WINDOW_COLUMNS + 1);
        assert_eq!(found.text.chars().nth(found.offset), Some('w'));
        let found = excerpt_line(&"値".repeat(5000), 4000).unwrap();
        assert_eq!((found.offset, found.width), (BEFORE_COLUMNS + 1, WINDOW_COLUMNS - BEFORE_COLUMNS));
        let end = excerpt_line(&"a ".repeat(5000), u32::MAX).unwrap();
        assert_eq!((end.offset, end.width), (BEFORE_COLUMNS + 1, 1));
    }

    #[test]
    fn a_terminal_is_shown_nothing_it_obeys() {
        check("id: \u{1b}[31mred", 5, "id: \u{fffd}[31mred\n    ^^^^^^^^");
        check("id: a\u{202e}b", 5, "id: a\u{fffd}b\n    ^^^");
    }

    #[test]
    fn files_and_lines() {
        let files = [("a.yaml", "\u{feff}one\r\ntwo\rthree\n".as_bytes()), ("b.yaml", b"\xff".as_slice())];
        let sources = SourceLines::new(files);
        let text = |path: &str, line: u32| sources.excerpt(path, line, 1).map(|found| found.text);
        assert_eq!(text("a.yaml", 1).as_deref(), Some("one"));
        assert_eq!(text("a.yaml", 2).as_deref(), Some("two"));
        assert_eq!(text("a.yaml", 3).as_deref(), Some("three"));
        for (path, line) in [("a.yaml", 4), ("a.yaml", 5), ("a.yaml", 0), ("b.yaml", 1), ("c.yaml", 1)] {
            assert_eq!(text(path, line), None, "{path} {line}");
        }
    }
}
