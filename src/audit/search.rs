//! Searches the newest records for a name, backwards and within limits, to tell whether a caller of that name was ever recorded.
//!
//! The files are read from their ends, one block of each in turn, until the name is found or a limit is reached. The outcome
//! states how much was read, so that nobody mistakes an early end for an answer. The search writes nothing and waits for no
//! recorder: every decision that left this process is in its file. Look next at `query.rs`, which reads a folder from its
//! beginning.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use super::Error;
use super::query::RecordFilter;

/// The limits of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SearchLimits {
    /// Bytes read from all files together.
    pub bytes_max: u64,
    /// Number of files; the files written last are read.
    pub files_max: usize,
    /// Names that are collected for suggestions.
    pub names_max: usize,
}

impl Default for SearchLimits {
    fn default() -> Self {
        Self { bytes_max: 64 * 1024 * 1024, files_max: 64, names_max: 2_000 }
    }
}

/// The outcome of a search, and how much was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SearchOutcome {
    /// Index of the member that holds the name: 0 if a record holds it in the first member, else the lowest index that was found.
    pub found: Option<usize>,
    /// Names in the first member of the newest records.
    pub names: BTreeSet<String>,
    /// Number of bytes read.
    pub bytes: u64,
    /// Whether the newest records contain a decision. Without one, the search says nothing about callers.
    pub has_decisions: bool,
    /// Whether all existing records were read.
    pub is_whole: bool,
}

/// Size of a block. Reading one block at a time visits every file before any file is read to its beginning.
const BLOCK_BYTES: u64 = 256 * 1024;
/// Bytes of the newest records from which names are collected. Every line of them is parsed.
const NAMES_BYTES_MAX: u64 = 1024 * 1024;

/// Searches the newest decisions of a folder for `name` at `members` (paths as in [`RecordFilter::members`]). Stops when a record holds
/// the name in the first member, when a limit is reached, or when `stop` returns true.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed. A file that cannot be read counts as not read.
pub fn search_name(
    directory: &Path,
    members: &[&str],
    name: &str,
    limits: SearchLimits,
    stop: &dyn Fn() -> bool,
) -> Result<SearchOutcome, Error> {
    let (mut open, is_whole) = newest_files(directory, limits.files_max)?;
    let mut searched = SearchOutcome { is_whole, ..SearchOutcome::default() };
    let query = NameQuery::new(members, name);
    while !open.is_empty() {
        let mut left = Vec::with_capacity(open.len());
        for mut tail in open {
            if stop() || searched.bytes >= limits.bytes_max {
                searched.is_whole = false;
                return Ok(searched);
            }
            let collect = searched.bytes < NAMES_BYTES_MAX;
            let Ok(block) = tail.read_block_back() else {
                searched.is_whole = false;
                continue;
            };
            searched.bytes = searched.bytes.saturating_add(block.len() as u64);
            query.scan_block(&block, collect.then_some(limits.names_max), &mut searched);
            if searched.found == Some(0) {
                return Ok(searched);
            }
            if tail.end > 0 {
                left.push(tail);
            }
        }
        open = left;
    }
    Ok(searched)
}

/// Returns the files written last, and whether these are all files.
fn newest_files(directory: &Path, files_max: usize) -> Result<(Vec<BackwardReader>, bool), Error> {
    let failed = |source| Error::Io { action: "list", path: directory.to_owned(), source };
    let mut files: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // A file that was removed in the meantime is skipped.
        if path.extension().is_some_and(|extension| extension == "jsonl")
            && let Ok(metadata) = std::fs::metadata(&path)
            && metadata.len() > 0
        {
            files.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), path, metadata.len()));
        }
    }
    files.sort_unstable();
    files.reverse();
    let is_whole = files.len() <= files_max;
    files.truncate(files_max);
    Ok((files.into_iter().map(|(_, path, end)| BackwardReader { path, end, carried: Vec::new() }).collect(), is_whole))
}

/// A file that is read backwards.
struct BackwardReader {
    path: PathBuf,
    /// Everything after this offset was read.
    end: u64,
    /// The end of a line whose beginning was not read yet.
    carried: Vec<u8>,
}

impl BackwardReader {
    /// Reads the complete lines of the block before the last one. A line that is longer than any record is dropped.
    fn read_block_back(&mut self) -> std::io::Result<Vec<u8>> {
        let from = self.end.saturating_sub(BLOCK_BYTES);
        let mut block = vec![0; usize::try_from(self.end - from).unwrap_or(0)];
        File::open(&self.path)?.read_exact_at(&mut block, from)?;
        self.end = from;
        block.append(&mut self.carried);
        if from > 0 {
            let begins = block.iter().position(|byte| *byte == b'\n').map_or(block.len(), |end| end + 1);
            self.carried = block.drain(..begins).collect();
            if self.carried.len() as u64 > super::query::LINE_BYTES_MAX {
                self.carried.clear();
            }
        }
        Ok(block)
    }
}

/// A name, in the forms in which lines and records are compared with it.
struct NameQuery<'a> {
    members: &'a [&'a str],
    filters: Vec<RecordFilter>,
    /// The longest part of the name that JSON writes unescaped. A line without it is not parsed.
    plain: &'a [u8],
}

impl<'a> NameQuery<'a> {
    fn new(members: &'a [&'a str], name: &'a str) -> Self {
        let filter =
            |member: &&str| RecordFilter { members: vec![((*member).to_owned(), name.to_owned())], ..RecordFilter::default() };
        // JSON escapes quotes, backslashes and control characters.
        let is_plain = |byte: &u8| *byte >= 0x20 && *byte != b'"' && *byte != b'\\' && *byte != 0x7f;
        let plain = name.as_bytes().split(|byte| !is_plain(byte)).max_by_key(|part| part.len()).unwrap_or_default();
        Self { members, filters: members.iter().map(filter).collect(), plain }
    }

    /// Searches the lines of a block, the last one first. Collects names too if `names_max` is given.
    fn scan_block(&self, block: &[u8], names_max: Option<usize>, searched: &mut SearchOutcome) {
        if names_max.is_none() && memchr::memmem::find(block, self.plain).is_none() {
            return;
        }
        for line in block.split(|byte| *byte == b'\n').rev() {
            let is_candidate = memchr::memmem::find(line, self.plain).is_some();
            if !is_candidate && names_max.is_none() {
                continue;
            }
            // A line that is unfinished or damaged names nobody.
            let Ok(record) = serde_json::from_slice::<Value>(line) else { continue };
            if record.get("kind").and_then(Value::as_str) != Some("decision") {
                continue;
            }
            searched.has_decisions = true;
            let met = self.filters.iter().position(|filter| is_candidate && filter.matches(&record));
            searched.found = [searched.found, met].into_iter().flatten().min();
            if searched.found == Some(0) {
                return;
            }
            if let (Some(names_max), Some(member)) = (names_max, self.members.first()) {
                collect_names(&record, member, names_max, &mut searched.names);
            }
        }
    }
}

/// Collects the texts at a path of member names; if the path leads through a list, the texts of all items.
fn collect_names(value: &Value, path: &str, names_max: usize, names: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect_names(item, path, names_max, names)),
        Value::Object(members) if !path.is_empty() => {
            let (first, rest) = path.split_once('.').unwrap_or((path, ""));
            if let Some(member) = members.get(first) {
                collect_names(member, rest, names_max, names);
            }
        }
        Value::String(text) if path.is_empty() && names.len() < names_max => {
            names.insert(text.clone());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBERS: &[&str] = &["principals.session.id", "principals.task.id", "chain.jti"];

    fn line(session: &str, task: &str, jti: &str) -> String {
        let record = serde_json::json!({
            "kind": "decision", "principals": { "session": { "id": session }, "task": { "id": task } },
            "chain": [{ "jti": "root" }, { "jti": jti }], "filler": "x".repeat(200),
        });
        format!("{record}\n")
    }

    fn never() -> bool {
        false
    }

    fn folder(files: &[(&str, String)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn many(prefix: &str, count: usize) -> String {
        (0..count).map(|index| line(&format!("{prefix}{index}"), "t", "j")).collect()
    }

    #[test]
    fn a_name_is_found_where_it_stands_and_nowhere_else() {
        let act = "{\"kind\":\"act\",\"reason\":\"revoke session ghost\",\"principals\":{\"session\":{\"id\":\"ghost\"}}}\n";
        let content = [&line("s-1", "t-1", "j-1"), act, &line("q\"uote\\\u{1}d", "s-2", "-j"), "{\"kind\":\"decis"].concat();
        let folder = folder(&[("a.jsonl", content), ("b.txt", line("elsewhere", "t", "j"))]);
        let check = |name: &str, expected: Option<usize>| {
            let searched = search_name(folder.path(), MEMBERS, name, SearchLimits::default(), &never).unwrap();
            assert_eq!(searched.found, expected, "{name}");
            assert!(searched.is_whole || expected == Some(0), "{name}");
        };
        check("s-1", Some(0));
        check("q\"uote\\\u{1}d", Some(0));
        check("t-1", Some(1));
        check("s-2", Some(1));
        check("-j", Some(2));
        check("root", Some(2));
        for name in ["ghost", "s-", "elsewhere", "session", "", "x"] {
            check(name, None);
        }
    }

    /// Lines across block borders and files of several blocks: no line is missed, whichever file is longer.
    #[test]
    fn every_line_is_looked_at_once() {
        let count = 4 * usize::try_from(BLOCK_BYTES).unwrap() / line("s0", "t", "j").len();
        let folder = folder(&[("a.jsonl", many("a", count)), ("b.jsonl", many("b", count / 3)), ("c.jsonl", String::new())]);
        let size: u64 = ["a.jsonl", "b.jsonl"].iter().map(|name| folder.path().join(name).metadata().unwrap().len()).sum();
        for index in (0..count).step_by(97).chain([count - 1]) {
            let searched = search_name(folder.path(), MEMBERS, &format!("a{index}"), SearchLimits::default(), &never).unwrap();
            assert_eq!(searched.found, Some(0), "a{index}");
        }
        let nobody = search_name(folder.path(), MEMBERS, "nobody", SearchLimits::default(), &never).unwrap();
        assert!(nobody.is_whole && nobody.found.is_none() && nobody.bytes >= size, "{nobody:?}");
        assert!(nobody.names.contains(&format!("a{}", count - 1)) && nobody.names.contains(&format!("b{}", count / 3 - 1)));
    }

    #[test]
    fn limits_are_kept_and_told() {
        let folder = folder(&[("a.jsonl", many("a", 4_000)), ("b.jsonl", many("b", 10))]);
        let size = folder.path().join("a.jsonl").metadata().unwrap().len();
        assert!(size > 2 * BLOCK_BYTES);
        let look = |name: &str, limits: SearchLimits, stop: &dyn Fn() -> bool| {
            let searched = search_name(folder.path(), MEMBERS, name, limits, stop).unwrap();
            (searched.found, searched.is_whole)
        };
        let few = SearchLimits { bytes_max: BLOCK_BYTES, ..SearchLimits::default() };
        assert_eq!(look("a0", few, &never), (None, false));
        assert_eq!(look("a3999", SearchLimits::default(), &never), (Some(0), true));
        assert_eq!(look("a0", SearchLimits::default(), &|| true), (None, false));
        assert!(!look("nobody", SearchLimits { files_max: 1, ..SearchLimits::default() }, &never).1);
        let names =
            search_name(folder.path(), MEMBERS, "nobody", SearchLimits { names_max: 3, ..SearchLimits::default() }, &never)
                .unwrap()
                .names;
        assert_eq!(names.len(), 3);
        assert!(search_name(&folder.path().join("missing"), MEMBERS, "a", SearchLimits::default(), &never).is_err());
    }
}
