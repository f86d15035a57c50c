//! Notifications: hints that a poll would find news, on a connection that does nothing else.
//!
//! Nothing relies on them. Behind a pooler that shares connections no notification ever arrives, and nothing breaks. Look next at
//! [`crate::store::Store::subscribe_commits`].

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::connection::{NOTIFY_CHANNEL, PostgresConnection};
use super::dedicated_connection::ReconnectBackoff;
use super::settings::Settings;
use super::tls::PostgresTlsConnector;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Listens until the future is dropped.
pub(super) async fn listen_for_commits(settings: Arc<Settings>, connector: PostgresTlsConnector, wake: watch::Sender<u64>) {
    let mut pause = ReconnectBackoff::default();
    for host in 0.. {
        let connection = PostgresConnection::connect(&settings, &connector, host, CONNECT_TIMEOUT, Some(wake.clone())).await;
        if let Ok(mut connection) = connection {
            let listening = tokio::time::timeout(CONNECT_TIMEOUT, connection.run_sql(&format!("LISTEN {NOTIFY_CHANNEL}"))).await;
            if matches!(listening, Ok(Ok(()))) {
                pause.reset();
                connection.wait_closed().await;
            }
        }
        tokio::time::sleep(pause.next_delay()).await;
    }
}
