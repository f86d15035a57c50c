//! A thread that reads a SQLite store on a connection of its own, one job after the other.
//!
//! Look next at `read.rs`, which holds the reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::lane::{Jobs, Lane};
use super::open::Db;
use super::store_fault::Fault;
use crate::store::Error;

/// A job for a thread that reads.
pub(super) type Job = Box<dyn FnOnce(&mut Db) + Send>;

/// A thread that reads on a connection of its own.
pub(super) struct Reader {
    lane: Lane<Job>,
    closing: Arc<AtomicBool>,
}

impl Reader {
    /// Starts a thread on a connection of its own.
    pub(super) fn start(name: &str, mut db: Db) -> Result<Self, Error> {
        let closing = Arc::new(AtomicBool::new(false));
        let (interrupt, stop) = (db.connection.get_interrupt_handle(), Arc::clone(&closing));
        let lane = Lane::start(name, Some(interrupt), move |mut jobs: Jobs<Job>| {
            let mut taken = Vec::with_capacity(1);
            while jobs.take(&mut taken, 1) {
                // Once the store is being dropped, nobody waits for an answer.
                for job in taken.drain(..).filter(|_| !stop.load(Ordering::Acquire)) {
                    job(&mut db);
                }
            }
        })?;
        Ok(Self { lane, closing })
    }

    /// A weak sender to the thread, which does not keep it alive.
    pub(super) fn handle(&self) -> Option<mpsc::WeakSender<Job>> {
        self.lane.handle()
    }

    /// Runs a checkpoint now.
    #[cfg(test)]
    pub(super) async fn run_checkpoint(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.lane.send(Box::new(move |db: &mut Db| drop(reply.send(db.checkpoint())))).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped".to_owned()))?
    }

    /// Closes the connection after the pending reads.
    pub(super) async fn close(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        // The sender may have stopped waiting.
        self.lane.send(Box::new(move |db: &mut Db| drop(reply.send(db.close())))).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped: restart the program".to_owned()))?
    }

    /// Runs `read` in one transaction on the thread, if the file is still the one that was opened.
    pub(super) async fn run<T, F>(&self, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |db: &mut Db| {
            if reply.is_closed() {
                return;
            }
            let answer = db.check_same().and_then(|()| {
                let read = |connection: &mut Connection| read(&*connection.transaction()?);
                read(&mut db.connection).map_err(|fault| db.explain(fault))
            });
            // The sender may have stopped waiting.
            let _ = reply.send(answer);
        });
        self.lane.send(job).await?;
        answer.await.map_err(|_| Error::Unavailable("the store has stopped: restart the program".to_owned()))?
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Release);
    }
}
