//! The rules of the source: which module may import which, the first line of every file, and the length of files and functions.
//!
//! It is the first test of the project. It reads the `crate::` paths of the sources as text, without test code, so it needs no
//! compiler.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The modules that each module may import besides `model`; `"*"` is any. `model` may import no other module.
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

/// Names that a pure function does not need.
const IMPURE: &[&str] = &[
    "Clock",
    "SystemClock",
    "ManualClock",
    "Instant",
    "SystemTime",
    ".now()",
    "rustix",
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::process",
    "tokio",
    "tracing",
    "println!",
    "eprintln!",
    "SystemRandom",
    "getrandom",
    "async",
];

/// Impure code in the modules that the decision may import, with the reason that no decision depends on it.
const IMPURE_ALLOWED: &[(&str, &[&str], &str)] = &[
    ("src/model/time.rs", &["Clock", "SystemClock", "ManualClock", "rustix"], "the clock itself; a decision takes its reading"),
    ("src/model/disk.rs", &["rustix", "std::io"], "reads the room of a disk, for the thread of the audit log and for the cache"),
    ("src/model/barrier.rs", &["std::io"], "the error of a write that others do"),
    ("src/model/primitives.rs", &["std::io"], "the error of starting a thread, for the index's upkeep"),
    ("src/model/primitives/loomed.rs", &["std::io"], "the same, modelled"),
    ("src/policy.rs", &["std::io"], "the error of reading a policy folder"),
    ("src/policy/source.rs", &["std::fs", "std::io"], "reads a policy folder for the command line"),
    ("src/revocation/index.rs", &["tracing"], "upkeep of the filter, by whoever writes to the index"),
    ("src/token/key.rs", &["SystemRandom"], "makes private keys"),
];

/// Checks every file of the modules that `decide` may import, by the table above, and not `pdp.rs` alone, because a decision runs
/// all of them.
#[test]
fn the_decision_is_pure() {
    let (_, imports) = MAY_IMPORT.iter().find(|(name, _)| *name == "pdp").unwrap();
    let modules: Vec<&str> = imports.iter().copied().chain(["pdp", "model"]).collect();
    let (mut wrong, mut seen, mut unused) = (Vec::new(), BTreeSet::new(), Vec::new());
    for file in sources(&["src"]).into_iter().filter(|file| modules.contains(&module_of(file).as_str())) {
        seen.insert(module_of(&file));
        let found = impure(&without_tests(&file));
        let allowed = IMPURE_ALLOWED.iter().find(|(name, ..)| file.ends_with(name)).map_or(&[][..], |(_, words, _)| words);
        wrong.extend(found.iter().filter(|word| !allowed.contains(word)).map(|word| format!("{}: `{word}`", file.display())));
        unused.extend(allowed.iter().filter(|word| !found.contains(word)).map(|word| format!("{}: `{word}`", file.display())));
    }
    assert!(wrong.is_empty(), "`now` is an argument, so that a recorded decision can be replayed:\n{}", wrong.join("\n"));
    assert!(unused.is_empty(), "allowed and not there any more:\n{}", unused.join("\n"));
    assert_eq!(seen.len(), modules.len(), "{seen:?}");
    for path in
        ["src/pdp/explain.rs", "src/policy/compile/evaluate.rs", "src/policy/condition/context.rs", "src/revocation/index.rs"]
    {
        assert!(!without_tests(Path::new(path)).is_empty(), "{path} is not read");
    }
}

/// The names in a text, without comments, that a pure function does not need.
fn impure(text: &str) -> Vec<&'static str> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let whole = |word: &str| {
        code.match_indices(word).any(|(start, _)| {
            let bounded = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
            let (before, after) = (code[..start].chars().next_back(), code[start + word.len()..].chars().next());
            (bounded(before) || word.starts_with('.')) && (bounded(after) || word.ends_with(['!', ')']))
        })
    };
    IMPURE.iter().copied().filter(|word| whole(word)).collect()
}

/// A failing test unwinds through its destructors. A destructor that panics then ends the process, and all other tests with it.
#[test]
fn no_destructor_of_a_test_panics() {
    let mut wrong = Vec::new();
    let test_code = sources(&["src", "tests", "load-tests", "benches"])
        .into_iter()
        .filter(|file| !file.starts_with("src") || file.starts_with("src/testing") || without_tests(file).is_empty());
    for file in test_code {
        for body in destructors(&read(&file)) {
            let panics =
                [".unwrap()", ".expect(", "assert", "panic!", "unreachable!", "todo!"].iter().find(|word| body.contains(**word));
            wrong.extend(panics.map(|word| format!("{}: `{word}` in a `drop`", file.display())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The bodies of the `Drop` implementations in a text, by the indentation of rustfmt.
fn destructors(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let begins = |line: &str| line.trim_start().starts_with("impl") && line.contains(" Drop for ") && line.ends_with('{');
    let body = |start: usize| {
        let indent = lines[start].len() - lines[start].trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        lines[start..].iter().take_while(|line| **line != end).copied().collect::<Vec<_>>().join("\n")
    };
    lines.iter().enumerate().filter(|(_, line)| begins(line)).map(|(start, _)| body(start)).collect()
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
    assert_eq!(impure("use tokio::time;\nlet x = clock.now();\n// tracing"), [".now()", "tokio"]);
    assert_eq!(impure("async fn a() { Instant::now(); println!() }"), ["Instant", "println!", "async"]);
    assert_eq!(impure("WallClockOnly asynchronous now_ms() unknown()"), [""; 0]);
    let dropped = destructors("impl Drop for A {\n    fn drop(&mut self) {\n        x.unwrap();\n    }\n}\ny.expect(z)\n");
    assert!(dropped.len() == 1 && dropped[0].contains(".unwrap()") && !dropped[0].contains("expect"), "{dropped:?}");
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

/// Every `.rs` file in the folders, without generated code.
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

/// The module depth of a file: `src/a.rs` is 1, `src/a/b.rs` is 2.
fn depth_of(file: &Path) -> usize {
    file.strip_prefix("src").unwrap().components().count()
}

/// The text of a file without its tests; empty for a file of tests.
fn without_tests(file: &Path) -> String {
    if file.ends_with("tests.rs") || file.components().any(|part| part.as_os_str() == "tests") {
        return String::new();
    }
    strip_tests(&read(file))
}

/// Removes every item after `#[cfg(test)]`, by the indentation of rustfmt.
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

/// The paths below the crate's root that a text names, with `crate::{a, b}` and `super::super::a` resolved.
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
