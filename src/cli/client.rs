//! Connections to a running server, and signed calls to administration: over the network, or in this process on a store.
//!
//! Look next at `outcome.rs`, which says how an act ended, and at `reach.rs`, which explains why no server answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use super::call_failure::refused;
use super::outcome::{self, ActAnswer};
use super::output::Output;
use super::{AdminArgs, Failure, input, reach};
use crate::api::r#gen as wire;
use crate::api::r#gen::approval_service_client::ApprovalServiceClient;
use crate::api::r#gen::fleet_service_client::FleetServiceClient;
use crate::api::r#gen::operator_service_client::OperatorServiceClient;
use crate::api::r#gen::policy_service_client::PolicyServiceClient;
use crate::api::r#gen::revocation_service_client::RevocationServiceClient;
use crate::app;
use crate::config;
use crate::model::time::{Clock as _, SystemClock};
use crate::token::PrivateKey;
use crate::token::operator::{self, Expected};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longer than the longest freshness bound.
const WAIT_TIMEOUT: Duration = Duration::from_secs(75);

/// Large enough for a list of every replica that may be registered.
const LIST_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Connects to a listener of a running server.
pub(super) async fn connect(target: &str) -> Result<Channel, Failure> {
    connect_for(target, CALL_TIMEOUT).await
}

async fn connect_for(target: &str, call_timeout: Duration) -> Result<Channel, Failure> {
    connect_within(target, CONNECT_TIMEOUT, call_timeout).await
}

async fn connect_within(target: &str, connect_timeout: Duration, call_timeout: Duration) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(target.to_owned())
        .map_err(|error| Failure::misuse(format!("--target: `{target}` is not a URL such as http://127.0.0.1:7700: {error}")))?
        .connect_timeout(connect_timeout)
        .timeout(call_timeout);
    endpoint.connect().await.map_err(|error| reach::unconnected(&error, target))
}

/// Makes signed calls to administration.
pub(super) struct AdminClient {
    channel: Channel,
    target: String,
    history: String,
    keys: Vec<PrivateKey>,
    local: Option<app::LocalAdmin>,
    /// The command on the store itself, for when the server cannot be relied on; `None` where this is it.
    store_line: Option<String>,
    /// Deadline by which an act that revokes must have reported its outcome.
    act_until: Instant,
}

impl AdminClient {
    /// As [`AdminClient::open`], for an act: where no server answers, the failure names the command on the store itself.
    pub(super) async fn open_for_act(arguments: &AdminArgs) -> Result<Self, Failure> {
        Self::open(arguments).await.map_err(|failure| failure.with_store_line(reach::store_line_of(arguments).as_deref()))
    }

    /// Connects to `--target` or opens `--store`, and reads the operator's keys.
    pub(super) async fn open(arguments: &AdminArgs) -> Result<Self, Failure> {
        let began = Instant::now();
        let default = [arguments.data.join("local.jwk")];
        let paths: &[PathBuf] = if arguments.operator_key.is_empty() { &default } else { &arguments.operator_key };
        let keys = paths.iter().map(|path| operator_key(path)).collect::<Result<Vec<_>, _>>()?;
        let (channel, target, local) = match &arguments.store {
            Some(url) => {
                let store = config::Store::new(url, arguments.store_durability).map_err(Failure::bad_configuration)?;
                let opened = app::LocalAdmin::open(&store, &arguments.data).await;
                let local = opened.map_err(|error| Failure::from(error).before_an_act())?;
                (local.channel(), store.to_string(), Some(local))
            }
            None => (connect_within(&arguments.url, reach::GREETING_TIMEOUT, CALL_TIMEOUT).await?, arguments.url.clone(), None),
        };
        if local.is_some() {
            return Self::over(channel, target, keys, local).await;
        }
        let greeted = timeout_at(began + reach::GREETING_TIMEOUT, Self::over(channel, target.clone(), keys, local)).await;
        let greeted = greeted.map_err(|_| reach::silent(&target))??;
        Ok(Self { act_until: began + reach::ACT_TIMEOUT, store_line: reach::store_line_of(arguments), ..greeted })
    }

    /// Makes signed calls over an existing connection.
    pub(super) async fn over(
        channel: Channel,
        target: String,
        keys: Vec<PrivateKey>,
        local: Option<app::LocalAdmin>,
    ) -> Result<Self, Failure> {
        let info = FleetServiceClient::new(channel.clone()).info(wire::InfoRequest {}).await;
        let history = info.map_err(|status| reach::ungreeted(&status, &target))?.into_inner().history_id;
        let act_until = Instant::now() + CALL_TIMEOUT;
        Ok(Self { channel, target, history, keys, local, store_line: None, act_until })
    }

    pub(super) async fn revoke(&mut self, message: wire::RevokeRequest) -> Result<ActAnswer<wire::RevokeResponse>, Failure> {
        let request = self.signed("/portcullis.v1.RevocationService/Revoke", message)?;
        let mut client = RevocationServiceClient::new(self.channel.clone());
        self.outcome(self.in_time(client.revoke(request)).await)
    }

    pub(super) async fn reinstate(
        &mut self,
        message: wire::ReinstateRequest,
    ) -> Result<ActAnswer<wire::ReinstateResponse>, Failure> {
        let request = self.signed("/portcullis.v1.RevocationService/Reinstate", message)?;
        let mut client = RevocationServiceClient::new(self.channel.clone());
        self.outcome(self.in_time(client.reinstate(request)).await)
    }

    pub(super) async fn revocations(
        &mut self,
        message: wire::ListRevocationsRequest,
    ) -> Result<wire::ListRevocationsResponse, Failure> {
        let request = self.signed("/portcullis.v1.RevocationService/List", message)?;
        self.answer(RevocationServiceClient::new(self.channel.clone()).list(request).await)
    }

    pub(super) async fn add_operator(
        &mut self,
        message: wire::AddOperatorRequest,
    ) -> Result<ActAnswer<wire::AddOperatorResponse>, Failure> {
        let request = self.signed("/portcullis.v1.OperatorService/Add", message)?;
        self.outcome(OperatorServiceClient::new(self.channel.clone()).add(request).await)
    }

    pub(super) async fn retire_operator(
        &mut self,
        message: wire::RetireOperatorRequest,
    ) -> Result<ActAnswer<wire::RetireOperatorResponse>, Failure> {
        let request = self.signed("/portcullis.v1.OperatorService/Retire", message)?;
        self.outcome(OperatorServiceClient::new(self.channel.clone()).retire(request).await)
    }

    pub(super) async fn operators(&mut self) -> Result<wire::ListOperatorsResponse, Failure> {
        let request = self.signed("/portcullis.v1.OperatorService/List", wire::ListOperatorsRequest {})?;
        let client = OperatorServiceClient::new(self.channel.clone());
        self.answer(client.max_decoding_message_size(LIST_BYTES_MAX).list(request).await)
    }

    pub(super) async fn replicas(&mut self) -> Result<wire::ListReplicasResponse, Failure> {
        let request = self.signed("/portcullis.v1.FleetService/ListReplicas", wire::ListReplicasRequest {})?;
        self.answer(
            FleetServiceClient::new(self.channel.clone()).max_decoding_message_size(LIST_BYTES_MAX).list_replicas(request).await,
        )
    }

    pub(super) async fn wait_for_fleet(
        &mut self,
        message: wire::WaitForFleetRequest,
    ) -> Result<wire::WaitForFleetResponse, Failure> {
        // All calls on a connection share one time limit, so a wait needs a connection of its own.
        let channel = match &self.local {
            Some(_) => self.channel.clone(),
            None => connect_for(&self.target, WAIT_TIMEOUT).await?,
        };
        let request = self.signed("/portcullis.v1.FleetService/WaitFor", message)?;
        self.answer(FleetServiceClient::new(channel).max_decoding_message_size(LIST_BYTES_MAX).wait_for(request).await)
    }

    /// Adopts the store. Later calls are signed for the history that the adoption began.
    pub(super) async fn adopt(&mut self, message: wire::AdoptRequest) -> Result<ActAnswer<wire::AdoptResponse>, Failure> {
        let request = self.signed("/portcullis.v1.FleetService/Adopt", message)?;
        let answer = self.outcome(FleetServiceClient::new(self.channel.clone()).adopt(request).await)?;
        if let Some((history, _)) = answer.message.revision.rsplit_once('.') {
            history.clone_into(&mut self.history);
        }
        Ok(answer)
    }

    pub(super) async fn wait_for_adoption(
        &mut self,
        message: wire::WaitForAdoptionRequest,
    ) -> Result<wire::WaitForAdoptionResponse, Failure> {
        let request = self.signed("/portcullis.v1.FleetService/WaitForAdoption", message)?;
        let mut client = FleetServiceClient::new(self.channel.clone()).max_decoding_message_size(LIST_BYTES_MAX);
        self.answer(client.wait_for_adoption(request).await)
    }

    pub(super) async fn approvals(
        &mut self,
        message: wire::ListApprovalsRequest,
    ) -> Result<wire::ListApprovalsResponse, Failure> {
        let request = self.signed("/portcullis.v1.ApprovalService/List", message)?;
        self.answer(ApprovalServiceClient::new(self.channel.clone()).list(request).await)
    }

    pub(super) async fn approve(&mut self, message: wire::ApproveRequest) -> Result<ActAnswer<wire::ApproveResponse>, Failure> {
        let request = self.signed("/portcullis.v1.ApprovalService/Approve", message)?;
        self.outcome(ApprovalServiceClient::new(self.channel.clone()).approve(request).await)
    }

    pub(super) async fn refuse(&mut self, message: wire::RefuseRequest) -> Result<ActAnswer<wire::RefuseResponse>, Failure> {
        let request = self.signed("/portcullis.v1.ApprovalService/Refuse", message)?;
        self.outcome(ApprovalServiceClient::new(self.channel.clone()).refuse(request).await)
    }

    pub(super) async fn apply(
        &mut self,
        message: wire::ApplyPolicyRequest,
    ) -> Result<ActAnswer<wire::ApplyPolicyResponse>, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/Apply", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.outcome(client.max_decoding_message_size(64 * 1024 * 1024).apply(request).await)
    }

    pub(super) async fn diff(&mut self, message: wire::DiffPolicyRequest) -> Result<wire::DiffPolicyResponse, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/Diff", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.answer(client.max_decoding_message_size(64 * 1024 * 1024).diff(request).await)
    }

    pub(super) async fn history(&mut self, message: wire::PolicyHistoryRequest) -> Result<wire::PolicyHistoryResponse, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/History", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.answer(client.max_decoding_message_size(64 * 1024 * 1024).history(request).await)
    }

    pub(super) async fn rollback(
        &mut self,
        message: wire::RollbackPolicyRequest,
    ) -> Result<ActAnswer<wire::ApplyPolicyResponse>, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/Rollback", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.outcome(client.max_decoding_message_size(64 * 1024 * 1024).rollback(request).await)
    }

    pub(super) async fn shadow_report(&mut self) -> Result<wire::ShadowReportResponse, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/ShadowReport", wire::ShadowReportRequest {})?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.answer(client.max_decoding_message_size(64 * 1024 * 1024).shadow_report(request).await)
    }

    pub(super) async fn explain(&mut self, message: wire::CheckRequest) -> Result<wire::ExplainResponse, Failure> {
        let request = self.signed("/portcullis.v1.PolicyService/Explain", message)?;
        self.answer(PolicyServiceClient::new(self.channel.clone()).explain(request).await)
    }

    /// Returns the answer to an act, or an error if none came in time; then the outcome is not known. The request carries no
    /// deadline, because the server carries out every act that it accepted.
    async fn in_time<M>(&self, act: impl Future<Output = Result<Response<M>, Status>>) -> Result<Response<M>, Status> {
        if self.local.is_some() {
            return act.await;
        }
        let late = || Status::deadline_exceeded("the server took the act and gave no answer in time");
        timeout_at(self.act_until, act).await.unwrap_or_else(|_| Err(late()))
    }

    fn signed<M: Message>(&self, method: &str, message: M) -> Result<Request<M>, Failure> {
        let bytes = message.encode_to_vec();
        let expected = Expected { audience: &self.history, method, message: &bytes };
        let mut request = Request::new(message);
        for key in &self.keys {
            let authorization = format!("Operator {}", operator::sign(key, &expected, SystemClock.now()));
            let value = MetadataValue::try_from(authorization).map_err(Failure::failed)?;
            request.metadata_mut().append("authorization", value);
        }
        Ok(request)
    }

    fn answer<M>(&self, answer: Result<Response<M>, Status>) -> Result<M, Failure> {
        answer.map(Response::into_inner).map_err(|status| refused(&status, &self.target))
    }

    /// Returns the answer to an act. A failure says first whether the act was done.
    fn outcome<M>(&self, answer: Result<Response<M>, Status>) -> Result<ActAnswer<M>, Failure> {
        let told = outcome::told(answer, &self.target).map_err(|failure| failure.with_store_line(self.store_line.as_deref()))?;
        if !told.is_recorded {
            // The warning goes to standard error, also for scripts, because the result stands.
            Output::new(false).warning(&outcome::unrecorded(&self.target, self.local.is_some()));
        }
        Ok(told)
    }
}

/// Reads an operator's private key.
pub(super) fn operator_key(path: &Path) -> Result<PrivateKey, Failure> {
    let hint = "name the operator's key with --operator-key or PORTCULLIS_OPERATOR_KEY, or the server's data folder with --data";
    let content = input::file("--operator-key", &path.to_string_lossy())
        .map_err(|failure| Failure::misuse(format!("{}; {hint}", failure.message)))?;
    let content = zeroize::Zeroizing::new(content);
    PrivateKey::from_jwk(&content)
        .map_err(|error| Failure::misuse(format!("the operator's key `{}` cannot be used: {error}; {hint}", path.display())))
}

#[cfg(test)]
mod tests;
