//! Administration in this process on a store, for when no server runs: the same services over a pipe instead of a socket.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Server};

use super::{Error, admin_routes, bind};
use crate::audit;
use crate::config;
use crate::model::time::{Clock, SystemClock};
use crate::pap::Admin;

/// An administration point in this process. What it records is written when it is dropped, at the latest.
pub struct LocalAdmin {
    channel: Channel,
    recorder: Arc<audit::Recorder>,
    log: Arc<audit::Log>,
}

impl LocalAdmin {
    /// Opens a store; acts are recorded in the data folder.
    ///
    /// # Errors
    /// If the store or the audit log cannot be opened.
    pub async fn open(store: &config::Store, data: &Path) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        bind::make_private_dir(data)?;
        let store = bind::open_store(store, clock.clone()).await?;
        let log = audit::Log::open(&data.join("audit"), "command-line", &*clock)?;
        let admin = Arc::new(Admin::new(store, clock, log.recorder("command-line")?));
        admin.set_records(&data.join("audit"));
        let (ours, theirs) = tokio::io::duplex(1024 * 1024);
        let recorder = admin.recorder();
        let routes = admin_routes(admin, None);
        tokio::spawn(async move {
            let incoming = tokio_stream::once(Ok::<_, std::io::Error>(theirs));
            if let Err(error) = Server::builder().add_routes(routes).serve_with_incoming(incoming).await {
                tracing::error!(%error, "administration ended");
            }
        });
        let mut ours = Some(ours);
        let connector = tower::service_fn(move |_| {
            let pipe = ours.take().map(TokioIo::new).ok_or_else(|| std::io::Error::other("the pipe was used"));
            async move { pipe }
        });
        let channel = Endpoint::from_static("http://store.local")
            .connect_with_connector(connector)
            .await
            .map_err(|error| Error::System(format!("a pipe: {error}")))?;
        Ok(Self { channel, recorder, log })
    }

    /// Writes what was recorded so far.
    ///
    /// # Errors
    /// If it cannot be written; it was done all the same.
    pub fn flush(&self) -> Result<(), String> {
        let failed = |error| format!("the act was done, but it could not be written to the audit log: {error}");
        self.recorder.flush().map_err(failed)
    }

    /// The way to the services.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

impl Drop for LocalAdmin {
    fn drop(&mut self) {
        if let Err(error) = self.log.shutdown() {
            tracing::error!(%error, "the audit log ended badly");
        }
    }
}
