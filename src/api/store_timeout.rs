//! Bounds the time that an administrative call waits for the store, so that a store that hangs never makes an operator wait for
//! ever.
//!
//! A read that takes too long is abandoned, because it changed nothing. An act that has begun is never abandoned: it runs to its
//! end and writes its audit record, even if the caller hangs up. The caller is then told that the outcome is not known. Look next
//! at `signature_layer.rs`.

use std::future::Future;
use std::time::Duration;

use tonic::{Code, Status};

use super::status::status_with_reason;
use crate::pap;

/// Longest wait for a read of the store before an act.
const READ_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Longest wait for an act.
const ACT_TIMEOUT: Duration = Duration::from_millis(4_000);

/// Waits for a read that precedes an act.
///
/// # Errors
/// The errors of the read, or `UNAVAILABLE` if the store does not answer in time. In both cases nothing was done, and a message
/// about the store says so.
pub(super) async fn await_read<T>(read: impl Future<Output = Result<T, pap::Error>>) -> Result<T, Status> {
    let late = || {
        let message = format!("the store does not answer ({} s): nothing was done", READ_TIMEOUT.as_secs_f32());
        status_with_reason(Code::Unavailable, "STORE_UNAVAILABLE", message)
    };
    match tokio::time::timeout(READ_TIMEOUT, read).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error @ pap::Error::Store(_))) if matches!(error.store_fault(), pap::StoreFault::Unavailable) => {
            Err(status_with_reason(Code::Unavailable, "STORE_UNAVAILABLE", format!("nothing was done: {error}")))
        }
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(late()),
    }
}

/// Waits for an act, which goes on after the wait ends or the caller hangs up.
///
/// # Errors
/// The errors of the act, or `COMMIT_UNKNOWN` if the store does not answer in time.
pub(super) async fn await_act<T: Send + 'static>(
    act: impl Future<Output = Result<T, pap::Error>> + Send + 'static,
) -> Result<T, Status> {
    let unknown = |why: &str| {
        let message = format!("{why}: it may or may not have been written, and may still be");
        status_with_reason(Code::Unknown, "COMMIT_UNKNOWN", message)
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

    /// On a store that hangs, a read is abandoned and an act runs to its end. The caller gets an answer in both cases.
    #[tokio::test(start_paused = true)]
    async fn who_asks_is_answered_whatever_the_store_does() {
        let nothing = await_read(std::future::pending::<Result<(), pap::Error>>()).await.unwrap_err();
        assert_eq!(nothing.code(), Code::Unavailable);
        assert!(nothing.message().contains("nothing was done"), "{nothing}");

        let ended = Arc::new(AtomicBool::new(false));
        let (ends, hung) = (ended.clone(), ACT_TIMEOUT * 3);
        let unknown = await_act(async move {
            tokio::time::sleep(hung).await;
            ends.store(true, Ordering::SeqCst);
            Ok(())
        });
        let unknown = unknown.await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unknown);
        assert!(unknown.message().contains("may or may not") && !ended.load(Ordering::SeqCst), "{unknown}");
        tokio::time::sleep(hung).await;
        assert!(ended.load(Ordering::SeqCst), "it was not cut short");
        await_act(async { Ok(()) }).await.unwrap();
        await_read(async { Ok(()) }).await.unwrap();
    }

    /// A store that refuses the read before an act has done nothing, and the message says so first.
    #[tokio::test]
    async fn a_store_that_cannot_be_read_has_done_nothing() {
        use crate::store;

        let fails =
            async |error: store::Error| await_read(async move { Err::<(), _>(pap::Error::from(error)) }).await.unwrap_err();
        let refused = fails(store::Error::Unavailable("the store `s` cannot be reached".to_owned())).await;
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "nothing was done: the store `s` cannot be reached"));
        let unknown = fails(store::Error::OutcomeUnknown("the connection broke".to_owned())).await;
        assert_eq!((unknown.code(), unknown.message()), (Code::Unknown, "the connection broke"));
    }

    /// A caller that hangs up during an act does not stop its audit record.
    #[tokio::test(start_paused = true)]
    async fn an_act_runs_to_its_end_whoever_hangs_up() {
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        let acting = await_act(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            ends.store(true, Ordering::SeqCst);
            Ok(())
        });
        assert!(tokio::time::timeout(Duration::from_millis(5), acting).await.is_err());
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(ended.load(Ordering::SeqCst));
    }
}
