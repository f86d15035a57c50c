//! A bound on what an act of administration waits for: a store that hangs must not make an operator hang.
//!
//! A read that does not come is given up: nothing was done. An act that was begun is not: it runs to its end and to its record,
//! whoever hangs up, and who asked is told that nobody knows yet. Look next at `signed.rs`.

use std::future::Future;
use std::time::Duration;

use tonic::{Code, Status};

use super::status::status;
use crate::pap;

/// How long a read of the store may take before an act.
const READ_TIMEOUT: Duration = Duration::from_millis(1_500);
/// How long an act is waited for.
const ACT_TIMEOUT: Duration = Duration::from_millis(4_000);

/// What a read before an act says.
///
/// # Errors
/// As the read, or `UNAVAILABLE` where the store does not answer in time; nothing was done then.
pub(super) async fn read<T>(read: impl Future<Output = Result<T, pap::Error>>) -> Result<T, Status> {
    let late = || {
        let message = format!("the store does not answer ({} s): nothing was done", READ_TIMEOUT.as_secs_f32());
        status(Code::Unavailable, "STORE_UNAVAILABLE", message)
    };
    Ok(tokio::time::timeout(READ_TIMEOUT, read).await.map_err(|_| late())??)
}

/// What became of an act, which goes on whoever stops waiting for it.
///
/// # Errors
/// As the act, or `COMMIT_UNKNOWN` where the store does not answer in time.
pub(super) async fn act<T: Send + 'static>(
    act: impl Future<Output = Result<T, pap::Error>> + Send + 'static,
) -> Result<T, Status> {
    let unknown = |why: &str| {
        let message = format!("{why}: it may or may not have been written, and may still be");
        status(Code::Unknown, "COMMIT_UNKNOWN", message)
    };
    match tokio::time::timeout(ACT_TIMEOUT, tokio::spawn(act)).await {
        Ok(Ok(done)) => Ok(done?),
        Ok(Err(_)) => Err(unknown("the server stopped while it acted")),
        Err(_) => Err(unknown(&format!("the store does not answer ({} s)", ACT_TIMEOUT.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A store that hangs: a read is given up, an act goes on to its end, and both are answered.
    #[tokio::test(start_paused = true)]
    async fn who_asks_is_answered_whatever_the_store_does() {
        let nothing = read(std::future::pending::<Result<(), pap::Error>>()).await.unwrap_err();
        assert_eq!(nothing.code(), Code::Unavailable);
        assert!(nothing.message().contains("nothing was done"), "{nothing}");

        let ended = Arc::new(AtomicBool::new(false));
        let (ends, hung) = (ended.clone(), ACT_TIMEOUT * 3);
        let unknown = act(async move {
            tokio::time::sleep(hung).await;
            ends.store(true, Ordering::SeqCst);
            Ok(())
        });
        let unknown = unknown.await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unknown);
        assert!(unknown.message().contains("may or may not") && !ended.load(Ordering::SeqCst), "{unknown}");
        tokio::time::sleep(hung).await;
        assert!(ended.load(Ordering::SeqCst), "it was not cut short");
        act(async { Ok(()) }).await.unwrap();
        read(async { Ok(()) }).await.unwrap();
    }

    /// Who hangs up in the middle of an act does not undo its record.
    #[tokio::test(start_paused = true)]
    async fn an_act_runs_to_its_end_whoever_hangs_up() {
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        let acting = act(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            ends.store(true, Ordering::SeqCst);
            Ok(())
        });
        assert!(tokio::time::timeout(Duration::from_millis(5), acting).await.is_err());
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(ended.load(Ordering::SeqCst));
    }
}
