//! Coalesces concurrent reads: callers that wait for the same read share it, so the store serves one read at a time, however many
//! callers there are.
//!
//! A caller never gets the result of a read that began before the caller asked. So the result is as new as a read of its own. Look
//! next at `pap/authorize.rs`.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

/// A read that concurrent callers share.
#[derive(Debug)]
pub(super) struct SharedRead<T> {
    /// The number of reads that have begun.
    begun: AtomicU64,
    /// The number and the result of the last read. Whoever holds the lock reads.
    last: Mutex<Option<(u64, T)>>,
}

impl<T> Default for SharedRead<T> {
    fn default() -> Self {
        Self { begun: AtomicU64::new(0), last: Mutex::new(None) }
    }
}

impl<T: Clone> SharedRead<T> {
    /// The result of a read that begins after this call. At most one read runs at a time. If a caller stops waiting in the middle
    /// of a read, the next caller reads anew.
    pub(super) async fn read(&self, read: impl Future<Output = T>) -> T {
        let begun_before = self.begun.load(Ordering::Acquire);
        let mut last = self.last.lock().await;
        if let Some((number, result)) = &*last
            && *number > begun_before
        {
            return result.clone();
        }
        let number = self.begun.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        let result = read.await;
        *last = Some((number, result.clone()));
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    /// A thousand callers cost two reads: the one under way, which began too early for them, and one for all of them.
    #[tokio::test]
    async fn any_number_of_callers_costs_one_read_at_a_time() {
        let shared = Arc::new(SharedRead::default());
        let (reads, release) = (Arc::new(AtomicU64::new(0)), Arc::new(Semaphore::new(0)));
        let ask = || {
            let (shared, reads, release) = (shared.clone(), reads.clone(), release.clone());
            tokio::spawn(async move {
                let read = async {
                    let number = reads.fetch_add(1, Ordering::SeqCst) + 1;
                    release.acquire().await.unwrap().forget();
                    number
                };
                shared.read(read).await
            })
        };
        let first = ask();
        while reads.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let others: Vec<_> = (0..1000).map(|_| ask()).collect();
        tokio::task::yield_now().await;
        release.add_permits(1);
        assert_eq!(first.await.unwrap(), 1);
        release.add_permits(1);
        for other in others {
            assert_eq!(other.await.unwrap(), 2);
        }
        let late = ask();
        release.add_permits(1);
        assert_eq!(late.await.unwrap(), 3, "a read that began before is no answer");
    }

    #[tokio::test]
    async fn who_gives_up_in_a_read_holds_nobody_up() {
        let shared = Arc::new(SharedRead::default());
        let hung = shared.clone();
        let gave_up = tokio::spawn(async move { hung.read(std::future::pending::<u64>()).await });
        while shared.begun.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let next = tokio::spawn(async move { shared.read(std::future::ready(7)).await });
        tokio::task::yield_now().await;
        gave_up.abort();
        assert_eq!(next.await.unwrap(), 7);
    }
}
