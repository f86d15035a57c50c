//! The rules of the source: which module may import which, in which direction the files of a module use each other, the first line
//! of every file, and the length of files and functions.
//!
//! It is the first test of the project. It reads the `crate::` paths of the sources as text, without test code, so it needs no
//! compiler.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
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

/// The files of one module use each other in one direction, so that each file can be read after those that it uses. Only parents are
/// exempt: a file may use what a parent of it defines, and the parent may use the file.
#[test]
fn files_of_a_module_form_no_circle() {
    let named = |file: PathBuf| Some((path_of(&file)?, without_tests(&file)));
    let texts: BTreeMap<String, String> = sources(&["src"]).into_iter().filter_map(named).collect();
    let uses = uses_of(&texts);
    assert!(uses["sync::status"]["sync::follower"].contains("HistoryPosition"), "no import is found: {uses:?}");
    let circles = circles_in(&uses);
    assert!(
        circles.is_empty(),
        "these files use each other: move what both need to the file that owns it, or to a new file that both use:\n{}",
        circles.join("\n")
    );
}

/// The files that each file uses, with the names that it uses of each. Only files of the same module count, and no parents.
type Uses = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// The uses among files, from their texts by module path.
fn uses_of(texts: &BTreeMap<String, String>) -> Uses {
    let files: BTreeSet<&str> = texts.keys().map(String::as_str).collect();
    let imports: BTreeMap<&str, _> = texts.iter().map(|(path, text)| (path.as_str(), imports_of(text, path, &files))).collect();
    let used_by = |module: &str, text: &str| {
        let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for path in paths_of(&without_reexports(text, module, &files), module, &files) {
            let (file, name) = definition_of(&path, &imports);
            let is_parent = module == file || module.starts_with(&format!("{file}::"));
            if !is_parent && file.split("::").next() == module.split("::").next() {
                used.entry(file).or_default().insert(name);
            }
        }
        used
    };
    texts.iter().map(|(module, text)| (module.clone(), used_by(module, text))).collect()
}

/// One circle for each group of files that use each other, as `a → b (names) → a (names)`.
fn circles_in(uses: &Uses) -> Vec<String> {
    let circle = |from: &str| {
        let way = way_back(from, uses)?;
        let is_first = way.iter().all(|file| from <= *file);
        let steps = way.iter().zip(way.iter().skip(1).chain([&from])).map(|(file, next)| {
            let names: Vec<&str> = uses[*file][*next].iter().map(String::as_str).collect();
            format!(" → {next} ({})", names.join(", "))
        });
        is_first.then(|| format!("{from}{}", steps.collect::<String>()))
    };
    uses.keys().filter_map(|from| circle(from)).collect()
}

/// The files on the shortest way from a file back to itself, if there is one.
fn way_back<'a>(from: &'a str, uses: &'a Uses) -> Option<Vec<&'a str>> {
    let (mut ways, mut seen) = (VecDeque::from([vec![from]]), BTreeSet::new());
    while let Some(way) = ways.pop_front() {
        for next in uses.get(*way.last()?).into_iter().flat_map(BTreeMap::keys) {
            if next == from {
                return Some(way);
            }
            if seen.insert(next) {
                ways.push_back(way.iter().copied().chain([next.as_str()]).collect());
            }
        }
    }
    None
}

/// The names that the file `module` imports or exports again, each with its path.
fn imports_of(text: &str, module: &str, files: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let paths = use_statements(text).into_iter().flat_map(|(_, tree)| paths_of(tree, module, files));
    let whole = paths.map(|path| path.trim_end_matches("::self").to_owned());
    whole.filter_map(|path| Some((path.rsplit("::").next()?.to_owned(), path))).collect()
}

/// The text without `pub use child::Name`: a user of `InvalidName` uses the child, whichever path it names.
fn without_reexports(text: &str, module: &str, files: &BTreeSet<&str>) -> String {
    let own = format!("{module}::");
    let is_reexport = |tree: &str| paths_of(tree, module, files).iter().all(|path| path.starts_with(&own));
    let reexports = use_statements(text).into_iter().filter(|(is_public, tree)| *is_public && is_reexport(tree));
    reexports.fold(text.to_owned(), |text, (_, tree)| text.replace(&format!("use {tree};"), ""))
}

/// The trees of the `use` statements in a text, each with whether other files see its names.
fn use_statements(text: &str) -> Vec<(bool, &str)> {
    let (mut found, mut start) = (Vec::new(), 0);
    for line in text.split_inclusive('\n') {
        let declared = line.trim_start();
        let public =
            declared.strip_prefix("pub ").or_else(|| declared.strip_prefix("pub(")?.split_once(") ").map(|(_, rest)| rest));
        if public.unwrap_or(declared).starts_with("use ") {
            let statement = text[start..].split(';').next().unwrap_or_default();
            found.extend(statement.split_once("use ").map(|(_, tree)| (public.is_some(), tree)));
        }
        start += line.len();
    }
    found
}

/// The paths below the crate's root that a text of the file `module` names, by `crate`, `self`, `super` or a child of the file.
fn paths_of(text: &str, module: &str, files: &BTreeSet<&str>) -> BTreeSet<String> {
    // `use child::*` names the child.
    let text = without_comments(text).replace("::*", "");
    let mut found = BTreeSet::new();
    for (end, _) in text.match_indices("::") {
        let before = text[..end].trim_end_matches(|c: char| c.is_alphanumeric() || matches!(c, '_' | '#'));
        let (word, rest) = (&text[before.len()..end], &text[end + 2..]);
        if before.ends_with([':', '.']) {
            continue;
        }
        let child = format!("{module}::{word}");
        match word {
            "crate" => expand("", rest, &mut found),
            "self" => expand(module, rest, &mut found),
            "super" => {
                let below = rest.trim_start_matches("super::");
                let supers = 1 + rest[..rest.len() - below.len()].matches("super::").count();
                let parts: Vec<&str> = module.split("::").collect();
                expand(&parts[..parts.len().saturating_sub(supers)].join("::"), below, &mut found);
            }
            _ if files.contains(child.as_str()) => expand(&child, rest, &mut found),
            _ => {}
        }
    }
    found
}

/// The file that defines what a path names, and the name. Follows the imports of the files on the path.
fn definition_of(path: &str, imports: &BTreeMap<&str, BTreeMap<String, String>>) -> (String, String) {
    const IMPORTS_FOLLOWED_MAX: usize = 8;
    let mut path = path.trim_end_matches("::self").to_owned();
    let mut found = (String::new(), String::new());
    for _ in 0..IMPORTS_FOLLOWED_MAX {
        let parts: Vec<&str> = path.split("::").collect();
        let files = (1..=parts.len()).rev().map(|length| (length, parts[..length].join("::")));
        let Some((length, file)) = files.into_iter().find(|(_, file)| imports.contains_key(file.as_str())) else { break };
        let name = parts.get(length).or(parts.last()).copied().unwrap_or_default();
        let import = parts.get(length).and_then(|name| imports[file.as_str()].get(*name));
        found = (file.clone(), name.to_owned());
        match import.filter(|import| **import != format!("{file}::{name}")) {
            Some(import) => path = [&[import.as_str()], &parts[length + 1..]].concat().join("::"),
            None => break,
        }
    }
    found
}

/// A file that no `mod` names is not compiled, and nobody notices that its text is no longer true.
#[test]
fn every_file_is_a_module() {
    let is_named = |file: &PathBuf| {
        let stem = file.file_stem().unwrap().to_str().unwrap();
        let parent = match file.parent().unwrap() {
            folder if folder == Path::new("src") => "src/lib.rs".into(),
            folder => folder.with_extension("rs"),
        };
        matches!(stem, "lib" | "main") || read(&parent).contains(&format!("mod {stem};"))
    };
    let orphans: Vec<PathBuf> = sources(&["src"]).into_iter().filter(|file| !is_named(file)).collect();
    assert_eq!(orphans, Vec::<PathBuf>::new(), "no `mod` names these files");
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
    ("src/model/write_barrier.rs", &["std::io"], "the error of a write that others do"),
    ("src/model/runtime.rs", &["std::io", "tokio"], "makes the runtimes of servers and stores"),
    ("src/model/sync_primitives.rs", &["std::io"], "the error of starting a thread, for the index's upkeep"),
    ("src/model/sync_primitives/loom_model.rs", &["std::io"], "the same, modelled"),
    ("src/policy.rs", &["std::io"], "the error of reading a policy folder"),
    ("src/policy/source.rs", &["std::fs", "std::io"], "reads a policy folder for the command line"),
    ("src/revocation/index.rs", &["tracing"], "upkeep of the filter, by whoever writes to the index"),
    ("src/token/private_key.rs", &["SystemRandom"], "makes private keys"),
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
    let code = without_comments(text);
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

#[test]
fn the_check_for_circles_sees_them() {
    let check = |files: &[(&str, &str)], expected: &[&str]| {
        let texts = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        assert_eq!(circles_in(&uses_of(&texts)), expected, "{files:?}");
    };
    let b = ("a::b", "use super::c::{Thing, thing::part};");
    check(
        &[("a", "mod b;\nmod c;"), b, ("a::c", "fn f() { crate::a::b::other(); }")],
        &["a::b → a::c (Thing, thing) → a::b (other)"],
    );
    check(&[("a", ""), b, ("a::c", "// super::b::other()\nuse super::Own; use crate::x::b::Other;")], &[]);
    check(&[("a", ""), ("a::b", "use super::c::{self};"), ("a::c", "use super::b::*;")], &["a::b → a::c (c) → a::b (b)"]);
    // Names that the parent exports again or imports are those of the child that defines them.
    let exports = ("a", "pub(crate) use c::{\n    Thing,\n};\nuse self::b::other;");
    check(&[exports, ("a::b", "use super::{Own, Thing};"), ("a::c", "super::other()")], &["a::b → a::c (Thing) → a::b (other)"]);
    check(&[exports, ("a::b", "use super::Thing;"), ("a::c", "")], &[]);
    // A parent and its child are no circle, but a parent and another file are one through the child.
    check(&[("a", ""), ("a::b", "use c::Deep;"), ("a::b::c", "use super::Own;")], &[]);
    check(
        &[
            ("a", ""),
            ("a::b", "fn f() { c::deep(); }"),
            ("a::b::c", "use super::super::d::Wide;"),
            ("a::d", "use super::b::Own;"),
        ],
        &["a::b → a::b::c (deep) → a::d (Wide) → a::b (Own)"],
    );
    // Files of different modules are the matter of the table of who may import whom.
    check(&[("a", ""), ("a::b", "use crate::c::d::X;"), ("c", ""), ("c::d", "use crate::a::b::Y;")], &[]);
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

/// The path of a file as a module: `src/a/b.rs` is `a::b`; `None` for the crate's root.
fn path_of(file: &Path) -> Option<String> {
    let path = file.strip_prefix("src").unwrap().with_extension("").to_str().unwrap().replace('/', "::");
    (path != "lib" && path != "main").then_some(path)
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

/// The text without the lines of comments.
fn without_comments(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
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
    let text = without_comments(text).replace(&up, "crate::");
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
