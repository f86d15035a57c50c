//! The connection to the server: TLS, passwords, and a real pooler in between.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::*;
use crate::testing::proxy::{ProxyRoute, RouteMode};

/// Long enough for a busy machine, and far below the limit of the work itself.
const SOON: Duration = Duration::from_secs(30);

/// Asks a store through a proxy that stops forwarding at certain words. The connection stays open, and no answer ever comes.
async fn breaks_at(words: &str, incarnation: &str, ask: impl AsyncFn(&PostgresStore, &ReplicaHeartbeat) -> Result<(), Error>) {
    let server = shared();
    let database = server.database();
    let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
    let route = ProxyRoute::listen(0, ([127, 0, 0, 1], server.port()).into()).await.unwrap();
    let near = open(&database).await.unwrap();
    let far = open(&format!("postgres://{}@{}/{name}?notify=off", server.superuser(), route.address())).await.unwrap();
    far.register_replica(&registration(incarnation)).await.unwrap();
    near.commit(kill("s")).await.unwrap();
    let heartbeat = beat(incarnation, 1);
    ask(&far, &heartbeat).await.unwrap();
    near.commit(kill("t")).await.unwrap();
    route.set_mode(RouteMode::BlackHoleAt(words.to_owned()));
    let asked = tokio::time::timeout(SOON, ask(&far, &heartbeat)).await;
    let refused = asked.unwrap_or_else(|_| panic!("still waiting at `{words}`"));
    assert!(refused.is_err(), "nobody said `{words}`");
    route.set_mode(RouteMode::Pass);
    let back = until("the store is not found again", || async { ask(&far, &heartbeat).await.is_ok() });
    assert!(tokio::time::timeout(SOON, back).await.is_ok(), "not back after `{words}`");
    // A commit is not lost because its reserved connection is lost: nothing was sent on that connection yet.
    far.commit(kill("u")).await.unwrap();
    route.set_mode(RouteMode::BlackHoleAt("BEGIN".to_owned()));
    let mended = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        route.set_mode(RouteMode::Pass);
    };
    let (done, ()) = tokio::join!(far.commit(kill("v")), mended);
    done.unwrap();
    assert_eq!(verify_change_log(&near).await.revision.number, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_that_breaks_in_the_middle_is_soon_left() {
    let poll = async |store: &PostgresStore, heartbeat: &ReplicaHeartbeat| store.poll_changes(heartbeat).await.map(drop);
    let load = async |store: &PostgresStore, heartbeat: &ReplicaHeartbeat| store.load_for_replica(heartbeat).await.map(drop);
    tokio::join!(
        breaks_at("BEGIN", "a", poll),
        breaks_at("UPDATE portcullis.replicas", "b", poll),
        breaks_at("FROM portcullis.head", "c", poll),
        breaks_at("SELECT hash FROM portcullis.log", "d", poll),
        breaks_at("SELECT number, previous_hash", "e", poll),
        breaks_at("COMMIT", "f", poll),
        breaks_at("BEGIN", "g", load),
        breaks_at("SELECT hash FROM portcullis.log", "h", load),
    );
}

/// An authority, and a certificate that it signed for a name.
fn certificates(folder: &Path, name: &str) -> (PathBuf, String, String) {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let path = folder.join(format!("{}.pem", uuid::Uuid::new_v4()));
    std::fs::write(&path, authority.pem()).unwrap();
    (path, certificate.pem(), key.serialize_pem())
}

#[tokio::test]
async fn tls_to_whom_it_should_be() {
    let server = PostgresServer::start(&[]);
    let database = server.database();
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, key) = certificates(folder.path(), "127.0.0.1");
    let (other_authority, ..) = certificates(folder.path(), "127.0.0.1");
    let (name_authority, name_certificate, name_key) = certificates(folder.path(), "db.example");
    let install = |certificate: &str, key: &str| {
        // The server itself writes the files, so that they belong to its user.
        let program = |path: &str, text: &str| {
            format!("COPY (SELECT regexp_split_to_table('{text}', E'\\n')) TO PROGRAM 'umask 077; cat > {path}'")
        };
        server.sql("postgres", &program("server.crt", certificate));
        server.sql("postgres", &program("server.key", key));
        server.change_setting("ssl = on");
    };
    let check = async |mode: &str, authority: &Path, expected: Result<(), &str>| {
        let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
        let place = format!("{}@127.0.0.1:{}/{name}", server.superuser(), server.port());
        let url = format!("postgres://{place}?sslmode={mode}&sslrootcert={}", authority.display());
        let opened = open(&url).await;
        match expected {
            Ok(()) => {
                let store = opened.unwrap();
                store.commit(kill("t")).await.unwrap();
                let plain = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                    WHERE application_name = 'portcullis' AND NOT ssl AND state IS NOT NULL";
                assert_eq!(server.sql(&database, plain), "0");
            }
            Err(part) => {
                let error = opened.err().unwrap().to_string();
                assert!(error.contains(part), "{mode}: {error}");
            }
        }
    };
    check("require", &authority, Err("does not support TLS")).await;
    install(&certificate, &key);
    until("no TLS", || async { server.sql("postgres", "SHOW ssl") == "on" }).await;
    check("verify-full", &authority, Ok(())).await;
    check("require", &authority, Ok(())).await;
    check("verify-full", &other_authority, Err("certificate")).await;
    check("require", &other_authority, Err("certificate")).await;
    check("verify-full", &folder.path().join("none.pem"), Err("sslrootcert")).await;
    std::fs::write(folder.path().join("empty.pem"), "nothing").unwrap();
    check("verify-full", &folder.path().join("empty.pem"), Err("no certificate")).await;
    // Signed by the right authority, but for another host.
    install(&name_certificate, &name_key);
    until("the certificate is not read", || async {
        let settings = Settings::parse(&format!("{database}&notify=off"), Durability::Single).unwrap();
        drop(settings);
        let url = format!("postgres://{}@127.0.0.1:{}/postgres", server.superuser(), server.port());
        let url = format!("{url}?sslmode=require&sslrootcert={}", name_authority.display());
        open(&url).await.is_ok()
    })
    .await;
    check("require", &name_authority, Ok(())).await;
    check("verify-full", &name_authority, Err("certificate")).await;
}

/// The server asks for a password (SCRAM), which no message ever contains.
#[tokio::test]
async fn passwords_are_never_said() {
    let server = PostgresServer::start(&["password_encryption=scram-sha-256"]);
    let database = server.database();
    let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
    server.sql(name, &format!("CREATE ROLE asked LOGIN PASSWORD 's3cr3t-canary'; ALTER DATABASE {name} OWNER TO asked"));
    let rules = server.folder().join("data/pg_hba.conf");
    let text = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("host all asked 127.0.0.1/32 scram-sha-256\n{text}")).unwrap();
    server.sql("postgres", "SELECT pg_reload_conf()");
    let url = |password: &str| format!("postgres://asked{password}@127.0.0.1:{}/{name}", server.port());
    until("the rules are not read", || async { open(&url("")).await.is_err() }).await;
    for wrong in ["", ":s3cr3t-canary-not", ":"] {
        let error = open(&url(wrong)).await.err().unwrap();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        let said = format!("{error} {error:?}");
        assert!(!said.contains("canary") && said.contains("password"), "{said}");
    }
    let store = open(&url(":s3cr3t-canary")).await.unwrap();
    store.commit(kill("t")).await.unwrap();
    drop(store);
    assert_eq!(verify_change_log(&open(&url(":s3cr3t%2Dcanary")).await.unwrap()).await.revision.number, 1);
}

/// Of several hosts, one is down, one never answers and one hangs at COMMIT. None of them keeps the store from the host that
/// serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_host_that_serves_is_found() {
    let (serving, frozen) = (PostgresServer::start(&[]), PostgresServer::start(&[]));
    let database = serving.database();
    let name = database.split('?').next().unwrap().rsplit('/').next().unwrap();
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    frozen.freeze(true);
    let place = |port: u16| format!("127.0.0.1:{port}");
    let hosts = [place(dead), place(frozen.port()), place(serving.port())].join(",");
    let store = open(&format!("postgres://{}@{hosts}/{name}", serving.superuser())).await.unwrap();
    store.commit(kill("t")).await.unwrap();
    store.register_replica(&registration("a")).await.unwrap();
    until("no poll reaches the host that serves", || async { store.poll_changes(&beat("a", 0)).await.is_ok() }).await;
    verify_change_log(&store).await;
    drop(store);

    // The copy replaces a server that can no longer commit.
    serving.change_setting("synchronous_standby_names = 'nobody'");
    let old = open_hanging(&serving, name).await;
    serving.crash();
    let copy = PostgresServer::start_copy(&serving, &["synchronous_standby_names="]);
    serving.restart();
    let hosts = [place(serving.port()), place(copy.port())].join(",");
    let both = format!("postgres://{}@{hosts}/{name}", serving.superuser());
    until("the old server holds on to those it cannot serve", || async {
        // Opening only reads, and may find the old server. A later poll is committed on the new server or not at all.
        let Ok(store) = open(&both).await else { return false };
        until("no poll is committed", || async { store.poll_changes(&beat("a", 0)).await.is_ok() }).await;
        true
    })
    .await;
    let heard =
        |server: &PostgresServer| server.sql(name, "SELECT max(seen_unix_ms) FROM portcullis.replicas").parse::<i64>().unwrap();
    assert!(heard(&copy) > old);
}

/// When the replica was last heard on a server that waits for a standby which does not exist.
async fn open_hanging(server: &PostgresServer, name: &str) -> i64 {
    until("the setting is not read", || async { server.sql("postgres", "SHOW synchronous_standby_names") == "nobody" }).await;
    server.sql(name, "SELECT max(seen_unix_ms) FROM portcullis.replicas").parse().unwrap()
}

/// pgbouncer in transaction mode, which may run each transaction on a different connection.
struct PgBouncer {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl PgBouncer {
    fn start(server: &PostgresServer, database: &str) -> Self {
        let folder = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let settings = format!(
            "[databases]\n{database} = host={} port={} user={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 3\nserver_round_robin = 1\n",
            server.folder().display(),
            server.port(),
            server.superuser(),
        );
        let path = folder.path().join("pgbouncer.ini");
        std::fs::write(&path, settings).unwrap();
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("this test needs pgbouncer: install Debian's package `pgbouncer`, as ./test.sh does");
        let mut command = Command::new(program);
        if rustix::process::geteuid().is_root() {
            // It refuses to run as root, and changes to the named user once it has its port.
            command.args(["-u", "nobody"]);
        }
        let process = command.arg("-q").arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { process, port, _folder: folder }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_shares_connections_does_not_matter() {
    let server = PostgresServer::start(&[]);
    let (mut names, mut poolers) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let url = server.database();
        let name = url.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
        poolers.push(PgBouncer::start(&server, &name));
        names.push(name);
    }
    let url = |index: usize, notify: &str| {
        let port = poolers[index].port;
        format!("postgres://{}@127.0.0.1:{port}/{}?notify={notify}", server.superuser(), names[index])
    };
    until("the pooler does not answer", || async { open(&url(0, "off")).await.is_ok() }).await;
    until("the pooler does not answer", || async { open(&url(1, "off")).await.is_ok() }).await;
    // More clients than connections: state that one client leaves on a connection would reach the next client.
    for notify in ["off", "on"] {
        let shared_by_all = url(0, notify);
        let stores = futures_util::future::join_all((0..6).map(|_| open(&shared_by_all))).await;
        let stores: Vec<_> = stores.into_iter().map(|store| Arc::new(store.unwrap())).collect();
        let tasks = stores.iter().enumerate().map(|(index, store)| {
            let store = store.clone();
            let name = format!("{notify}{index}");
            tokio::spawn(async move {
                store.register_replica(&registration(&name)).await.unwrap();
                for turn in 0..20 {
                    until("no commit", || async { store.commit(kill(&format!("{name}-{turn}"))).await.is_ok() }).await;
                    until("no poll", || async { store.poll_changes(&beat(&name, turn)).await.is_ok() }).await;
                    until("no key", || async { store.spend_proof([turn as u8; 32], i64::MAX).await.is_ok() }).await;
                }
            })
        });
        for task in futures_util::future::join_all(tasks).await {
            task.unwrap();
        }
        let state = verify_change_log(&*stores[0]).await;
        assert!(state.revocations.len() >= 120);
        assert_eq!(verify_change_log(&*stores[5]).await, state);
    }
    // Settings of one transaction do not reach the next transaction on the connection.
    let lock_timeout = server
        .psql()
        .args(["-h", "127.0.0.1", "-p", &poolers[0].port.to_string(), "-d", &names[0], "-c", "SHOW lock_timeout"])
        .output()
        .unwrap();
    assert_eq!(lock_timeout.stdout, b"0\n", "{lock_timeout:?}");
}
