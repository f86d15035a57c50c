//! Connections to a running server, and signed calls to administration: over the network, or in this process on a store.
//!
//! Look next at `act_outcome.rs`, which says how an act ended, and at `server_unreachable.rs`, which explains why no server
//! answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use super::act_outcome::{self, ActAnswer};
use super::call_failure::call_failure;
use super::output::CommandOutput;
use super::{AdminArgs, CommandFailure, input, server_unreachable};
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
use crate::token::operator_act::{self, AdminCall};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longer than the longest freshness bound.
const WAIT_TIMEOUT: Duration = Duration::from_secs(75);

/// Large enough for a list of every replica that may be registered.
const LIST_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Connects to a listener of a running server.
pub(super) async fn connect(target: &str) -> Result<Channel, CommandFailure> {
    connect_with_timeout(target, CALL_TIMEOUT).await
}

async fn connect_with_timeout(target: &str, call_timeout: Duration) -> Result<Channel, CommandFailure> {
    connect_with_timeouts(target, CONNECT_TIMEOUT, call_timeout).await
}

async fn connect_with_timeouts(
    target: &str,
    connect_timeout: Duration,
    call_timeout: Duration,
) -> Result<Channel, CommandFailure> {
    let endpoint = Endpoint::from_shared(url_of(target))
        .map_err(|error| {
            CommandFailure::misuse(format!("--target: `{target}` is not a URL such as http://127.0.0.1:7700: {error}"))
        })?
        .connect_timeout(connect_timeout)
        .timeout(call_timeout);
    endpoint.connect().await.map_err(|error| server_unreachable::connect_failure(&error, target))
}

/// The URL of a target. `HOST:PORT`, as the ready line of a server shows it, is taken too.
fn url_of(target: &str) -> String {
    if target.contains("://") { target.to_owned() } else { format!("http://{target}") }
}

/// Makes signed calls to administration.
pub(super) struct AdminClient {
    channel: Channel,
    target: String,
    history: String,
    keys: Vec<PrivateKey>,
    local: Option<app::InProcessAdmin>,
    /// Who follows the store that was opened, as read after the last act on it.
    followers: Option<app::StoreFollowers>,
    /// The command on the store itself, for when the server cannot be relied on; `None` where this is it.
    store_hint: Option<String>,
    /// Deadline by which an act that revokes must have reported its outcome.
    act_deadline: Instant,
}

impl AdminClient {
    /// As [`AdminClient::open`], for an act: where no server answers, the failure names the command on the store itself.
    pub(super) async fn open_for_act(arguments: &AdminArgs) -> Result<Self, CommandFailure> {
        Self::open(arguments)
            .await
            .map_err(|failure| failure.with_store_command_hint(server_unreachable::store_command_hint_for(arguments).as_deref()))
    }

    /// Connects to `--target` or opens `--store`, and reads the operator's keys.
    pub(super) async fn open(arguments: &AdminArgs) -> Result<Self, CommandFailure> {
        let began = Instant::now();
        let default = [arguments.data.join("local.jwk")];
        let paths: &[PathBuf] = if arguments.operator_key.is_empty() { &default } else { &arguments.operator_key };
        let keys = paths.iter().map(|path| read_operator_key(path)).collect::<Result<Vec<_>, _>>()?;
        let (channel, target, local) = match &arguments.store {
            Some(url) => {
                let store =
                    config::StoreLocation::new(url, arguments.store_durability).map_err(CommandFailure::bad_configuration)?;
                let opened = app::InProcessAdmin::open(&store, &arguments.data).await;
                let local = opened.map_err(|error| CommandFailure::from(error).nothing_done())?;
                (local.channel(), store.to_string(), Some(local))
            }
            None => (
                connect_with_timeouts(&arguments.url, server_unreachable::GREETING_TIMEOUT, CALL_TIMEOUT).await?,
                arguments.url.clone(),
                None,
            ),
        };
        if local.is_some() {
            return Self::over_channel(channel, target, keys, local).await;
        }
        let greeted =
            timeout_at(began + server_unreachable::GREETING_TIMEOUT, Self::over_channel(channel, target.clone(), keys, local))
                .await;
        let greeted = greeted.map_err(|_| server_unreachable::silent_server_failure(&target))??;
        Ok(Self {
            act_deadline: began + server_unreachable::ACT_TIMEOUT,
            store_hint: server_unreachable::store_command_hint_for(arguments),
            ..greeted
        })
    }

    /// Makes signed calls over an existing connection.
    pub(super) async fn over_channel(
        channel: Channel,
        target: String,
        keys: Vec<PrivateKey>,
        local: Option<app::InProcessAdmin>,
    ) -> Result<Self, CommandFailure> {
        let info = FleetServiceClient::new(channel.clone()).info(wire::InfoRequest {}).await;
        let history = info.map_err(|status| server_unreachable::greeting_failure(&status, &target))?.into_inner().history_id;
        let act_until = Instant::now() + CALL_TIMEOUT;
        Ok(Self { channel, target, history, keys, local, followers: None, store_hint: None, act_deadline: act_until })
    }

    pub(super) async fn revoke(
        &mut self,
        message: wire::RevokeRequest,
    ) -> Result<ActAnswer<wire::RevokeResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.RevocationService/Revoke", message)?;
        let mut client = RevocationServiceClient::new(self.channel.clone());
        self.read_act_answer_and_followers(self.within_act_deadline(client.revoke(request)).await).await
    }

    pub(super) async fn reinstate(
        &mut self,
        message: wire::ReinstateRequest,
    ) -> Result<ActAnswer<wire::ReinstateResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.RevocationService/Reinstate", message)?;
        let mut client = RevocationServiceClient::new(self.channel.clone());
        self.read_act_answer_and_followers(self.within_act_deadline(client.reinstate(request)).await).await
    }

    pub(super) async fn revocations(
        &mut self,
        message: wire::ListRevocationsRequest,
    ) -> Result<wire::ListRevocationsResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.RevocationService/List", message)?;
        self.read_answer(RevocationServiceClient::new(self.channel.clone()).list(request).await)
    }

    pub(super) async fn add_operator(
        &mut self,
        message: wire::AddOperatorRequest,
    ) -> Result<ActAnswer<wire::AddOperatorResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.OperatorService/Add", message)?;
        self.read_act_answer_and_followers(OperatorServiceClient::new(self.channel.clone()).add(request).await).await
    }

    pub(super) async fn retire_operator(
        &mut self,
        message: wire::RetireOperatorRequest,
    ) -> Result<ActAnswer<wire::RetireOperatorResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.OperatorService/Retire", message)?;
        self.read_act_answer_and_followers(OperatorServiceClient::new(self.channel.clone()).retire(request).await).await
    }

    pub(super) async fn operators(&mut self) -> Result<wire::ListOperatorsResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.OperatorService/List", wire::ListOperatorsRequest {})?;
        let client = OperatorServiceClient::new(self.channel.clone());
        self.read_answer(client.max_decoding_message_size(LIST_BYTES_MAX).list(request).await)
    }

    pub(super) async fn replicas(&mut self) -> Result<wire::ListReplicasResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.FleetService/ListReplicas", wire::ListReplicasRequest {})?;
        self.read_answer(
            FleetServiceClient::new(self.channel.clone()).max_decoding_message_size(LIST_BYTES_MAX).list_replicas(request).await,
        )
    }

    pub(super) async fn wait_for_fleet(
        &mut self,
        message: wire::WaitForFleetRequest,
    ) -> Result<wire::WaitForFleetResponse, CommandFailure> {
        // All calls on a connection share one time limit, so a wait needs a connection of its own.
        let channel = match &self.local {
            Some(_) => self.channel.clone(),
            None => connect_with_timeout(&self.target, WAIT_TIMEOUT).await?,
        };
        let request = self.sign_request("/portcullis.v1.FleetService/WaitFor", message)?;
        self.read_answer(FleetServiceClient::new(channel).max_decoding_message_size(LIST_BYTES_MAX).wait_for(request).await)
    }

    /// Adopts the store. Later calls are signed for the history that the adoption began.
    pub(super) async fn adopt(&mut self, message: wire::AdoptRequest) -> Result<ActAnswer<wire::AdoptResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.FleetService/Adopt", message)?;
        // A restored store is followed only after its adoption.
        let answer = self.read_act_answer(FleetServiceClient::new(self.channel.clone()).adopt(request).await)?;
        if let Some((history, _)) = answer.message.revision.rsplit_once('.') {
            history.clone_into(&mut self.history);
        }
        Ok(answer)
    }

    pub(super) async fn wait_for_adoption(
        &mut self,
        message: wire::WaitForAdoptionRequest,
    ) -> Result<wire::WaitForAdoptionResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.FleetService/WaitForAdoption", message)?;
        let mut client = FleetServiceClient::new(self.channel.clone()).max_decoding_message_size(LIST_BYTES_MAX);
        self.read_answer(client.wait_for_adoption(request).await)
    }

    pub(super) async fn approvals(
        &mut self,
        message: wire::ListApprovalsRequest,
    ) -> Result<wire::ListApprovalsResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.ApprovalService/List", message)?;
        self.read_answer(ApprovalServiceClient::new(self.channel.clone()).list(request).await)
    }

    pub(super) async fn approve(
        &mut self,
        message: wire::ApproveRequest,
    ) -> Result<ActAnswer<wire::ApproveResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.ApprovalService/Approve", message)?;
        self.read_act_answer_and_followers(ApprovalServiceClient::new(self.channel.clone()).approve(request).await).await
    }

    pub(super) async fn refuse(
        &mut self,
        message: wire::RefuseRequest,
    ) -> Result<ActAnswer<wire::RefuseResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.ApprovalService/Refuse", message)?;
        self.read_act_answer_and_followers(ApprovalServiceClient::new(self.channel.clone()).refuse(request).await).await
    }

    pub(super) async fn apply(
        &mut self,
        message: wire::ApplyPolicyRequest,
    ) -> Result<ActAnswer<wire::ApplyPolicyResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/Apply", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.read_act_answer_and_followers(client.max_decoding_message_size(64 * 1024 * 1024).apply(request).await).await
    }

    pub(super) async fn diff(&mut self, message: wire::DiffPolicyRequest) -> Result<wire::DiffPolicyResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/Diff", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.read_answer(client.max_decoding_message_size(64 * 1024 * 1024).diff(request).await)
    }

    pub(super) async fn history(
        &mut self,
        message: wire::PolicyHistoryRequest,
    ) -> Result<wire::PolicyHistoryResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/History", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.read_answer(client.max_decoding_message_size(64 * 1024 * 1024).history(request).await)
    }

    pub(super) async fn rollback(
        &mut self,
        message: wire::RollbackPolicyRequest,
    ) -> Result<ActAnswer<wire::ApplyPolicyResponse>, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/Rollback", message)?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.read_act_answer_and_followers(client.max_decoding_message_size(64 * 1024 * 1024).rollback(request).await).await
    }

    pub(super) async fn shadow_report(&mut self) -> Result<wire::ShadowReportResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/ShadowReport", wire::ShadowReportRequest {})?;
        let client = PolicyServiceClient::new(self.channel.clone());
        self.read_answer(client.max_decoding_message_size(64 * 1024 * 1024).shadow_report(request).await)
    }

    pub(super) async fn explain(&mut self, message: wire::CheckRequest) -> Result<wire::ExplainResponse, CommandFailure> {
        let request = self.sign_request("/portcullis.v1.PolicyService/Explain", message)?;
        self.read_answer(PolicyServiceClient::new(self.channel.clone()).explain(request).await)
    }

    /// Returns the answer to an act, or an error if none came in time; then the outcome is not known. The request carries no
    /// deadline, because the server carries out every act that it accepted.
    async fn within_act_deadline<M>(
        &self,
        act: impl Future<Output = Result<Response<M>, Status>>,
    ) -> Result<Response<M>, Status> {
        if self.local.is_some() {
            return act.await;
        }
        let late = || Status::deadline_exceeded("the server took the act and gave no answer in time");
        timeout_at(self.act_deadline, act).await.unwrap_or_else(|_| Err(late()))
    }

    fn sign_request<M: Message>(&self, method: &str, message: M) -> Result<Request<M>, CommandFailure> {
        let bytes = message.encode_to_vec();
        let expected = AdminCall { audience: &self.history, method, message: &bytes };
        let mut request = Request::new(message);
        for key in &self.keys {
            let authorization = format!("Operator {}", operator_act::sign_act(key, &expected, SystemClock.now()));
            let value = MetadataValue::try_from(authorization).map_err(CommandFailure::failed)?;
            request.metadata_mut().append("authorization", value);
        }
        Ok(request)
    }

    fn read_answer<M>(&self, answer: Result<Response<M>, Status>) -> Result<M, CommandFailure> {
        answer.map(Response::into_inner).map_err(|status| call_failure(&status, &self.target))
    }

    /// Who follows the store that was opened for an act; `None` if a server did the act.
    pub(super) fn followers(&self) -> Option<&app::StoreFollowers> {
        self.followers.as_ref()
    }

    /// As [`AdminClient::read_act_answer`]. If the command opened the store itself, it also reads which replicas follow that
    /// store, and warns if none does.
    async fn read_act_answer_and_followers<M>(
        &mut self,
        answer: Result<Response<M>, Status>,
    ) -> Result<ActAnswer<M>, CommandFailure> {
        let answer = self.read_act_answer(answer)?;
        if let Some(local) = &self.local {
            let followers = local.followers().await;
            warn_of_followers(&followers);
            self.followers = Some(followers);
        }
        Ok(answer)
    }

    /// Returns the answer to an act. A failure says first whether the act was done.
    fn read_act_answer<M>(&self, answer: Result<Response<M>, Status>) -> Result<ActAnswer<M>, CommandFailure> {
        let answer = act_outcome::act_result(answer, &self.target)
            .map_err(|failure| failure.with_store_command_hint(self.store_hint.as_deref()))?;
        if !answer.is_recorded {
            // The warning goes to standard error, also for scripts, because the result stands.
            CommandOutput::new(false).warning(&act_outcome::unrecorded_warning(&self.target, self.local.is_some()));
        }
        Ok(answer)
    }
}

/// Warns if an act was done on a store that no server may follow.
pub(super) fn warn_of_followers(followers: &app::StoreFollowers) {
    if let Some(warning) = act_outcome::unfollowed_store_warning(followers) {
        CommandOutput::new(false).warning(&warning);
    }
}

/// Reads an operator's private key.
pub(super) fn read_operator_key(path: &Path) -> Result<PrivateKey, CommandFailure> {
    let hint = "name the operator's key with --operator-key or PORTCULLIS_OPERATOR_KEY, or the server's data folder with --data";
    let content = input::read_file("--operator-key", &path.to_string_lossy())
        .map_err(|failure| CommandFailure::misuse(format!("{}; {hint}", failure.message)))?;
    let content = zeroize::Zeroizing::new(content);
    PrivateKey::from_jwk(&content).map_err(|error| {
        CommandFailure::misuse(format!("the operator's key `{}` cannot be used: {error}; {hint}", path.display()))
    })
}

#[cfg(test)]
mod tests;
