//! The operator service over gRPC: converts messages and calls `pap`.
//!
//! The handlers check no right themselves: `pap` does. Look next at `pap/operators.rs`.

use tonic::{Request, Response, Status};

use super::admin::{AdminApi, policy_error_status, require_authorized};
use super::r#gen as wire;
use super::r#gen::operator_service_server::OperatorService;
use crate::pap::{ListedOperator, NewOperator, OperatorChangeOutcome, OperatorSpec, OperatorState};

#[tonic::async_trait]
impl OperatorService for AdminApi {
    async fn add(&self, request: Request<wire::AddOperatorRequest>) -> Result<Response<wire::AddOperatorResponse>, Status> {
        let by = require_authorized(&request)?;
        let request = request.into_inner();
        let new = NewOperator {
            id: request.id,
            keys: request.keys_jwk.into_iter().map(Into::into).collect(),
            roles: request.roles,
            groups: request.groups,
            users: request.users.into_iter().map(|user| (user.issuer, user.sub)).collect(),
        };
        let added = self.admin().add_operator(&by, &new, &request.reason).await.map_err(policy_error_status)?;
        Ok(Response::new(wire::AddOperatorResponse {
            revision: added.revision.to_string(),
            committed_at_unix_ms: added.unix_ms,
            operator: Some(operator_change_to_wire(&added, OperatorState::Active)),
        }))
    }

    async fn retire(
        &self,
        request: Request<wire::RetireOperatorRequest>,
    ) -> Result<Response<wire::RetireOperatorResponse>, Status> {
        let by = require_authorized(&request)?;
        let wire::RetireOperatorRequest { id, reason } = request.into_inner();
        let retired = self.admin().retire_operator(&by, &id, &reason).await?;
        Ok(Response::new(wire::RetireOperatorResponse {
            revision: retired.revision.to_string(),
            committed_at_unix_ms: retired.unix_ms,
            operator: Some(operator_change_to_wire(&retired, OperatorState::Retired)),
        }))
    }

    async fn list(&self, request: Request<wire::ListOperatorsRequest>) -> Result<Response<wire::ListOperatorsResponse>, Status> {
        let by = require_authorized(&request)?;
        let operators = self.admin().list_operators(&by).await?.iter().map(listed_operator_to_wire).collect();
        Ok(Response::new(wire::ListOperatorsResponse { operators }))
    }
}

fn operator_change_to_wire(changed: &OperatorChangeOutcome, state: OperatorState) -> wire::Operator {
    let why = (state == OperatorState::Retired).then(|| format!("rotated out of operator {}", changed.operator.id));
    let revoked = changed.operator.keys.iter().map(|_| why.clone());
    let revision = changed.revision.to_string();
    wire::Operator { state: state.as_str().to_owned(), revision, ..operator_to_wire(&changed.operator, revoked) }
}

fn listed_operator_to_wire(listed: &ListedOperator) -> wire::Operator {
    let (path, line) = listed.location.clone().unwrap_or_default();
    let (state, revision) = (listed.state.as_str().to_owned(), listed.revision.to_string());
    wire::Operator { state, path, line, revision, ..operator_to_wire(&listed.operator, listed.revoked.iter().cloned()) }
}

fn operator_to_wire(operator: &OperatorSpec, revoked: impl Iterator<Item = Option<String>>) -> wire::Operator {
    let keys = operator.keys.iter().zip(revoked).map(|(key, why)| wire::OperatorKey {
        thumbprint: key.thumbprint().to_string(),
        revoked: why.is_some(),
        reason: why.unwrap_or_default(),
    });
    let users = operator.users.iter();
    wire::Operator {
        id: operator.id.to_string(),
        keys: keys.collect(),
        roles: operator.roles.iter().map(|role| role.as_str().to_owned()).collect(),
        groups: operator.groups.iter().map(ToString::to_string).collect(),
        users: users.map(|user| wire::OperatorUser { issuer: user.issuer.to_string(), sub: user.subject.to_string() }).collect(),
        ..Default::default()
    }
}
