//! Progress bars on standard error for work that may take seconds. Nothing is drawn if standard error is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A spinner for a wait, with the elapsed time.
pub(super) fn start_spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A bar for work in steps. Nothing is drawn before [`show_step`].
pub(super) fn new_step_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {human_pos}/{human_len} {elapsed}") {
        bar.set_style(style);
    }
    bar
}

/// Shows a step and its progress.
pub(super) fn show_step(bar: &ProgressBar, step: &'static str, done: u64, total: u64) {
    bar.set_message(step);
    bar.set_length(total);
    bar.set_position(done);
}
