//! The shape of the house: who may import whom, what every file opens with, how long files and functions may be.
//!
//! The first test of the project. It reads sources as text: `crate::` paths outside test code, so it needs no compiler.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What each module may import besides `model`; `"*"` is anything. `model` may import nothing of ours.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("token", &[]),
    ("policy", &[]),
    ("revocation", &[]),
    ("store", &[]),
    ("audit", &["telemetry::names"]),
    ("telemetry", &[]),
    ("snapshot", &["token", "policy", "revocation"]),
    ("pdp", &["token", "policy", "revocation", "snapshot"]),
    ("sync", &["store", "snapshot", "policy", "token", "revocation", "telemetry"]),
    ("pap", &["store", "policy", "token", "audit"]),
    ("service", &["pdp", "token", "snapshot", "audit", "telemetry"]),
    ("api", &["service", "pap", "sync::status", "audit::query"]),
    ("server", &["api", "telemetry"]),
    ("config", &["*"]),
    ("app", &["*"]),
    ("cli", &["*"]),
    ("testing", &["token", "policy", "revocation", "store", "audit", "telemetry", "snapshot", "pdp", "sync", "pap", "service"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

/// Crates that only some modules may name.
const CONFINED: &[(&str, &[&str])] = &[
    ("rusqlite::", &["store"]),
    ("tokio_postgres::", &["store"]),
    ("prost::", &["api", "app", "cli"]),
    ("api::r#gen", &["api", "cli", "app", "server"]),
    ("saphyr_parser::", &["policy"]),
    (" ring::", &["model", "token", "store", "revocation", "service", "audit", "policy", "pap"]),
];

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;

#[test]
fn imports_follow_the_layers() {
    let mut wrong = Vec::new();
    for file in sources(&["src"]) {
        let text = without_tests(&file);
        let module = module_of(&file);
        let allowed = MAY_IMPORT.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed);
        let allowed = allowed.unwrap_or_else(|| panic!("module `{module}` is not in the table of who may import whom"));
        for path in imported(&text, depth_of(&file)) {
            let target = path.split("::").next().unwrap();
            let known = MAY_IMPORT.iter().any(|(name, _)| *name == target);
            let free = !known || target == module || (target == "model" && module != "lib") || allowed.contains(&"*");
            let granted = allowed.iter().any(|edge| path == *edge || path.starts_with(&format!("{edge}::")) || *edge == target);
            if !free && !granted {
                wrong.push(format!("{}: `{module}` may not import `{path}`", file.display()));
            }
        }
        for (name, modules) in CONFINED {
            if names(&text, name) && !modules.contains(&module.as_str()) {
                wrong.push(format!("{}: only {modules:?} may name `{name}`", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a pure function has no use for.
const IMPURE: &[&str] = &[
    "Clock",
    "Instant",
    "SystemTime",
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "tokio",
    "tracing",
    "SystemRandom",
    "async ",
];

#[test]
fn the_decision_is_pure() {
    let text = without_tests(Path::new("src/pdp.rs"));
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let found: Vec<_> = IMPURE.iter().filter(|word| code.contains(*word)).collect();
    assert!(found.is_empty(), "src/pdp.rs names {found:?}: `now` is an argument, so that a recorded decision can be replayed");
}

#[test]
fn files_say_what_they_are() {
    let silent: Vec<_> = sources(&["src", "tests", "benches", "load-tests", "examples", "fuzz"])
        .into_iter()
        .filter(|file| !read(file).starts_with("//!"))
        .collect();
    assert!(silent.is_empty(), "these files do not open with `//!`: {silent:?}");
}

#[test]
fn files_and_functions_stay_short() {
    let mut long = Vec::new();
    for file in sources(&["src", "benches", "load-tests"]) {
        let text = without_tests(&file);
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > FILE_LINES_MAX {
            long.push(format!("{}: {} lines", file.display(), lines.len()));
        }
        for (start, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let declared = line.trim_start().split(['(', '<']).next().unwrap_or_default();
            if !declared.split(' ').any(|word| word == "fn")
                || line.trim_start().starts_with("//")
                || line.trim_end().ends_with(['}', ';'])
            {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| **line == *end).map_or(0, |end| end + 1);
            if length > FUNCTION_LINES_MAX {
                long.push(format!("{}:{}: a function of {length} lines", file.display(), start + 1));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn the_checks_see_what_they_forbid() {
    let edges = |text: &str, depth| imported(text, depth).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(edges("use crate::store::Store;\nlet x = crate::pdp::decide();", 1), "pdp::decide store::Store");
    assert_eq!(edges("use crate::{model::ids, store::{Error, sqlite::Open}};", 1), "model::ids store::Error store::sqlite::Open");
    assert_eq!(edges("use super::super::store::Store; use super::near::Thing;", 2), "store::Store");
    assert!(names("use ring::digest;", "ring::") && names("ring::x", "ring::") && !names("String::new()", "ring::"));
    assert_eq!(strip_tests("a\n#[cfg(test)]\nmod tests {\n    use crate::pdp;\n}\n"), "a\n");
}

/// Whether a text names a crate; `String::` does not name `ring::`.
fn names(text: &str, name: &str) -> bool {
    let begins = |start: usize| !text[..start].ends_with(|before: char| before.is_alphanumeric() || before == '_');
    text.match_indices(name).any(|(start, _)| begins(start))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(root().join(file)).unwrap()
}

/// Every `.rs` file under the folders, generated code left out.
fn sources(folders: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending: Vec<PathBuf> = folders.iter().map(PathBuf::from).filter(|folder| root().join(folder).is_dir()).collect();
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                if entry.file_name() != "gen" && entry.file_name() != "target" {
                    pending.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty());
    found
}

fn module_of(file: &Path) -> String {
    let mut parts = file.strip_prefix("src").unwrap().components();
    parts.next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// How many modules deep a file is: `src/a.rs` is 1, `src/a/b.rs` is 2.
fn depth_of(file: &Path) -> usize {
    file.strip_prefix("src").unwrap().components().count()
}

/// A file's text without its tests; empty for a file that is only tests.
fn without_tests(file: &Path) -> String {
    if file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests") {
        return String::new();
    }
    strip_tests(&read(file))
}

/// Drops every item that follows `#[cfg(test)]`, by the indentation that rustfmt gives it.
fn strip_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        for line in lines.by_ref() {
            let outermost = line.len() - line.trim_start().len() == indent.len();
            if outermost && (line.trim_end() == format!("{indent}}}") || line.trim_end().ends_with(';')) {
                break;
            }
        }
    }
    kept
}

/// The paths below the crate's root that a text names, `crate::{a, b}` and `super::super::a` resolved.
fn imported(text: &str, depth: usize) -> BTreeSet<String> {
    let up = "super::".repeat(depth);
    let text: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let text = text.replace(&up, "crate::");
    let mut found = BTreeSet::new();
    for (start, _) in text.match_indices("crate::") {
        let rest = &text[start + "crate::".len()..];
        expand("", rest, &mut found);
    }
    found
}

fn expand(prefix: &str, rest: &str, found: &mut BTreeSet<String>) {
    let word: String = rest.chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | '#')).collect();
    let after = &rest[word.len()..];
    let path = if prefix.is_empty() { word.clone() } else { format!("{prefix}::{word}") };
    if let Some(group) = rest.strip_prefix('{') {
        let mut level = 0;
        let mut start = 0;
        for (index, character) in group.char_indices() {
            match character {
                '{' => level += 1,
                '}' if level == 0 => {
                    expand(prefix, group[start..index].trim(), found);
                    break;
                }
                '}' => level -= 1,
                ',' if level == 0 => {
                    expand(prefix, group[start..index].trim(), found);
                    start = index + 1;
                }
                _ => {}
            }
        }
    } else if let Some(next) = after.strip_prefix("::") {
        expand(&path, next, found);
    } else if !word.is_empty() {
        found.insert(path);
    }
}
