//! Authorizes administrative calls. Every call is an act that operators signed, and the signatures are checked before anything
//! else.
//!
//! Nothing here performs an act. Look next at `crate::token::operator`, which verifies a single signature.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use super::{AdministrationPoint, Error};
use crate::model::ids::Thumbprint;
use crate::model::jwk::PublicKey;
use crate::model::limits::KEYS_MAX;
use crate::model::revision::Revision;
use crate::model::rows::RevocationTarget;
use crate::policy::document::{Document, DocumentBody, OperatorRole, OperatorSpec};
use crate::store::signers;
use crate::token::operator_act::{AdminCall, UnverifiedAct};

/// A method of the administration API, and the roles that may call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminMethod {
    /// Full gRPC method path.
    pub path: &'static str,
    /// The permitted roles. One of them is enough.
    pub roles: &'static [OperatorRole],
}

/// All signed methods.
pub(super) const METHODS: &[AdminMethod] = &[
    admin_method("/portcullis.v1.RevocationService/Revoke", &[OperatorRole::Respond]),
    admin_method("/portcullis.v1.RevocationService/Reinstate", &[OperatorRole::Administer]),
    admin_method(
        "/portcullis.v1.RevocationService/List",
        &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Audit],
    ),
    admin_method(
        "/portcullis.v1.FleetService/ListReplicas",
        &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Approve, OperatorRole::Audit],
    ),
    admin_method("/portcullis.v1.FleetService/WaitFor", &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.FleetService/Adopt", &[OperatorRole::Administer]),
    admin_method(
        "/portcullis.v1.FleetService/WaitForAdoption",
        &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Audit],
    ),
    admin_method("/portcullis.v1.OperatorService/Add", &[OperatorRole::Administer]),
    admin_method("/portcullis.v1.OperatorService/Retire", &[OperatorRole::Administer]),
    admin_method("/portcullis.v1.OperatorService/List", &[OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/Apply", &[OperatorRole::Administer]),
    admin_method("/portcullis.v1.PolicyService/Check", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/Get", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/List", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/Diff", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/History", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/Rollback", &[OperatorRole::Administer]),
    admin_method("/portcullis.v1.PolicyService/ShadowReport", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method("/portcullis.v1.PolicyService/Explain", &[OperatorRole::Administer, OperatorRole::Audit]),
    admin_method(
        "/portcullis.v1.ApprovalService/List",
        &[OperatorRole::Approve, OperatorRole::Respond, OperatorRole::Administer, OperatorRole::Audit],
    ),
    admin_method("/portcullis.v1.ApprovalService/Approve", &[OperatorRole::Approve]),
    admin_method("/portcullis.v1.ApprovalService/Refuse", &[OperatorRole::Approve]),
];

const fn admin_method(path: &'static str, roles: &'static [OperatorRole]) -> AdminMethod {
    AdminMethod { path, roles }
}

/// Proof that operators with the required roles signed exactly this message. Only this file creates it.
#[derive(Clone, Debug)]
pub struct AuthorizedAct {
    method: &'static str,
    operators: Vec<String>,
    keys: Vec<Thumbprint>,
    signatures: Vec<String>,
    jtis: Vec<(String, i64)>,
    peer: String,
    unrecorded: Arc<AtomicBool>,
}

impl AuthorizedAct {
    /// An act without signatures, for simulations that do not test signatures.
    #[cfg(test)]
    pub(crate) fn unsigned_for_tests(method: &'static str) -> Self {
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
    pub(super) fn operator_by_key(&self, thumbprint: &str) -> &str {
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
///
/// A key holds at most as many signatures as are free. So no key can keep all others from acting: one that signs without end takes
/// a half, and `n` of them leave one part of `n + 1`.
#[derive(Debug, Default)]
pub(super) struct SpentSignatures {
    /// `jti` and `exp` of the signatures of each key.
    by_key: HashMap<Thumbprint, HashMap<String, i64>>,
    count: usize,
    /// When expired signatures were last removed.
    removed_at_s: i64,
}

/// The outcome of spending a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spent {
    /// The signature was not used before, and is used now.
    First,
    /// The signature was used before.
    Before,
    /// The key's share is full. The signature was not used.
    Full,
}

/// The maximum number of remembered signatures. A signature is valid for 60 seconds.
const SIGNATURES_REMEMBERED_MAX: usize = 100_000;

impl SpentSignatures {
    fn spend(&mut self, key: &Thumbprint, jti: &str, expires_at_s: i64, now_s: i64) -> Spent {
        if self.contains(key, jti) {
            return Spent::Before;
        }
        if self.is_full(key) {
            self.remove_expired(now_s);
            if self.is_full(key) {
                return Spent::Full;
            }
        }
        self.by_key.entry(key.clone()).or_default().insert(jti.to_owned(), expires_at_s);
        self.count += 1;
        Spent::First
    }

    fn contains(&self, key: &Thumbprint, jti: &str) -> bool {
        self.by_key.get(key).is_some_and(|used| used.contains_key(jti))
    }

    /// Whether the key holds as many signatures as are free.
    fn is_full(&self, key: &Thumbprint) -> bool {
        let own = self.by_key.get(key).map_or(0, HashMap::len);
        own >= SIGNATURES_REMEMBERED_MAX.saturating_sub(self.count)
    }

    /// Removes expired signatures, at most once a second, because it visits every one.
    fn remove_expired(&mut self, now_s: i64) {
        if self.removed_at_s == now_s {
            return;
        }
        self.removed_at_s = now_s;
        self.by_key.retain(|_, used| {
            used.retain(|_, expires_at_s| *expires_at_s >= now_s);
            !used.is_empty()
        });
        self.count = self.by_key.values().map(HashMap::len).sum();
    }
}

impl AdministrationPoint {
    /// Verifies the signatures of a message. At least one operator must sign, and each must have a role that the method allows.
    ///
    /// `authorizations` are the values of the `authorization` header, `Operator <compact JWS>`. An act of two people needs two. A
    /// refusal is recorded.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`], [`Error::KeyRevoked`] or [`Error::PermissionDenied`], or if the store cannot be read.
    pub async fn authorize(
        &self,
        path: &str,
        message: &[u8],
        authorizations: &[&str],
        peer: &str,
    ) -> Result<AuthorizedAct, Error> {
        let mut operators = Vec::new();
        let checked = self.verify_signatures(path, Some(message), authorizations, peer, &mut operators).await;
        let checked = checked.and_then(|authorized| self.spend_signatures(&authorized).map(|()| authorized));
        if let Err(error) = &checked {
            self.record_refusal(path, &operators, peer, error)?;
        }
        checked
    }

    /// Verifies the signatures except for the digest of the message. So the server need not read the message of a caller who did
    /// not sign this call. This check spends no signature and authorizes nobody.
    ///
    /// # Errors
    /// As for [`AdministrationPoint::authorize`]. A refusal is recorded.
    pub async fn check_signatures(&self, path: &str, authorizations: &[&str], peer: &str) -> Result<(), Error> {
        let mut operators = Vec::new();
        let checked = self.verify_signatures(path, None, authorizations, peer, &mut operators).await;
        let checked = checked.and_then(|authorized| self.check_unspent(&authorized));
        if let Err(error) = &checked {
            self.record_refusal(path, &operators, peer, error)?;
        }
        checked
    }

    async fn load_operators(&self) -> Result<(Revision, Vec<OperatorSpec>), Error> {
        let listed = self.store.documents(Some("operator")).await?;
        Ok((listed.revision, listed.documents.iter().filter_map(|stored| read_operator(&stored.row)).collect()))
    }

    /// Verifies signatures. Without a message, its digest is not compared.
    async fn verify_signatures(
        &self,
        path: &str,
        message: Option<&[u8]>,
        authorizations: &[&str],
        peer: &str,
        operators: &mut Vec<String>,
    ) -> Result<AuthorizedAct, Error> {
        let Some(method) = METHODS.iter().find(|method| method.path == path) else {
            return Err(Error::PermissionDenied(format!("no role allows the method `{path}`")));
        };
        if authorizations.is_empty() {
            return Err(unsigned_error());
        }
        if authorizations.len() > KEYS_MAX {
            return Err(Error::Unauthenticated(format!("more than {KEYS_MAX} signatures")));
        }
        let (revision, documents) = self.load_operators().await?;
        let now = self.clock.now();
        let mut authorized = AuthorizedAct {
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
            let unverified = parse_authorization(authorization)?;
            let Some((operator, key)) = find_signer(&documents, unverified.thumbprint()) else {
                return Err(unknown_key_error(unverified.thumbprint()));
            };
            let audience = revision.history.as_str();
            let verified = match message {
                Some(message) => unverified.verify(key, &AdminCall { audience, method: path, message }, now),
                None => unverified.verify_without_message(key, audience, path, now),
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
            authorized.signatures.push(authorization.trim_start_matches(AUTHORIZATION_SCHEME).to_owned());
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
        let targets: Vec<RevocationTarget> =
            signers.iter().map(|(_, key)| signers::key_target(key.thumbprint().as_str())).collect();
        let rows = self.store.revocations_of(&targets).await?;
        let revoked = |key: &PublicKey| {
            rows.iter()
                .any(|row| row.target == signers::key_target(key.thumbprint().as_str()) && signers::is_key_revoked(Some(row)))
        };
        match signers.iter().find(|(_, key)| revoked(key)) {
            Some((operator, key)) => Err(self.key_revoked_error(operator.id.as_str(), key.thumbprint().as_str()).await),
            None => Ok(()),
        }
    }

    /// The error for a revoked key. It names the way out if no administrator can sign any more.
    pub(super) async fn key_revoked_error(&self, operator: &str, thumbprint: &str) -> Error {
        let hint = match self.administrators().await {
            Ok(administrators) if administrators.has_nobody() => administrators.lack(),
            _ => "; `portcullis revocations`, signed with another operator's key, says why".to_owned(),
        };
        Error::KeyRevoked(format!("the key `{thumbprint}` of operator `{operator}` is revoked: it signs nothing any more{hint}"))
    }

    /// Checks that no signature was used on this replica before.
    fn check_unspent(&self, by: &AuthorizedAct) -> Result<(), Error> {
        let spent = self.spent_signatures.lock().unwrap_or_else(PoisonError::into_inner);
        match by.keys.iter().zip(&by.jtis).find(|(key, (jti, _))| spent.contains(key, jti)) {
            Some((_, (jti, _))) => Err(replayed_error(jti)),
            None => Ok(()),
        }
    }

    /// Spends the signatures on this replica, whatever the result of the act is. A commit also spends them in the store, for the
    /// whole fleet.
    fn spend_signatures(&self, by: &AuthorizedAct) -> Result<(), Error> {
        let now_s = self.clock.now().unix_s();
        let mut spent = self.spent_signatures.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, (jti, expires_at_s)) in by.keys.iter().zip(&by.jtis) {
            match spent.spend(key, jti, *expires_at_s, now_s) {
                Spent::First => {}
                Spent::Before => return Err(replayed_error(jti)),
                Spent::Full => return Err(too_many(key)),
            }
        }
        Ok(())
    }
}

/// The scheme before the compact JWS.
const AUTHORIZATION_SCHEME: &str = "Operator ";

fn parse_authorization(authorization: &str) -> Result<UnverifiedAct<'_>, Error> {
    let jws = authorization
        .strip_prefix(AUTHORIZATION_SCHEME)
        .ok_or_else(|| Error::Unauthenticated("the authorization is not `Operator <compact JWS>`".to_owned()))?;
    UnverifiedAct::parse(jws.as_bytes()).map_err(|error| Error::Unauthenticated(error.to_string()))
}

fn replayed_error(jti: &str) -> Error {
    Error::Unauthenticated(format!("the signed act `{jti}` was used before: sign a new one"))
}

fn too_many(key: &Thumbprint) -> Error {
    Error::Unauthenticated(format!("the key `{key}` signed more calls within a minute than this server remembers: wait a minute"))
}

fn unsigned_error() -> Error {
    let hint = "sign the call: `authorization: Operator <compact JWS>`; the command line does it with --operator-key";
    Error::Unauthenticated(format!("the call is not signed: {hint}"))
}

fn unknown_key_error(thumbprint: &Thumbprint) -> Error {
    Error::Unauthenticated(format!("no operator has the key `{thumbprint}`: is it this store's?"))
}

fn find_signer<'a>(operators: &'a [OperatorSpec], thumbprint: &Thumbprint) -> Option<(&'a OperatorSpec, &'a PublicKey)> {
    operators.iter().find_map(|operator| {
        let key = operator.keys.iter().find(|key| key.thumbprint() == thumbprint)?;
        Some((operator, key))
    })
}

fn read_operator(row: &crate::model::rows::DocumentRow) -> Option<OperatorSpec> {
    match Document::from_row(row).ok()?.body {
        DocumentBody::Operator(operator) => Some(operator),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_counts_once() {
        let (mut spent, [ada, bo]) = (SpentSignatures::default(), keys());
        assert_eq!(spent.spend(&ada, "a", 100, 50), Spent::First);
        assert_eq!(spent.spend(&ada, "a", 100, 60), Spent::Before);
        assert_eq!(spent.spend(&ada, "b", 100, 60), Spent::First);
        assert_eq!(spent.spend(&bo, "a", 100, 60), Spent::First, "nobody uses up the signature of another");
    }

    #[test]
    fn no_key_takes_the_place_of_all_others() {
        let (mut spent, [ada, bo]) = (SpentSignatures::default(), keys());
        let flood = |spent: &mut SpentSignatures, key: &Thumbprint, now_s: i64| {
            let sign = |index: &usize| spent.spend(key, &format!("{now_s}.{index}"), now_s + 60, now_s) == Spent::First;
            (0..2 * SIGNATURES_REMEMBERED_MAX).take_while(sign).count()
        };
        assert_eq!(flood(&mut spent, &ada, 1), SIGNATURES_REMEMBERED_MAX / 2);
        assert_eq!(spent.spend(&ada, "one more", 61, 1), Spent::Full);
        assert_eq!(spent.spend(&bo, "a kill", 61, 1), Spent::First);
        assert_eq!(spent.spend(&ada, "1.0", 61, 1), Spent::Before, "what was used stays used");
        assert_eq!(flood(&mut spent, &bo, 2), SIGNATURES_REMEMBERED_MAX / 4 - 1, "a half of what the first left");
        // Expired signatures make room.
        assert_eq!(spent.spend(&ada, "one more", 122, 62), Spent::First);
        assert_eq!((spent.count, spent.by_key.len()), (SIGNATURES_REMEMBERED_MAX / 4, 2));
    }

    fn keys() -> [Thumbprint; 2] {
        [1, 2].map(|seed| crate::token::PrivateKey::from_seed([seed; 32]).unwrap().public_key().thumbprint().clone())
    }
}
