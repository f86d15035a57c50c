//! Who may administer: every call is an act that an operator signed, and the signature is checked before anything else.

use std::collections::HashMap;
use std::sync::PoisonError;

use super::{Admin, Error};
use crate::model::limits::KEYS_MAX;
use crate::policy::document::{Body, Document, OperatorSpec, Role};
use crate::token::operator::{Expected, UnverifiedAct};

/// A method of the administration API and who may call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Full gRPC method path.
    pub path: &'static str,
    /// Any of these roles will do.
    pub roles: &'static [Role],
    /// Whether it changes the store: then the signature is used up by the store's own transaction.
    pub writes: bool,
}

/// Every signed method.
pub(super) const METHODS: &[Method] = &[
    write("/portcullis.v1.RevocationService/Revoke", &[Role::Respond]),
    write("/portcullis.v1.RevocationService/Reinstate", &[Role::Administer]),
    read("/portcullis.v1.RevocationService/List", &[Role::Respond, Role::Administer, Role::Audit]),
    write("/portcullis.v1.PolicyService/Apply", &[Role::Administer]),
    read("/portcullis.v1.PolicyService/Check", &[Role::Administer, Role::Audit]),
    read("/portcullis.v1.PolicyService/Get", &[Role::Administer, Role::Audit]),
    read("/portcullis.v1.PolicyService/List", &[Role::Administer, Role::Audit]),
];

const fn write(path: &'static str, roles: &'static [Role]) -> Method {
    Method { path, roles, writes: true }
}

const fn read(path: &'static str, roles: &'static [Role]) -> Method {
    Method { path, roles, writes: false }
}

/// Proof that operators with the right roles signed exactly this message. Made only here.
#[derive(Clone, Debug)]
pub struct Authorized {
    method: &'static str,
    operators: Vec<String>,
    signatures: Vec<String>,
    jtis: Vec<(String, i64)>,
    peer: String,
}

impl Authorized {
    /// Full gRPC method path.
    pub fn method(&self) -> &str {
        self.method
    }

    /// The operators' ids, all different.
    pub fn operators(&self) -> &[String] {
        &self.operators
    }

    /// Their compact JWS.
    pub fn signatures(&self) -> &[String] {
        &self.signatures
    }

    /// `jti` and `exp` of each signature.
    pub fn jtis(&self) -> &[(String, i64)] {
        &self.jtis
    }

    /// Where the call came from.
    pub fn peer(&self) -> &str {
        &self.peer
    }
}

/// Signatures of reads that were seen, until they expire: a read is not a row of any transaction.
#[derive(Debug, Default)]
pub(super) struct ReadSignatures {
    seen: HashMap<String, i64>,
}

/// Signatures of reads remembered at once; they live 60 seconds.
const READS_REMEMBERED_MAX: usize = 100_000;

impl ReadSignatures {
    fn spend(&mut self, jti: &str, expires_at_s: i64, now_s: i64) -> bool {
        if self.seen.len() >= READS_REMEMBERED_MAX {
            self.seen.retain(|_, expires| *expires >= now_s);
        }
        self.seen.len() < READS_REMEMBERED_MAX && self.seen.insert(jti.to_owned(), expires_at_s).is_none()
    }
}

impl Admin {
    /// Checks the signatures over a message: at least one operator, each with a role that the method allows.
    ///
    /// `authorizations` are the values of the `authorization` header, `Operator <compact JWS>`; two for an act that needs two
    /// people. A refusal is recorded.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] or [`Error::PermissionDenied`], or if the store cannot be read.
    pub async fn authorize(&self, path: &str, message: &[u8], authorizations: &[&str], peer: &str) -> Result<Authorized, Error> {
        let mut operators = Vec::new();
        let checked = self.check(path, message, authorizations, peer, &mut operators).await;
        if let Err(error) = &checked {
            self.record_refused(path, &operators, peer, error)?;
        }
        checked
    }

    async fn check(
        &self,
        path: &str,
        message: &[u8],
        authorizations: &[&str],
        peer: &str,
        operators: &mut Vec<String>,
    ) -> Result<Authorized, Error> {
        let Some(method) = METHODS.iter().find(|method| method.path == path) else {
            return Err(Error::PermissionDenied(format!("no role allows the method `{path}`")));
        };
        if authorizations.is_empty() {
            let hint = "sign the call: `authorization: Operator <compact JWS>`; the command line does it with --operator-key";
            return Err(Error::Unauthenticated(format!("the call is not signed: {hint}")));
        }
        if authorizations.len() > KEYS_MAX {
            return Err(Error::Unauthenticated(format!("more than {KEYS_MAX} signatures")));
        }
        let listed = self.store.documents(Some("operator")).await?;
        let documents: Vec<OperatorSpec> = listed.documents.iter().filter_map(|stored| operator_of(&stored.row)).collect();
        let now = self.clock.now();
        let mut authorized =
            Authorized { method: method.path, operators: vec![], signatures: vec![], jtis: vec![], peer: peer.to_owned() };
        for authorization in authorizations {
            let jws = authorization
                .strip_prefix("Operator ")
                .ok_or_else(|| Error::Unauthenticated("the authorization is not `Operator <compact JWS>`".to_owned()))?;
            let refused = |error: crate::token::operator::Error| Error::Unauthenticated(error.to_string());
            let unverified = UnverifiedAct::parse(jws.as_bytes()).map_err(refused)?;
            let found = documents.iter().find_map(|operator| {
                let key = operator.keys.iter().find(|key| key.thumbprint() == unverified.thumbprint())?;
                Some((operator, key))
            });
            let Some((operator, key)) = found else {
                let message = format!("no operator has the key `{}`: is it this store's?", unverified.thumbprint());
                return Err(Error::Unauthenticated(message));
            };
            let expected = Expected { audience: listed.revision.history.as_str(), method: path, message };
            let act = unverified.verify(key, &expected, now).map_err(refused)?;
            operators.push(operator.id.to_string());
            if !method.roles.iter().any(|role| operator.roles.contains(role)) {
                let wanted: Vec<_> = method.roles.iter().map(|role| role.as_str()).collect();
                let message = format!("operator `{}` has none of the roles this needs: {}", operator.id, wanted.join(", "));
                return Err(Error::PermissionDenied(message));
            }
            if authorized.operators.iter().any(|id| id == operator.id.as_str()) {
                return Err(Error::Unauthenticated(format!(
                    "operator `{}` signed twice: two people are two operators",
                    operator.id
                )));
            }
            authorized.operators.push(operator.id.to_string());
            authorized.signatures.push(jws.to_owned());
            authorized.jtis.push((act.jti().to_owned(), act.exp_s()));
        }
        if !method.writes {
            self.spend_read(&authorized)?;
        }
        Ok(authorized)
    }

    /// Uses up the signatures of an act that makes no row in the store, until they expire.
    pub(super) fn spend_read(&self, by: &Authorized) -> Result<(), Error> {
        let now_s = self.clock.now().unix_s();
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        for (jti, expires_at_s) in &by.jtis {
            if !reads.spend(jti, *expires_at_s, now_s) {
                return Err(Error::Unauthenticated(format!("the signed act `{jti}` was used before: sign a new one")));
            }
        }
        Ok(())
    }
}

fn operator_of(row: &crate::model::records::DocumentRow) -> Option<OperatorSpec> {
    match Document::from_row(row).ok()?.body {
        Body::Operator(operator) => Some(operator),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_signature_counts_once() {
        let mut reads = ReadSignatures::default();
        assert!(reads.spend("a", 100, 50));
        assert!(!reads.spend("a", 100, 60));
        assert!(reads.spend("b", 100, 60));
    }
}
