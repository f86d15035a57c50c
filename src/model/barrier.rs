//! The socket barrier: what must have happened before bytes may leave on a connection.

use std::io;

/// Called by the IO wrapper of every served connection before it lets bytes out.
///
/// INVARIANT: no permit leaves the process unless its audit record is in the kernel. The server knows only this trait;
/// `app` binds it to the audit log.
pub trait WriteBarrier: Send + Sync {
    /// Makes everything recorded so far on this runtime reach the kernel.
    ///
    /// # Errors
    /// The connection is cut if this fails, so that the answer cannot be read.
    fn before_write(&self) -> io::Result<()>;
}
