//! The write barrier of a connection: audit records must reach the kernel before bytes of an answer leave the process.
//!
//! `server` calls it; `app` binds it to the audit log.

use std::io;

/// A hook that the I/O wrapper of every served connection calls before it sends bytes.
///
/// INVARIANT: no permit leaves the process unless its audit record is in the kernel. The server knows only this trait; `app` binds it to
/// the audit log.
pub trait WriteBarrier: Send + Sync {
    /// Writes all records of this runtime so far to the kernel.
    ///
    /// # Errors
    /// If it fails, the connection is cut, so that the client cannot read the answer.
    fn flush_before_write(&self) -> io::Result<()>;

    /// The number of times that a record failed to reach the kernel.
    ///
    /// After a failure, an answer without a record may wait in any connection of the runtime. So the server reads this number when a
    /// connection opens, and cuts the connection once the number has grown. A connection that opens after the failure carries only later
    /// answers, which are denials until the barrier works again.
    fn failure_count(&self) -> u64 {
        0
    }
}
