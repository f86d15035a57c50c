//! A thread with a bounded queue: where blocking work on one connection is done, so that no runtime ever waits for a disk.
//!
//! A thread of our own and not the runtime's pool, because several runtimes share a store and a connection is used by one at a
//! time anyway. It knows nothing of SQL. Look next at `super::write`, which drains such a queue.

use std::thread::JoinHandle;

use tokio::sync::mpsc;

use crate::store::Error;

/// Jobs that wait on one lane; a sender waits for a place.
const QUEUE_JOBS_MAX: usize = 1024;

/// The sending end of a lane. Dropping it lets the thread finish what is queued, and waits for that.
pub(super) struct Lane<J> {
    queue: Option<mpsc::Sender<J>>,
    thread: Option<JoinHandle<()>>,
    /// Cuts short what the thread is at, if that may be cut short.
    interrupt: Option<rusqlite::InterruptHandle>,
}

impl<J: Send + 'static> Lane<J> {
    /// Starts a thread that takes jobs until the lane is dropped.
    pub(super) fn start(
        name: &str,
        interrupt: Option<rusqlite::InterruptHandle>,
        body: impl FnOnce(mpsc::Receiver<J>) + Send + 'static,
    ) -> Result<Self, Error> {
        let (queue, jobs) = mpsc::channel(QUEUE_JOBS_MAX);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(jobs))
            .map_err(|error| Error::Unavailable(format!("cannot start the thread `{name}`: {error}")))?;
        Ok(Self { queue: Some(queue), thread: Some(thread), interrupt })
    }

    /// Queues a job; where the queue is full, once there is a place.
    pub(super) async fn send(&self, job: J) -> Result<(), Error> {
        let gone = || Error::Unavailable("the store has stopped: restart the program".to_owned());
        self.queue.as_ref().ok_or_else(gone)?.send(job).await.map_err(|_| gone())
    }

    /// A way to the queue that does not keep the thread.
    pub(super) fn handle(&self) -> Option<mpsc::WeakSender<J>> {
        self.queue.as_ref().map(mpsc::Sender::downgrade)
    }

    /// Queues a job if there is a place; answers whether there was.
    pub(super) fn offer(&self, job: J) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.try_send(job).is_ok())
    }
}

impl<J> Drop for Lane<J> {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(interrupt) = &self.interrupt {
            interrupt.interrupt();
        }
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to close.
            let _ = thread.join();
        }
    }
}
