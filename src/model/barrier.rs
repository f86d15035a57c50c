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

    /// How often a record has failed to reach the kernel so far.
    ///
    /// An answer may wait in any connection of the runtime when that happens. So whoever serves them reads this when a
    /// connection opens and cuts it once the number has grown; a connection opened after a failure carries only what was
    /// said since, which is denials until the barrier works again.
    fn failures(&self) -> u64 {
        0
    }
}
