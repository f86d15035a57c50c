//! `kind: test`: calls of one chain of agents, for one user, in one application, with the expected answers.
//!
//! `policy test` runs the tests, and every `apply` does so before it writes. Tests are never stored, because they decide nothing.
//! Look next at [`testrun`](super::super::testrun), which runs them.

use std::sync::Arc;

use crate::model::constraint::{ArgumentMap, Error, abridged};
use crate::model::decision::Effect;
use crate::model::ids::{AgentId, ApplicationId, GroupId, UserId};
use crate::model::json::{Object, Value};
use crate::model::reason::{Layer, Reason};
use crate::model::request::Scope;

use super::super::diagnostic::Position;
use super::super::node::{Kind, Node};
use super::fields::{Fields, Reader};

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
    pub scope: Option<Scope>,
    /// The time that conditions see, in seconds since the Unix epoch. An expectation may name its own.
    pub at_unix_s: Option<i64>,
    /// The environment that the gateway states. An expectation may name its own.
    pub environment: Option<Object>,
    /// The calls, in order.
    pub expect: Vec<Expectation>,
}

/// One call and its expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Expectation {
    /// `server/tool`.
    pub tool: Arc<str>,
    /// The arguments.
    pub arguments: Object,
    /// The expected effect.
    pub want: Effect,
    /// The expected reason; `None` accepts every reason.
    pub reason: Option<Reason>,
    /// The expected deciding layer; `None` accepts every layer.
    pub layer: Option<Layer>,
    /// The time that conditions see; `None`: the time of the test.
    pub at_unix_s: Option<i64>,
    /// The environment that the gateway states; `None`: the environment of the test.
    pub environment: Option<Object>,
    /// Whether the run assumes that every call demanded by `prepared:` entries was prepared.
    pub prepared: bool,
    /// The line of the expectation, 1-based.
    pub line: u32,
    /// The column of the expectation, 1-based.
    pub column: u32,
}

/// Reads a test. A missing field without a sensible default is an error.
pub(super) fn read_test(fields: &mut Fields<'_>, reader: &mut Reader<'_>) -> Option<TestSpec> {
    let agents = read_agents(fields, reader);
    let user = fields.require("user", reader).and_then(|node| read_user(node, reader));
    let application = fields.require("application", reader).and_then(|node| reader.text(node, "`application`"));
    let application = application.map(ApplicationId::from);
    let scope = fields.take("scope").and_then(|node| read_scope(node, reader));
    let at_unix_s = fields.take("at").and_then(|node| read_time(node, reader));
    let environment = fields.take("env").and_then(|node| read_object(node, "`env`", reader));
    let mut expect = Vec::new();
    match fields.require("expect", reader).map(|node| (node, &node.kind)) {
        Some((_, Kind::Sequence(items))) => {
            for item in items {
                if let Some(expectation) = read_expectation(item, reader) {
                    reader.positions.put("expect", expect.len(), item.at);
                    expect.push(expectation);
                }
            }
        }
        Some((node, _)) => reader.wrong(node, "`expect` must be a list of `{tool: …, args: {…}, want: PERMIT}`"),
        None => {}
    }
    let (user, groups) = user?;
    Some(TestSpec { agents, user, groups, application: application?, scope, at_unix_s, environment, expect })
}

/// Reads `agent` or `agents`; exactly one of them must be given.
fn read_agents(fields: &mut Fields<'_>, reader: &mut Reader<'_>) -> Vec<AgentId> {
    let ids = match (fields.take("agent"), fields.take("agents")) {
        (Some(node), None) => {
            reader.positions.put("agents", 0, node.at);
            reader.text(node, "`agent`").map(str::to_owned).into_iter().collect()
        }
        (None, Some(node)) => {
            let agents = reader.strings(node, "agents");
            if agents.is_empty() {
                reader.error(node.at, "`agents` must name the chain, root to leaf");
            }
            agents
        }
        _ => {
            reader.error(fields.at, "a test needs either `agent` or `agents`, the chain from root to leaf");
            Vec::new()
        }
    };
    ids.iter().map(|id| AgentId::from(id.as_str())).collect()
}

fn read_user(node: &Node, reader: &mut Reader<'_>) -> Option<(UserId, Vec<GroupId>)> {
    let mut fields = Fields::new(node, "`user`", reader)?;
    let issuer = fields.require("issuer", reader);
    if let Some(node) = issuer {
        reader.positions.put("user", 0, node.at);
    }
    let issuer = issuer.and_then(|node| reader.text(node, "`issuer`"));
    let subject = fields.require("sub", reader).and_then(|node| reader.text(node, "`sub`"));
    let groups = fields.take("groups").map(|node| reader.strings(node, "groups")).unwrap_or_default();
    fields.finish(reader);
    let groups = groups.iter().map(|group| GroupId::from(group.as_str())).collect();
    Some((UserId::new(issuer?, subject?), groups))
}

/// Reads a scope: tools with argument constraints, as in a token.
fn read_scope(node: &Node, reader: &mut Reader<'_>) -> Option<Scope> {
    let Kind::Mapping(members) = &node.kind else {
        reader.wrong(node, "`scope` must map tools to argument constraints, as a token does");
        return None;
    };
    let mut tools = Vec::with_capacity(members.len());
    for member in members {
        match ArgumentMap::parse(&member.value.to_value()) {
            Ok(map) => tools.push((member.name.as_str().into(), map)),
            Err(error @ Error::TooNested) => reader.error(member.value.at, error.to_string()),
            Err(Error::Malformed(problem)) => reader.error(member.value.at, problem),
        }
    }
    Some(Scope { tools: tools.into_iter().collect() })
}

fn read_expectation(item: &Node, reader: &mut Reader<'_>) -> Option<Expectation> {
    let mut fields = Fields::new(item, "an expectation", reader)?;
    let tool = fields.require("tool", reader).and_then(|node| reader.text(node, "`tool`"));
    let arguments = match fields.take("args") {
        Some(node) => read_object(node, "`args`", reader)?,
        None => Object::default(),
    };
    let effects = [Effect::Permit, Effect::NeedsApproval, Effect::Deny];
    let want = fields.require("want", reader).and_then(|node| reader.choice(node, "want", &effects, Effect::as_str));
    let reason = fields.take("reason").and_then(|node| reader.choice(node, "reason", Reason::ALL, Reason::as_str));
    let layers = Layer::ALL;
    let layer = fields.take("layer").and_then(|node| reader.choice(node, "layer", layers, Layer::as_str));
    let at_unix_s = fields.take("at").and_then(|node| read_time(node, reader));
    let environment = fields.take("env").and_then(|node| read_object(node, "`env`", reader));
    let prepared = fields.take("prepared").and_then(|node| reader.truth(node, "`prepared`")).unwrap_or(false);
    fields.finish(reader);
    let Position { line, column } = item.at;
    let tool = tool?.into();
    Some(Expectation { tool, arguments, want: want?, reason, layer, at_unix_s, environment, prepared, line, column })
}

/// Reads a mapping as a JSON object whose numbers can all be compared.
fn read_object(node: &Node, what: &str, reader: &mut Reader<'_>) -> Option<Object> {
    match node.to_value() {
        Value::Object(object) if object.iter().all(|(_, value)| value.is_comparable()) => Some(object),
        Value::Object(_) => {
            reader.error(node.at, format!("{what} holds a number beyond ±(2^53-1), which cannot be compared"));
            None
        }
        _ => {
            reader.wrong(node, &format!("{what} must be a mapping"));
            None
        }
    }
}

/// Reads a time in the form of RFC 3339, such as `2026-11-25T08:30:00Z`.
fn read_time(node: &Node, reader: &mut Reader<'_>) -> Option<i64> {
    let text = match &node.kind {
        Kind::Scalar(scalar) => scalar.text.as_str(),
        _ => "",
    };
    let second = text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second);
    if second.is_none() {
        reader.error(node.at, format!("`{}` is not a time: write `2026-11-25T08:30:00Z`", abridged(text)));
    }
    second
}
