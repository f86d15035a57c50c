//! Escapes text of other parties before it reaches a terminal, so that it can neither hide nor disguise anything.

/// Writes out as `\u{…}` every character that a terminal would obey, hide or reorder.
pub(super) fn escape_for_terminal(text: &str) -> String {
    let unseen = |character: char| {
        character.is_control()
            || matches!(character,
                '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
                | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}')
    };
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if unseen(character) {
            out.extend(character.escape_unicode());
        } else {
            out.push(character);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An approver must never see another call than the one that is approved.
    #[test]
    fn nothing_reaches_the_terminal_that_hides_or_turns_text() {
        let check = |text: &str, expected: &str| assert_eq!(escape_for_terminal(text), expected);
        check(r#"{"amount":100,"to":"DE12 é 漢字"}"#, r#"{"amount":100,"to":"DE12 é 漢字"}"#);
        check("\u{1b}[2K\rharmless", "\\u{1b}[2K\\u{d}harmless");
        check("100\u{202e}000\u{202c}", "100\\u{202e}000\\u{202c}");
        check("a\u{200b}b\u{feff}c\u{9b}d\u{7f}", "a\\u{200b}b\\u{feff}c\\u{9b}d\\u{7f}");
        check("\u{e0041}\u{2028}\n", "\\u{e0041}\\u{2028}\\u{a}");
    }
}
