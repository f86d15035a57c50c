//! Data of others that tests read but the project does not copy: where it lies, and what to do without it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The folder of an outside suite: what `variable` names, or `../shared/NAME`. Without one the suite is not run and says so,
/// unless `CI=true`: then it fails.
pub(crate) fn folder(name: &str, variable: &str) -> Option<PathBuf> {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    match find(std::env::var_os(variable), &usual, ci) {
        Found::At(folder) => Some(folder),
        Found::NotRun => {
            eprintln!("suite `{name}` is not run: neither `{variable}` nor {} is a folder", usual.display());
            None
        }
        Found::Missing => panic!("suite `{name}` must run where CI=true: set `{variable}` to its folder"),
    }
}

#[derive(Debug, PartialEq)]
enum Found {
    At(PathBuf),
    NotRun,
    Missing,
}

fn find(named: Option<OsString>, usual: &Path, ci: bool) -> Found {
    let folder = named.map(PathBuf::from).into_iter().chain([usual.to_owned()]).find(|folder| folder.is_dir());
    match folder {
        Some(folder) => Found::At(folder),
        None if ci => Found::Missing,
        None => Found::NotRun,
    }
}

#[test]
fn an_absent_suite_fails_in_ci_only() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (source, none) = (here.join("src"), here.join("no-such-folder"));
    for (named, usual, ci, expected) in [
        (Some(&source), &none, true, Found::At(source.clone())),
        (Some(&source), &here.join("tests"), false, Found::At(source.clone())),
        (Some(&none), &source, true, Found::At(source.clone())),
        (None, &none, false, Found::NotRun),
        (Some(&none), &none, true, Found::Missing),
    ] {
        assert_eq!(find(named.map(|named| named.as_os_str().to_owned()), usual, ci), expected);
    }
}
