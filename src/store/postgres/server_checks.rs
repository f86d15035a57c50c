//! The required configuration of a PostgreSQL server: its version, its encoding, and the settings that make commits durable.
//!
//! Look next at `schema.rs`, which creates the tables once the server was checked, and at `read.rs`, which checks the settings
//! again with every answer.

use super::connection::{PostgresConnection, QueryError};
use super::settings::Durability;
use crate::store::Error;

/// The oldest supported server, as `server_version_num` states it.
const SERVER_VERSION_MIN: i64 = 130_000;

/// The server's settings that determine durability, as the server reports them.
pub(super) struct DurabilitySettings {
    pub(super) fsync: String,
    pub(super) full_page_writes: String,
    pub(super) synchronous_commit: String,
    pub(super) has_standbys: bool,
}

impl DurabilitySettings {
    /// The columns that [`DurabilitySettings::from_row`] parses.
    pub(super) const COLUMNS: &str = "current_setting('fsync'), current_setting('full_page_writes'), \
        current_setting('synchronous_commit'), current_setting('synchronous_standby_names') <> ''";

    /// Parses the settings from a row; `first` is the index of their first column.
    pub(super) fn from_row(row: &tokio_postgres::Row, first: usize) -> Result<Self, QueryError> {
        let text = |column: usize| row.try_get::<_, String>(first.saturating_add(column));
        let (fsync, full_page_writes, synchronous_commit) = (text(0)?, text(1)?, text(2)?);
        Ok(Self { fsync, full_page_writes, synchronous_commit, has_standbys: row.try_get(first.saturating_add(3))? })
    }

    /// Checks the settings against the operator's claim.
    ///
    /// # Errors
    /// [`Error::Misconfigured`], naming the server's setting and the remedy.
    pub(super) fn check_claim(&self, claimed: Durability, store_url: &str) -> Result<(), Error> {
        let wrong = |setting: &str, is: &str, instead: &str| {
            let claimed = claimed.as_str();
            Err(Error::Misconfigured(format!(
                "the server of the store `{store_url}` has `{setting} = {is}`, so `store_durability: {claimed}` does not hold: {instead}"
            )))
        };
        if self.fsync != "on" {
            return wrong("fsync", &self.fsync, "set it to `on`, for without it a crash loses or mangles what was acknowledged");
        }
        if self.full_page_writes != "on" {
            return wrong("full_page_writes", &self.full_page_writes, "set it to `on`, for without it a crash mangles pages");
        }
        if self.synchronous_commit == "off" {
            return wrong(
                "synchronous_commit",
                "off",
                "set it to `on` for this role, for without it a crash loses what was acknowledged",
            );
        }
        if claimed == Durability::Synchronous && !self.has_standbys {
            return wrong("synchronous_standby_names", "''", "name a standby there, or say `single` or `asynchronous`");
        }
        if claimed == Durability::Synchronous && !["on", "remote_apply"].contains(&self.synchronous_commit.as_str()) {
            return wrong("synchronous_commit", &self.synchronous_commit, "set it to `on` or `remote_apply` for this role");
        }
        Ok(())
    }
}

/// Checks the server before anything is created in it.
pub(super) async fn check_server(
    connection: &PostgresConnection,
    claimed: Durability,
    store_url: &str,
) -> Result<(), QueryError> {
    let sql = format!(
        "SELECT {}, current_setting('server_encoding'), current_setting('server_version_num')::int8, pg_is_in_recovery()",
        DurabilitySettings::COLUMNS
    );
    let row =
        connection.query_row(&sql, &[]).await?.ok_or_else(|| Error::Corrupt("the server says nothing of itself".to_owned()))?;
    let (encoding, version, standby): (String, i64, bool) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
    if version < SERVER_VERSION_MIN {
        let why = format!("the server of the store `{store_url}` is of version {version}: 13 or newer is needed");
        return Err(Error::Misconfigured(why).into());
    }
    if encoding != "UTF8" {
        let why = format!("the database of the store `{store_url}` is encoded in {encoding}: make one with ENCODING 'UTF8'");
        return Err(Error::Misconfigured(why).into());
    }
    if standby {
        return Err(Error::Unavailable(format!("the server of the store `{store_url}` is a standby: name the primary")).into());
    }
    Ok(DurabilitySettings::from_row(&row, 0)?.check_claim(claimed, store_url)?)
}
