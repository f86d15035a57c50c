//! The reported outcome of an act: done, refused or unknown, each recorded or not, over a socket and in this process.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tonic::service::Routes;

use super::*;
use crate::audit::{self, AuditRecorder, query};
use crate::model::jwk::PublicKey;
use crate::model::time::Clock;
use crate::pap::{self, AdministrationPoint};
use crate::server::{self, BoundListeners, GrpcServices, HttpServices, NoWriteBarrier, Server, ServiceFactories};
use crate::store::Store;
use crate::store::sqlite::SqliteStore;
use crate::testing::store::FaultyStore;

/// How the store handles the act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoreBehavior {
    Commit,
    Refuse,
    Abort,
}

/// The expected outcome for the caller.
struct ExpectedOutcome {
    /// The exit code; 0 means that the act was done.
    code: u8,
    /// The start of the message; for a completed act, of the warning.
    begins: &'static str,
    /// Further parts of the message.
    says: &'static [&'static str],
    /// `effect` of the line in the audit log; `None` if the log cannot be written.
    effect: Option<&'static str>,
}

const UNRECORDED_TEXT: &str = "is not in the audit log, which cannot be written: make room";

#[tokio::test]
async fn the_outcome_of_an_act_is_told_first_and_truly() {
    use StoreBehavior::{Abort, Commit, Refuse};
    let table = [
        (Commit, true, ExpectedOutcome { code: 0, begins: "", says: &[], effect: Some("ACCEPTED") }),
        (
            Commit,
            false,
            ExpectedOutcome { code: 0, begins: "it was done", says: &["keeps the signed act", "make room"], effect: None },
        ),
        (Refuse, true, ExpectedOutcome { code: 69, begins: "not done: no space", says: &[], effect: Some("REFUSED") }),
        (Refuse, false, ExpectedOutcome { code: 69, begins: "not done: no space", says: &[UNRECORDED_TEXT], effect: None }),
        (Abort, true, ExpectedOutcome { code: 69, begins: "it is not known", says: &["revocations"], effect: Some("UNKNOWN") }),
        (
            Abort,
            false,
            ExpectedOutcome { code: 69, begins: "it is not known", says: &[UNRECORDED_TEXT, "revocations"], effect: None },
        ),
    ];
    for is_local in [false, true] {
        for (does, is_recorded, ends) in &table {
            check(is_local, *does, *is_recorded, ends).await;
        }
    }
}

async fn check(is_local: bool, does: StoreBehavior, is_recorded: bool, ends: &ExpectedOutcome) {
    let case = format!("local {is_local}, store {does:?}, recorded {is_recorded}");
    let bench = AdminFixture::new(is_local, is_recorded).await;
    bench.store.set_fault(match does {
        StoreBehavior::Commit => None,
        StoreBehavior::Refuse => Some(crate::store::Error::Unavailable("no space is left".to_owned())),
        StoreBehavior::Abort => Some(crate::store::Error::OutcomeUnknown("it may or may not have been written".to_owned())),
    });
    let before = bench.store.revision().await.unwrap().number;
    let target = wire::RevocationTarget { kind: "session".to_owned(), key: vec!["s-1".to_owned()] };
    let message = wire::RevokeRequest { target: Some(target), reason: "test".to_owned(), ..Default::default() };
    let request = bench.client.sign_request("/portcullis.v1.RevocationService/Revoke", message).unwrap();
    let answer = RevocationServiceClient::new(bench.client.channel.clone()).revoke(request).await;
    let (code, message) = match act_outcome::act_result(answer, &bench.client.target) {
        Ok(answer) => {
            assert!(answer.message.revision.ends_with(&format!(".{}", before + 1)), "{case}: {}", answer.message.revision);
            assert_eq!(answer.is_recorded, is_recorded, "{case}");
            (0, if is_recorded { String::new() } else { act_outcome::unrecorded_warning(&bench.client.target, is_local) })
        }
        Err(failure) => (failure.code, failure.message),
    };
    assert_eq!(code, ends.code, "{case}: {message}");
    assert!(message.starts_with(ends.begins), "{case}: {message}");
    ends.says.iter().for_each(|says| assert!(message.contains(says), "{case}: {message}"));
    let written = u64::from(does == StoreBehavior::Commit);
    assert_eq!(bench.store.revision().await.unwrap().number, before + written, "{case}");
    let effects: Vec<Value> = bench.lines().into_iter().map(|line| line["effect"].clone()).collect();
    assert_eq!(effects, ends.effect.into_iter().collect::<Vec<_>>(), "{case}");
}

/// A read that cannot be recorded returns nothing, and says so.
#[tokio::test]
async fn what_is_only_read_is_not_told_unrecorded() {
    for is_local in [false, true] {
        let mut bench = AdminFixture::new(is_local, false).await;
        let failure = bench.client.revocations(wire::ListRevocationsRequest::default()).await.unwrap_err();
        assert_eq!(failure.code, CommandFailure::UNAVAILABLE);
        assert!(failure.message.contains("nothing was done or answered: make room"), "{}", failure.message);
    }
}

/// A server that disappears during an act has reported no outcome.
#[tokio::test]
async fn an_act_without_an_answer_is_not_known() {
    for (status, expected) in [
        (Status::unknown("transport error"), act_outcome::ActFailure::Unanswered),
        (Status::deadline_exceeded("Timeout expired"), act_outcome::ActFailure::Unanswered),
        (Status::unavailable("tcp connect error"), act_outcome::ActFailure::Refused),
        (Status::unimplemented(""), act_outcome::ActFailure::Refused),
    ] {
        let became = act_outcome::failure_from_status(&status);
        assert_eq!(became, expected, "{status:?}");
        let failure = became.into_failure(call_failure(&status, "http://there"));
        let begins =
            if expected == act_outcome::ActFailure::Refused { "not done: " } else { "no answer came, so it is not known" };
        assert!(failure.message.starts_with(begins), "{}", failure.message);
    }
}

/// A client of an administration whose store and audit log a test controls.
struct AdminFixture {
    client: AdminClient,
    store: Arc<FaultyStore>,
    log: Arc<audit::AuditLog>,
    folder: tempfile::TempDir,
    _server: Option<Server>,
}

impl AdminFixture {
    async fn new(is_local: bool, is_recorded: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let inner = SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap();
        let store = Arc::new(FaultyStore::new(Arc::new(inner)));
        let key = PrivateKey::generate().unwrap();
        let public: PublicKey = key.public_key().clone();
        pap::create_first_operator(&*store, "local", &public).await.unwrap().unwrap();
        let log = audit::AuditLog::open(&audit_folder(folder.path()), "n1", clock.clone()).unwrap();
        let recorder = match is_recorded {
            true => log.open_recorder("admin").unwrap(),
            false => {
                Arc::new(AuditRecorder::unavailable("n1", clock.clone(), audit::Error::Thread(std::io::Error::other("no disk"))))
            }
        };
        let admin = Arc::new(AdministrationPoint::new(store.clone(), clock, recorder));
        let (channel, server) = match is_local {
            true => (app::in_process_admin::serve_in_process(admin).await.unwrap(), None),
            false => {
                let server = serve(admin).await;
                let url = format!("http://{}", server.addresses().admin);
                (connect(&url).await.unwrap(), Some(server))
            }
        };
        let client = AdminClient::over_channel(channel, "http://there".to_owned(), vec![key], None).await.unwrap();
        Self { client, store, log, folder, _server: server }
    }

    fn lines(&self) -> Vec<Value> {
        assert!(self.log.status().pending_bytes == 0, "an act is in the kernel before it is answered");
        query::read_folder(&audit_folder(self.folder.path())).unwrap().map(Result::unwrap).collect()
    }
}

fn audit_folder(data: &Path) -> PathBuf {
    data.join("audit")
}

/// Administration as `portcullis serve` serves it, without any other service.
async fn serve(admin: Arc<AdministrationPoint>) -> Server {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let settings = server::Settings {
        decisions_address: any,
        http_address: any,
        admin_address: any,
        decision_runtimes: 1,
        ..Default::default()
    };
    let factories = ServiceFactories {
        finish: Arc::new(|_| Box::pin(std::future::ready(()))),
        decisions: Arc::new(|_| GrpcServices {
            routes: Routes::default(),
            barrier: Arc::new(NoWriteBarrier),
            limits: crate::api::wires::decision_limits,
        }),
        admin: Box::new(move |_| app::admin_services(admin, None)),
        http: Box::new(|_| HttpServices {
            ready: Arc::new(|| Ok("ready")),
            metrics: Arc::new(String::new),
            routes: axum::Router::new(),
            barrier: Arc::new(NoWriteBarrier),
        }),
    };
    BoundListeners::bind(settings).unwrap().serve(factories).await.unwrap()
}
