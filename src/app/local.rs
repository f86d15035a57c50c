//! Administration of a store within this process, for when no server runs. It serves the same services over a pipe instead of a
//! socket.
//!
//! No decision is given here. Look next at `cli/client.rs`, which signs the calls.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Server};

use super::{Error, admin_routes, bind};
use crate::audit;
use crate::config;
use crate::model::time::{Clock, SystemClock};
use crate::pap::{self, Admin, NewOperator, OperatorChanged};

/// An administration point in this process.
pub struct LocalAdmin {
    admin: Arc<Admin>,
    channel: Channel,
    /// `None` if the data folder takes no records. Acts are carried out all the same, and the answers say that they are unrecorded.
    log: Option<Arc<audit::Log>>,
}

impl LocalAdmin {
    /// Opens a store. Acts are recorded in the data folder if it can be written. The store keeps every act, so a full disk under
    /// the audit log never keeps an operator with access to the store from revoking.
    ///
    /// # Errors
    /// If the store cannot be opened.
    pub async fn open(store: &config::Store, data: &Path) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let store = bind::open_store(store, clock.clone()).await?;
        // The folder is created only now, so that a mistyped store name leaves nothing behind. A failure is reported when an act is
        // recorded.
        let _ = bind::make_private_dir(data);
        let opened = audit::Log::open(&data.join("audit"), NAME, clock.clone()).and_then(|log| Ok((log.recorder(NAME)?, log)));
        let (recorder, log) = match opened {
            Ok((recorder, log)) => (recorder, Some(log)),
            Err(error) => (Arc::new(audit::Recorder::unavailable(NAME, clock.clone(), error)), None),
        };
        let admin = Arc::new(Admin::new(store, clock, recorder));
        admin.set_records(&data.join("audit"));
        let channel = serve(admin.clone()).await?;
        Ok(Self { admin, channel, log })
    }

    /// Adds an operator without a signature; access to the store replaces it. The record names the user and the machine.
    ///
    /// # Errors
    /// See [`Admin::break_glass`].
    pub async fn break_glass(&self, new: &NewOperator, reason: &str) -> Result<OperatorChanged, pap::Error> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "an unknown machine".to_owned());
        let host = host.trim();
        let who = format!("user id {} on {host}", rustix::process::geteuid().as_raw());
        self.admin.break_glass(who, new, reason).await
    }

    /// The channel to the services.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

/// The node name of this process in records.
const NAME: &str = "command-line";

/// Serves administration to this process alone.
pub(crate) async fn serve(admin: Arc<Admin>) -> Result<Channel, Error> {
    let (ours, theirs) = tokio::io::duplex(1024 * 1024);
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
    Endpoint::from_static("http://store.local")
        .connect_with_connector(connector)
        .await
        .map_err(|error| Error::System(format!("a pipe: {error}")))
}

impl Drop for LocalAdmin {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.log.as_ref().map(|log| log.shutdown()) {
            tracing::error!(%error, "the audit log ended badly");
        }
    }
}
