//! External test suites that the project reads but does not copy: their folders, and the behavior without them.
//!
//! An absent suite is never silent. `./test.sh` leaves its tests out, so that the runner's summary counts them as filtered out. A
//! test that runs nevertheless reports that it checked nothing, on standard error and past the runner's capture.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A suite, the variable that names its folder if that is not `../shared/NAME`, and the names of its tests in this program.
struct ExternalSuite {
    name: &'static str,
    variable: &'static str,
    tests: &'static [&'static str],
}

const SUITES: [ExternalSuite; 2] = [
    ExternalSuite { name: "vectors", variable: "PORTCULLIS_VECTORS", tests: &["aat::", "cli::the_drafts_vectors_by_command"] },
    ExternalSuite { name: "agentdojo", variable: "PORTCULLIS_AGENTDOJO", tests: &["agentdojo::"] },
];

/// The folder of a suite. Without it a test checks nothing and says so; with `CI=true` the test fails.
pub(crate) fn folder(name: &str) -> Option<PathBuf> {
    let suite = SUITES.iter().find(|suite| suite.name == name).expect("no such suite");
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    match find(std::env::var_os(suite.variable), &usual, ci) {
        SuiteLocation::At(folder) => Some(folder),
        SuiteLocation::NotRun => {
            let (test, variable) = (std::thread::current(), suite.variable);
            let test = test.name().unwrap_or("a test");
            // `eprintln` is not used, because the runner shows its output for failed tests only.
            let said = writeln!(
                std::io::stderr(),
                "{test} checks NOTHING: its suite `{name}` is absent; set {variable}, or put it at {}",
                usual.display()
            );
            said.unwrap();
            None
        }
        SuiteLocation::Missing => panic!("suite `{name}` must run where CI=true: set `{}` to its folder", suite.variable),
    }
}

#[derive(Debug, PartialEq)]
enum SuiteLocation {
    At(PathBuf),
    NotRun,
    Missing,
}

fn find(named: Option<OsString>, usual: &Path, ci: bool) -> SuiteLocation {
    // A folder that is named wrongly is not replaced by the default one.
    let folder = named.map_or_else(|| usual.to_owned(), PathBuf::from);
    match folder.is_dir() {
        true => SuiteLocation::At(folder),
        false if ci => SuiteLocation::Missing,
        false => SuiteLocation::NotRun,
    }
}

#[test]
fn an_absent_suite_fails_in_ci_only() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (source, none) = (here.join("src"), here.join("no-such-folder"));
    for (named, usual, ci, expected) in [
        (Some(&source), &none, true, SuiteLocation::At(source.clone())),
        (Some(&source), &here.join("tests"), false, SuiteLocation::At(source.clone())),
        (Some(&none), &source, true, SuiteLocation::Missing),
        (Some(&none), &source, false, SuiteLocation::NotRun),
        (None, &source, true, SuiteLocation::At(source.clone())),
        (None, &none, false, SuiteLocation::NotRun),
        (Some(&none), &none, true, SuiteLocation::Missing),
    ] {
        assert_eq!(find(named.map(|named| named.as_os_str().to_owned()), usual, ci), expected);
    }
}

/// Every test that reads a suite is listed above, and `./test.sh` leaves out the same tests.
#[test]
fn tests_of_suites_are_known() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = std::fs::read_to_string(root.join("test.sh")).unwrap();
    for ExternalSuite { name, variable, tests } in &SUITES {
        let line = format!("\nsuite {name} {variable} {}\n", tests.join(" "));
        assert!(script.contains(&line), "test.sh has no line `{}`", line.trim());
    }
    assert!(
        script.ends_with("cargo test --locked --lib --bins --test it --test memory -- $skip\n"),
        "test.sh leaves out something else"
    );
    let mut readers = 0;
    for entry in std::fs::read_dir(root.join("tests/it")).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if module == "external_suites" || !path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (at, _) in text.match_indices("external_suites::folder(\"") {
            let before = &text[..at];
            let test = before[before.rfind("\nfn ").unwrap() + 4..].split('(').next().unwrap();
            let name = text[at..].split('"').nth(1).unwrap();
            let test = format!("{module}::{test}");
            let suite = SUITES.iter().find(|suite| suite.name == name).unwrap();
            assert!(suite.tests.iter().any(|tests| test.starts_with(tests)), "`{test}` reads suite `{name}` and is not left out");
            readers += 1;
        }
    }
    assert!(readers >= 6, "{readers}");
}

/// Runs this program without any suite, as a reader would. With the arguments of `./test.sh` the summary counts the tests of the
/// suites as filtered out, and none as passed. Without these arguments each test says that it checks nothing.
#[test]
fn the_summary_shows_an_absent_suite() {
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(arguments).env_remove("CI");
        for suite in &SUITES {
            command.env(suite.variable, "/no-such-folder");
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let listed = |arguments: &[&str]| -> Vec<String> {
        let list = run(&[&["--list"], arguments].concat()).0;
        list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
    };
    let patterns: Vec<&str> = SUITES.iter().flat_map(|suite| suite.tests).copied().collect();
    let (of_suites, others): (Vec<_>, Vec<_>) =
        listed(&[]).into_iter().partition(|test| patterns.iter().any(|tests| test.starts_with(tests)));
    assert!(of_suites.len() >= 6 && !others.is_empty(), "{of_suites:?}");
    let skips: Vec<&str> = patterns.iter().flat_map(|tests| ["--skip", tests]).collect();
    assert_eq!(listed(&skips), others, "exactly the suites' tests are left out");
    let one = of_suites.first().unwrap();
    let (summary, _) = run(&[&[one.as_str()], skips.as_slice()].concat());
    assert!(summary.contains("0 passed") && !summary.contains(" 0 filtered out"), "{summary}");
    let (_, said) = run(&["--exact", one]);
    assert!(said.contains(&format!("{one} checks NOTHING")), "{said}");
}
