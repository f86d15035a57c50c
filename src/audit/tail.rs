//! Cuts the unfinished last line of files whose process has ended.
//!
//! A process that is killed in the middle of a write leaves a part of a line. No answer left the process for such a record, and a
//! JSON reader stops at it before it reads the later files. So a start removes that part, and logs how much it removed.
//!
//! A file whose writer still runs is locked and stays as it is. Look next at `log.rs`, which locks each new file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::Error;
use super::query::LINE_BYTES_MAX;

/// Size of a block that is read at once, backwards from the end of a file.
const BLOCK_BYTES: u64 = 64 * 1024;

/// Cuts each file of a folder behind its last whole line.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed. A file that cannot be cut is logged and stays as it is.
pub(super) fn truncate_unfinished_lines(directory: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io { action: "list", path: directory.to_owned(), source };
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) || path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        match truncate_unfinished_line(&path) {
            Ok(0) => {}
            Ok(bytes) => tracing::warn!(
                file = %path.display(), bytes,
                "audit log: a process ended in the middle of a record; the unfinished record was removed"
            ),
            Err(error) => tracing::warn!(
                file = %path.display(), %error,
                "audit log: the file ends in the middle of a record, and cannot be cut: readers may stop there"
            ),
        }
    }
    Ok(())
}

/// Cuts one file, and returns the number of removed bytes.
fn truncate_unfinished_line(path: &Path) -> io::Result<u64> {
    // Most files end with a whole line. They are only read, so that a file that may not be written causes no warning.
    if complete_lines_length(&File::open(path)?)?.is_none() {
        return Ok(0);
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(0),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // The writer may have finished its line and ended in the meantime.
    let Some((length, whole)) = complete_lines_length(&file)? else { return Ok(0) };
    file.set_len(whole)?;
    file.sync_all()?;
    Ok(length - whole)
}

/// The length of a file and of its whole lines; `None` if the file is empty or ends with a whole line.
fn complete_lines_length(file: &File) -> io::Result<Option<(u64, u64)>> {
    let length = file.metadata()?.len();
    let mut end = length;
    while end > 0 {
        let from = end.saturating_sub(if end == length { 1 } else { BLOCK_BYTES });
        let mut block = vec![0; usize::try_from(end - from).unwrap_or(0)];
        file.read_exact_at(&mut block, from)?;
        if let Some(at) = block.iter().rposition(|byte| *byte == b'\n') {
            let whole = from + at as u64 + 1;
            return Ok((whole < length).then_some((length, whole)));
        }
        end = from;
        if length - end > LINE_BYTES_MAX {
            return Err(io::Error::other(format!("its last {LINE_BYTES_MAX} bytes hold no end of a line")));
        }
    }
    Ok((length > 0).then_some((length, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unfinished_is_cut_unless_its_writer_runs() {
        let folder = tempfile::tempdir().unwrap();
        let check = |content: &str, expected: &str| {
            let path = folder.path().join("a.jsonl");
            std::fs::write(&path, content).unwrap();
            truncate_unfinished_lines(folder.path()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap().len(), expected.len());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        };
        check("", "");
        check("{}\n", "{}\n");
        check("{}\n{}\n{\"kind\":\"ac", "{}\n{}\n");
        check("{\"kind\"", "");
        let long = "x".repeat(usize::try_from(2 * BLOCK_BYTES).unwrap() + 7);
        check(&format!("{{}}\n{long}"), "{}\n");
        check(&long, "");
        // This was never a record, so it is left for a person.
        let foreign = "x".repeat(usize::try_from(LINE_BYTES_MAX + 2 * BLOCK_BYTES).unwrap());
        check(&foreign, &foreign);

        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "{}\n{").unwrap();
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        writer.try_lock().unwrap();
        truncate_unfinished_lines(folder.path()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"{}\n{", "its writer may be about to finish the line");
        drop(writer);
        std::fs::write(folder.path().join("b.txt"), "{").unwrap();
        truncate_unfinished_lines(folder.path()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"{}\n");
        assert_eq!(std::fs::read(folder.path().join("b.txt")).unwrap(), b"{");
    }
}
