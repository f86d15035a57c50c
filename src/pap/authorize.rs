//! Authorizes administrative calls. Every call is an act that operators signed, and the signatures are checked before anything
//! else.
//!
//! A caller that signed nothing costs no read of the store of its own. Its signature is held against the operators that were read
//! last. Only if they do not know the key, one read is made for all such callers. Whoever signed gets reads that wait for no such
//! caller, and these decide.
//!
//! Nothing here performs an act. Look next at `crate::token::operator_act`, which verifies a single signature.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::administrators::Administrators;
use super::shared_read::SharedRead;
use super::{AdministrationPoint, Error};
use crate::model::ids::Thumbprint;
use crate::model::jwk::PublicKey;
use crate::model::limits::{KEYS_MAX, KEYS_PER_LOOKUP_MAX};
use crate::model::revision::Revision;
use crate::model::rows::RevocationTarget;
use crate::model::time::ClockReading;
use crate::policy::document::{Document, DocumentBody, OperatorRole, OperatorSpec};
use crate::store::{self, Store, signers};
use crate::token::operator_act::{self, AdminCall, UnverifiedAct};

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

/// The used signatures, until they expire. They are needed for acts that commit nothing, because the store does not see those.
///
/// A key may occupy at most as many entries as are still free, so no key can block all others: one flooding key gets half of the
/// table, and `n` flooding keys leave a share of `1 / (n + 1)` free.
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
enum SignatureSpendOutcome {
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
    fn spend(&mut self, key: &Thumbprint, jti: &str, expires_at_s: i64, now_s: i64) -> SignatureSpendOutcome {
        if self.contains(key, jti) {
            return SignatureSpendOutcome::Before;
        }
        if self.is_full(key) {
            self.remove_expired(now_s);
            if self.is_full(key) {
                return SignatureSpendOutcome::Full;
            }
        }
        self.by_key.entry(key.clone()).or_default().insert(jti.to_owned(), expires_at_s);
        self.count += 1;
        SignatureSpendOutcome::First
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
        let acts =
            authorizations.iter().map(|authorization| parse_authorization(authorization)).collect::<Result<Vec<_>, _>>()?;
        let call = SignedCall { method, message, authorizations, acts: &acts, peer };
        match self.operators.last_read().map(|last_read| call.verify(&last_read, self.clock.now(), operators)) {
            Some(Ok((signed, _))) => self.check_unspent(&signed)?,
            Some(Err(SignatureError::Refused(error))) => return Err(error),
            Some(Err(SignatureError::NotListed(_))) | None => {
                let listed = self.operators.list(&*self.store).await?;
                let (signed, _) = call.verify(&listed, self.clock.now(), operators)?;
                self.check_unspent(&signed)?;
            }
        }
        // INVARIANT: operators and revocations are read from the store, not from the replica's snapshot. So a revoked key signs
        // nothing from that moment on, not even a read. A commit checks the key again in its own transaction.
        let (listed, revoked) = self.operators.list_with_revoked(&*self.store).await?;
        let (authorized, lacking) = call.verify(&listed, self.clock.now(), operators)?;
        if let Some((operator, key)) = authorized.operators.iter().zip(&authorized.keys).find(|(_, key)| revoked.contains(*key)) {
            let administrators = Administrators::from_operators(&listed.operators, |key| revoked.contains(key));
            return Err(key_revoked_error(operator, key.as_str(), Some(&administrators)));
        }
        if let Some(operator) = lacking {
            let wanted: Vec<_> = method.roles.iter().map(|role| role.as_str()).collect();
            let message = format!("operator `{operator}` has none of the roles this needs: {}", wanted.join(", "));
            return Err(Error::PermissionDenied(message));
        }
        Ok(authorized)
    }

    /// The error for a key that was revoked while its act was done. Reads the operators again.
    pub(super) async fn key_revoked_error(&self, operator: &str, thumbprint: &str) -> Error {
        key_revoked_error(operator, thumbprint, self.administrators().await.ok().as_ref())
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
                SignatureSpendOutcome::First => {}
                SignatureSpendOutcome::Before => return Err(replayed_error(jti)),
                SignatureSpendOutcome::Full => return Err(too_many_signatures_error(key)),
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

fn too_many_signatures_error(key: &Thumbprint) -> Error {
    Error::Unauthenticated(format!("the key `{key}` signed more calls within a minute than this server remembers: wait a minute"))
}

fn unsigned_error() -> Error {
    let hint = "sign the call: `authorization: Operator <compact JWS>`; the command line does it with --operator-key";
    Error::Unauthenticated(format!("the call is not signed: {hint}"))
}

fn unknown_key_error(thumbprint: &Thumbprint) -> Error {
    Error::Unauthenticated(format!("no operator has the key `{thumbprint}`: is it this store's?"))
}

/// The error for a revoked key. It names the way out if no administrator can sign any more.
fn key_revoked_error(operator: &str, thumbprint: &str, administrators: Option<&Administrators>) -> Error {
    let hint = match administrators {
        Some(administrators) if administrators.none_can_sign() => administrators.shortage_hint(),
        _ => "; `portcullis revocations`, signed with another operator's key, says why".to_owned(),
    };
    Error::KeyRevoked(format!("the key `{thumbprint}` of operator `{operator}` is revoked: it signs nothing any more{hint}"))
}

/// The operators of the store at one revision.
#[derive(Debug)]
struct OperatorList {
    revision: Revision,
    operators: Vec<OperatorSpec>,
    /// Where each key stands: the index of its operator, and of the key in that operator's list.
    keys: HashMap<Thumbprint, (usize, usize)>,
}

impl OperatorList {
    fn new(revision: Revision, operators: Vec<OperatorSpec>) -> Self {
        let mut keys = HashMap::new();
        for (operator_index, operator) in operators.iter().enumerate() {
            for (key_index, key) in operator.keys.iter().enumerate() {
                keys.entry(key.thumbprint().clone()).or_insert((operator_index, key_index));
            }
        }
        Self { revision, operators, keys }
    }

    fn find_signer(&self, thumbprint: &Thumbprint) -> Option<(&OperatorSpec, &PublicKey)> {
        let (operator_index, key_index) = self.keys.get(thumbprint)?;
        let operator = self.operators.get(*operator_index)?;
        Some((operator, operator.keys.get(*key_index)?))
    }
}

/// The operators, and those of their keys that are revoked.
type OperatorsAndRevokedKeys = (Arc<OperatorList>, Arc<HashSet<Thumbprint>>);

/// Reads the operators. Strangers share a read, and so do signers, so no number of callers delays a signer by more than two reads.
#[derive(Debug, Default)]
pub(super) struct OperatorReader {
    last_read: RwLock<Option<Arc<OperatorList>>>,
    for_strangers: SharedRead<Result<Arc<OperatorList>, store::Error>>,
    for_signers: SharedRead<Result<OperatorsAndRevokedKeys, store::Error>>,
}

impl OperatorReader {
    /// The operators that were read last. They authorize nobody.
    fn last_read(&self) -> Option<Arc<OperatorList>> {
        self.last_read.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the operators from the store, no earlier than this call.
    async fn list(&self, store: &dyn Store) -> Result<Arc<OperatorList>, Error> {
        Ok(self.for_strangers.read(self.read(store)).await?)
    }

    /// Reads as [`OperatorReader::list`], for a caller that signed, and then reads which of the operators' keys are revoked.
    async fn list_with_revoked(&self, store: &dyn Store) -> Result<(Arc<OperatorList>, Arc<HashSet<Thumbprint>>), Error> {
        let read = async {
            let listed = self.read(store).await?;
            let keys: Vec<&Thumbprint> = listed.keys.keys().collect();
            let mut revoked = HashSet::new();
            for some in keys.chunks(KEYS_PER_LOOKUP_MAX) {
                let targets: Vec<RevocationTarget> = some.iter().map(|key| signers::key_target(key.as_str())).collect();
                let rows = store.revocations_of(&targets).await?;
                let dead: HashSet<&RevocationTarget> =
                    rows.iter().filter(|row| signers::is_key_revoked(Some(row))).map(|row| &row.target).collect();
                let found = some.iter().zip(&targets).filter(|(_, target)| dead.contains(target));
                revoked.extend(found.map(|(key, _)| Thumbprint::clone(key)));
            }
            Ok::<_, store::Error>((listed, Arc::new(revoked)))
        };
        Ok(self.for_signers.read(read).await?)
    }

    async fn read(&self, store: &dyn Store) -> Result<Arc<OperatorList>, store::Error> {
        let listed = store.documents(Some("operator")).await?;
        let operators = listed.documents.iter().filter_map(|stored| read_operator(&stored.row)).collect();
        let listed = Arc::new(OperatorList::new(listed.revision, operators));
        *self.last_read.write().unwrap_or_else(PoisonError::into_inner) = Some(listed.clone());
        Ok(listed)
    }
}

/// A call as received, with its parsed signatures.
struct SignedCall<'a> {
    method: &'static AdminMethod,
    /// `None` before the message was read.
    message: Option<&'a [u8]>,
    authorizations: &'a [&'a str],
    acts: &'a [UnverifiedAct<'a>],
    peer: &'a str,
}

/// Why the signatures of a call do not verify.
enum SignatureError {
    /// They are wrong, whatever the store holds by now.
    Refused(Error),
    /// Operators of a later revision may verify them: they have an unknown key, or are for another history.
    NotListed(Error),
}

impl From<SignatureError> for Error {
    fn from(unverified: SignatureError) -> Self {
        match unverified {
            SignatureError::Refused(error) | SignatureError::NotListed(error) => error,
        }
    }
}

impl SignedCall<'_> {
    /// Verifies the signatures against listed operators. Fills `operators` with those that signed. Returns the id of an operator
    /// without a role for the method, too.
    fn verify(
        &self,
        listed: &OperatorList,
        now: ClockReading,
        operators: &mut Vec<String>,
    ) -> Result<(AuthorizedAct, Option<String>), SignatureError> {
        operators.clear();
        let mut lacking = None;
        let mut authorized = AuthorizedAct {
            method: self.method.path,
            operators: vec![],
            keys: vec![],
            signatures: vec![],
            jtis: vec![],
            peer: self.peer.to_owned(),
            unrecorded: Arc::default(),
        };
        for (authorization, act) in self.authorizations.iter().zip(self.acts) {
            let Some((operator, key)) = listed.find_signer(act.thumbprint()) else {
                return Err(SignatureError::NotListed(unknown_key_error(act.thumbprint())));
            };
            let (audience, method) = (listed.revision.history.as_str(), self.method.path);
            let verified = match self.message {
                Some(message) => act.verify(key, &AdminCall { audience, method, message }, now),
                None => act.verify_without_message(key, audience, method, now),
            };
            let act = verified.map_err(|error| {
                let refused = Error::Unauthenticated(error.to_string());
                if error == operator_act::Error::Audience {
                    SignatureError::NotListed(refused)
                } else {
                    SignatureError::Refused(refused)
                }
            })?;
            operators.push(operator.id.to_string());
            if authorized.operators.iter().any(|id| id == operator.id.as_str()) {
                return Err(SignatureError::Refused(Error::Unauthenticated(format!(
                    "operator `{}` signed twice: two people are two operators",
                    operator.id
                ))));
            }
            if !self.method.roles.iter().any(|role| operator.roles.contains(role)) {
                lacking.get_or_insert_with(|| operator.id.to_string());
            }
            authorized.operators.push(operator.id.to_string());
            authorized.keys.push(key.thumbprint().clone());
            authorized.signatures.push(authorization.trim_start_matches(AUTHORIZATION_SCHEME).to_owned());
            authorized.jtis.push((act.jti().to_owned(), act.exp_s()));
        }
        Ok((authorized, lacking))
    }
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
    use crate::audit::AuditRecorder;
    use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationKind, StoreWrite};
    use crate::model::time::{Clock, SystemClock};
    use crate::pap::create_first_operator;
    use crate::store::CommitRequest;
    use crate::store::sqlite::SqliteStore;
    use crate::testing::store::FaultyStore;
    use crate::token::PrivateKey;

    const LIST: &str = "/portcullis.v1.RevocationService/List";

    fn act(key: &PrivateKey, audience: &str, method: &str) -> String {
        format!("Operator {}", operator_act::sign_act(key, &AdminCall { audience, method, message: b"" }, SystemClock.now()))
    }

    /// Whoever signs nothing costs the store nothing, and a thousand calls with unknown keys cost far fewer reads. The calls do not all
    /// arrive before the first read, because the runtime polls some of them at a time. Signers are heard.
    #[tokio::test]
    async fn strangers_cost_the_store_next_to_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let inner = SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap();
        let store = Arc::new(FaultyStore::new(Arc::new(inner)));
        let (key, stranger) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        create_first_operator(&*store, "local", key.public_key()).await.unwrap().unwrap();
        let admin = AdministrationPoint::new(store.clone(), clock, Arc::new(AuditRecorder::discarding("n1")));
        let history = admin.revision().await.unwrap().history.to_string();
        let check = async |authorization: &str| admin.check_signatures(LIST, &[authorization], "127.0.0.1:1").await;
        let reads = async |of: &[&str], expected: std::ops::RangeInclusive<u64>| {
            let before = store.reads();
            let checked = futures_util::future::join_all(of.iter().map(|authorization| check(authorization))).await;
            assert!(checked.iter().all(|checked| matches!(checked, Err(Error::Unauthenticated(_)))), "{checked:?}");
            let made = store.reads() - before;
            assert!(expected.contains(&made), "{made} reads for {}", of.len());
        };
        reads(&["Operator a.b.c"; 1000], 0..=0).await;
        let unknown = act(&stranger, &history, LIST);
        reads(&vec![unknown.as_str(); 1000], 1..=100).await;
        check(&act(&key, &history, LIST)).await.unwrap();
        // The key is known now, so forged and misused signatures of it are refused without a read.
        let good = act(&key, &history, LIST);
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let forged = format!("{signed}.{}{}", if signature.starts_with('A') { 'B' } else { 'A' }, signature.get(1..).unwrap());
        reads(&vec![forged.as_str(); 1000], 0..=0).await;
        reads(&vec![act(&key, &history, "/portcullis.v1.PolicyService/Apply").as_str(); 1000], 0..=0).await;
        // The store may have another history by now.
        reads(&vec![act(&key, "another", LIST).as_str(); 1000], 1..=100).await;
        admin.authorize(LIST, b"", &[&good], "127.0.0.1:1").await.unwrap();
        reads(&vec![good.as_str(); 1000], 0..=0).await;
        let before = store.reads();
        let revisions = futures_util::future::join_all((0..1000).map(|_| admin.revision())).await;
        assert!(revisions.iter().all(Result::is_ok) && store.reads() - before <= 100);
        // Whoever has a revoked key can sign as often as it likes.
        let target = RevocationTarget::Key(key.public_key().thumbprint().to_string());
        let revoke = StoreWrite::Revoke { target, kind: RevocationKind::Dead, reason: String::new() };
        store.commit(CommitRequest { writes: vec![revoke], ..Default::default() }).await.unwrap();
        let signed: Vec<String> = (0..100).map(|_| act(&key, &history, LIST)).collect();
        let before = store.reads();
        let checked = futures_util::future::join_all(signed.iter().map(|signed| check(signed))).await;
        assert!(checked.iter().all(|checked| matches!(checked, Err(Error::KeyRevoked(_)))), "{checked:?}");
        assert!(store.reads() - before <= 50);
    }

    /// What was read before authorizes nobody: a key counts from the commit that lists it, and not after the commit that removes it.
    #[tokio::test]
    async fn a_key_counts_as_the_store_says() {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let store = Arc::new(SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap());
        let (key, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        create_first_operator(&*store, "local", key.public_key()).await.unwrap().unwrap();
        let admin = AdministrationPoint::new(store.clone(), clock, Arc::new(AuditRecorder::discarding("n1")));
        let history = admin.revision().await.unwrap().history.to_string();
        let may = async |key: &PrivateKey| admin.authorize(LIST, b"", &[&act(key, &history, LIST)], "").await.is_ok();
        assert!(may(&key).await && !may(&other).await);
        let list = async |key: &PrivateKey| {
            let id = DocumentKey { kind: "operator".to_owned(), id: "local".to_owned() };
            let json = format!(r#"{{"id":"local","keys":[{}],"kind":"operator","roles":["audit"]}}"#, key.public_key().to_jwk());
            let row = DocumentRow { key: id, json, path: String::new(), line: 0, origin: DocumentOrigin::Api };
            store.commit(CommitRequest { writes: vec![StoreWrite::PutDocument(row)], ..Default::default() }).await.unwrap();
        };
        list(&other).await;
        assert!(!may(&key).await && may(&other).await);
        list(&key).await;
        assert!(!may(&other).await && may(&key).await);
        let revoke = StoreWrite::Revoke {
            target: RevocationTarget::Key(key.public_key().thumbprint().to_string()),
            kind: RevocationKind::Dead,
            reason: String::new(),
        };
        store.commit(CommitRequest { writes: vec![revoke], ..Default::default() }).await.unwrap();
        assert!(!may(&key).await);
    }

    #[test]
    fn a_signature_counts_once() {
        let (mut spent, [ada, bo]) = (SpentSignatures::default(), keys());
        assert_eq!(spent.spend(&ada, "a", 100, 50), SignatureSpendOutcome::First);
        assert_eq!(spent.spend(&ada, "a", 100, 60), SignatureSpendOutcome::Before);
        assert_eq!(spent.spend(&ada, "b", 100, 60), SignatureSpendOutcome::First);
        assert_eq!(spent.spend(&bo, "a", 100, 60), SignatureSpendOutcome::First, "nobody uses up the signature of another");
    }

    #[test]
    fn no_key_takes_the_place_of_all_others() {
        let (mut spent, [ada, bo]) = (SpentSignatures::default(), keys());
        let flood = |spent: &mut SpentSignatures, key: &Thumbprint, now_s: i64| {
            let sign =
                |index: &usize| spent.spend(key, &format!("{now_s}.{index}"), now_s + 60, now_s) == SignatureSpendOutcome::First;
            (0..2 * SIGNATURES_REMEMBERED_MAX).take_while(sign).count()
        };
        assert_eq!(flood(&mut spent, &ada, 1), SIGNATURES_REMEMBERED_MAX / 2);
        assert_eq!(spent.spend(&ada, "one more", 61, 1), SignatureSpendOutcome::Full);
        assert_eq!(spent.spend(&bo, "a kill", 61, 1), SignatureSpendOutcome::First);
        assert_eq!(spent.spend(&ada, "1.0", 61, 1), SignatureSpendOutcome::Before, "what was used stays used");
        assert_eq!(flood(&mut spent, &bo, 2), SIGNATURES_REMEMBERED_MAX / 4 - 1, "a half of what the first left");
        // Expired signatures make room.
        assert_eq!(spent.spend(&ada, "one more", 122, 62), SignatureSpendOutcome::First);
        assert_eq!((spent.count, spent.by_key.len()), (SIGNATURES_REMEMBERED_MAX / 4, 2));
    }

    fn keys() -> [Thumbprint; 2] {
        [1, 2].map(|seed| crate::token::PrivateKey::from_seed([seed; 32]).unwrap().public_key().thumbprint().clone())
    }
}
