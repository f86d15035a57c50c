//! Reads the log back line by line, for investigators and for tests.
//!
//! There is no index: a folder is read from its first file to its last, and memory holds one line. A damaged line yields an
//! error, and reading continues after it. Look next at `record.rs`, which defines the members.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Error;

/// A longer line is no record.
pub const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Reads every record of a folder, in the order of the files' names, and within a file in the order of writing.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed. After that, each item is a record or its own error.
pub fn read_folder(directory: &Path) -> Result<impl Iterator<Item = Result<Value, Error>> + use<>, Error> {
    let failed = |source| Error::Io { action: "list", path: directory.to_owned(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths.into_iter().flat_map(|path| {
        let (lines, error) = match read_file(&path) {
            Ok(lines) => (Some(lines), None),
            Err(error) => (None, Some(Err(error))),
        };
        error.into_iter().chain(lines.into_iter().flatten())
    }))
}

/// Reads every record of one file, in the order of writing.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened.
pub fn read_file(path: &Path) -> Result<RecordReader, Error> {
    let file = File::open(path).map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?;
    Ok(RecordReader { path: path.to_owned(), reader: BufReader::new(file), line: 0, is_over: false })
}

/// The records of one file.
#[derive(Debug)]
pub struct RecordReader {
    path: PathBuf,
    reader: BufReader<File>,
    line: u64,
    is_over: bool,
}

impl Iterator for RecordReader {
    type Item = Result<Value, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let mut bytes = Vec::new();
        self.line += 1;
        let outcome = self.reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes);
        // After these errors, the next bytes cannot be told from the middle of a line.
        self.is_over = outcome.is_err() || bytes.last() != Some(&b'\n');
        let (path, line) = (self.path.clone(), self.line);
        match outcome {
            Err(source) => Some(Err(Error::Io { action: "read", path, source })),
            Ok(0) => None,
            Ok(_) if bytes.last() == Some(&b'\n') => Some(match serde_json::from_slice(&bytes) {
                Ok(value @ Value::Object(_)) => Ok(value),
                Ok(_) => Err(Error::InvalidLine { path, line, problem: "not an object".to_owned() }),
                Err(error) => Err(Error::InvalidLine { path, line, problem: error.to_string() }),
            }),
            Ok(count) if count as u64 == LINE_BYTES_MAX => {
                Some(Err(Error::InvalidLine { path, line, problem: format!("longer than {LINE_BYTES_MAX} bytes") }))
            }
            Ok(_) => Some(Err(Error::UnfinishedLine { path, line })),
        }
    }
}

/// Selects records; an empty filter selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordFilter {
    /// Pairs of a path and a text. A path consists of member names separated by dots (`principals.agents.id`, `reason`). All
    /// pairs must match; if a path leads through a list, one matching item is enough.
    pub members: Vec<(String, String)>,
    /// Selects records at or after this time.
    pub from_unix_ns: Option<i64>,
    /// Selects records before this time.
    pub to_unix_ns: Option<i64>,
}

impl RecordFilter {
    /// Whether the filter selects a record.
    pub fn matches(&self, record: &Value) -> bool {
        let time = record.get("time_unix_ns").and_then(Value::as_i64);
        let bound = |bound: Option<i64>, holds: fn(i64, i64) -> bool| {
            bound.is_none_or(|bound| time.is_some_and(|time| holds(time, bound)))
        };
        bound(self.from_unix_ns, |time, from| time >= from)
            && bound(self.to_unix_ns, |time, to| time < to)
            && self.members.iter().all(|(path, text)| path_matches(record, path, text))
    }
}

/// Whether `path` leads from `value` to the text.
fn path_matches(value: &Value, path: &str, text: &str) -> bool {
    match value {
        Value::Array(items) => items.iter().any(|item| path_matches(item, path, text)),
        Value::Object(members) if !path.is_empty() => {
            let (first, rest) = path.split_once('.').unwrap_or((path, ""));
            members.get(first).is_some_and(|member| path_matches(member, rest, text))
        }
        _ if !path.is_empty() => false,
        Value::String(string) => string == text,
        Value::Object(_) | Value::Null => false,
        Value::Bool(flag) => text == if *flag { "true" } else { "false" },
        Value::Number(number) => format!("{number}") == text,
    }
}
