//! Writes lines of the log to standard error, and never waits for its reader.
//!
//! Every thread logs, those that decide among them. A reader of a pipe that has stopped reading, such as a pager or a terminal that is
//! paused, must hold none of them up. A line that does not fit is lost, and the next line that fits says how many were. Look next at
//! `logs.rs`, which gives the lines.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Format of a line of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Time, level, message and fields.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// What fits into a pipe or a socket that is said to be writable: `PIPE_BUF` of Linux.
const PART_BYTES: usize = 4096;

/// What was not written.
#[derive(Debug)]
struct LostLines {
    lines: u64,
    /// Whether a line was broken off in its middle.
    is_torn: bool,
}

static LOST: Mutex<LostLines> = Mutex::new(LostLines { lines: 0, is_torn: false });

/// Standard error, for whole lines.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogWriter(pub(super) LogFormat);

impl Write for LogWriter {
    /// Takes a line, whether or not it could be written.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lost = LOST.lock().unwrap_or_else(PoisonError::into_inner);
        write_line(&mut io::stderr().lock(), line, self.0, &mut lost);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_line(stream: &mut (impl Write + AsFd), line: &[u8], format: LogFormat, lost: &mut LostLines) {
    if lost.lines > 0 {
        let loss_report = match format {
            LogFormat::Human => format!("WARN {} lines of the log were lost: standard error was not read in time\n", lost.lines),
            LogFormat::Json => format!(
                "{{\"level\":\"WARN\",\"message\":\"lines of the log were lost: standard error was not read in time\",\"lines\":{}}}\n",
                lost.lines
            ),
        };
        let loss_report = if lost.is_torn { format!("\n{loss_report}") } else { loss_report };
        if write_parts(stream, loss_report.as_bytes()) == 0 {
            lost.lines = lost.lines.saturating_add(1);
            return;
        }
        *lost = LostLines { lines: 0, is_torn: false };
    }
    let written = write_parts(stream, line);
    if written < line.len() {
        *lost = LostLines { lines: 1, is_torn: written > 0 };
    }
}

/// Returns how many bytes were written without waiting. If the reader is gone, all bytes count as written, because nobody could
/// read a report of the loss.
fn write_parts(stream: &mut (impl Write + AsFd), line: &[u8]) -> usize {
    let mut written = 0;
    for part in line.chunks(PART_BYTES) {
        if !is_writable(stream) {
            break;
        }
        let _ = stream.write_all(part);
        written += part.len();
    }
    written
}

fn is_writable(stream: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// A pipe that nobody reads takes what fits and holds nobody up; once it is read the log says what was lost.
    #[test]
    fn a_full_pipe_loses_lines_and_says_so() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        let mut lost = LostLines { lines: 0, is_torn: false };
        let line = [&[b'x'; 999][..], b"\n"].concat();
        let mut count = 0;
        while lost.lines < 10 {
            write_line(&mut writer, &line, LogFormat::Human, &mut lost);
            count += 1;
            assert!(count < 100_000, "the pipe is never full");
        }
        let mut room = vec![0; (count - 10) * line.len() - 1];
        reader.read_exact(&mut room).unwrap();
        write_line(&mut writer, b"again\n", LogFormat::Human, &mut lost);
        assert_eq!(lost.lines, 0);
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let loss_report = "WARN 10 lines of the log were lost: standard error was not read in time\nagain\n";
        assert!(rest.trim_start_matches(['x', '\n']) == loss_report, "{rest}");
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        let mut lost = LostLines { lines: 3, is_torn: false };
        write_line(&mut writer, b"nobody\n", LogFormat::Json, &mut lost);
        assert_eq!(lost.lines, 0);
    }
}
