//! The output of commands: aligned tables and colors for people, one JSON document for scripts, errors on standard error.
//!
//! A command prints either text or JSON, never both. Look next at `cli/diagnostic_text.rs`, which renders policy diagnostics.

use std::io::Write as _;

use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, ContentArrangement, Table, presets};
use serde_json::{Value, json};

/// Prints for people or for a script.
#[derive(Debug)]
pub(super) struct CommandOutput {
    json: bool,
}

impl CommandOutput {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether the output is for a script.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints one line of text; nothing for a script.
    pub(super) fn line(&self, text: &str) {
        if !self.json {
            write_line(text);
        }
    }

    /// Prints text without adding a line end; nothing for a script.
    pub(super) fn text(&self, text: &str) {
        if !self.json {
            let _ = write!(anstream::stdout(), "{text}");
        }
    }

    /// Prints text that is not the result to standard error.
    pub(super) fn note(&self, text: &str) {
        let _ = write!(anstream::stderr(), "{text}");
    }

    /// Prints the one JSON document for a script; nothing for people.
    pub(super) fn json(&self, value: &Value) {
        if self.json {
            write_line(&value.to_string());
        }
    }

    /// Prints text that is the result itself, for people and scripts alike.
    pub(super) fn raw(&self, text: &str) {
        write_line(text);
    }

    /// Prints an aligned table; nothing for a script.
    pub(super) fn table(&self, headers: &[&str], rows: Vec<Vec<String>>) {
        if self.json {
            return;
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(headers.iter().map(|header| Cell::new(paint(header, bold()))));
        for row in rows {
            table.add_row(row);
        }
        for line in table.lines() {
            write_line(line.trim_end());
        }
    }

    /// Warns of an act that was done, but probably not as intended.
    pub(super) fn warning(&self, message: &str) {
        let mut stream = anstream::stderr();
        // If standard error is closed, there is nobody to tell.
        let _ = if self.json {
            writeln!(stream, "{}", json!({ "warning": message }))
        } else {
            writeln!(stream, "{} {message}", paint("warning:", Style::new().fg_color(Some(AnsiColor::Yellow.into())).bold()))
        };
    }

    /// Reports the problem and the remedy.
    pub(super) fn error(&self, message: &str) {
        let mut stream = anstream::stderr();
        // If standard error is closed, there is nobody to tell.
        let _ = if self.json {
            writeln!(stream, "{}", json!({ "error": message }))
        } else {
            writeln!(stream, "{} {message}", paint("error:", Style::new().fg_color(Some(AnsiColor::Red.into())).bold()))
        };
    }
}

fn write_line(text: &str) {
    // A reader that went away (`| head`) is no fault of the command.
    let _ = writeln!(anstream::stdout(), "{text}");
}

/// Text in a style. The style is removed if the output shows no colors.
pub(super) fn paint(text: &str, style: Style) -> String {
    format!("{}{text}{}", style.render(), style.render_reset())
}

/// The style of headings.
pub(super) fn bold() -> Style {
    Style::new().bold()
}

/// An effect in its color.
pub(super) fn paint_effect(name: &str) -> String {
    let color = match name {
        "PERMIT" => AnsiColor::Green,
        "NEEDS_APPROVAL" => AnsiColor::Yellow,
        _ => AnsiColor::Red,
    };
    paint(name, Style::new().fg_color(Some(color.into())).bold())
}
