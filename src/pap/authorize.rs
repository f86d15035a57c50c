//! Authorizes administrative calls. Every call is an act that operators signed, and the signatures are checked before anything
//! else.
//!
//! Nothing here performs an act. Look next at `crate::token::operator`, which verifies a single signature.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use super::{Admin, Error};
use crate::model::ids::Thumbprint;
use crate::model::jwk::PublicKey;
use crate::model::limits::KEYS_MAX;
use crate::model::records::Target;
use crate::model::revision::Revision;
use crate::policy::document::{Body, Document, OperatorSpec, Role};
use crate::store::signers;
use crate::token::operator::{Expected, UnverifiedAct};

/// A method of the administration API, and the roles that may call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Full gRPC method path.
    pub path: &'static str,
    /// The permitted roles. One of them is enough.
    pub roles: &'static [Role],
}

/// All signed methods.
pub(super) const METHODS: &[Method] = &[
    method("/portcullis.v1.RevocationService/Revoke", &[Role::Respond]),
    method("/portcullis.v1.RevocationService/Reinstate", &[Role::Administer]),
    method("/portcullis.v1.RevocationService/List", &[Role::Respond, Role::Administer, Role::Audit]),
    method("/portcullis.v1.FleetService/ListReplicas", &[Role::Respond, Role::Administer, Role::Approve, Role::Audit]),
    method("/portcullis.v1.FleetService/WaitFor", &[Role::Respond, Role::Administer, Role::Audit]),
    method("/portcullis.v1.FleetService/Adopt", &[Role::Administer]),
    method("/portcullis.v1.FleetService/WaitForAdoption", &[Role::Respond, Role::Administer, Role::Audit]),
    method("/portcullis.v1.OperatorService/Add", &[Role::Administer]),
    method("/portcullis.v1.OperatorService/Retire", &[Role::Administer]),
    method("/portcullis.v1.OperatorService/List", &[Role::Respond, Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/Apply", &[Role::Administer]),
    method("/portcullis.v1.PolicyService/Check", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/Get", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/List", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/Diff", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/History", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/Rollback", &[Role::Administer]),
    method("/portcullis.v1.PolicyService/ShadowReport", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.PolicyService/Explain", &[Role::Administer, Role::Audit]),
    method("/portcullis.v1.ApprovalService/List", &[Role::Approve, Role::Respond, Role::Administer, Role::Audit]),
    method("/portcullis.v1.ApprovalService/Approve", &[Role::Approve]),
    method("/portcullis.v1.ApprovalService/Refuse", &[Role::Approve]),
];

const fn method(path: &'static str, roles: &'static [Role]) -> Method {
    Method { path, roles }
}

/// Proof that operators with the required roles signed exactly this message. Only this file creates it.
#[derive(Clone, Debug)]
pub struct Authorized {
    method: &'static str,
    operators: Vec<String>,
    keys: Vec<Thumbprint>,
    signatures: Vec<String>,
    jtis: Vec<(String, i64)>,
    peer: String,
    unrecorded: Arc<AtomicBool>,
}

impl Authorized {
    /// An act without signatures, for simulations that do not test signatures.
    #[cfg(test)]
    pub(crate) fn in_a_simulation(method: &'static str) -> Self {
        let [operators, signatures] = [const { Vec::new() }; 2];
        let unrecorded = Arc::default();
        Self { method, operators, keys: Vec::new(), signatures, jtis: Vec::new(), peer: String::new(), unrecorded }
    }

    /// An act without signatures, for a caller with write access to the store itself when no key is left that can sign. `who`
    /// takes the place of the signature in the record.
    pub(super) fn break_glass(who: String) -> Self {
        let [operators, signatures] = [const { Vec::new() }; 2];
        let method = "/portcullis.v1.OperatorService/Add";
        let unrecorded = Arc::default();
        Self { method, operators, keys: Vec::new(), signatures, jtis: Vec::new(), peer: who, unrecorded }
    }

    /// Full gRPC method path.
    pub fn method(&self) -> &str {
        self.method
    }

    /// The ids of the operators, all different.
    pub fn operators(&self) -> &[String] {
        &self.operators
    }

    /// The thumbprints of the signing keys, one for each operator.
    pub fn keys(&self) -> &[Thumbprint] {
        &self.keys
    }

    /// The operator who signed with a key; empty if no operator did.
    pub(super) fn operator_of(&self, thumbprint: &str) -> &str {
        let signed = self.operators.iter().zip(&self.keys).find(|(_, key)| key.as_str() == thumbprint);
        signed.map_or("", |(operator, _)| operator)
    }

    /// The signatures as compact JWS.
    pub fn signatures(&self) -> &[String] {
        &self.signatures
    }

    /// `jti` and `exp` of each signature.
    pub fn jtis(&self) -> &[(String, i64)] {
        &self.jtis
    }

    /// The address of the caller.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether the act was done but is missing in the audit log. All clones share this flag.
    pub fn is_unrecorded(&self) -> bool {
        self.unrecorded.load(Ordering::Acquire)
    }

    pub(super) fn mark_unrecorded(&self) {
        self.unrecorded.store(true, Ordering::Release);
    }
}

/// The signatures that were used, until they expire. Acts that are no transaction need it, because the store does not see them.
#[derive(Debug, Default)]
pub(super) struct SpentSignatures {
    seen: HashMap<String, i64>,
}

/// The maximum number of remembered signatures. A signature is valid for 60 seconds.
const SIGNATURES_REMEMBERED_MAX: usize = 100_000;

impl SpentSignatures {
    fn spend(&mut self, jti: &str, expires_at_s: i64, now_s: i64) -> bool {
        if self.seen.len() >= SIGNATURES_REMEMBERED_MAX {
            self.seen.retain(|_, expires| *expires >= now_s);
        }
        self.seen.len() < SIGNATURES_REMEMBERED_MAX && self.seen.insert(jti.to_owned(), expires_at_s).is_none()
    }
}

impl Admin {
    /// Verifies the signatures of a message. At least one operator must sign, and each must have a role that the method allows.
    ///
    /// `authorizations` are the values of the `authorization` header, `Operator <compact JWS>`. An act of two people needs two. A
    /// refusal is recorded.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`], [`Error::KeyRevoked`] or [`Error::PermissionDenied`], or if the store cannot be read.
    pub async fn authorize(&self, path: &str, message: &[u8], authorizations: &[&str], peer: &str) -> Result<Authorized, Error> {
        let mut operators = Vec::new();
        let checked = self.check(path, Some(message), authorizations, peer, &mut operators).await;
        let checked = checked.and_then(|authorized| self.spend(&authorized).map(|()| authorized));
        if let Err(error) = &checked {
            self.record_refused(path, &operators, peer, error)?;
        }
        checked
    }

    /// Verifies the signatures except for the digest of the message. So the server need not read the message of a caller who did
    /// not sign this call. This check spends no signature and authorizes nobody.
    ///
    /// # Errors
    /// As for [`Admin::authorize`]. A refusal is recorded.
    pub async fn check_signatures(&self, path: &str, authorizations: &[&str], peer: &str) -> Result<(), Error> {
        let mut operators = Vec::new();
        let checked = self.check(path, None, authorizations, peer, &mut operators).await;
        let checked = checked.and_then(|authorized| self.check_unspent(&authorized));
        if let Err(error) = &checked {
            self.record_refused(path, &operators, peer, error)?;
        }
        checked
    }

    async fn operators(&self) -> Result<(Revision, Vec<OperatorSpec>), Error> {
        let listed = self.store.documents(Some("operator")).await?;
        Ok((listed.revision, listed.documents.iter().filter_map(|stored| operator_of(&stored.row)).collect()))
    }

    /// Verifies signatures. Without a message, its digest is not compared.
    async fn check(
        &self,
        path: &str,
        message: Option<&[u8]>,
        authorizations: &[&str],
        peer: &str,
        operators: &mut Vec<String>,
    ) -> Result<Authorized, Error> {
        let Some(method) = METHODS.iter().find(|method| method.path == path) else {
            return Err(Error::PermissionDenied(format!("no role allows the method `{path}`")));
        };
        if authorizations.is_empty() {
            return Err(unsigned());
        }
        if authorizations.len() > KEYS_MAX {
            return Err(Error::Unauthenticated(format!("more than {KEYS_MAX} signatures")));
        }
        let (revision, documents) = self.operators().await?;
        let now = self.clock.now();
        let mut authorized = Authorized {
            method: method.path,
            operators: vec![],
            keys: vec![],
            signatures: vec![],
            jtis: vec![],
            peer: peer.to_owned(),
            unrecorded: Arc::default(),
        };
        let mut signers = Vec::with_capacity(authorizations.len());
        for authorization in authorizations {
            let unverified = parsed(authorization)?;
            let Some((operator, key)) = signer(&documents, unverified.thumbprint()) else {
                return Err(nobodys(unverified.thumbprint()));
            };
            let audience = revision.history.as_str();
            let verified = match message {
                Some(message) => unverified.verify(key, &Expected { audience, method: path, message }, now),
                None => unverified.verify_call(key, audience, path, now),
            };
            let act = verified.map_err(|error| Error::Unauthenticated(error.to_string()))?;
            operators.push(operator.id.to_string());
            if authorized.operators.iter().any(|id| id == operator.id.as_str()) {
                return Err(Error::Unauthenticated(format!(
                    "operator `{}` signed twice: two people are two operators",
                    operator.id
                )));
            }
            signers.push((operator, key));
            authorized.operators.push(operator.id.to_string());
            authorized.keys.push(key.thumbprint().clone());
            authorized.signatures.push(authorization.trim_start_matches(SCHEME).to_owned());
            authorized.jtis.push((act.jti().to_owned(), act.exp_s()));
        }
        // INVARIANT: the revocation is read from the store, not from the replica's snapshot. So a revoked key signs nothing from
        // that moment on, not even a read. A commit checks the key again in its own transaction.
        self.check_not_revoked(&signers).await?;
        let lacks = |operator: &OperatorSpec| !method.roles.iter().any(|role| operator.roles.contains(role));
        if let Some((operator, _)) = signers.iter().find(|(operator, _)| lacks(operator)) {
            let wanted: Vec<_> = method.roles.iter().map(|role| role.as_str()).collect();
            let message = format!("operator `{}` has none of the roles this needs: {}", operator.id, wanted.join(", "));
            return Err(Error::PermissionDenied(message));
        }
        Ok(authorized)
    }

    /// Refuses revoked keys.
    async fn check_not_revoked(&self, signers: &[(&OperatorSpec, &PublicKey)]) -> Result<(), Error> {
        let targets: Vec<Target> = signers.iter().map(|(_, key)| signers::target(key.thumbprint().as_str())).collect();
        let rows = self.store.revocations_of(&targets).await?;
        let revoked = |key: &PublicKey| {
            rows.iter().any(|row| row.target == signers::target(key.thumbprint().as_str()) && signers::is_revoked(Some(row)))
        };
        match signers.iter().find(|(_, key)| revoked(key)) {
            Some((operator, key)) => Err(key_revoked(operator.id.as_str(), key.thumbprint().as_str())),
            None => Ok(()),
        }
    }

    /// Checks that no signature was used on this replica before.
    fn check_unspent(&self, by: &Authorized) -> Result<(), Error> {
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        match by.jtis.iter().find(|(jti, _)| spent.seen.contains_key(jti)) {
            Some((jti, _)) => Err(used_before(jti)),
            None => Ok(()),
        }
    }

    /// Spends the signatures on this replica, whatever the result of the act is. A commit also spends them in the store, for the
    /// whole fleet.
    fn spend(&self, by: &Authorized) -> Result<(), Error> {
        let now_s = self.clock.now().unix_s();
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        for (jti, expires_at_s) in &by.jtis {
            if !spent.spend(jti, *expires_at_s, now_s) {
                return Err(used_before(jti));
            }
        }
        Ok(())
    }
}

/// The scheme before the compact JWS.
const SCHEME: &str = "Operator ";

fn parsed(authorization: &str) -> Result<UnverifiedAct<'_>, Error> {
    let jws = authorization
        .strip_prefix(SCHEME)
        .ok_or_else(|| Error::Unauthenticated("the authorization is not `Operator <compact JWS>`".to_owned()))?;
    UnverifiedAct::parse(jws.as_bytes()).map_err(|error| Error::Unauthenticated(error.to_string()))
}

fn used_before(jti: &str) -> Error {
    Error::Unauthenticated(format!("the signed act `{jti}` was used before: sign a new one"))
}

fn unsigned() -> Error {
    let hint = "sign the call: `authorization: Operator <compact JWS>`; the command line does it with --operator-key";
    Error::Unauthenticated(format!("the call is not signed: {hint}"))
}

fn nobodys(thumbprint: &Thumbprint) -> Error {
    Error::Unauthenticated(format!("no operator has the key `{thumbprint}`: is it this store's?"))
}

/// The error for a revoked key.
pub(super) fn key_revoked(operator: &str, thumbprint: &str) -> Error {
    Error::KeyRevoked(format!(
        "the key `{thumbprint}` of operator `{operator}` is revoked: it signs nothing any more; `portcullis revocations` says why"
    ))
}

fn signer<'a>(operators: &'a [OperatorSpec], thumbprint: &Thumbprint) -> Option<(&'a OperatorSpec, &'a PublicKey)> {
    operators.iter().find_map(|operator| {
        let key = operator.keys.iter().find(|key| key.thumbprint() == thumbprint)?;
        Some((operator, key))
    })
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
    fn a_signature_counts_once() {
        let mut spent = SpentSignatures::default();
        assert!(spent.spend("a", 100, 50));
        assert!(!spent.spend("a", 100, 60));
        assert!(spent.spend("b", 100, 60));
    }
}
