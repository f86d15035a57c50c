//! A thread that reads a SQLite store on a connection of its own, one job after the other.
//!
//! Look next at `read.rs`, which holds the reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::connection::SqliteConnection;
use super::error::SqliteError;
use super::store_thread::{JobQueues, StoreThread};
use crate::store::Error;

/// A job for a thread that reads.
pub(super) type ReadJob = Box<dyn FnOnce(&mut SqliteConnection) + Send>;

/// A thread that reads on a connection of its own.
pub(super) struct ReadWorker {
    worker: StoreThread<ReadJob>,
    closing: Arc<AtomicBool>,
}

impl ReadWorker {
    /// Starts a thread on a connection of its own.
    pub(super) fn start(name: &str, mut db: SqliteConnection) -> Result<Self, Error> {
        let closing = Arc::new(AtomicBool::new(false));
        let (interrupt, stop) = (db.connection.get_interrupt_handle(), Arc::clone(&closing));
        let reader = StoreThread::start(name, Some(interrupt), move |mut jobs: JobQueues<ReadJob>| {
            let mut taken = Vec::with_capacity(1);
            while jobs.take_batch(&mut taken, 1) {
                // Once the store is being dropped, nobody waits for an answer.
                for job in taken.drain(..).filter(|_| !stop.load(Ordering::Acquire)) {
                    job(&mut db);
                }
            }
        })?;
        Ok(Self { worker: reader, closing })
    }

    /// A weak sender to the thread, which does not keep it alive.
    pub(super) fn weak_sender(&self) -> Option<mpsc::WeakSender<ReadJob>> {
        self.worker.weak_sender()
    }

    /// Runs a checkpoint now.
    #[cfg(test)]
    pub(super) async fn run_checkpoint(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.worker.send_urgent(Box::new(move |db: &mut SqliteConnection| drop(reply.send(db.checkpoint())))).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped".to_owned()))?
    }

    /// Closes the connection after the pending reads.
    pub(super) async fn close(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        // The sender may have stopped waiting.
        self.worker.send_urgent(Box::new(move |db: &mut SqliteConnection| drop(reply.send(db.close())))).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped: restart the program".to_owned()))?
    }

    /// Runs `read` in one transaction on the thread, if the file is still the one that was opened and the head of the store has
    /// not fallen.
    pub(super) async fn run_read<T, F>(&self, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, SqliteError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |db: &mut SqliteConnection| {
            if reply.is_closed() {
                return;
            }
            let answer = db.check_files().and_then(|()| {
                // INVARIANT: read before the transaction begins, because a commit that follows is not in the transaction.
                let (files, known) = (Arc::clone(db.files()), db.files().newest_commit());
                let read = |connection: &mut Connection| {
                    let transaction = connection.transaction()?;
                    files.check_head(&transaction, known)?;
                    read(&transaction)
                };
                read(&mut db.connection).map_err(|fault| db.to_store_error(fault))
            });
            // The sender may have stopped waiting.
            let _ = reply.send(answer);
        });
        self.worker.send_urgent(job).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped: restart the program".to_owned()))?
    }
}

impl Drop for ReadWorker {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Release);
    }
}
