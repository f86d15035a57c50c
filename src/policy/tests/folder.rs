//! Tests of reading a folder: files that are read, skipped or refused.

use std::fs;
use std::path::Path;

use super::super::source::{parse_files, read_folder};
use super::KEY_X;

fn write(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn paths(root: &Path) -> Result<Vec<String>, String> {
    read_folder(root).map(|files| files.into_iter().map(|file| file.path).collect()).map_err(|error| error.to_string())
}

#[test]
fn a_folder_is_its_yaml_and_the_keys_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let issuer = |id: &str, file: &str| format!("{{kind: issuer, id: {id}, keys: {{file: {file}}}}}\n");
    let jwks = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{KEY_X}"}}]}}"#);
    write(root, "b.yaml", issuer("https://b", "keys/b.json"));
    write(root, "a/x.yml", issuer("https://x", "./x.json"));
    write(root, "a/x.json", &jwks);
    write(root, "keys/b.json", &jwks);
    write(root, "keys/private.json", "not read");
    write(root, "notes.txt", "not read");
    write(root, ".hidden.yaml", "kind: nonsense");
    write(root, ".git/x.yaml", "kind: nonsense");
    std::os::unix::fs::symlink("b.yaml", root.join("link.yaml")).unwrap();
    assert_eq!(paths(root).unwrap(), ["a/x.yml", "b.yaml", "link.yaml", "a/x.json", "keys/b.json"]);
    let parsed = parse_files(&read_folder(root).unwrap());
    assert_eq!((parsed.documents.len(), parsed.diagnostics), (3, vec![]));
    assert_eq!(paths(&root.join("b.yaml")).unwrap(), ["b.yaml", "keys/b.json"]);
}

#[test]
fn what_is_refused() {
    let check = |make: &dyn Fn(&Path), expected: &str| {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(outside.path(), "secret.yaml", "kind: group");
        std::os::unix::fs::symlink(outside.path(), folder.path().join(".outside")).unwrap();
        make(folder.path());
        let said = paths(folder.path()).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    let outside = |root: &Path| root.join(".outside").canonicalize().unwrap();
    check(&|_| {}, "holds no policy");
    check(&|root| write(root, "x.json", "{}"), "holds no policy");
    check(
        &|root| std::os::unix::fs::symlink(outside(root).join("secret.yaml"), root.join("a.yaml")).unwrap(),
        "leads out of the policy folder",
    );
    check(&|root| std::os::unix::fs::symlink(outside(root), root.join("a")).unwrap(), "it is a link to a folder");
    check(&|root| std::os::unix::fs::symlink(root.join("gone"), root.join("a.yaml")).unwrap(), "cannot read");
    check(&|root| write(root, &format!("{}a.yaml", "d/".repeat(20)), ""), "16 folders deep");
    check(&|root| write(root, "a.yaml", vec![b'#'; 8 * 1024 * 1024 + 1]), "8388608 bytes a file");
    check(&|root| (0..5).for_each(|n| write(root, &format!("{n}.yaml"), vec![b'#'; 8 * 1024 * 1024])), "33554432 bytes");
    check(
        &|root| {
            write(root, "a.yaml", "{kind: issuer, id: i, keys: {file: k.json}}");
            std::os::unix::fs::symlink(outside(root).join("secret.yaml"), root.join("k.json")).unwrap();
        },
        "leads out of the policy folder",
    );
    assert!(paths(Path::new("/nowhere/at/all")).unwrap_err().contains("cannot read `/nowhere/at/all`"));
    let file = tempfile::NamedTempFile::with_suffix(".txt").unwrap();
    assert!(paths(file.path()).unwrap_err().contains("its name must end in"));
}
