//! The generated protobuf code is committed, so that a user needs no `protoc`. This test fails when the code differs from `proto/`.
//!
//! `UPDATE=1 cargo test codegen` writes the code again.

use std::path::{Path, PathBuf};

#[test]
fn generated_code_matches_proto() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("src/api/gen");
    let scratch = tempfile::tempdir().unwrap();
    generate(&root.join("proto"), scratch.path());
    let mut drifted = Vec::new();
    for file in files(scratch.path()) {
        let fresh = std::fs::read(scratch.path().join(&file)).unwrap();
        if std::fs::read(committed.join(&file)).unwrap_or_default() == fresh {
            continue;
        }
        if std::env::var_os("UPDATE").is_some() {
            std::fs::create_dir_all(&committed).unwrap();
            std::fs::write(committed.join(&file), fresh).unwrap();
        } else {
            drifted.push(file);
        }
    }
    assert!(drifted.is_empty(), "`proto/` and src/api/gen/ differ in {drifted:?}: run `UPDATE=1 cargo test codegen`");
}

/// Every `.proto` file under a folder, in the order of their names.
fn proto_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found = entries.flat_map(|path| match path.is_dir() {
        true => proto_files(&path),
        false => vec![path],
    });
    let mut files: Vec<_> = found.filter(|path| path.extension().is_some_and(|extension| extension == "proto")).collect();
    files.sort();
    files
}

fn generate(proto: &Path, out: &Path) {
    let descriptors = protox::Compiler::new([proto])
        .unwrap()
        .include_source_info(true)
        .include_imports(true)
        .open_files(proto_files(proto))
        .unwrap()
        .file_descriptor_set();
    let mut reflection = descriptors.clone();
    reflection.file.iter_mut().for_each(|file| file.source_code_info = None);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&reflection)).unwrap();
    tonic_prost_build::configure().bytes(".").out_dir(out).emit_rerun_if_changed(false).compile_fds(descriptors).unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| PathBuf::from(entry.unwrap().file_name())).collect();
    files.sort();
    files
}
