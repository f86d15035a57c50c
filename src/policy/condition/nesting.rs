//! Limits the nesting of a condition before it is parsed, because Cedar's parser recurses and could overflow the stack.
//!
//! The check counts everything that can nest: brackets, `if` expressions, chains of operators and chains of members. It knows
//! only strings and comments of the grammar. Look next at `condition.rs`.

/// The maximum nesting of brackets.
const BRACKETS_NESTING_MAX: usize = 12;
/// The maximum number of `if … then … else …`. Each `else` may hold the next one without a bracket.
const CONDITIONALS_MAX: usize = 12;
/// The maximum number of operators, because a chain of operators nests to the left.
const OPERATORS_MAX: usize = 64;
/// The maximum length of a chain of members such as `.a.b["c"]`.
const MEMBERS_MAX: usize = 12;

/// The counts for a text.
#[derive(Default)]
struct NestingCounts {
    depth: usize,
    deepest: usize,
    conditionals: usize,
    operators: usize,
    members: usize,
    longest_members: usize,
}

/// Refuses a text that exceeds a limit.
///
/// # Errors
/// One line that names the limit.
pub(super) fn check_nesting(text: &str) -> Result<(), String> {
    let counts = count_nesting(text);
    let over = |count: usize, max: usize, what: &str| match count > max {
        true => Err(format!("the condition has {what}: at most {max}, found {count}; split it into several entries")),
        false => Ok(()),
    };
    over(counts.deepest, BRACKETS_NESTING_MAX, "brackets inside each other")?;
    over(counts.conditionals, CONDITIONALS_MAX, "`if`s")?;
    over(counts.operators, OPERATORS_MAX, "operators")?;
    over(counts.longest_members, MEMBERS_MAX, "members of members")
}

/// Counts the brackets, `if` expressions, operators and members of a text.
fn count_nesting(text: &str) -> NestingCounts {
    let mut counts = NestingCounts::default();
    let bytes = text.as_bytes();
    let at = |index: usize| bytes.get(index).copied().unwrap_or(0);
    let mut index = 0;
    while index < bytes.len() {
        let byte = at(index);
        let mut width = 1;
        match byte {
            b'"' => width = string_width(bytes, index),
            b'/' if at(index + 1) == b'/' => {
                width = bytes.iter().skip(index).take_while(|byte| !matches!(byte, b'\n' | b'\r')).count();
            }
            b'(' | b'{' => counts.open(),
            b'[' => {
                counts.open();
                counts.member();
            }
            b')' | b']' | b'}' => counts.depth = counts.depth.saturating_sub(1),
            b'.' => counts.member(),
            b'&' | b'|' if at(index + 1) == byte => {
                counts.operator();
                width = 2;
            }
            b'+' | b'-' | b'*' | b'!' => counts.operator(),
            b',' | b'=' | b'<' | b'>' => counts.members = 0,
            _ if byte.is_ascii_alphabetic() || byte == b'_' => {
                let is_word = |byte: &&u8| byte.is_ascii_alphanumeric() || **byte == b'_';
                width = bytes.iter().skip(index).take_while(is_word).count();
                counts.conditionals += usize::from(width == 2 && (byte, at(index + 1)) == (b'i', b'f'));
            }
            _ => {}
        }
        index += width.max(1);
    }
    counts
}

/// The length of a string literal with its quotes. An unclosed literal extends to the end of the text.
fn string_width(bytes: &[u8], start: usize) -> usize {
    let mut escaped = false;
    for (width, byte) in bytes.iter().skip(start + 1).enumerate() {
        match byte {
            b'"' if !escaped => return width + 2,
            b'\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    bytes.len() - start
}

impl NestingCounts {
    fn open(&mut self) {
        self.depth += 1;
        self.deepest = self.deepest.max(self.depth);
    }

    fn operator(&mut self) {
        self.operators += 1;
        self.members = 0;
    }

    fn member(&mut self) {
        self.members += 1;
        self.longest_members = self.longest_members.max(self.members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nests_is_counted() {
        let check = |text: &str, expected: [usize; 4]| {
            let counts = count_nesting(text);
            assert_eq!([counts.deepest, counts.conditionals, counts.operators, counts.longest_members], expected, "{text}");
        };
        check("", [0, 0, 0, 0]);
        check("context.args.a == 1 && !(context.args.b.c > 2)", [1, 0, 2, 3]);
        check(r#"context.args["a"]["b"].c"#, [1, 0, 0, 4]);
        check(r#"if context.x then "if ( && \" (" else [f(1), 2]"#, [2, 1, 0, 2]);
        check("true // if ( \" && \n || (false)", [1, 0, 1, 0]);
        check(r#""unclosed ( && "#, [0, 0, 0, 0]);
        check("elif iff _if if", [0, 1, 0, 0]);
        check("a & b | c", [0, 0, 0, 0]);
        check("(a.b, c.d)", [1, 0, 0, 1]);
    }
}
