//! A served connection: lets bytes out only after the barrier.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tonic::transport::server::Connected;

use crate::model::barrier::WriteBarrier;
use crate::model::connection::PeerInfo;

/// A connection whose every write first passes the barrier of its runtime.
pub(super) struct Io<S> {
    stream: S,
    peer: PeerInfo,
    barrier: Arc<dyn WriteBarrier>,
    _permit: OwnedSemaphorePermit,
}

impl<S> Io<S> {
    pub(super) fn new(stream: S, peer: PeerInfo, barrier: Arc<dyn WriteBarrier>, permit: OwnedSemaphorePermit) -> Self {
        Self { stream, peer, barrier, _permit: permit }
    }
}

impl<S> Connected for Io<S> {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Io<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

// INVARIANT: every way out passes the barrier first. An error cuts the connection: what was not recorded is not read.
impl<S: AsyncWrite + Unpin> AsyncWrite for Io<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.barrier.before_write()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.barrier.before_write()?;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::Semaphore;

    use super::*;

    struct Counting {
        passed: AtomicUsize,
        broken: bool,
    }

    impl WriteBarrier for Counting {
        fn before_write(&self) -> io::Result<()> {
            self.passed.fetch_add(1, Ordering::SeqCst);
            if self.broken { Err(io::Error::other("the disk is full")) } else { Ok(()) }
        }
    }

    async fn check(broken: bool) -> (Result<(), io::ErrorKind>, usize, usize) {
        let barrier = Arc::new(Counting { passed: AtomicUsize::new(0), broken });
        let (ours, mut theirs) = tokio::io::duplex(64);
        let peer = PeerInfo { connection_id: 1, address: "a".into(), is_loopback: true };
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut io = Io::new(ours, peer, barrier.clone(), permit);
        let wrote = io.write_all(b"answer").await.map_err(|error| error.kind());
        drop(io);
        let mut read = Vec::new();
        theirs.read_to_end(&mut read).await.unwrap();
        (wrote, read.len(), barrier.passed.load(Ordering::SeqCst))
    }

    #[tokio::test]
    async fn bytes_pass_the_barrier_or_stay() {
        assert_eq!(check(false).await, (Ok(()), 6, 1));
        assert_eq!(check(true).await, (Err(io::ErrorKind::Other), 0, 1));
    }
}
