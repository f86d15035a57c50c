//! A thread with bounded queues, which does the blocking work on one connection, so that no runtime ever waits for a disk.
//!
//! Urgent jobs have a queue of their own and go first. The thread does not belong to a runtime's pool, because several runtimes
//! share a store, and a connection is used by one job at a time anyway. This file knows nothing of SQL. Look next at
//! `super::write`, which takes jobs from such queues.

use std::thread::JoinHandle;

use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::model::limits::LEDGER_QUEUE_MAX;
use crate::store::Error;

/// Urgent jobs that may wait for one thread. When the queue is full, a sender waits.
const QUEUE_JOBS_MAX: usize = 1024;

/// The sending end of the queues, which owns the thread. Dropping it lets the thread finish the queued jobs, and waits for that.
pub(super) struct StoreThread<J> {
    urgent: Option<mpsc::Sender<J>>,
    /// For jobs that may wait. A job is refused if too many of them wait.
    deferrable: Option<mpsc::Sender<J>>,
    thread: Option<JoinHandle<()>>,
    /// Interrupts the current job, if the thread may be interrupted.
    interrupt: Option<rusqlite::InterruptHandle>,
}

impl<J: Send + 'static> StoreThread<J> {
    /// Starts a thread that takes jobs until this value is dropped.
    pub(super) fn start(
        name: &str,
        interrupt: Option<rusqlite::InterruptHandle>,
        body: impl FnOnce(JobQueues<J>) + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::Unavailable(format!("cannot start the thread `{name}`: {error}"));
        let (queue, urgent) = mpsc::channel(QUEUE_JOBS_MAX);
        let (deferrable, waiting) = mpsc::channel(LEDGER_QUEUE_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(failed)?;
        let jobs = JobQueues { urgent, deferrable: waiting, runtime };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(jobs)).map_err(failed)?;
        Ok(Self { urgent: Some(queue), deferrable: Some(deferrable), thread: Some(thread), interrupt })
    }

    /// Queues an urgent job. Waits while the queue is full.
    pub(super) async fn send_urgent(&self, job: J) -> Result<(), Error> {
        let gone = || Error::Unavailable("the store has stopped: restart the program".to_owned());
        self.urgent.as_ref().ok_or_else(gone)?.send(job).await.map_err(|_| gone())
    }

    /// A weak sender to the urgent queue, which does not keep the thread alive.
    pub(super) fn weak_sender(&self) -> Option<mpsc::WeakSender<J>> {
        self.urgent.as_ref().map(mpsc::Sender::downgrade)
    }

    /// Queues a job behind all urgent jobs, if the queue has room.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if too many jobs wait; the job is then not done.
    pub(super) fn try_send_deferrable(&self, job: J) -> Result<(), Error> {
        let queued = self.deferrable.as_ref().is_some_and(|deferrable| deferrable.try_send(job).is_ok());
        let full = || format!("{LEDGER_QUEUE_MAX} uses wait for the store, and that is the limit: try again");
        if queued { Ok(()) } else { Err(Error::Unavailable(full())) }
    }

    /// Queues an urgent job if the queue has room. Returns whether it had.
    pub(super) fn try_send_urgent(&self, job: J) -> bool {
        self.urgent.as_ref().is_some_and(|queue| queue.try_send(job).is_ok())
    }
}

impl<J> Drop for StoreThread<J> {
    fn drop(&mut self) {
        drop((self.urgent.take(), self.deferrable.take()));
        if let Some(interrupt) = &self.interrupt {
            interrupt.interrupt();
        }
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to close.
            let _ = thread.join();
        }
    }
}

/// The receiving end of the queues.
pub(super) struct JobQueues<J> {
    urgent: mpsc::Receiver<J>,
    deferrable: mpsc::Receiver<J>,
    /// A runtime of the thread itself, on which it waits for both queues at once.
    runtime: Runtime,
}

impl<J> JobQueues<J> {
    /// Waits for jobs and takes up to `jobs_max` from one queue, urgent jobs first. Returns `false` once no more jobs can come.
    pub(super) fn take_batch(&mut self, batch: &mut Vec<J>, jobs_max: usize) -> bool {
        let Self { urgent, deferrable, runtime } = self;
        let taken = runtime.block_on(async {
            tokio::select! {
                biased;
                Some(job) = urgent.recv() => Some((job, true)),
                Some(job) = deferrable.recv() => Some((job, false)),
                else => None,
            }
        });
        let Some((job, is_urgent)) = taken else { return false };
        batch.push(job);
        let queue = if is_urgent { urgent } else { deferrable };
        while batch.len() < jobs_max
            && let Ok(job) = queue.try_recv()
        {
            batch.push(job);
        }
        true
    }
}
