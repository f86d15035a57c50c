//! A policy file is refused with places inside it, or compiles or is refused as a whole; what is stored of it reads back.
//! `cargo +nightly fuzz run policy`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::rows::DocumentOrigin;
use portcullis::policy::CompiledPolicy;
use portcullis::policy::document::{Document, DocumentBody};
use portcullis::policy::source::{SourceFile, parse_files};

fuzz_target!(|data: &[u8]| {
    let lines = data.iter().filter(|byte| **byte == b'\n').count() + 1;
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: data.to_vec() }]);
    for diagnostic in &parsed.diagnostics {
        assert!(diagnostic.line >= 1 && diagnostic.line as usize <= lines + 1, "{diagnostic}");
        assert!(!diagnostic.message.contains('\n'), "{diagnostic:?}");
    }
    if parsed.has_errors() {
        return;
    }
    for document in parsed.documents.iter().filter(|document| !matches!(document.body, DocumentBody::Test(_))) {
        let row = document.to_row(DocumentOrigin::Folder);
        assert!(Document::from_row(&row).is_ok_and(|again| again == *document), "{}", row.json);
    }
    let _ = CompiledPolicy::compile(&parsed.documents);
});
