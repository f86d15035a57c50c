//! `kind: test`: calls of one chain of agents, for one user, in one application, with the expected answers.
//!
//! `policy test` runs the tests, and every `apply` does so before it writes. Tests are never stored, because they decide nothing.
//! Look next at [`test_run`](super::super::test_run), which runs them.

use std::sync::Arc;

use crate::model::constraint::{ConstraintMap, Error, abbreviate};
use crate::model::decision::Effect;
use crate::model::ids::{AgentId, ApplicationId, GroupId, UserId};
use crate::model::json::{JsonObject, Value};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::request::TokenScope;

use super::super::diagnostic::SourcePosition;
use super::super::node::{NodeKind, SourceNode};
use super::field_reader::{DocumentReader, MappingFields};

/// Calls of one subject, each with its expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct TestSpec {
    /// The agents of the chain, root to leaf. `agent:` gives a chain of one.
    pub agents: Vec<AgentId>,
    /// The user who delegated.
    pub user: UserId,
    /// The user's groups.
    pub groups: Vec<GroupId>,
    /// The application that the agents run in.
    pub application: ApplicationId,
    /// The scope of the tokens. `None`: the tokens grant each call that is tested.
    pub scope: Option<TokenScope>,
    /// The time that conditions see, in seconds since the Unix epoch. An expectation may name its own.
    pub at_unix_s: Option<i64>,
    /// The environment that the gateway states. An expectation may name its own.
    pub environment: Option<JsonObject>,
    /// The calls, in order.
    pub expect: Vec<ExpectedCall>,
}

/// One call and its expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpectedCall {
    /// `server/tool`.
    pub tool: Arc<str>,
    /// The arguments.
    pub arguments: JsonObject,
    /// The expected effect.
    pub effect: Effect,
    /// The expected reason; `None` accepts every reason.
    pub reason: Option<Reason>,
    /// The expected deciding layer; `None` accepts every layer.
    pub layer: Option<DecisionLayer>,
    /// The time that conditions see; `None`: the time of the test.
    pub at_unix_s: Option<i64>,
    /// The environment that the gateway states; `None`: the environment of the test.
    pub environment: Option<JsonObject>,
    /// Whether the run assumes that every call demanded by `prepared:` entries was prepared.
    pub assume_prepared: bool,
    /// The line of the expectation, 1-based.
    pub line: u32,
    /// The column of the expectation, 1-based.
    pub column: u32,
}

/// Reads a test. A missing field without a sensible default is an error.
pub(super) fn read_test(fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> Option<TestSpec> {
    let agents = read_agents(fields, reader);
    let user = fields.require("user", reader).and_then(|node| read_user(node, reader));
    let application = fields.require("application", reader).and_then(|node| reader.read_text(node, "`application`"));
    let application = application.map(ApplicationId::from);
    let scope = fields.take("scope").and_then(|node| read_scope(node, reader));
    let at_unix_s = fields.take("at").and_then(|node| read_time(node, reader));
    let environment = fields.take("env").and_then(|node| read_object(node, "`env`", reader));
    let mut expect = Vec::new();
    match fields.require("expect", reader).map(|node| (node, &node.kind)) {
        Some((_, NodeKind::Sequence(items))) => {
            for item in items {
                if let Some(expectation) = read_expectation(item, reader) {
                    reader.positions.insert("expect", expect.len(), item.at);
                    expect.push(expectation);
                }
            }
        }
        Some((node, _)) => reader.report_wrong_type(node, "`expect` must be a list of `{tool: …, args: {…}, want: PERMIT}`"),
        None => {}
    }
    let (user, groups) = user?;
    Some(TestSpec { agents, user, groups, application: application?, scope, at_unix_s, environment, expect })
}

/// Reads `agent` or `agents`; exactly one of them must be given.
fn read_agents(fields: &mut MappingFields<'_>, reader: &mut DocumentReader<'_>) -> Vec<AgentId> {
    let ids = match (fields.take("agent"), fields.take("agents")) {
        (Some(node), None) => {
            reader.positions.insert("agents", 0, node.at);
            reader.read_text(node, "`agent`").map(str::to_owned).into_iter().collect()
        }
        (None, Some(node)) => {
            let agents = reader.read_strings(node, "agents");
            if agents.is_empty() {
                reader.report_error(node.at, "`agents` must name the chain, root to leaf");
            }
            agents
        }
        _ => {
            reader.report_error(fields.at, "a test needs either `agent` or `agents`, the chain from root to leaf");
            Vec::new()
        }
    };
    ids.iter().map(|id| AgentId::from(id.as_str())).collect()
}

fn read_user(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<(UserId, Vec<GroupId>)> {
    let mut fields = MappingFields::new(node, "`user`", reader)?;
    let issuer = fields.require("issuer", reader);
    if let Some(node) = issuer {
        reader.positions.insert("user", 0, node.at);
    }
    let issuer = issuer.and_then(|node| reader.read_text(node, "`issuer`"));
    let subject = fields.require("sub", reader).and_then(|node| reader.read_text(node, "`sub`"));
    let groups = fields.take("groups").map(|node| reader.read_strings(node, "groups")).unwrap_or_default();
    fields.reject_unknown_fields(reader);
    let groups = groups.iter().map(|group| GroupId::from(group.as_str())).collect();
    Some((UserId::new(issuer?, subject?), groups))
}

/// Reads a scope: tools with argument constraints, as in a token.
fn read_scope(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<TokenScope> {
    let NodeKind::Mapping(members) = &node.kind else {
        reader.report_wrong_type(node, "`scope` must map tools to argument constraints, as a token does");
        return None;
    };
    let mut tools = Vec::with_capacity(members.len());
    for member in members {
        match ConstraintMap::parse(&member.value.to_json()) {
            Ok(map) => tools.push((member.name.as_str().into(), map)),
            Err(error @ Error::TooNested) => reader.report_error(member.value.at, error.to_string()),
            Err(Error::Malformed(problem)) => reader.report_error(member.value.at, problem),
        }
    }
    Some(TokenScope { tools: tools.into_iter().collect() })
}

fn read_expectation(item: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<ExpectedCall> {
    let mut fields = MappingFields::new(item, "an expectation", reader)?;
    let tool = fields.require("tool", reader).and_then(|node| reader.read_text(node, "`tool`"));
    let arguments = match fields.take("args") {
        Some(node) => read_object(node, "`args`", reader)?,
        None => JsonObject::default(),
    };
    let effects = [Effect::Permit, Effect::NeedsApproval, Effect::Deny];
    let want = fields.require("want", reader).and_then(|node| reader.read_choice(node, "want", &effects, Effect::as_str));
    let reason = fields.take("reason").and_then(|node| reader.read_choice(node, "reason", Reason::ALL, Reason::as_str));
    let layers = DecisionLayer::ALL;
    let layer = fields.take("layer").and_then(|node| reader.read_choice(node, "layer", layers, DecisionLayer::as_str));
    let at_unix_s = fields.take("at").and_then(|node| read_time(node, reader));
    let environment = fields.take("env").and_then(|node| read_object(node, "`env`", reader));
    let prepared = fields.take("prepared").and_then(|node| reader.read_bool(node, "`prepared`")).unwrap_or(false);
    fields.reject_unknown_fields(reader);
    let SourcePosition { line, column } = item.at;
    let tool = tool?.into();
    Some(ExpectedCall {
        tool,
        arguments,
        effect: want?,
        reason,
        layer,
        at_unix_s,
        environment,
        assume_prepared: prepared,
        line,
        column,
    })
}

/// Reads a mapping as a JSON object whose numbers can all be compared.
fn read_object(node: &SourceNode, what: &str, reader: &mut DocumentReader<'_>) -> Option<JsonObject> {
    match node.to_json() {
        Value::Object(object) if object.iter().all(|(_, value)| value.is_comparable()) => Some(object),
        Value::Object(_) => {
            reader.report_error(
                node.at,
                format!(
                    "{what} holds a number beyond ±(2^53-1), or with more digits than a double keeps, which cannot be compared"
                ),
            );
            None
        }
        _ => {
            reader.report_wrong_type(node, &format!("{what} must be a mapping"));
            None
        }
    }
}

/// Reads a time in the form of RFC 3339, such as `2026-11-25T08:30:00Z`.
fn read_time(node: &SourceNode, reader: &mut DocumentReader<'_>) -> Option<i64> {
    let text = match &node.kind {
        NodeKind::Scalar(scalar) => scalar.text.as_str(),
        _ => "",
    };
    let second = text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second);
    if second.is_none() {
        reader.report_error(node.at, format!("`{}` is not a time: write `2026-11-25T08:30:00Z`", abbreviate(text)));
    }
    second
}
