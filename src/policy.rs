//! Policy: the source documents, their validation, and their evaluation.
//!
//! A policy passes three stages. [`source`] reads files and turns them into [`document`]s. [`validate`] checks all documents
//! together. [`compile`] resolves the documents to permission sets and answers calls. A store keeps the same documents as rows,
//! and the same reader reads them back.
//!
//! This module knows no token, no store and no clock. Evaluation takes plain facts (`model::request`); `pdp` makes sure that
//! those facts were verified. Look next at [`document`] for the policy language, then at [`compile`] for the evaluation.

mod bit_set;
pub mod compile;
pub mod condition;
pub mod diagnostic;
pub mod diff;
pub mod document;
pub mod excerpt;
pub mod key_changes;
mod node;
pub mod source;
pub mod test_run;
mod tools;
pub mod validate;
pub mod yaml;

pub use compile::{CompiledPolicy, PolicyVerdict, ResolvedSubject};
pub use diagnostic::{Diagnostic, Severity};
pub use document::{Document, DocumentBody};

/// The JSON Schema (draft 2020-12) of a policy document, for editors.
pub const SCHEMA: &str = include_str!("policy/schema.json");

#[cfg(test)]
mod tests;

/// The errors that stop a policy from being read at all. A mistake *inside* a file is a [`Diagnostic`] instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// The file or folder.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The folder holds no policy. Applying such a folder would remove every document.
    #[error("`{path}` holds no policy: expected files that end in `.yaml` or `.yml`")]
    EmptyFolder {
        /// The folder.
        path: String,
    },
    /// The path is not a policy file: its name does not end in `.yaml` or `.yml` or is not UTF-8, or it is a device or a link to
    /// a folder.
    #[error("`{path}` is not a policy file: {problem}")]
    NotPolicy {
        /// The file or folder.
        path: String,
        /// The reason why it is not a policy file.
        problem: &'static str,
    },
    /// A link points to a file outside the policy folder.
    #[error("`{path}` leads out of the policy folder: copy the file into it")]
    EscapesFolder {
        /// The link.
        path: String,
    },
    /// A file or folder exceeds a limit.
    #[error("`{path}` is too large: {limit} allowed")]
    TooLarge {
        /// The file or folder at which the limit was reached.
        path: String,
        /// The limit, with its unit.
        limit: String,
    },
    /// A stored document cannot be read: another version wrote it, or somebody changed it by hand.
    #[error("stored {kind} `{id}` cannot be read: {problem}")]
    UnreadableStored {
        /// The kind in the key of the document.
        kind: String,
        /// The id in the key of the document.
        id: String,
        /// The mistake in the document.
        problem: String,
    },
}
