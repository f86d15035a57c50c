//! Quotes commands for a shell, so that a command in a message can be pasted.

use super::visible_text::escape_for_terminal;

/// Quotes a word for a POSIX shell, with single quotes if needed. Characters that a terminal would hide or obey are escaped. A
/// word with such characters is then no longer the original: it is for people to read, not to run.
pub(super) fn quote_word(word: &str) -> String {
    let word = escape_for_terminal(word);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:@%+=,".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Quotes a whole command.
pub(super) fn quote_command<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(quote_word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_read_more() {
        let check = |word: &str, expected: &str| assert_eq!(quote_word(word), expected);
        check("spiffe://acme.example/agent/a", "spiffe://acme.example/agent/a");
        check("-AbC_9", "-AbC_9");
        check("", "''");
        check("leaked key", "'leaked key'");
        check("it's", r"'it'\''s'");
        check("$(reboot)", "'$(reboot)'");
        check("a*", "'a*'");
        check("a\u{1b}[2Kb", r"'a\u{1b}[2Kb'");
        assert_eq!(quote_command(["portcullis", "revoke", "user", "https://i", "a b"]), "portcullis revoke user https://i 'a b'");
    }
}
