//! Progress bars on standard error for work that may take seconds. Nothing is drawn if standard error is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A spinner for a wait, with the elapsed time.
pub(super) fn start_spinner(what: &'static str) -> ProgressBar {
    let progress_bar = ProgressBar::new_spinner().with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        progress_bar.set_style(style);
    }
    progress_bar.enable_steady_tick(Duration::from_millis(120));
    progress_bar
}

/// A bar for work in steps. Nothing is drawn before [`show_step`].
pub(super) fn new_step_bar() -> ProgressBar {
    let progress_bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {human_pos}/{human_len} {elapsed}") {
        progress_bar.set_style(style);
    }
    progress_bar
}

/// Shows a step and its progress.
pub(super) fn show_step(progress_bar: &ProgressBar, step: &'static str, done: u64, total: u64) {
    progress_bar.set_message(step);
    progress_bar.set_length(total);
    progress_bar.set_position(done);
}
