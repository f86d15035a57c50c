//! The page as Prometheus reads it, spans as an exporter receives them, and both over OTLP as a collector receives them.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use opentelemetry::trace::{SpanId, Status};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::sync::mpsc;

use crate::model::ids::{AgentId, ApplicationId, SessionId, TaskId, UserId};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::revision::HistoryId;

use super::*;
use crate::model::decision::Effect;

#[test]
fn the_page_shows_what_was_counted() {
    let metrics = Metrics::unexported();
    metrics.record_decision(Effect::Permit, Reason::Ok, 900);
    metrics.record_decision(Effect::Permit, Reason::Ok, 10_000);
    metrics.record_decision(Effect::Permit, Reason::Ok, 10_001);
    metrics.record_decision(Effect::Deny, Reason::AuditUnavailable, 2_000_000_000);
    metrics.record_chain_lookup(true);
    metrics.record_chain_lookup(true);
    metrics.record_chain_lookup(false);
    metrics.record_cold_verification();
    metrics.record_kill_propagation(30_000_000);
    metrics.register_gauge(names::SNAPSHOT_AGE, "Age.", || 0.25);
    metrics.register_gauge(names::REVISION, "Old.", || 1.0);
    metrics.register_gauge(names::REVISION, "Revision.", || 7.0);
    metrics.register_counter(names::AUDIT_RECORDS, "Records.", || 5);
    metrics.register_state(names::REPLICA_STATE, "State.", &["loading", "ready"], || 1);
    // Values that other threads count are included.
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| metrics.record_decision(Effect::Deny, Reason::Stale, 1));
        }
    });
    let page = metrics.render_page();
    for line in [
        "portcullis_check_decisions_total{portcullis_effect=\"PERMIT\",portcullis_reason=\"OK\"} 3",
        "portcullis_check_decisions_total{portcullis_effect=\"DENY\",portcullis_reason=\"AUDIT_UNAVAILABLE\"} 1",
        "portcullis_check_decisions_total{portcullis_effect=\"DENY\",portcullis_reason=\"STALE\"} 10",
        "portcullis_check_duration_seconds_bucket{le=\"0.00001\",portcullis_effect=\"PERMIT\"} 2",
        "portcullis_check_duration_seconds_bucket{le=\"0.000025\",portcullis_effect=\"PERMIT\"} 3",
        "portcullis_check_duration_seconds_bucket{le=\"1.0\",portcullis_effect=\"DENY\"} 10",
        "portcullis_check_duration_seconds_bucket{le=\"+Inf\",portcullis_effect=\"DENY\"} 11",
        "portcullis_check_duration_seconds_count{portcullis_effect=\"PERMIT\"} 3",
        "portcullis_chain_cache_lookups_total{portcullis_result=\"hit\"} 2",
        "portcullis_chain_cache_lookups_total{portcullis_result=\"miss\"} 1",
        "portcullis_chain_verifications_total 1",
        "portcullis_kill_propagation_seconds_bucket{le=\"0.05\"} 1",
        "portcullis_kill_propagation_seconds_sum 0.03",
        "# TYPE portcullis_snapshot_age_seconds gauge",
        "portcullis_snapshot_age_seconds 0.25",
        "portcullis_revision 7.0",
        "portcullis_audit_records_total 5",
        "portcullis_replica_state{portcullis_state=\"loading\"} 0.0",
        "portcullis_replica_state{portcullis_state=\"ready\"} 1.0",
    ] {
        assert!(page.lines().any(|other| other == line), "`{line}` is not in:\n{page}");
    }
    assert!(page.ends_with("# EOF\n") && !page.contains("Old."));
}

/// Collects the exported spans.
#[derive(Clone, Debug, Default)]
struct CollectedSpans(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for CollectedSpans {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

impl CollectedSpans {
    fn spans(settings: &Settings) -> (SpanRecorder, Self) {
        let kept = CollectedSpans::default();
        let tracers = tracer_builder().with_simple_exporter(kept.clone()).build();
        (SpanRecorder::new(tracers.tracer(names::SERVICE), settings), kept)
    }

    fn take(&self) -> Vec<SpanData> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn bare(history: &HistoryId, effect: Effect, reason: Reason) -> SpanFacts<'_> {
    SpanFacts {
        parent: None,
        method: "Check",
        start_unix_ns: 1_700_000_000_000_000_000,
        end_unix_ns: 1_700_000_000_000_005_000,
        decision_id: "d1",
        effect,
        reason,
        layer: reason.layer(),
        user: None,
        application: None,
        agents: &[],
        tool: None,
        session: None,
        task: None,
        history,
        revision: 42,
    }
}

fn said(span: &SpanData) -> Vec<(String, String)> {
    let mut said: Vec<_> = span.attributes.iter().map(|a| (a.key.to_string(), a.value.as_str().into_owned())).collect();
    said.sort();
    said
}

#[test]
fn a_span_says_who_and_what() {
    let (spans, kept) = CollectedSpans::spans(&Settings::default());
    let history = HistoryId::new("h");
    let parent = TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Some("v=1")).unwrap();
    let (user, application) = (UserId::new("https://i", "ada"), ApplicationId::from("crm"));
    let (session, task) = (SessionId::from("s1"), TaskId::from("x1"));
    let agents = [AgentId::from("a/1"), AgentId::from("a/2")];
    spans.record(&SpanFacts {
        parent: Some(&parent),
        user: Some(&user),
        application: Some(&application),
        agents: &agents,
        tool: Some("crm/read"),
        session: Some(&session),
        task: Some(&task),
        ..bare(&history, Effect::Permit, Reason::Ok)
    });
    let exported = kept.take();
    let [span] = exported.as_slice() else { panic!("{} spans", exported.len()) };
    assert_eq!(span.name, "portcullis.check");
    assert_eq!(span.span_context.trace_id().to_bytes(), parent.trace_id());
    assert_eq!(span.span_context.trace_state().header(), "v=1");
    assert_eq!((span.parent_span_id, span.parent_span_is_remote), (SpanId::from(0x00f0_67aa_0ba9_02b7), true));
    assert_eq!(span.end_time.duration_since(span.start_time).unwrap().as_nanos(), 5_000);
    let unix_ns = span.start_time.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    assert_eq!((unix_ns, &span.status), (1_700_000_000_000_000_000, &Status::Unset));
    let expected = [
        ("enduser.id", "[\"https://i\",\"ada\"]"),
        ("gen_ai.agent.id", "a/2"),
        ("gen_ai.operation.name", "execute_tool"),
        ("gen_ai.tool.name", "crm/read"),
        ("portcullis.agents", "[\"a/1\",\"a/2\"]"),
        ("portcullis.application.id", "crm"),
        ("portcullis.decision.id", "d1"),
        ("portcullis.effect", "PERMIT"),
        ("portcullis.method", "Check"),
        ("portcullis.reason", "OK"),
        ("portcullis.revision", "h.42"),
        ("portcullis.task.id", "x1"),
        ("session.id", "s1"),
    ];
    assert_eq!(said(span), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
}

#[test]
fn errors_are_marked_and_denials_are_not() {
    let (spans, kept) = CollectedSpans::spans(&Settings::default());
    let history = HistoryId::new("h");
    spans.record(&bare(&history, Effect::Deny, Reason::UserDenies));
    spans.record(&bare(&history, Effect::Deny, Reason::Stale));
    let exported = kept.take();
    assert_eq!(exported.iter().map(|span| span.status != Status::Unset).collect::<Vec<_>>(), [false, true]);
    assert!(said(&exported[1]).contains(&("error.type".into(), "STALE".into())));
    assert!(said(&exported[0]).contains(&("portcullis.deciding_layer".into(), DecisionLayer::User.to_string())));
    assert_ne!(exported[0].span_context.trace_id(), exported[1].span_context.trace_id());
}

#[test]
fn what_is_sampled() {
    let settings =
        Settings { permit_span_ratio: 0.25, permit_spans_per_s_max: 60, denial_spans_per_s_max: 10, ..Settings::default() };
    let history = HistoryId::new("h");
    let parent = |flags: &str| TraceContext::parse(&format!("00-{}-{}-{flags}", "a".repeat(32), "b".repeat(16)), None);
    let (kept_by_caller, dropped_by_caller) = (parent("01"), parent("00"));
    let check = |effect, parent: Option<&TraceContext>, calls: i64, expected: usize| {
        let (spans, kept) = CollectedSpans::spans(&settings);
        for _ in 0..calls {
            spans.record(&SpanFacts { parent, ..bare(&history, effect, Reason::Ok) });
        }
        assert_eq!(kept.take().len(), expected, "{effect:?} {parent:?}");
        // The next second has its own limit.
        let end_unix_ns = 1_700_000_001_000_000_000;
        spans.record(&SpanFacts { parent, end_unix_ns, ..bare(&history, Effect::Deny, Reason::Ok) });
        assert_eq!(kept.take().len(), 1);
    };
    check(Effect::Deny, None, 100, 10);
    check(Effect::Deny, dropped_by_caller.as_ref(), 100, 10);
    check(Effect::NeedsApproval, None, 100, 10);
    check(Effect::Permit, kept_by_caller.as_ref(), 50, 50);
    check(Effect::Permit, kept_by_caller.as_ref(), 100, 60);
    check(Effect::Permit, dropped_by_caller.as_ref(), 100, 0);
    // A quarter of the permits, evenly spread, with the first among them.
    check(Effect::Permit, None, 200, 51);
    check(Effect::Permit, None, 1_000, 60);
}

#[test]
fn off_means_off() {
    let telemetry = Telemetry::start(&Settings::default()).unwrap();
    assert!(!telemetry.spans().is_enabled());
    telemetry.spans().record(&bare(&HistoryId::new("h"), Effect::Deny, Reason::Stale));
    telemetry.shutdown().unwrap();
}

#[test]
fn bad_settings_are_named() {
    let check = |settings: Settings, expected: &str| {
        let message = Telemetry::start(&settings).unwrap_err().to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    };
    let endpoint = |endpoint: &str| Settings { otlp_endpoint: Some(endpoint.to_owned()), ..Settings::default() };
    check(Settings { permit_span_ratio: 1.5, ..Settings::default() }, "from 0 to 1");
    check(Settings { permit_span_ratio: f64::NAN, ..Settings::default() }, "from 0 to 1");
    check(endpoint("http://127.0.0.1:1"), "tokio runtime");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    check(endpoint("not a url"), "`not a url`");
    check(endpoint("https://127.0.0.1:1"), "`https://127.0.0.1:1`");
}

/// Any OTLP request. Its content is one repeated message, kept as bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct ExportRequest {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    resources: Vec<Bytes>,
}

/// Hands the path and content of each request to the test.
#[derive(Clone)]
struct FakeCollector {
    path: String,
    received: mpsc::Sender<(String, Vec<u8>)>,
}

impl tonic::server::UnaryService<ExportRequest> for FakeCollector {
    type Response = ExportRequest;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<tonic::Response<ExportRequest>, tonic::Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<ExportRequest>) -> Self::Future {
        let (collector, content) = (self.clone(), request.into_inner().resources.concat());
        Box::pin(async move {
            collector.received.send((collector.path, content)).await.unwrap();
            Ok(tonic::Response::new(ExportRequest::default()))
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_gets_spans_and_metrics() {
    let (received, mut exports) = mpsc::channel(16);
    let handler = move |request: http::Request<axum::body::Body>| {
        let collector = FakeCollector { path: request.uri().path().to_owned(), received: received.clone() };
        async move { tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).unary(collector, request).await }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let routes = tonic::service::Routes::from(axum::Router::new().fallback(handler));
    tokio::spawn(tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming));

    // Pushed at shutdown, because the test does not wait for the interval.
    let settings = Settings {
        otlp_endpoint: Some(endpoint),
        node: "node-7".to_owned(),
        metrics_interval_ms: 3_600_000,
        ..Settings::default()
    };
    let telemetry = Telemetry::start(&settings).unwrap();
    let metrics = telemetry.metrics();
    metrics.record_decision(Effect::Deny, Reason::GuardrailDenies, 3_000);
    metrics.record_chain_lookup(true);
    metrics.register_gauge(names::SNAPSHOT_AGE, "Age.", || 0.25);
    metrics.register_state(names::REPLICA_STATE, "State.", &["loading", "ready"], || 1);
    telemetry.spans().record(&bare(&HistoryId::new("history-1"), Effect::Deny, Reason::GuardrailDenies));
    tokio::task::spawn_blocking(move || telemetry.shutdown()).await.unwrap().unwrap();

    let mut check = async |path: &str, expected: &[&str]| {
        let (got, content) = exports.recv().await.unwrap();
        assert!(got.contains(path), "{got}");
        for text in expected {
            assert!(content.windows(text.len()).any(|window| window == text.as_bytes()), "no `{text}` in {got}");
        }
    };
    check("TraceService/Export", &["portcullis.check", "node-7", "GUARDRAIL_DENIES", "history-1.42", "execute_tool"]).await;
    let counted = ["portcullis.check.decisions", "portcullis.check.duration", "GUARDRAIL_DENIES", "node-7"];
    check("MetricsService/Export", &counted).await;
}
