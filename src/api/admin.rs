//! The administration services over gRPC: they convert messages and call `pap`.
//!
//! `signature_layer.rs` runs first and puts the verified signature into the request's extensions. Every handler reads it from there. The
//! handlers check no right themselves: `pap` does. Look next at `pap.rs`.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Code, Request, Response, Status};

use super::caller::{caller_of, trace_headers};
use super::r#gen as wire;
use super::r#gen::approval_service_server::ApprovalService;
use super::r#gen::fleet_service_server::FleetService;
use super::r#gen::policy_service_server::PolicyService;
use super::r#gen::revocation_service_server::RevocationService;
use super::revocation_feed::{fleet_to_wire, info_to_wire, replica_to_wire};
use super::status::{invalid_argument, status_with_reason};
use super::store_timeout;
use super::wires::portcullis_v1::check_request_from_wire;
use super::wires::portcullis_v1::explanation::explanation_to_wire;
use crate::model::approval::ApprovalRow;
use crate::model::ids::UserId;
use crate::model::limits::{POLICY_BYTES_MAX, POLICY_FILE_BYTES_MAX, POLICY_FILES_MAX};
use crate::model::replica::ReplicaWaitOutcome;
use crate::model::revision::{HistoryId, Revision};
use crate::model::rows::{DocumentKey, RevocationKind, RevocationRow, RevocationTarget};
use crate::pap::{
    AdministrationPoint, ApplyOutcome, ApprovalAnswer, AuthorizedAct, CommitMetadata, DiagnosticText, DocumentChange, Error,
    HISTORY_LISTED_DEFAULT, NameStatus, PolicyFile, RevokeRequest, TargetLookup,
};
use crate::service::RuntimeService;
use crate::service::request::Caller;

/// Largest encoded list of approvals. One approval may hold 16 KiB of arguments.
const APPROVAL_LIST_BYTES_MAX: usize = 3 * 1024 * 1024;

/// The administration services, over one [`AdministrationPoint`].
#[derive(Clone)]
pub struct AdminApi {
    admin: Arc<AdministrationPoint>,
    runtime_service: Option<RuntimeService>,
}

impl AdminApi {
    /// Serves `admin`. Without a `runtime_service` this process makes no decisions, so `Explain` and `ShadowReport` are refused.
    pub fn new(admin: Arc<AdministrationPoint>, runtime_service: Option<RuntimeService>) -> Self {
        Self { admin, runtime_service }
    }

    pub(super) fn admin(&self) -> &AdministrationPoint {
        &self.admin
    }

    /// Carries an act out. A caller that opened the store itself waits for the act to end, because no server could be asked later.
    async fn run_act<T: Send + 'static>(
        &self,
        act: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Status> {
        if self.runtime_service.is_some() { store_timeout::await_act(act).await } else { Ok(act.await?) }
    }

    fn runtime_service(&self) -> Result<&RuntimeService, Status> {
        let nobody = "no decisions are given here: ask a running server, with --target instead of --store";
        self.runtime_service.as_ref().ok_or_else(|| status_with_reason(Code::FailedPrecondition, "REJECTED", nobody))
    }
}

#[tonic::async_trait]
impl RevocationService for AdminApi {
    async fn revoke(&self, request: Request<wire::RevokeRequest>) -> Result<Response<wire::RevokeResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let meaning = match wire::RevocationMeaning::try_from(request.meaning) {
            Ok(wire::RevocationMeaning::Unspecified) => None,
            Ok(wire::RevocationMeaning::Suspend) => Some(RevocationKind::Suspend),
            Ok(wire::RevocationMeaning::Watermark) => Some(RevocationKind::Watermark),
            Ok(wire::RevocationMeaning::Dead) => Some(RevocationKind::Dead),
            Err(_) => {
                let error = Error::InvalidArgument { field: "meaning", message: format!("{} is not a meaning", request.meaning) };
                self.admin.record_refusal(by.method(), by.operators(), by.peer(), &error)?;
                return Err(error.into());
            }
        };
        let target = request.target.unwrap_or_default();
        let asked = RevokeRequest { kind: target.kind, key: target.key, revocation_kind: meaning, reason: request.reason };
        let (admin, acting) = (self.admin.clone(), by.clone());
        let done = self.run_act(async move { admin.revoke(&acting, asked).await }).await?;
        let (target, committed) = (done.target, done.committed);
        // INVARIANT: the revocation is durable here. It stands, whatever the look-up of the name returns, or if the look-up fails.
        let name = self.admin.look_up_target(&target, &committed.revision).await;
        Ok(Response::new(wire::RevokeResponse {
            revision: committed.revision.to_string(),
            target: Some(target_to_wire(&target)),
            committed_at_unix_ms: committed.unix_ms,
            name: Some(recognition_to_wire(name)),
            freshness_bound_ms: committed.freshness_bound_ms,
            watermark_unix_s: done.watermark_unix_s.unwrap_or(0),
        }))
    }

    async fn reinstate(&self, request: Request<wire::ReinstateRequest>) -> Result<Response<wire::ReinstateResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let target = request.target.unwrap_or_default();
        let (admin, reason) = (self.admin.clone(), request.reason);
        let done = self.run_act(async move { admin.reinstate(&by, &target.kind, &target.key, reason).await }).await?;
        Ok(Response::new(wire::ReinstateResponse {
            revision: done.committed.revision.to_string(),
            committed_at_unix_ms: done.committed.unix_ms,
            waits_for_second_until_unix_ms: done.waits_until_unix_ms.unwrap_or(0),
        }))
    }

    async fn list(
        &self,
        request: Request<wire::ListRevocationsRequest>,
    ) -> Result<Response<wire::ListRevocationsResponse>, Status> {
        const LISTED_DEFAULT: u32 = 100;
        const LISTED_MAX: u32 = 1000;
        let by = require_authorized(&request)?;
        let limit = match request.into_inner().limit {
            0 => LISTED_DEFAULT,
            limit => limit.min(LISTED_MAX),
        };
        let listed = self.admin.revocations(&by, limit as usize).await?;
        let revocation =
            |row: &RevocationRow| revocation_to_wire(row, &listed.revision.history, listed.commits.get(&row.revision));
        let revocations = listed.rows.iter().map(revocation).collect();
        Ok(Response::new(wire::ListRevocationsResponse { revocations, total: listed.total }))
    }

    type WatchStream = futures_util::stream::Empty<Result<wire::WatchRevocationsResponse, Status>>;

    async fn watch(&self, _request: Request<wire::WatchRevocationsRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let message = "revocations are watched on the decisions' listener, unsigned";
        Err(status_with_reason(Code::Unimplemented, "NOT_SERVED_HERE", message))
    }
}

#[tonic::async_trait]
impl PolicyService for AdminApi {
    async fn apply(&self, request: Request<wire::ApplyPolicyRequest>) -> Result<Response<wire::ApplyPolicyResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let files = policy_files_from_wire(request.files)?;
        let outcome = self.admin.apply(&by, files, request.dry_run).await.map_err(policy_error_status)?;
        Ok(Response::new(apply_outcome_to_wire(outcome)))
    }

    async fn check(&self, request: Request<wire::CheckPolicyRequest>) -> Result<Response<wire::CheckPolicyResponse>, Status> {
        let by = require_authorized(&request)?;
        let files = policy_files_from_wire(request.into_inner().files)?;
        let diagnostics = self.admin.check_policy(&by, files).await?.iter().map(diagnostic_to_wire).collect();
        Ok(Response::new(wire::CheckPolicyResponse { diagnostics }))
    }

    async fn get(&self, request: Request<wire::GetDocumentRequest>) -> Result<Response<wire::GetDocumentResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let row = self.admin.document(&by, &request.kind, &request.id).await?;
        Ok(Response::new(wire::GetDocumentResponse { document_json: row.json.into(), path: row.path, line: row.line }))
    }

    async fn list(&self, request: Request<wire::ListDocumentsRequest>) -> Result<Response<wire::ListDocumentsResponse>, Status> {
        let by = require_authorized(&request)?;
        let kind = request.into_inner().kind;
        let keys = self.admin.document_keys(&by, Some(kind.as_str()).filter(|kind| !kind.is_empty())).await?;
        let documents = keys.into_iter().map(document_key_to_wire).collect();
        Ok(Response::new(wire::ListDocumentsResponse { documents }))
    }

    async fn diff(&self, request: Request<wire::DiffPolicyRequest>) -> Result<Response<wire::DiffPolicyResponse>, Status> {
        let by = require_authorized(&request)?;
        let files = policy_files_from_wire(request.into_inner().files)?;
        let outcome = self.admin.diff(&by, files).await.map_err(policy_error_status)?;
        let pairs = outcome.pairs.listed.iter().map(|pair| wire::PairChange {
            agent: pair.agent.to_string(),
            tool: pair.tool.to_string(),
            before: pair.before.to_string(),
            after: pair.after.to_string(),
            direction: pair.direction.as_str().to_owned(),
        });
        Ok(Response::new(wire::DiffPolicyResponse {
            revision: outcome.revision.to_string(),
            pairs: pairs.collect(),
            pairs_total: outcome.pairs.total,
            documents: outcome.documents.into_iter().map(document_change_to_wire).collect(),
            warnings: outcome.warnings.iter().map(diagnostic_to_wire).collect(),
        }))
    }

    async fn history(
        &self,
        request: Request<wire::PolicyHistoryRequest>,
    ) -> Result<Response<wire::PolicyHistoryResponse>, Status> {
        let by = require_authorized(&request)?;
        let limit = match request.into_inner().limit {
            0 => HISTORY_LISTED_DEFAULT,
            limit => limit as usize,
        };
        let revisions = self.admin.policy_history(&by, limit).await?.into_iter().map(|revision| wire::PolicyRevision {
            revision: revision.revision.to_string(),
            committed_at_unix_ms: revision.unix_ms,
            operators: revision.operators,
            method: revision.method,
            account: revision.account,
            put: revision.put.into_iter().map(document_key_to_wire).collect(),
            removed: revision.removed.into_iter().map(document_key_to_wire).collect(),
        });
        Ok(Response::new(wire::PolicyHistoryResponse { revisions: revisions.collect() }))
    }

    async fn rollback(
        &self,
        request: Request<wire::RollbackPolicyRequest>,
    ) -> Result<Response<wire::ApplyPolicyResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let outcome = self.admin.rollback(&by, &request.revision, request.dry_run).await.map_err(policy_error_status)?;
        Ok(Response::new(apply_outcome_to_wire(outcome)))
    }

    async fn shadow_report(
        &self,
        request: Request<wire::ShadowReportRequest>,
    ) -> Result<Response<wire::ShadowReportResponse>, Status> {
        let by = require_authorized(&request)?;
        self.admin.record_read(&by, "report what shadows would do")?;
        let report = self.runtime_service()?.shadow_report();
        let flips = report.flips.into_iter().map(|flip| wire::ShadowFlip {
            agent: flip.agent.to_string(),
            tool: flip.tool.to_string(),
            effect: flip.effect.as_str().to_owned(),
            would_be_effect: flip.would_be.as_str().to_owned(),
            would_be_reason: flip.would_be_reason.as_str().to_owned(),
            count: flip.count,
            last_decision_id: flip.last_decision_id,
        });
        Ok(Response::new(wire::ShadowReportResponse {
            flips: flips.collect(),
            since_unix_ms: report.since_unix_ms,
            decisions: report.decisions,
            flips_uncounted: report.flips_uncounted,
        }))
    }

    async fn explain(&self, request: Request<wire::CheckRequest>) -> Result<Response<wire::ExplainResponse>, Status> {
        let by = require_authorized(&request)?;
        // A signer who is an operator may ask for any audience of an issuer, as a caller on this machine may.
        let caller = Caller { is_loopback: true, ..caller_of(request.extensions()) };
        let trace = trace_headers(request.metadata());
        let runtime_service = self.runtime_service()?;
        let request = check_request_from_wire(request.into_inner(), trace)
            .map_err(|malformed| malformed.into_status_recording_proof(runtime_service, &caller))?;
        let explanation = runtime_service.explain(&request, &caller).await?;
        let locations = self.admin.document_locations(&by, explanation.mentioned_documents()).await?;
        Ok(Response::new(explanation_to_wire(request.request_id, &request.tool, &explanation, Some(&locations))))
    }
}

#[tonic::async_trait]
impl ApprovalService for AdminApi {
    async fn list(&self, request: Request<wire::ListApprovalsRequest>) -> Result<Response<wire::ListApprovalsResponse>, Status> {
        const LISTED_DEFAULT: u32 = 100;
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let limit = if request.limit == 0 { LISTED_DEFAULT } else { request.limit };
        let listed = self.admin.list_approvals(&by, request.all, limit as usize).await?;
        let (mut approvals, mut bytes) = (Vec::with_capacity(listed.rows.len()), 0usize);
        for row in &listed.rows {
            let item = approval_to_wire(row, listed.read_at_unix_ms);
            bytes = bytes.saturating_add(item.encoded_len());
            // A client accepts messages of 4 MiB by default. `total` shows that there are more approvals than the list holds.
            if bytes > APPROVAL_LIST_BYTES_MAX {
                break;
            }
            approvals.push(item);
        }
        Ok(Response::new(wire::ListApprovalsResponse { approvals, total: listed.total }))
    }

    async fn approve(&self, request: Request<wire::ApproveRequest>) -> Result<Response<wire::ApproveResponse>, Status> {
        let by = require_authorized(&request)?;
        let wire::ApproveRequest { digest, reason } = request.into_inner();
        let admin = self.admin.clone();
        let answered =
            self.run_act(async move { admin.answer_approval(&by, ApprovalAnswer::Approve, &digest, &reason).await }).await?;
        Ok(Response::new(wire::ApproveResponse {
            revision: answered.committed.revision.to_string(),
            approval: Some(approval_to_wire(&answered.row, answered.unix_ms)),
        }))
    }

    async fn refuse(&self, request: Request<wire::RefuseRequest>) -> Result<Response<wire::RefuseResponse>, Status> {
        let by = require_authorized(&request)?;
        let wire::RefuseRequest { digest, reason } = request.into_inner();
        let admin = self.admin.clone();
        let answered =
            self.run_act(async move { admin.answer_approval(&by, ApprovalAnswer::Refuse, &digest, &reason).await }).await?;
        Ok(Response::new(wire::RefuseResponse {
            revision: answered.committed.revision.to_string(),
            approval: Some(approval_to_wire(&answered.row, answered.unix_ms)),
        }))
    }
}

#[tonic::async_trait]
impl FleetService for AdminApi {
    async fn info(&self, _request: Request<wire::InfoRequest>) -> Result<Response<wire::InfoResponse>, Status> {
        let revision: Revision = store_timeout::await_read(self.admin.revision()).await?;
        Ok(Response::new(info_to_wire(&revision)))
    }

    async fn list_replicas(
        &self,
        request: Request<wire::ListReplicasRequest>,
    ) -> Result<Response<wire::ListReplicasResponse>, Status> {
        let by = require_authorized(&request)?;
        Ok(Response::new(fleet_to_wire(&self.admin.replicas(&by).await?)))
    }

    async fn wait_for(
        &self,
        request: Request<wire::WaitForFleetRequest>,
    ) -> Result<Response<wire::WaitForFleetResponse>, Status> {
        let by = require_authorized(&request)?;
        let wire::WaitForFleetRequest { revision, committed_at_unix_ms } = request.into_inner();
        let revision = revision.parse::<Revision>().map_err(|error| invalid_argument("revision", error))?;
        let waited = self.admin.wait_for_fleet(&by, &revision, committed_at_unix_ms).await?;
        let answers = waited.replicas.iter().map(|(replica, outcome)| wire::ReplicaAnswer {
            replica: Some(replica_to_wire(replica, &waited.revision)),
            outcome: outcome.as_str().to_owned(),
            acknowledged_after_ms: match outcome {
                ReplicaWaitOutcome::Acknowledged { after_ms } => *after_ms,
                ReplicaWaitOutcome::RanOut | ReplicaWaitOutcome::Quarantined => None,
            },
        });
        Ok(Response::new(wire::WaitForFleetResponse {
            revision: waited.revision.to_string(),
            replicas: answers.collect(),
            freshness_bound_ms: waited.freshness_bound_ms,
            waited_ms: waited.waited_ms,
        }))
    }

    async fn adopt(&self, request: Request<wire::AdoptRequest>) -> Result<Response<wire::AdoptResponse>, Status> {
        let by = require_authorized(&request)?;
        if self.runtime_service.is_some() {
            let error =
                Error::PermissionDenied("a running server adopts nothing: name the store itself, with --store".to_owned());
            self.admin.record_refusal(by.method(), by.operators(), by.peer(), &error)?;
            return Err(error.into());
        }
        let adopted = self.admin.adopt(&by, request.into_inner().reason).await?;
        Ok(Response::new(wire::AdoptResponse {
            revision: adopted.committed.revision.to_string(),
            adopted_from: adopted.from.to_string(),
            committed_at_unix_ms: adopted.committed.unix_ms,
            watermark_unix_s: adopted.watermark_unix_s,
        }))
    }

    async fn wait_for_adoption(
        &self,
        request: Request<wire::WaitForAdoptionRequest>,
    ) -> Result<Response<wire::WaitForAdoptionResponse>, Status> {
        let by = require_authorized(&request)?;
        let wire::WaitForAdoptionRequest { revision, wait_ms } = request.into_inner();
        let revision = revision.parse::<Revision>().map_err(|error| invalid_argument("revision", error))?;
        let waited = self.admin.wait_for_adoption(&by, &revision, wait_ms).await?;
        let replicas = waited.replicas.iter().map(|one| {
            let mut replica = replica_to_wire(&one.replica, &revision);
            if !one.registered {
                replica.state = "gone".to_owned();
            }
            wire::AdoptingReplica { replica: Some(replica), merged: one.merged, follows: one.follows }
        });
        Ok(Response::new(wire::WaitForAdoptionResponse {
            revision: revision.to_string(),
            replicas: replicas.collect(),
            complete: waited.complete,
            waited_ms: waited.waited_ms,
        }))
    }
}

pub(super) fn require_authorized<T>(request: &Request<T>) -> Result<AuthorizedAct, Status> {
    let found = request.extensions().get::<AuthorizedAct>().cloned();
    found.ok_or_else(|| status_with_reason(Code::Unauthenticated, "UNAUTHENTICATED", "the call is not signed"))
}

fn policy_files_from_wire(files: Vec<wire::PolicyFile>) -> Result<Vec<PolicyFile>, Status> {
    if files.len() > POLICY_FILES_MAX {
        return Err(invalid_argument("files", format!("{} files: at most {POLICY_FILES_MAX}", files.len())));
    }
    if let Some(large) = files.iter().find(|file| file.content.len() > POLICY_FILE_BYTES_MAX) {
        return Err(invalid_argument("files", format!("`{}` is over {POLICY_FILE_BYTES_MAX} bytes", large.path)));
    }
    if files.iter().map(|file| file.content.len()).sum::<usize>() > POLICY_BYTES_MAX {
        return Err(invalid_argument("files", format!("over {POLICY_BYTES_MAX} bytes together")));
    }
    Ok(files.into_iter().map(|file| PolicyFile { path: file.path, content: file.content.into() }).collect())
}

fn apply_outcome_to_wire(outcome: ApplyOutcome) -> wire::ApplyPolicyResponse {
    wire::ApplyPolicyResponse {
        revision: outcome.revision.to_string(),
        changes: outcome.changes.into_iter().map(document_change_to_wire).collect(),
        warnings: outcome.warnings.iter().map(diagnostic_to_wire).collect(),
    }
}

fn document_change_to_wire(change: DocumentChange) -> wire::DocumentChange {
    wire::DocumentChange { change: change.change.to_owned(), kind: change.key.kind, id: change.key.id }
}

fn document_key_to_wire(key: DocumentKey) -> wire::DocumentId {
    wire::DocumentId { kind: key.kind, id: key.id }
}

/// Lists every diagnostic or failed test, so that a client can show them as `policy check` and `policy test` do.
pub(super) fn policy_error_status(error: Error) -> Status {
    match error {
        Error::InvalidPolicy(diagnostics) => {
            let lines: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            let message = format!("the policy has errors, nothing was applied:\n{}", lines.join("\n"));
            status_with_reason(Code::InvalidArgument, "POLICY_INVALID", truncate_message(message, "policy check"))
        }
        Error::TestsFailed { failures, .. } => {
            let message = format!("the policy's tests fail, nothing was applied:\n{}", failures.join("\n"));
            status_with_reason(Code::InvalidArgument, "POLICY_TESTS_FAILED", truncate_message(message, "policy test"))
        }
        error => error.into(),
    }
}

fn diagnostic_to_wire(diagnostic: &DiagnosticText) -> wire::Diagnostic {
    wire::Diagnostic {
        severity: diagnostic.severity.as_str().to_owned(),
        path: diagnostic.path.clone(),
        line: diagnostic.line,
        column: diagnostic.column,
        message: diagnostic.message.clone(),
        help: diagnostic.help.clone().unwrap_or_default(),
    }
}

fn revocation_to_wire(row: &RevocationRow, history: &HistoryId, committed: Option<&CommitMetadata>) -> wire::Revocation {
    wire::Revocation {
        target: Some(target_to_wire(&row.target)),
        dead: row.dead,
        suspended: row.suspended,
        watermark_unix_s: row.watermark_unix_s.unwrap_or(0),
        reason: row.reason.clone(),
        revision: Revision { history: history.clone(), number: row.revision }.to_string(),
        committed_at_unix_ms: committed.map_or(0, |committed| committed.unix_ms),
        operators: committed.map(|committed| committed.operators.clone()).unwrap_or_default(),
    }
}

fn approval_to_wire(row: &ApprovalRow, unix_ms: i64) -> wire::ApprovalItem {
    let call = &row.call;
    let layers = row.layers.iter().map(|layer| wire::ApprovalLayer {
        layer: layer.layer.as_str().to_owned(),
        by: layer.by.clone(),
        approved_by: layer.approved_by.clone().unwrap_or_default(),
        expires_at_unix_ms: layer.expires_at_unix_ms,
        hop: layer.hop.and_then(|hop| i32::try_from(hop).ok()).unwrap_or(-1),
    });
    wire::ApprovalItem {
        digest: call.digest.clone(),
        state: row.state(unix_ms).as_str().to_owned(),
        user: UserId::new(call.issuer.as_str(), call.subject.as_str()).to_string(),
        application: call.application.clone(),
        agents: call.agents.clone(),
        session: call.session.clone(),
        task: call.task.clone(),
        tool: call.tool.clone(),
        arguments_json: call.arguments_json.clone().into(),
        layers: layers.collect(),
        asked_at_unix_ms: row.asked_at_unix_ms,
        expires_at_unix_ms: row.expires_at_unix_ms(),
    }
}

fn recognition_to_wire(name: TargetLookup) -> wire::NameRecognition {
    let standing = match name.status {
        NameStatus::Known => wire::NameStanding::Known,
        NameStatus::Unknown => wire::NameStanding::Unknown,
        NameStatus::NotChecked => wire::NameStanding::NotLooked,
    };
    wire::NameRecognition { standing: standing.into(), nearest: name.nearest.as_ref().map(target_to_wire), note: name.note }
}

fn target_to_wire(target: &RevocationTarget) -> wire::RevocationTarget {
    wire::RevocationTarget { kind: target.kind().to_owned(), key: target.key_parts().into_iter().map(str::to_owned).collect() }
}

/// Cuts a status message to fit. gRPC sends it in a header, and the usual limit for headers is 16 KiB.
fn truncate_message(mut message: String, shows_all: &str) -> String {
    const STATUS_MESSAGE_BYTES_MAX: usize = 3000;
    if message.len() > STATUS_MESSAGE_BYTES_MAX {
        let cut = message.floor_char_boundary(STATUS_MESSAGE_BYTES_MAX);
        message.truncate(cut);
        message.push_str(&format!("\n… (`portcullis {shows_all}` shows all)"));
    }
    message
}
