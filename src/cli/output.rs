//! What commands print: aligned tables and colours for people, one JSON document for scripts, errors on standard error.

use std::io::Write as _;

use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, ContentArrangement, Table, presets};
use serde_json::{Value, json};

/// Where and how to print.
#[derive(Debug)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a script reads.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// One line of text; nothing for a script.
    pub(super) fn line(&self, text: &str) {
        if !self.json {
            write_line(text);
        }
    }

    /// Lines of text that end where they end; nothing for a script.
    pub(super) fn text(&self, text: &str) {
        if !self.json {
            let _ = write!(anstream::stdout(), "{text}");
        }
    }

    /// Lines of text that are not the result, on standard error.
    pub(super) fn aside(&self, text: &str) {
        let _ = write!(anstream::stderr(), "{text}");
    }

    /// The one JSON document for a script; nothing for people.
    pub(super) fn json(&self, value: &Value) {
        if self.json {
            write_line(&value.to_string());
        }
    }

    /// Text that is the result itself, the same for people and scripts.
    pub(super) fn raw(&self, text: &str) {
        write_line(text);
    }

    /// An aligned table; nothing for a script.
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

    /// What was done, but probably not as it was meant.
    pub(super) fn warning(&self, message: &str) {
        let mut stream = anstream::stderr();
        // Nobody is left to tell if standard error is closed.
        let _ = if self.json {
            writeln!(stream, "{}", json!({ "warning": message }))
        } else {
            writeln!(stream, "{} {message}", paint("warning:", Style::new().fg_color(Some(AnsiColor::Yellow.into())).bold()))
        };
    }

    /// What went wrong and what to do.
    pub(super) fn error(&self, message: &str) {
        let mut stream = anstream::stderr();
        // Nobody is left to tell if standard error is closed.
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

/// Text in a style; taken out again where the reader shows no colours.
pub(super) fn paint(text: &str, style: Style) -> String {
    format!("{}{text}{}", style.render(), style.render_reset())
}

/// Headings.
pub(super) fn bold() -> Style {
    Style::new().bold()
}

/// An effect in its colour.
pub(super) fn effect(name: &str) -> String {
    let colour = match name {
        "PERMIT" => AnsiColor::Green,
        "NEEDS_APPROVAL" => AnsiColor::Yellow,
        _ => AnsiColor::Red,
    };
    paint(name, Style::new().fg_color(Some(colour.into())).bold())
}
