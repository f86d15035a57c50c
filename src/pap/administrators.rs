//! Counts the operators who administer, and those of them who can still sign.
//!
//! Whether two operators must sign depends on the number of administrators. One whose keys are all revoked still counts. Otherwise a thief who revokes the keys of
//! all others could act alone. So a revocation can leave fewer administrators who can sign than an act needs, and every answer that
//! depends on that says so. This module only reports; `apply.rs` and `revoke.rs` decide.

use super::{AdministrationPoint, Error};
use crate::model::constraint::abbreviate;
use crate::model::ids::Thumbprint;
use crate::model::rows::RevocationTarget;
use crate::policy::document::{Document, DocumentBody, OperatorRole, OperatorSpec};
use crate::store::{StoredDocument, signers};

/// The maximum number of names in a message.
const NAMED_MAX: usize = 8;
/// The remedy where too few administrators can sign.
const BREAK_GLASS: &str = "add an administrator at the store: `portcullis operator add ID --out FILE --role administer --store URL \
                           --data DATA --break-glass`";

/// The operators who administer, by their ability to sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Administrators {
    count: usize,
    /// The ids of those with a key that is not revoked.
    live: Vec<String>,
}

/// Whether a document is that of an operator who administers.
pub(super) fn is_administrator(document: &Document) -> bool {
    matches!(&document.body, DocumentBody::Operator(operator) if operator.roles.contains(&OperatorRole::Administer))
}

/// The operators with the role `administer`.
pub(super) fn administrators(stored: &[StoredDocument]) -> impl Iterator<Item = OperatorSpec> {
    let documents = stored.iter().filter_map(|stored| Document::from_row(&stored.row).ok());
    documents.filter(is_administrator).filter_map(|document| match document.body {
        DocumentBody::Operator(operator) => Some(operator),
        _ => None,
    })
}

/// The thumbprints of all keys of the operators.
pub(super) fn operator_keys(operators: &[OperatorSpec]) -> Vec<String> {
    operators.iter().flat_map(|operator| &operator.keys).map(|key| key.thumbprint().to_string()).collect()
}

impl AdministrationPoint {
    /// Counts the present administrators.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub(super) async fn administrators(&self) -> Result<Administrators, Error> {
        let stored = self.store.documents(Some("operator")).await?.documents;
        let operators: Vec<OperatorSpec> = administrators(&stored).collect();
        let targets: Vec<RevocationTarget> = operators
            .iter()
            .flat_map(|operator| &operator.keys)
            .map(|key| signers::key_target(key.thumbprint().as_str()))
            .collect();
        let rows = self.store.revocations_of(&targets).await?;
        let is_live = |operator: &&OperatorSpec| {
            operator.keys.iter().any(|key| {
                let target = signers::key_target(key.thumbprint().as_str());
                !signers::is_key_revoked(rows.iter().find(|row| row.target == target))
            })
        };
        let live = operators.iter().filter(is_live).map(|operator| operator.id.to_string()).collect();
        Ok(Administrators { count: operators.len(), live })
    }

    /// The hint to append to a message if too few administrators can sign the next acts. Empty if enough can sign, or if their
    /// number cannot be read.
    pub(super) async fn administrator_shortage_hint(&self) -> String {
        self.administrators().await.map(|administrators| administrators.shortage_hint()).unwrap_or_default()
    }
}

impl Administrators {
    /// Counts the administrators among operators, by which of their keys are revoked.
    pub(super) fn from_operators(operators: &[OperatorSpec], is_revoked: impl Fn(&Thumbprint) -> bool) -> Self {
        let administer = operators.iter().filter(|operator| operator.roles.contains(&OperatorRole::Administer));
        let (mut count, mut live) = (0, Vec::new());
        for operator in administer {
            count += 1;
            if operator.keys.iter().any(|key| !is_revoked(key.thumbprint())) {
                live.push(operator.id.to_string());
            }
        }
        Self { count, live }
    }

    /// Whether an act that needs two operators finds no second one.
    pub(super) fn lacks_second(&self) -> bool {
        self.count >= 2 && self.live.len() < 2
    }

    /// Whether nobody who administers can sign.
    pub(super) fn none_can_sign(&self) -> bool {
        self.live.is_empty()
    }

    /// The hint to append to a message if too few administrators can sign the next acts; empty if enough can.
    pub(super) fn shortage_hint(&self) -> String {
        match self.live.len() {
            0 => format!("; {self}: nothing can be administered until there is one; {BREAK_GLASS}"),
            1 if self.lacks_second() => {
                format!("; {self}: what needs two operators cannot be done until a second one can sign; {BREAK_GLASS}")
            }
            _ => String::new(),
        }
    }
}

impl std::fmt::Display for Administrators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (noun, all) =
            if self.count == 1 { ("operator who administers", 1) } else { ("operators who administer", self.count) };
        let named: Vec<String> = self.live.iter().take(NAMED_MAX).map(|id| format!("`{}`", abbreviate(id))).collect();
        match self.live.len() {
            0 => write!(f, "of {all} {noun}, none has a live key"),
            1 => write!(f, "of {all} {noun}, 1 has a live key: {}", named.join(", ")),
            live if live > NAMED_MAX => write!(f, "of {all} {noun}, {live} have a live key: {}, …", named.join(", ")),
            live => write!(f, "of {all} {noun}, {live} have a live key: {}", named.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_told_with_the_remedy() {
        let check = |count: usize, live: &[&str], lacks_second: bool, expected: &str| {
            let counted = Administrators { count, live: live.iter().map(|id| (*id).to_owned()).collect() };
            assert_eq!(counted.lacks_second(), lacks_second, "{counted}");
            let hint = counted.shortage_hint();
            assert!(hint.starts_with(expected) && hint.is_empty() == expected.is_empty(), "{hint}");
            assert!(hint.is_empty() || hint.contains("--break-glass"), "{hint}");
        };
        check(1, &[], false, "; of 1 operator who administers, none has a live key: nothing can be administered");
        check(2, &[], true, "; of 2 operators who administer, none has a live key: nothing can be administered");
        check(2, &["ada"], true, "; of 2 operators who administer, 1 has a live key: `ada`: what needs two operators");
        check(1, &["ada"], false, "");
        check(3, &["ada", "bo"], false, "");
        let many = Administrators { count: 12, live: (0..9).map(|index| index.to_string()).collect() };
        assert!(many.to_string().ends_with("9 have a live key: `0`, `1`, `2`, `3`, `4`, `5`, `6`, `7`, …"), "{many}");
    }
}
