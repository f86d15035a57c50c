//! Reason codes and layers. They are a stable part of the interface: a code is never renamed and never gets another meaning.
//!
//! `docs/REASONS.md` describes each code for operators. Look next at [`super::decision`], which carries a reason.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The layer that gave the least answer; absent on a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecisionLayer {
    /// The chain, the proof or the audience.
    Identity,
    /// A revocation applies.
    Revocation,
    /// The replica is not fresh enough.
    Freshness,
    /// The tool registry.
    Tool,
    /// The policy of the user's groups.
    User,
    /// The policy of the application.
    Application,
    /// The policy of one agent of the chain.
    Agent,
    /// The scope of one token.
    Hop,
    /// A guardrail.
    Guardrail,
    /// The decision could not be recorded.
    Audit,
}

impl DecisionLayer {
    /// Every layer.
    pub const ALL: &'static [DecisionLayer] = &[
        DecisionLayer::Identity,
        DecisionLayer::Revocation,
        DecisionLayer::Freshness,
        DecisionLayer::Tool,
        DecisionLayer::User,
        DecisionLayer::Application,
        DecisionLayer::Agent,
        DecisionLayer::Hop,
        DecisionLayer::Guardrail,
        DecisionLayer::Audit,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            DecisionLayer::Identity => "identity",
            DecisionLayer::Revocation => "revocation",
            DecisionLayer::Freshness => "freshness",
            DecisionLayer::Tool => "tool",
            DecisionLayer::User => "user",
            DecisionLayer::Application => "application",
            DecisionLayer::Agent => "agent",
            DecisionLayer::Hop => "hop",
            DecisionLayer::Guardrail => "guardrail",
            DecisionLayer::Audit => "audit",
        }
    }

    /// Whether the layer's answer may depend on the arguments of a call.
    pub fn judges_arguments(self) -> bool {
        match self {
            DecisionLayer::Identity | DecisionLayer::Revocation | DecisionLayer::Freshness | DecisionLayer::Audit => false,
            DecisionLayer::Tool
            | DecisionLayer::User
            | DecisionLayer::Application
            | DecisionLayer::Agent
            | DecisionLayer::Hop
            | DecisionLayer::Guardrail => true,
        }
    }
}

impl fmt::Display for DecisionLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $layer:ident, $message:literal;)+) => {
        /// The reason for a decision.
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

            /// The layer of a reason. A decision may name another layer if several layers can give the reason.
            pub fn layer(self) -> Option<DecisionLayer> {
                match self { $(Reason::$variant => reasons!(@layer $layer),)+ }
            }

            /// One sentence for the caller. It reveals nothing of the policy.
            pub fn message(self) -> &'static str {
                match self { $(Reason::$variant => $message,)+ }
            }
        }
    };
    (@layer None) => { None };
    (@layer $layer:ident) => { Some(DecisionLayer::$layer) };
}

reasons! {
    /// The call is permitted.
    Ok = "OK", None, "permitted";
    /// A token or the presentation is malformed. This includes key material in a header, `crit`, and an `exp` at or before `iat`.
    TokenMalformed = "TOKEN_MALFORMED", Identity, "a token of the chain is malformed";
    /// The algorithm of the header is not that of the key.
    TokenAlg = "TOKEN_ALG", Identity, "a token of the chain names an algorithm that its key does not have";
    /// The `typ` of the header is not the required one.
    TokenType = "TOKEN_TYPE", Identity, "a token of the chain is of the wrong type";
    /// A signature does not verify, or the issuer has no such key.
    TokenSignature = "TOKEN_SIGNATURE", Identity, "a signature of the chain does not verify";
    /// A token's `exp` has passed.
    TokenExpired = "TOKEN_EXPIRED", Identity, "a token of the chain has expired";
    /// The `iat` or `nbf` of a token is further ahead of our clock than the skew allows.
    TokenNotYetValid = "TOKEN_NOT_YET_VALID", Identity, "a token of the chain is not valid yet";
    /// The lifetime of a token is longer than its issuer may give.
    TokenLifetime = "TOKEN_LIFETIME", Identity, "a token of the chain lives longer than allowed";
    /// A token, the chain or the nesting of a constraint exceeds its limit.
    TokenTooLarge = "TOKEN_TOO_LARGE", Identity, "the credential is larger than allowed";
    /// The issuer of the root is not trusted.
    IssuerUnknown = "ISSUER_UNKNOWN", Identity, "the issuer of the chain is not trusted here";
    /// The issuer may not name this application or group.
    IssuerNotEntitled = "ISSUER_NOT_ENTITLED", Identity, "the issuer may not vouch for what the chain says";
    /// A hop is not linked to its parent.
    ChainBroken = "CHAIN_BROKEN", Identity, "the chain does not hold together";
    /// The chain has more hops than a token or an agent allows.
    ChainTooDeep = "CHAIN_TOO_DEEP", Identity, "the chain is longer than allowed";
    /// A hop grants more than its parent.
    ChainWidened = "CHAIN_WIDENED", Identity, "a hop of the chain grants more than it was given";
    /// A `jti` occurs twice in the chain.
    ChainReplayedToken = "CHAIN_REPLAYED_TOKEN", Identity, "a token stands twice in the chain";
    /// A required identity claim is missing.
    IdentityMissing = "IDENTITY_MISSING", Identity, "the chain lacks a required identity";
    /// A hop has a claim that only the root may have.
    IdentityInHop = "IDENTITY_IN_HOP", Identity, "a hop of the chain asserts an identity that only the root may assert";
    /// Neither the agent nor its key is registered.
    AgentUnknown = "AGENT_UNKNOWN", Identity, "an agent of the chain is not registered";
    /// The key is not registered for this agent.
    AgentKeyUnknown = "AGENT_KEY_UNKNOWN", Identity, "an agent's key is not registered for it";
    /// The agent is suspended.
    AgentSuspended = "AGENT_SUSPENDED", Revocation, "an agent of the chain is suspended";
    /// The application has no document.
    ApplicationUnknown = "APPLICATION_UNKNOWN", Application, "the application is not registered";
    /// The agent may not act for this user.
    UserNotServed = "USER_NOT_SERVED", Agent, "the agent does not act for this user";
    /// The agent may not run inside this application.
    ApplicationNotServed = "APPLICATION_NOT_SERVED", Agent, "the agent does not run inside this application";
    /// The delegating agent may not delegate to the next agent.
    DelegationNotAllowed = "DELEGATION_NOT_ALLOWED", Agent, "an agent may not delegate to the one that follows it";
    /// The audience is missing, is not that of the chain, or may not be claimed by the caller.
    AudienceMismatch = "AUDIENCE_MISMATCH", Identity, "the credential is not meant for this audience";
    /// The tool requires a proof of possession, and the call has none.
    ProofMissing = "PROOF_MISSING", Identity, "the call needs a proof of possession";
    /// The proof does not match this leaf, tool and arguments.
    ProofInvalid = "PROOF_INVALID", Identity, "the proof of possession does not fit this call";
    /// The proof was used before.
    ProofReplayed = "PROOF_REPLAYED", Identity, "the proof of possession was used before";
    /// The proof is outside its window, or was made before this replica was ready.
    ProofStale = "PROOF_STALE", Identity, "the proof of possession is too old or too new";
    /// The connection has no such handle: send the chain again.
    HandleUnknown = "HANDLE_UNKNOWN", Identity, "the handle is unknown here: send the chain again";
    /// The tool is not registered.
    ToolUnknown = "TOOL_UNKNOWN", Tool, "the tool is not registered";
    /// The tool is suspended.
    ToolSuspended = "TOOL_SUSPENDED", Revocation, "the tool is suspended";
    /// The tool's schema is not the registered one.
    ToolChanged = "TOOL_CHANGED", Tool, "the tool's schema is not the registered one";
    /// A token of the chain does not grant the tool.
    ToolNotGranted = "TOOL_NOT_GRANTED", Hop, "the chain does not grant this tool";
    /// A token refuses the arguments, or the arguments are not comparable JSON.
    ArgumentRefused = "ARGUMENT_REFUSED", Hop, "the arguments are refused";
    /// The policy of the user's groups does not allow the call.
    UserDenies = "USER_DENIES", User, "the user may not do this";
    /// The policy of the application does not allow the call.
    ApplicationDenies = "APPLICATION_DENIES", Application, "the application may not do this";
    /// The application is suspended.
    ApplicationSuspended = "APPLICATION_SUSPENDED", Revocation, "the application is suspended";
    /// The user is suspended.
    UserSuspended = "USER_SUSPENDED", Revocation, "the user is suspended";
    /// The policy of an agent does not allow the call.
    AgentDenies = "AGENT_DENIES", Agent, "an agent of the chain may not do this";
    /// A guardrail forbids the call.
    GuardrailDenies = "GUARDRAIL_DENIES", Guardrail, "a guardrail forbids this";
    /// A condition could not be evaluated.
    ConditionError = "CONDITION_ERROR", None, "a condition could not be evaluated";
    /// An operator must approve exactly this call.
    ApprovalRequired = "APPROVAL_REQUIRED", None, "this call needs an approval";
    /// The approval was given or used too late.
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
    /// The agent's credentials that were issued at or before the watermark are void.
    RevokedAgent = "REVOKED_AGENT", Revocation, "the agent's older credentials are revoked";
    /// The user's credentials that were issued at or before the watermark are void.
    RevokedUser = "REVOKED_USER", Revocation, "the user's older credentials are revoked";
    /// The application's credentials that were issued at or before the watermark are void.
    RevokedApplication = "REVOKED_APPLICATION", Revocation, "the application's older credentials are revoked";
    /// A key of the chain is revoked.
    RevokedKey = "REVOKED_KEY", Revocation, "a key of the chain is revoked";
    /// Everything is suspended, or the root was issued before a restored store was adopted.
    RevokedAll = "REVOKED_ALL", Revocation, "everything is suspended, or a restored store voided this credential";
    /// The replica has had no proof of freshness for as long as the bound.
    Stale = "STALE", Freshness, "this replica is not fresh enough to permit";
    /// The replica does not have the requested revision.
    RevisionUnavailable = "REVISION_UNAVAILABLE", Freshness, "this replica has not reached the revision asked for";
    /// The store did not accept the use of a proof or approval in time. Nothing was used.
    LedgerBusy = "LEDGER_BUSY", Freshness, "the store did not take the use in time and nothing was used: ask again";
    /// It is unknown whether the store recorded the use of a proof or approval.
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
