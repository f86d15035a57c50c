//! The files of a SQLite store that an operator copies, backs up, mistypes and restores: a copy is complete, or it is refused.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::harness::{CommandResult, PATIENCE, ServerProcess, TestChain, TestWorld, binary, request, run_with};

async fn reason(server: &ServerProcess, chain: &TestChain) -> String {
    let asked = request(chain, Bytes::new(), "crm/look", "{}");
    server.connect().await.check(asked).await.unwrap().into_inner().reason
}

fn revoke(server: &ServerProcess, world: &TestWorld, session: &str) {
    let mut command = binary();
    command.args(["--json", "revoke", "session", session, "--unknown-ok", "--target"]).arg(server.admin_url());
    run_with(command.arg("--data").arg(world.data()), "").ended(0);
}

fn stop(mut server: ServerProcess) {
    server.terminate();
    assert!(server.wait().success(), "{}", server.log());
}

/// The names in a folder that begin with `store.db`.
fn files(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.starts_with("store.db"));
    names.sort();
    names
}

fn serve(data: &Path) -> Command {
    let mut command = binary();
    command.arg("serve").args(["--listen", "--http-listen", "--admin-listen"].iter().flat_map(|flag| [*flag, "127.0.0.1:0"]));
    command.arg("--data").arg(data);
    command
}

fn url(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

/// A new data folder that holds one file of a store.
fn folder_with(world: &TestWorld, name: &str, store: &Path) -> PathBuf {
    let data = world.folder.path().join(name);
    std::fs::create_dir(&data).unwrap();
    std::fs::copy(store, data.join("store.db")).unwrap();
    data
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_clean_stop_one_file_is_the_whole_store() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let chain = world.session("alpha", "killed");
    assert_eq!(reason(&server, &chain).await, "OK");
    revoke(&server, &world, "killed");
    stop(server);
    assert_eq!(files(&world.data()), ["store.db"]);
    // A command that opens the store itself leaves one file too.
    let mut command = binary();
    command
        .args(["revoke", "session", "later", "--unknown-ok", "--store", &url(&world.data().join("store.db")), "--data"])
        .arg(world.data());
    run_with(&mut command, "").ended(0);
    assert_eq!(files(&world.data()), ["store.db"]);

    let copied = folder_with(&world, "copied", &world.data().join("store.db"));
    let server = ServerProcess::start_at(&world, &binary(), &copied);
    assert_eq!(reason(&server, &chain).await, "REVOKED_SESSION");
    assert_eq!(reason(&server, &world.session("alpha", "later")).await, "REVOKED_SESSION");
    assert_eq!(reason(&server, &world.session("alpha", "other")).await, "OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_store_holds_its_kills() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let chain = world.session("alpha", "killed");
    assert_eq!(reason(&server, &chain).await, "OK");
    revoke(&server, &world, "killed");
    let file = world.folder.path().join("backup.db");
    let backup = |more: &[&str]| {
        let mut command = binary();
        command.args(["--json", "store", "backup"]).arg(&file).args(more).arg("--data").arg(world.data());
        run_with(&mut command, "")
    };
    let made = backup(&[]).ended(0).json();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(made["bytes"].as_u64().unwrap(), file.metadata().unwrap().len());
    let text = |ran: CommandResult| ran.stderr;
    assert!(text(backup(&[]).ended(64)).contains("--overwrite"));
    let again = backup(&["--overwrite"]).ended(0).json();
    assert_eq!(again["revision"], made["revision"]);
    assert!(text(backup(&["--store", "postgres://u@127.0.0.1/d"]).ended(64)).contains("pg_dump"));
    let nothing = world.folder.path().join("nothing.db");
    assert!(text(backup(&["--overwrite", "--store", &url(&nothing)]).ended(78)).contains("there is no store"));
    assert!(!nothing.exists());
    // The server continues without any change.
    assert_eq!(server.get("/readyz").0, 200);
    revoke(&server, &world, "after");
    stop(server);

    let restored = folder_with(&world, "restored", &file);
    let server = ServerProcess::start_at(&world, &binary(), &restored);
    assert_eq!(reason(&server, &chain).await, "REVOKED_SESSION");
    assert_eq!(reason(&server, &world.session("alpha", "after")).await, "OK", "a backup does not know what came after it");
    let history: String =
        rusqlite::Connection::open(&file).unwrap().query_row("SELECT history FROM meta", (), |row| row.get(0)).unwrap();
    assert_eq!(history, made["revision"].as_str().unwrap().rsplit_once('.').unwrap().0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_store_is_no_empty_store() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    revoke(&server, &world, "killed");
    stop(server);
    let whole = world.data().join("store.db");
    let check = |name: &str, make: &dyn Fn(&Path), says: &str| {
        let data = world.folder.path().join(name);
        std::fs::create_dir(&data).unwrap();
        let store = data.join("store.db");
        make(&store);
        let before = std::fs::read(&store).ok();
        let commands: [Vec<String>; 4] = [
            vec![],
            vec!["--store".into(), url(&store), "--create".into()],
            vec!["revoke".into(), "all".into(), "--store".into(), url(&store)],
            vec!["store".into(), "backup".into(), data.join("b.db").display().to_string(), "--store".into(), url(&store)],
        ];
        for (number, arguments) in commands.into_iter().enumerate() {
            let mut command = if number < 2 { serve(&data) } else { binary() };
            command.args(arguments);
            if number == 2 {
                command.arg("--operator-key").arg(world.data().join("local.jwk"));
            }
            let ran = run_with(&mut command, "").ended(78);
            assert!(ran.stderr.contains(says) && ran.stderr.contains("store.db"), "{name} {number}: {ran:?}");
            assert_eq!(std::fs::read(&store).ok(), before, "{name} {number}: it is left as it is");
            assert_eq!(files(&data), ["store.db"], "{name} {number}");
        }
    };
    let sql = |path: &Path, sql: &str| {
        let connection = rusqlite::Connection::open(path).unwrap();
        connection.execute_batch(sql).unwrap();
        connection.close().unwrap();
    };
    check("shell", &|path| sql(path, "PRAGMA journal_mode = WAL"), "shell of a database");
    check("empty", &|path| drop(std::fs::File::create(path).unwrap()), "empty (0 bytes)");
    check(
        "headless",
        &|path| {
            std::fs::copy(&whole, path).unwrap();
            sql(path, "DELETE FROM head; PRAGMA wal_checkpoint(TRUNCATE)");
        },
        "no head",
    );
    check(
        "text",
        &|path| std::fs::write(path, "these are notes, no database at all. ".repeat(500)).unwrap(),
        "not a SQLite database",
    );
    check("another", &|path| sql(path, "CREATE TABLE people (name TEXT)"), "of another program");
    check(
        "newer",
        &|path| {
            std::fs::copy(&whole, path).unwrap();
            sql(path, "PRAGMA user_version = 999; PRAGMA wal_checkpoint(TRUNCATE)");
        },
        "use the version that made it",
    );
    check("folder", &|path| std::fs::create_dir(path).unwrap(), "is a folder");
}

#[test]
fn a_store_that_may_not_be_written_to_is_refused() {
    let world = TestWorld::new();
    stop(ServerProcess::start(&world));
    let data = world.folder.path().join("readable");
    std::fs::create_dir(&data).unwrap();
    let store = data.join("store.db");
    std::fs::copy(world.data().join("store.db"), &store).unwrap();
    std::fs::set_permissions(&store, std::fs::Permissions::from_mode(0o444)).unwrap();
    let mut command = serve(&data);
    command.args(["--store", &url(&store)]);
    if rustix::process::geteuid().is_root() {
        // Root may write to any file, so another user runs the command. That user may not enter root's home, where the program may be.
        const NOBODY: u32 = 65_534;
        let program = world.folder.path().join("portcullis");
        std::fs::copy(command.get_program(), &program).unwrap();
        let mut copied = Command::new(&program);
        copied.args(command.get_args()).current_dir(world.folder.path());
        for (name, _) in command.get_envs() {
            copied.env_remove(name);
        }
        command = copied;
        for path in [world.folder.path(), &data] {
            std::os::unix::fs::chown(path, Some(NOBODY), None).unwrap();
        }
        command.uid(NOBODY);
    }
    let ran = run_with(&mut command, "").ended(78);
    assert!(ran.stderr.contains("cannot be written to") && ran.stderr.contains("store.db"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_path_makes_no_store() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    stop(server);
    let key = world.data().join("local.jwk");
    let typo = world.folder.path().join("folder/stroe.db");
    let elsewhere = world.folder.path().join("elsewhere");
    let nothing_made = |ran: &CommandResult| {
        assert!(ran.stderr.contains("there is no store at") && ran.stderr.contains("stroe.db"), "{ran:?}");
        assert!(!typo.exists() && !typo.parent().unwrap().exists(), "{ran:?}");
    };
    let policies = world.policies();
    for arguments in [
        vec!["revoke", "all"],
        vec!["reinstate", "all"],
        vec!["revocations"],
        vec!["fleet", "status"],
        vec!["approvals"],
        vec!["store", "adopt"],
        vec!["policy", "history"],
        vec!["policy", "apply", policies.to_str().unwrap()],
    ] {
        let mut command = binary();
        command.args(&arguments).args(["--store", &url(&typo), "--operator-key"]).arg(&key).arg("--data").arg(&elsewhere);
        let ran = run_with(&mut command, "").ended(78);
        nothing_made(&ran);
        assert!(!elsewhere.exists(), "{arguments:?} left a data folder behind");
    }
    let ran = run_with(serve(&elsewhere).args(["--store", &url(&typo)]), "").ended(78);
    nothing_made(&ran);
    let ran_env = run_with(serve(&elsewhere).env("PORTCULLIS_STORE", url(&typo)), "").ended(78);
    nothing_made(&ran_env);
    assert!(!elsewhere.exists(), "a server left a data folder behind");

    // The message names the command that creates a store, and that command works.
    let said = format!("portcullis serve --store {} --create", url(&typo));
    assert!(ran.stderr.contains(&said), "{ran:?}");
    let store = url(&typo);
    let flags = ["--store", &store, "--create"];
    for _ in 0..2 {
        // A second start with the same flags finds the store.
        let server = ServerProcess::start_at(&world, binary().args(flags), &elsewhere);
        assert!(typo.exists());
        stop(server);
    }
    let made = std::fs::read(elsewhere.join("place.json")).unwrap();
    assert!(!made.is_empty());

    // A store that was followed is not created again, even with the flag.
    std::fs::remove_file(&typo).unwrap();
    let ran = run_with(serve(&elsewhere).args(flags), "").ended(78);
    assert!(ran.stderr.contains("place.json") && ran.stderr.contains("back"), "{ran:?}");
    assert!(!typo.exists());
    std::fs::remove_file(world.data().join("store.db")).unwrap();
    let ran = run_with(&mut serve(&world.data()), "").ended(78);
    assert!(ran.stderr.contains("place.json"), "{ran:?}");
    assert_eq!(files(&world.data()), [""; 0]);
}

/// A mistyped data folder begins no empty store, in which nothing is revoked, and no command makes one.
#[test]
fn a_mistyped_data_folder_is_not_made() {
    let world = TestWorld::new();
    stop(ServerProcess::start(&world));
    let typo = world.folder.path().join("dta");
    let ran = run_with(&mut serve(&typo), "").ended(78);
    assert!(ran.stderr.contains("there is no store at") && ran.stderr.contains("dta/store.db"), "{ran:?}");
    assert!(ran.stderr.contains(&format!("portcullis serve --data {} --create", typo.display())), "{ran:?}");
    run_with(serve(&typo).args(["--policies"]).arg(world.policies()), "").ended(78);
    run_with(binary().arg("serve").env("PORTCULLIS_DATA", &typo), "").ended(78);
    let mut kill = binary();
    kill.args(["revoke", "all", "--store", &url(&world.data().join("store.db")), "--operator-key"]);
    let ran = run_with(kill.arg(world.data().join("local.jwk")).arg("--data").arg(&typo), "").ended(78);
    assert!(ran.stderr.contains("nothing was done") && ran.stderr.contains("there is no folder"), "{ran:?}");
    assert!(!typo.exists());

    let server = ServerProcess::start_at(&world, binary().arg("--create"), &typo);
    assert!(typo.join("store.db").exists());
    assert!(server.log().contains("WARN") && server.log().contains("made a new, empty store"), "{}", server.log());
    stop(server);
}

/// `store backup --overwrite` under a mistyped name, and the store that it copies.
#[test]
fn a_backup_replaces_backups_alone() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let data = world.data();
    let backup = |file: &Path, environment: Option<String>| {
        let mut command = binary();
        if let Some(store) = environment {
            command.env("PORTCULLIS_STORE", store);
        }
        command.args(["store", "backup", "--overwrite"]).arg(file).arg("--data").arg(&data);
        run_with(&mut command, "")
    };
    for file in [data.join("store.db-wal"), data.join("place.json"), world.policies().join("policy.yaml")] {
        let before = std::fs::read(&file).unwrap();
        let ran = backup(&file, None).ended(64);
        assert!(ran.stderr.contains(file.to_str().unwrap()), "{ran:?}");
        assert_eq!(std::fs::read(&file).unwrap(), before);
    }
    assert_eq!(server.get("/readyz").0, 200, "{}", server.log());
    let file = world.folder.path().join("b.db");
    for _ in 0..2 {
        let made = backup(&file, None).ended(0);
        assert!(made.stdout.contains(&format!("store {}\n", url(&data.join("store.db")))), "{made:?}");
    }
    // It takes the store that the environment names, as `serve` does.
    let ran = backup(&file, Some("postgres://u@127.0.0.1/d".to_owned())).ended(64);
    assert!(ran.stderr.contains("pg_dump"), "{ran:?}");
    let missing = world.folder.path().join("missing.db");
    assert!(backup(&file, Some(url(&missing))).ended(78).stderr.contains("missing.db"));
    stop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_place_shows_a_folder_that_was_put_back() {
    let world = TestWorld::new();
    let place = world.folder.path().join("elsewhere.json");
    let place = place.to_str().unwrap();
    let policies = world.policies();
    let first = ServerProcess::start_with(&world, binary().arg("--policies").arg(&policies).args(["--place", place]));
    let chain = world.session("alpha", "killed");
    assert_eq!(reason(&first, &chain).await, "OK");
    stop(first);
    let snapshot = world.folder.path().join("snapshot");
    copy_folder(&world.data(), &snapshot);
    let server = ServerProcess::start_with(&world, binary().args(["--place", place]));
    revoke(&server, &world, "killed");
    let until = Instant::now() + PATIENCE;
    let kept = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    while kept(Path::new(place)) != kept(&world.data().join("place.json"))
        || kept(Path::new(place)) == kept(&snapshot.join("place.json"))
    {
        assert!(Instant::now() < until, "{}", kept(Path::new(place)));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop(server);

    // All of the folder is restored, and nothing in it shows that.
    std::fs::remove_dir_all(world.data()).unwrap();
    copy_folder(&snapshot, &world.data());
    let refused = run_with(serve(&world.data()).args(["--place", place]), "").ended(78);
    assert!(refused.stderr.contains("elsewhere.json") && refused.stderr.contains("store adopt"), "{refused:?}");
    let mut adopt = binary();
    adopt
        .args(["store", "adopt", "--reason", "drill", "--store", &url(&world.data().join("store.db")), "--data"])
        .arg(world.data());
    run_with(&mut adopt, "").ended(0);
    let server = ServerProcess::start_with(&world, binary().args(["--place", place]));
    assert_eq!(reason(&server, &chain).await, "REVOKED_ALL");
    stop(server);

    // A file that cannot keep the position is reported at the start.
    for wrong in ["/no/such/folder/place.json", world.folder.path().to_str().unwrap()] {
        let refused = run_with(serve(&world.data()).args(["--place", wrong]), "").ended(78);
        assert!(refused.stderr.contains(wrong), "{refused:?}");
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
