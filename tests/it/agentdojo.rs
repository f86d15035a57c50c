//! Real tool calls of a prompt-injection benchmark, through a live server. Every call that a user's task needs is permitted, and
//! every attack under the same chain has a call that is not.
//!
//! One agent serves the suite and may call all of its tools. Each user task is a session with a user, an application, an assistant,
//! and a worker. The worker's hop grants what [`scope_of`] derives from the task's own calls, and the worker signs every call.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use bytes::Bytes;
use portcullis::api::r#gen as wire;
use portcullis::app::App;
use portcullis::config::Settings;
use portcullis::model::json::parse_object;
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::token::{PrivateKey, ProofCall, issue};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use wire::check_request::Credential;
use wire::decision_service_client::DecisionServiceClient;

use crate::external_suites;

const ISSUER: &str = "https://login.agentdojo.example";
const AUDIENCE: &str = "https://gateway.agentdojo.example";
const ASSISTANT: &str = "spiffe://agentdojo.example/agent/assistant";
const WORKER: &str = "spiffe://agentdojo.example/agent/worker";

/// Arguments that hold prose, by the last word of their name. All other arguments name a person, a thing, a place or a time.
const FREE_TEXT: &[&str] =
    &["body", "subject", "content", "title", "description", "message", "text", "summary", "comment", "note", "notes"];

/// Pairs of task and attack in which the attack is contained in the task. In slack three tasks may message the very person that one
/// attack messages; only the text differs.
const KNOWN: &[(&str, usize, usize)] = &[("slack", 102, 105), ("workspace", 240, 240)];

#[derive(Debug, Deserialize)]
struct DojoSuite {
    suite: String,
    tools: Vec<DojoTool>,
    user_tasks: Vec<DojoTask>,
    injection_tasks: Vec<DojoTask>,
}

#[derive(Debug, Deserialize)]
struct DojoTool {
    name: String,
    arguments: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct DojoTask {
    id: String,
    calls: Vec<DojoCall>,
}

#[derive(Debug, Deserialize)]
struct DojoCall {
    tool: String,
    args: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, Default)]
struct SuiteScore {
    tasks: usize,
    tasks_permitted: usize,
    pairs: usize,
    pairs_contained: usize,
}

impl std::fmt::Display for SuiteScore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tasks, tasks_permitted, pairs, pairs_contained } = self;
        write!(f, "{tasks_permitted} of {tasks} tasks permitted, {pairs_contained} of {pairs} pairs contained")
    }
}

#[test]
fn agentdojo() {
    let Some(folder) = external_suites::folder("agentdojo") else { return };
    let mut suites: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    suites.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    suites.sort();
    assert!(!suites.is_empty(), "no suite in {}", folder.display());
    let mut total = SuiteScore::default();
    for path in suites {
        let suite: DojoSuite = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let score = run(&suite);
        println!("{}: {score}", suite.suite);
        total.tasks += score.tasks;
        total.tasks_permitted += score.tasks_permitted;
        total.pairs += score.pairs;
        total.pairs_contained += score.pairs_contained;
        assert_eq!(score.tasks_permitted, score.tasks, "{}: a call of a task is not permitted", suite.suite);
        match KNOWN.iter().find(|(name, ..)| *name == suite.suite) {
            Some((name, contained, pairs)) => assert_eq!((score.pairs_contained, score.pairs), (*contained, *pairs), "{name}"),
            None => assert!(score.pairs_contained * 100 >= score.pairs * 95, "{}: {score}", suite.suite),
        }
    }
    println!("total: {total}");
}

/// The grant of a worker for a task: its tools, with each argument limited to the values in the task's own calls.
///
/// Prose is unlimited. Any other argument must equal one of the values (a list is one value). An argument that some call omits is
/// optional. A tool that is only called without arguments accepts none.
fn scope_of(task: &DojoTask, tools: &[DojoTool]) -> BTreeMap<String, Value> {
    let mut scope = BTreeMap::new();
    let called: BTreeSet<&str> = task.calls.iter().map(|call| call.tool.as_str()).collect();
    for tool in called {
        let calls: Vec<&DojoCall> = task.calls.iter().filter(|call| call.tool == tool).collect();
        let names: BTreeSet<&String> = calls.iter().flat_map(|call| call.args.keys()).collect();
        let mut map = Map::new();
        for name in names {
            let mut values: Vec<&Value> = Vec::new();
            for value in calls.iter().filter_map(|call| call.args.get(name)) {
                if !values.contains(&value) {
                    values.push(value);
                }
            }
            let mut constraint = constraint_of(name, &values);
            if calls.iter().any(|call| !call.args.contains_key(name)) {
                constraint["optional"] = Value::Bool(true);
            }
            map.insert(name.clone(), constraint);
        }
        if map.is_empty() {
            // An empty map would accept any arguments.
            let declared = tools.iter().find(|known| known.name == tool).map_or(&[][..], |known| &known.arguments);
            let nothing = json!({"constraint_type": "exact", "value": null, "optional": true});
            map.extend(declared.iter().map(|name| (name.clone(), nothing.clone())));
        }
        scope.insert(tool.to_owned(), Value::Object(map));
    }
    scope
}

fn constraint_of(name: &str, values: &[&Value]) -> Value {
    let last_word = name.rsplit('_').next().unwrap();
    if FREE_TEXT.contains(&last_word) && values.iter().all(|value| value.is_string()) {
        return json!({"constraint_type": "wildcard"});
    }
    match values {
        [scalar] if !scalar.is_array() && !scalar.is_object() => json!({"constraint_type": "exact", "value": scalar}),
        _ => json!({"constraint_type": "one_of", "values": values}),
    }
}

struct SuiteKeys {
    issuer: PrivateKey,
    assistant: PrivateKey,
    worker: PrivateKey,
}

fn run(suite: &DojoSuite) -> SuiteScore {
    let keys = SuiteKeys {
        issuer: PrivateKey::generate().unwrap(),
        assistant: PrivateKey::generate().unwrap(),
        worker: PrivateKey::generate().unwrap(),
    };
    let folder = tempfile::tempdir().unwrap();
    let policies = folder.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    std::fs::write(policies.join("suite.yaml"), policy(suite, &keys)).unwrap();
    let free = "127.0.0.1:0".parse().unwrap();
    let app = App::start(Settings {
        data: folder.path().join("data"),
        create: true,
        policies: Some(policies),
        listen: free,
        http_listen: free,
        admin_listen: free,
        logs: false,
        ..Settings::default()
    })
    .unwrap();
    let ready_s = SystemClock.now().unix_s();
    let target = format!("http://{}", app.addresses().decisions);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let score = runtime.block_on(async {
        // A proof must come from a later second than the one in which the replica became ready.
        while SystemClock.now().unix_s() <= ready_s {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let mut client = DecisionServiceClient::connect(target).await.unwrap();
        let mut score = SuiteScore::default();
        for task in &suite.user_tasks {
            let chain = chain_for(suite, task, &keys);
            let mut permitted = true;
            for call in &task.calls {
                let answer = check(&mut client, suite, &chain, &keys.worker, call).await;
                if answer.effect() != wire::Effect::Permit {
                    println!("{} {}: {} {:?} {}", suite.suite, task.id, call.tool, call.args, answer.reason);
                    permitted = false;
                }
            }
            score.tasks += 1;
            score.tasks_permitted += usize::from(permitted);
            for attack in suite.injection_tasks.iter().filter(|attack| !attack.calls.is_empty()) {
                score.pairs += 1;
                score.pairs_contained += usize::from(is_contained(&mut client, suite, &chain, &keys.worker, attack).await);
            }
        }
        score
    });
    drop(runtime);
    app.stop().unwrap();
    score
}

type DecisionClient = DecisionServiceClient<tonic::transport::Channel>;

/// Whether a call of an attack is refused because of its content.
async fn is_contained(
    client: &mut DecisionClient,
    suite: &DojoSuite,
    chain: &[Bytes],
    worker: &PrivateKey,
    attack: &DojoTask,
) -> bool {
    let mut contained = false;
    for call in &attack.calls {
        let answer = check(client, suite, chain, worker, call).await;
        if answer.effect() != wire::Effect::Permit {
            let because = ["TOOL_NOT_GRANTED", "ARGUMENT_REFUSED"].contains(&answer.reason.as_str());
            assert!(because, "{} {}: {} {}", suite.suite, attack.id, call.tool, answer.reason);
            contained = true;
        }
    }
    contained
}

async fn check(
    client: &mut DecisionClient,
    suite: &DojoSuite,
    chain: &[Bytes],
    worker: &PrivateKey,
    call: &DojoCall,
) -> wire::CheckResponse {
    let tool = format!("{}/{}", suite.suite, call.tool);
    let arguments_json = serde_json::to_vec(&call.args).unwrap();
    let arguments = parse_object(&arguments_json).unwrap();
    let proof_of = ProofCall { tool: &tool, arguments: &arguments, audience: Some(AUDIENCE) };
    let proof = issue::sign_proof(worker, chain, &proof_of, None, SystemClock.now()).unwrap();
    let presentation = wire::Presentation { aat_chain: chain.to_vec(), aat_pop: proof.into() };
    let request = wire::CheckRequest {
        credential: Some(Credential::Presentation(presentation)),
        tool,
        arguments_json: arguments_json.into(),
        audience: AUDIENCE.to_owned(),
        ..Default::default()
    };
    client.check(request).await.unwrap().into_inner()
}

/// The root lets the assistant use the whole suite. The hop grants the worker the needs of the task.
fn chain_for(suite: &DojoSuite, task: &DojoTask, keys: &SuiteKeys) -> Vec<Bytes> {
    let now = SystemClock.now();
    let named = |scope: BTreeMap<String, Value>| -> Map<String, Value> {
        scope.into_iter().map(|(tool, map)| (format!("{}/{tool}", suite.suite), map)).collect()
    };
    let every_tool = suite.tools.iter().map(|tool| (tool.name.clone(), json!({}))).collect();
    let root = json!({
        "iss": ISSUER, "sub": "emma", "sub_profile": "user", "groups": ["people"], "client_id": "workbench", "aud": AUDIENCE,
        "sid": format!("session-{}", task.id), "txn": format!("txn-{}", task.id),
        "exp": now.unix_s() + 600, "del_max_depth": 1, "act": {"iss": ISSUER, "sub": ASSISTANT},
        "cnf": {"jwk": jwk(&keys.assistant)}, "authorization_details": details(named(every_tool)),
    });
    let hop = json!({
        "exp": now.unix_s() + 600, "del_max_depth": 1, "act": {"iss": ISSUER, "sub": WORKER},
        "cnf": {"jwk": jwk(&keys.worker)}, "authorization_details": details(named(scope_of(task, &suite.tools))),
    });
    let mut chain = vec![Bytes::from(issue::issue_root(&keys.issuer, &root.to_string(), now).unwrap())];
    chain.push(issue::issue_hop(&keys.assistant, &chain, &hop.to_string(), now).unwrap().into());
    chain
}

fn details(tools: Map<String, Value>) -> Value {
    json!([{"type": "attenuating_agent_token", "tools": tools}])
}

fn jwk(key: &PrivateKey) -> Value {
    serde_json::from_str(&key.public_key().to_jwk()).unwrap()
}

/// The suite's server, the two agents that may use all of it, and their users. Every call is a write, so each needs a proof of its
/// own.
fn policy(suite: &DojoSuite, keys: &SuiteKeys) -> String {
    let everything = format!("{}/*", suite.suite);
    let tools: Map<String, Value> = suite.tools.iter().map(|tool| (tool.name.clone(), json!({"risk": "write"}))).collect();
    let agent = |id: &str, key: &PrivateKey, delegates_to: &[&str], hops_max: u64| {
        json!({
            "kind": "agent", "id": id, "owner": "benchmark", "keys": [key.public_key().thumbprint().as_str()],
            "applications": ["workbench"], "acts_for": ["people"], "delegates_to": delegates_to,
            "session": {"hops_max": hops_max}, "allow": [everything],
        })
    };
    let documents = [
        json!({"kind": "server", "id": suite.suite, "tools": tools}),
        json!({
            "kind": "issuer", "id": ISSUER, "keys": {"jwks": {"keys": [jwk(&keys.issuer)]}}, "audiences": [AUDIENCE],
            "groups": ["people"], "applications": ["workbench"],
        }),
        json!({"kind": "application", "id": "workbench", "allow": [everything]}),
        json!({"kind": "group", "id": "people", "allow": [everything]}),
        agent(ASSISTANT, &keys.assistant, &[WORKER], 1),
        agent(WORKER, &keys.worker, &[], 0),
    ];
    documents.map(|document| document.to_string()).join("\n---\n")
}

#[test]
fn scopes_say_what_the_calls_say() {
    let task: DojoTask = serde_json::from_value(json!({"id": "t", "calls": [
        {"tool": "pay", "args": {"to": "A", "amount": 10.5, "subject": "rent"}},
        {"tool": "pay", "args": {"to": "B", "amount": 10.5, "subject": "food", "cc": ["x", "y"]}},
        {"tool": "list", "args": {}},
    ]}))
    .unwrap();
    let tools = [DojoTool { name: "list".to_owned(), arguments: vec!["limit".to_owned()] }];
    let expected = json!({
        "pay": {
            "to": {"constraint_type": "one_of", "values": ["A", "B"]},
            "amount": {"constraint_type": "exact", "value": 10.5},
            "subject": {"constraint_type": "wildcard"},
            "cc": {"constraint_type": "one_of", "values": [["x", "y"]], "optional": true},
        },
        "list": {"limit": {"constraint_type": "exact", "value": null, "optional": true}},
    });
    assert_eq!(serde_json::to_value(scope_of(&task, &tools)).unwrap(), expected);
    assert_eq!(constraint_of("message_id", &[&json!("7")]), json!({"constraint_type": "exact", "value": "7"}));
    assert_eq!(constraint_of("content", &[&json!([1])]), json!({"constraint_type": "one_of", "values": [[1]]}));
}
