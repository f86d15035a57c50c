//! `portcullis demo`: to come.

use clap::Args;

use super::{Failure, output::Output};

/// Show it all
#[derive(Debug, Args)]
pub(super) struct DemoArgs {}

pub(super) fn run(_arguments: DemoArgs, _output: &Output) -> Result<(), Failure> {
    Ok(())
}
