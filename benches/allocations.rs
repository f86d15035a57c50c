//! How often a warm decision allocates. It counts and does not time, in a program of its own, so that counting slows no other
//! bench.

#[path = "../load-tests/fixture.rs"]
#[allow(dead_code, reason = "the load test uses the rest")]
mod fixture;

use std::alloc::System;
use std::hint::black_box;
use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use fixture::{ARGUMENTS, CompanyFixture, TOOL};
use portcullis::model::decision::Effect;
use portcullis::model::json::parse_object;
use portcullis::model::request::ToolCall;
use portcullis::model::revision::{HistoryId, Revision, StateDigest};
use portcullis::model::rows::DocumentOrigin;
use portcullis::model::time::{Clock as _, SystemClock};
use portcullis::pdp::{self, PreparedChain};
use portcullis::policy::source::{SourceFile, parse_files};
use portcullis::revocation::RevocationIndex;
use portcullis::snapshot::{FullState, SnapshotBuilder};
use portcullis::token::{self, VerificationOptions};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DECISIONS: usize = 1000;

fn main() -> Result<()> {
    let company = CompanyFixture::new()?;
    let parsed = parse_files(&[SourceFile { path: "company.yaml".to_owned(), content: company.policy(0)?.into_bytes() }]);
    let snapshot = SnapshotBuilder::new(Arc::new(RevocationIndex::new())).replace_all(FullState {
        revision: Revision { history: HistoryId::new("00000000-0000-7000-8000-000000000000"), number: 12 },
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: parsed.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect(),
        revocations: Vec::new(),
    })?;
    let arguments = parse_object(ARGUMENTS.as_bytes())?;
    let mut out = std::io::stdout();
    for (tool, expected) in [(TOOL, Effect::Permit), ("hr/self.read", Effect::Deny)] {
        for tokens in [1, 2, 5] {
            let now = SystemClock.now();
            let chain = token::verify(&company.chain(0, tokens, now)?, snapshot.trust(), &VerificationOptions::default(), now)?;
            let prepared = PreparedChain::new(Arc::new(chain), &snapshot).context("the chain has no identities")?;
            let call = ToolCall::new(tool, &arguments);
            if pdp::decide(&prepared, &call, &snapshot, now).effect != expected {
                bail!("`{tool}` is not {expected:?}");
            }
            let region = Region::new(ALLOCATOR);
            for _ in 0..DECISIONS {
                black_box(pdp::decide(black_box(&prepared), &call, &snapshot, now));
            }
            let count = region.change().allocations as f64 / DECISIONS as f64;
            writeln!(out, "pdp::decide, {tokens} tokens, {expected:?}: {count} allocations")?;
        }
    }
    Ok(())
}
