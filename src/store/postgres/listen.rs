//! Notifications: hints that a poll would find news, on a connection that does nothing else.
//!
//! Nothing relies on them. Behind a pooler that shares connections no notification ever arrives, and nothing breaks. Look next at
//! [`crate::store::Store::wake`].

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::lane::Pause;
use super::link::{CHANNEL, Link};
use super::settings::Settings;
use super::tls::Connector;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Listens until the future is dropped.
pub(super) async fn listen(settings: Arc<Settings>, connector: Connector, wake: watch::Sender<u64>) {
    let mut pause = Pause::default();
    for host in 0.. {
        let link = Link::connect(&settings, &connector, host, CONNECT_TIMEOUT, Some(wake.clone())).await;
        if let Ok(mut link) = link {
            let listening = tokio::time::timeout(CONNECT_TIMEOUT, link.run(&format!("LISTEN {CHANNEL}"))).await;
            if matches!(listening, Ok(Ok(()))) {
                pause.reset();
                link.closed().await;
            }
        }
        tokio::time::sleep(pause.next()).await;
    }
}
