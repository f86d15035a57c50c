//! The log of the process, written to standard error for people or for machines.
//!
//! Facts are fields; nothing is logged per request above debug. Look next at `log_writer.rs`, which writes the lines.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::log_writer::{LogFormat, LogWriter};
use super::{Error, Settings};

/// Starts to receive the logs of the process.
pub(super) fn init_logs(settings: &Settings) -> Result<(), Error> {
    let filter = parse_filter(&settings.log_filter)?;
    let format = settings.log_format;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || LogWriter(format))
        // A line that cannot be written is lost, for example on a full disk or a closed pipe. Reporting that on standard error
        // would panic.
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let outcome = match settings.log_format {
        LogFormat::Human => builder.finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    };
    outcome.map_err(|_| Error::LogsTwice)
}

fn parse_filter(text: &str) -> Result<EnvFilter, Error> {
    let text = if text.trim().is_empty() { "info" } else { text };
    EnvFilter::try_new(text).map_err(|error| Error::Filter { filter: text.to_owned(), problem: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_or_named() {
        for good in ["", " ", "debug", "info,portcullis=debug", "off"] {
            assert!(parse_filter(good).is_ok(), "{good}");
        }
        let message = parse_filter("portcullis=loud").unwrap_err().to_string();
        assert!(message.contains("`portcullis=loud`") && !message.contains('\n'), "{message}");
    }
}
