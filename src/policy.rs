//! Policy: source documents, what is wrong with them, and what they permit.
//!
//! The way of a policy: [`source`] reads files and makes [`document`]s of them, [`validate`] says what is wrong with those as a
//! whole, [`compile`] resolves them to permission sets and answers. The same documents come back from a store as rows, through
//! the same reader.
//!
//! Nothing here knows a token, a store or a clock. Evaluation takes plain facts (`model::request`); that they are verified is
//! `pdp`'s business. Look next at [`document`] for the language, then at [`compile`] for the algebra.

mod bits;
pub mod compile;
pub mod condition;
pub mod diagnostic;
pub mod diff;
pub mod document;
pub mod excerpt;
pub mod keys;
mod node;
pub mod source;
pub mod testrun;
mod tools;
pub mod validate;
pub mod yaml;

pub use compile::{Compiled, Resolved, Verdict};
pub use diagnostic::{Diagnostic, Severity};
pub use document::{Body, Document};

/// The JSON Schema (draft 2020-12) of a policy document, for editors.
pub const SCHEMA: &str = include_str!("policy/schema.json");

#[cfg(test)]
mod tests;

/// Why policy could not be read at all. What is wrong *inside* a file is a [`Diagnostic`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// What was to be read.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder holds no policy; applying nothing would remove everything.
    #[error("`{path}` holds no policy: expected files that end in `.yaml` or `.yml`")]
    Empty {
        /// The folder.
        path: String,
    },
    /// A single file that is not YAML by its name, a folder that is a link, a device, a name that is not UTF-8.
    #[error("`{path}` is not a policy file: {problem}")]
    NotPolicy {
        /// The file or folder.
        path: String,
        /// What it is instead.
        problem: &'static str,
    },
    /// A link that leads out of the folder.
    #[error("`{path}` leads out of the policy folder: copy the file into it")]
    Escapes {
        /// The link.
        path: String,
    },
    /// More than a limit allows.
    #[error("`{path}` is too large: {limit} allowed")]
    TooLarge {
        /// The file or folder at which the limit was reached.
        path: String,
        /// The limit, with its unit.
        limit: String,
    },
    /// A stored document cannot be understood: it was written by another version, or changed by hand.
    #[error("stored {kind} `{id}` cannot be read: {problem}")]
    Stored {
        /// The kind in its key.
        kind: String,
        /// The id in its key.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
}
