//! Reason codes and layers: a stable part of the interface, so a code is never renamed and never gets a second meaning.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which layer gave the least answer; empty on a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// The chain, the proof or the audience.
    Identity,
    /// The kill switch.
    Revocation,
    /// The replica is not fresh enough.
    Freshness,
    /// The tool registry.
    Tool,
    /// The user's groups.
    User,
    /// The application's ceiling.
    Application,
    /// One of the chain's agents.
    Agent,
    /// A token's scope.
    Hop,
    /// A guardrail.
    Guardrail,
    /// The decision could not be recorded.
    Audit,
}

impl Layer {
    /// Every layer.
    pub const ALL: &'static [Layer] = &[
        Layer::Identity,
        Layer::Revocation,
        Layer::Freshness,
        Layer::Tool,
        Layer::User,
        Layer::Application,
        Layer::Agent,
        Layer::Hop,
        Layer::Guardrail,
        Layer::Audit,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Layer::Identity => "identity",
            Layer::Revocation => "revocation",
            Layer::Freshness => "freshness",
            Layer::Tool => "tool",
            Layer::User => "user",
            Layer::Application => "application",
            Layer::Agent => "agent",
            Layer::Hop => "hop",
            Layer::Guardrail => "guardrail",
            Layer::Audit => "audit",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $layer:ident, $message:literal;)+) => {
        /// Why a decision came out as it did.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// The code on the wire, in the audit log and in tests.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $code,)+ }
            }

            /// The layer that a reason belongs to by itself; a decision may name another where the code can come of several.
            pub fn layer(self) -> Option<Layer> {
                match self { $(Reason::$variant => reasons!(@layer $layer),)+ }
            }

            /// One sentence for the caller that reveals nothing of the policy.
            pub fn message(self) -> &'static str {
                match self { $(Reason::$variant => $message,)+ }
            }
        }
    };
    (@layer None) => { None };
    (@layer $layer:ident) => { Some(Layer::$layer) };
}

reasons! {
    /// The call may go on.
    Ok = "OK", None, "permitted";
    /// A token, or the presentation, is not well formed; header key material, `crit` and `exp` at or before `iat` too.
    TokenMalformed = "TOKEN_MALFORMED", Identity, "a token of the chain is malformed";
    /// The header's algorithm is not the key's.
    TokenAlg = "TOKEN_ALG", Identity, "a token of the chain names an algorithm that its key does not have";
    /// The header's `typ` is not what this place demands.
    TokenType = "TOKEN_TYPE", Identity, "a token of the chain is of the wrong type";
    /// A signature does not verify, or the issuer has no such key.
    TokenSignature = "TOKEN_SIGNATURE", Identity, "a signature of the chain does not verify";
    /// A token's `exp` has passed.
    TokenExpired = "TOKEN_EXPIRED", Identity, "a token of the chain has expired";
    /// A token's `iat` or `nbf` is ahead of our clock by more than the skew.
    TokenNotYetValid = "TOKEN_NOT_YET_VALID", Identity, "a token of the chain is not valid yet";
    /// A token lives longer than its issuer may give.
    TokenLifetime = "TOKEN_LIFETIME", Identity, "a token of the chain lives longer than allowed";
    /// A token, the chain or a constraint's nesting is over the limit.
    TokenTooLarge = "TOKEN_TOO_LARGE", Identity, "the credential is larger than allowed";
    /// Nobody here trusts the root's issuer.
    IssuerUnknown = "ISSUER_UNKNOWN", Identity, "the issuer of the chain is not trusted here";
    /// The issuer may not speak for this application or group.
    IssuerNotEntitled = "ISSUER_NOT_ENTITLED", Identity, "the issuer may not vouch for what the chain says";
    /// A hop does not follow from its parent.
    ChainBroken = "CHAIN_BROKEN", Identity, "the chain does not hold together";
    /// More hops than a token or an agent allows.
    ChainTooDeep = "CHAIN_TOO_DEEP", Identity, "the chain is longer than allowed";
    /// A hop grants more than its parent.
    ChainWidened = "CHAIN_WIDENED", Identity, "a hop of the chain grants more than it was given";
    /// A `jti` stands twice in the chain.
    ChainReplayedToken = "CHAIN_REPLAYED_TOKEN", Identity, "a token stands twice in the chain";
    /// A required identity claim is missing.
    IdentityMissing = "IDENTITY_MISSING", Identity, "the chain lacks a required identity";
    /// A hop asserts what only the root may.
    IdentityInHop = "IDENTITY_IN_HOP", Identity, "a hop of the chain asserts an identity that only the root may assert";
    /// Neither the agent nor its key is registered.
    AgentUnknown = "AGENT_UNKNOWN", Identity, "an agent of the chain is not registered";
    /// The key is not one of this agent's.
    AgentKeyUnknown = "AGENT_KEY_UNKNOWN", Identity, "an agent's key is not registered for it";
    /// The agent is suspended.
    AgentSuspended = "AGENT_SUSPENDED", Revocation, "an agent of the chain is suspended";
    /// The application has no document.
    ApplicationUnknown = "APPLICATION_UNKNOWN", Application, "the application is not registered";
    /// The agent does not act for this user.
    UserNotServed = "USER_NOT_SERVED", Agent, "the agent does not act for this user";
    /// The agent does not run inside this application.
    ApplicationNotServed = "APPLICATION_NOT_SERVED", Agent, "the agent does not run inside this application";
    /// The delegator does not list the agent it handed to.
    DelegationNotAllowed = "DELEGATION_NOT_ALLOWED", Agent, "an agent may not delegate to the one that follows it";
    /// The audience is missing, is not the chain's, or is not the caller's to claim.
    AudienceMismatch = "AUDIENCE_MISMATCH", Identity, "the credential is not meant for this audience";
    /// The tool demands a proof of possession and none came.
    ProofMissing = "PROOF_MISSING", Identity, "the call needs a proof of possession";
    /// The proof is not one of this leaf, tool and arguments.
    ProofInvalid = "PROOF_INVALID", Identity, "the proof of possession does not fit this call";
    /// The proof was used before.
    ProofReplayed = "PROOF_REPLAYED", Identity, "the proof of possession was used before";
    /// The proof is outside its window, or from before this replica was ready.
    ProofStale = "PROOF_STALE", Identity, "the proof of possession is too old or too new";
    /// No such handle on this connection: send the chain again.
    HandleUnknown = "HANDLE_UNKNOWN", Identity, "the handle is unknown here: send the chain again";
    /// The tool is not registered.
    ToolUnknown = "TOOL_UNKNOWN", Tool, "the tool is not registered";
    /// The tool is suspended.
    ToolSuspended = "TOOL_SUSPENDED", Revocation, "the tool is suspended";
    /// The tool's schema is not the registered one.
    ToolChanged = "TOOL_CHANGED", Tool, "the tool's schema is not the registered one";
    /// A token of the chain does not grant the tool.
    ToolNotGranted = "TOOL_NOT_GRANTED", Hop, "the chain does not grant this tool";
    /// The arguments are refused by a token, or are not comparable JSON.
    ArgumentRefused = "ARGUMENT_REFUSED", Hop, "the arguments are refused";
    /// The user's groups do not allow it.
    UserDenies = "USER_DENIES", User, "the user may not do this";
    /// The application does not allow it.
    ApplicationDenies = "APPLICATION_DENIES", Application, "the application may not do this";
    /// The application is suspended.
    ApplicationSuspended = "APPLICATION_SUSPENDED", Revocation, "the application is suspended";
    /// The user is suspended.
    UserSuspended = "USER_SUSPENDED", Revocation, "the user is suspended";
    /// An agent's policy does not allow it.
    AgentDenies = "AGENT_DENIES", Agent, "an agent of the chain may not do this";
    /// A guardrail forbids it.
    GuardrailDenies = "GUARDRAIL_DENIES", Guardrail, "a guardrail forbids this";
    /// A condition could not be evaluated.
    ConditionError = "CONDITION_ERROR", None, "a condition could not be evaluated";
    /// An operator must approve this very call.
    ApprovalRequired = "APPROVAL_REQUIRED", None, "this call needs an approval";
    /// The approval came or was used too late.
    ApprovalExpired = "APPROVAL_EXPIRED", None, "the approval has expired";
    /// The approval was used before.
    ApprovalUsed = "APPROVAL_USED", None, "the approval was used before";
    /// An operator refused this call.
    ApprovalRefused = "APPROVAL_REFUSED", None, "the approval was refused";
    /// A token or hop of the chain is revoked.
    RevokedToken = "REVOKED_TOKEN", Revocation, "a token of the chain is revoked";
    /// The session is revoked.
    RevokedSession = "REVOKED_SESSION", Revocation, "the session is revoked";
    /// The task is revoked.
    RevokedTask = "REVOKED_TASK", Revocation, "the task is revoked";
    /// The user's delegation to an agent is revoked.
    RevokedDelegation = "REVOKED_DELEGATION", Revocation, "the user's delegation to this agent is revoked";
    /// The agent's credentials issued before the watermark are void.
    RevokedAgent = "REVOKED_AGENT", Revocation, "the agent's older credentials are revoked";
    /// The user's credentials issued before the watermark are void.
    RevokedUser = "REVOKED_USER", Revocation, "the user's older credentials are revoked";
    /// The application's credentials issued before the watermark are void.
    RevokedApplication = "REVOKED_APPLICATION", Revocation, "the application's older credentials are revoked";
    /// A key of the chain is revoked.
    RevokedKey = "REVOKED_KEY", Revocation, "a key of the chain is revoked";
    /// Everything is suspended, or a restored store was adopted and the root was issued before.
    RevokedAll = "REVOKED_ALL", Revocation, "everything is suspended, or a restored store voided this credential";
    /// The replica has not heard from the store within the bound.
    Stale = "STALE", Freshness, "this replica is not fresh enough to permit";
    /// The replica does not have the revision that was asked for.
    RevisionUnavailable = "REVISION_UNAVAILABLE", Freshness, "this replica has not reached the revision asked for";
    /// The store did not take the use of a proof or approval in time: nothing was used.
    LedgerBusy = "LEDGER_BUSY", Freshness, "the store did not take the use in time and nothing was used: ask again";
    /// Nobody can say whether the store took the use of a proof or approval.
    LedgerUnknown = "LEDGER_UNKNOWN", Freshness, "it is unknown whether the use was stored: send the very same request again";
    /// The decision could not be recorded.
    AuditUnavailable = "AUDIT_UNAVAILABLE", Audit, "the decision could not be recorded";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_complete() {
        let mut codes: Vec<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(codes.len(), 60);
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Reason::ALL.len());
    }
}
