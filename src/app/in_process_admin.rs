//! Administration of a store within this process, for when no server runs. It serves the same services over a pipe instead of a
//! socket.
//!
//! No decision is given here. Look next at `cli/client.rs`, which signs the calls.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Server};

use super::{Error, admin_routes, follower_runtime, wiring};
use crate::audit;
use crate::config;
use crate::model::time::{Clock, SystemClock};
use crate::pap::{self, AdministrationPoint, NewOperator, OperatorChangeOutcome};
use crate::store::fleet::HEARTBEAT_INTERVAL_MS;
use crate::store::{ReplicaState, Store};
use crate::sync::PositionFiles;

/// Longest look at who follows a store. The act is done by then, and its answer must not wait for a busy store.
const FOLLOWERS_TIMEOUT: Duration = Duration::from_secs(1);

/// An administration point in this process.
pub struct InProcessAdmin {
    admin: Arc<AdministrationPoint>,
    channel: Channel,
    store: Arc<dyn Store>,
    /// The store, with an absolute path and without a password.
    store_url: String,
    /// The files in which replicas may have recorded how far they followed the store.
    position_files: Option<PositionFiles>,
    /// `None` if the data folder takes no records. Acts are carried out all the same, and the answers say that they are unrecorded.
    log: Option<Arc<audit::AuditLog>>,
}

impl InProcessAdmin {
    /// Opens a store. Acts are recorded in the data folder if it can be written. The store keeps every act, so a full disk under
    /// the audit log never keeps an operator with access to the store from revoking.
    ///
    /// # Errors
    /// If the store cannot be opened, or if there is no data folder.
    pub async fn open(store: &config::StoreLocation, data: &Path) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let chosen = store;
        let store = wiring::open_store(chosen, clock.clone()).await?;
        // A command makes no data folder: nobody would look for the record of its act in a folder whose name was mistyped.
        if !data.is_dir() {
            return Err(Error::Configuration(format!(
                "--data: there is no folder `{}`, and the act is recorded in the audit log of the data folder: name the folder of the \
                 server, or make one for this machine",
                data.display()
            )));
        }
        let opened = audit::AuditLog::open(&data.join("audit"), NODE_NAME, clock.clone())
            .and_then(|log| Ok((log.open_recorder(NODE_NAME)?, log)));
        let (recorder, log) = match opened {
            Ok((recorder, log)) => (recorder, Some(log)),
            Err(error) => (Arc::new(audit::AuditRecorder::unavailable(NODE_NAME, clock.clone(), error)), None),
        };
        let admin = Arc::new(AdministrationPoint::new(store.clone(), clock, recorder));
        admin.set_record_directory(&data.join("audit"));
        let channel = serve_in_process(admin.clone()).await?;
        Ok(Self { admin, channel, store, store_url: chosen.absolute(), position_files: position_files_of(chosen, data), log })
    }

    /// Adds an operator without a signature; access to the store replaces it. The record names the user and the machine.
    ///
    /// # Errors
    /// See [`AdministrationPoint::break_glass`].
    pub async fn break_glass(&self, new: &NewOperator, reason: &str) -> Result<OperatorChangeOutcome, pap::Error> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "an unknown machine".to_owned());
        let host = host.trim();
        let who = format!("user id {} on {host}", rustix::process::geteuid().as_raw());
        self.admin.break_glass(who, new, reason).await
    }

    /// Reads who follows the store. Takes at most a second.
    pub async fn followers(&self) -> StoreFollowers {
        let read_followers = async {
            let replicas = self.store.replicas().await.map_err(|error| error.to_string())?;
            let bound_ms = replicas.freshness_bound_ms.saturating_add(HEARTBEAT_INTERVAL_MS);
            let named = |row: &crate::store::ReplicaRow| row.registration.address.clone();
            let unix_ms = replicas.unix_ms;
            let rows_with_age = || replicas.rows.iter().map(move |row| (row.age_ms(unix_ms), row));
            Ok(StoreFollowers {
                store: self.store_url.clone(),
                bound_ms,
                heard: rows_with_age()
                    .filter(|(age_ms, row)| *age_ms < bound_ms && row.state != ReplicaState::Draining)
                    .map(|(_, row)| named(row))
                    .collect(),
                last_heard: rows_with_age().min_by_key(|(age_ms, _)| *age_ms).map(|(age_ms, row)| (named(row), age_ms)),
                contradiction: self.contradiction().await,
                unread: None,
            })
        };
        let read = tokio::time::timeout(FOLLOWERS_TIMEOUT, read_followers).await;
        let late = || Err(format!("the store did not answer within {} s", FOLLOWERS_TIMEOUT.as_secs()));
        read.unwrap_or_else(|_| late()).unwrap_or_else(|unread| StoreFollowers {
            store: self.store_url.clone(),
            unread: Some(unread),
            ..StoreFollowers::default()
        })
    }

    /// Why the store is not the one that a replica followed, by the positions that replicas recorded; `None` if nothing says so.
    async fn contradiction(&self) -> Option<String> {
        let recorded = self.position_files.as_ref()?.read_all();
        let recorded = match recorded {
            Ok(recorded) => recorded,
            Err(problem) => return Some(problem),
        };
        for (known, path) in recorded {
            // The store was read a moment ago. An error of the store here says nothing about its history.
            if let Err(Error::Configuration(problem)) = follower_runtime::check_position(&*self.store, &known, &path).await {
                return Some(problem);
            }
        }
        None
    }

    /// The hint for an administrator after a break-glass act. See [`AdministrationPoint::break_glass_hint`].
    pub async fn break_glass_hint(&self) -> String {
        self.admin.break_glass_hint().await
    }

    /// The channel to the services.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

/// The store that a command opened, and the replicas that follow it.
#[derive(Clone, Debug, Default)]
pub struct StoreFollowers {
    /// The store, with an absolute path and without a password.
    pub store: String,
    /// A replica that was not heard for this long is not heard, in milliseconds.
    pub bound_ms: u64,
    /// The addresses of the replicas that were heard and do not stop.
    pub heard: Vec<String>,
    /// The address of the replica that was heard last, and milliseconds since then.
    pub last_heard: Option<(String, u64)>,
    /// Why this is not the store that a replica followed, by the position that the replica recorded.
    pub contradiction: Option<String>,
    /// Why the replicas could not be read.
    pub unread: Option<String>,
}

impl StoreFollowers {
    /// Whether a replica follows the store, and no recorded position contradicts it.
    pub fn is_followed(&self) -> bool {
        !self.heard.is_empty() && self.contradiction.is_none()
    }
}

/// The recorded positions in the data folder, and in the folder of the store's file.
fn position_files_of(store: &config::StoreLocation, data: &Path) -> Option<PositionFiles> {
    let folder = match store {
        config::StoreLocation::Sqlite(path) => path.parent().map(Path::to_owned),
        config::StoreLocation::Postgres(_) => None,
    };
    let folder = folder.map(|folder| if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder });
    let same = |folder: &PathBuf| folder.canonicalize().ok() == data.canonicalize().ok();
    let second_file = folder.filter(|folder| !same(folder)).map(|folder| PositionFiles::file_of(&folder));
    PositionFiles::new(data, second_file.as_deref()).ok()
}

/// The node name of this process in records.
const NODE_NAME: &str = "command-line";

/// Serves administration to this process alone.
pub(crate) async fn serve_in_process(admin: Arc<AdministrationPoint>) -> Result<Channel, Error> {
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

impl Drop for InProcessAdmin {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.log.as_ref().map(|log| log.shutdown()) {
            tracing::error!(%error, "the audit log ended badly");
        }
    }
}
