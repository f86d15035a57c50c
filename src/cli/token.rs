//! `portcullis token`: makes keys, roots, hops and proofs; reads and verifies chains without a server.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::output::CommandOutput;
use super::{CommandFailure, input};
use crate::model::json::{JsonObject, parse_object};
use crate::model::jwk::PublicKey;
use crate::model::reason::Reason;
use crate::model::time::{Clock as _, ClockReading, SystemClock};
use crate::policy::document::{Document, DocumentBody};
use crate::policy::source::{parse_files, read_folder};
use crate::snapshot::build_trust_table;
use crate::token::{
    self, Presentation, PrivateKey, ProofCall, RegistryMode, Rejection, UnverifiedChain, VerificationOptions, issue,
};

/// Make and read keys, delegation tokens and proofs
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make an Ed25519 key: the private JWK into a file (mode 0600), the public one on standard output
    Keygen {
        /// Where the private key goes; an existing file is not overwritten
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Sign a root: user U authorizes agent A, as application P, with scope S, until T
    Issue {
        /// The issuer's private key, a JWK file
        #[arg(long, value_name = "FILE")]
        key: String,
        /// The claims, a JSON file or the JSON itself; missing jti, iat and del_depth are filled in
        #[arg(long, value_name = "FILE")]
        claims: String,
    },
    /// Sign a hop: hand a part of a delegation to another agent
    Delegate {
        /// The private key that holds the parent, a JWK file
        #[arg(long, value_name = "FILE")]
        key: String,
        /// The chain so far: presentation JSON, or one JWS a line, root first
        #[arg(long, value_name = "FILE")]
        parent: String,
        /// The claims; missing iss, jti, iat, par_hash and del_depth are filled in
        #[arg(long, value_name = "FILE")]
        claims: String,
    },
    /// Sign a proof of possession for one call
    Prove(TokenProveArgs),
    /// Describe a chain in words; nothing of it is verified
    Inspect {
        /// The chain: a file, `-`, or the JSON itself
        #[arg(value_name = "PRESENTATION")]
        presentation: String,
    },
    /// Verify a chain and its proof for one call, without a server; exits 0 on a permit, 3 on a denial
    Verify(Box<TokenVerifyArgs>),
}

#[derive(Debug, Args)]
pub(super) struct TokenProveArgs {
    /// The leaf's private key, a JWK file
    #[arg(long, value_name = "FILE")]
    key: String,
    /// The chain: presentation JSON, or one JWS a line, root first
    #[arg(long, value_name = "FILE")]
    chain: String,
    /// The tool that will be called
    #[arg(long, value_name = "TOOL")]
    tool: String,
    /// The call's arguments, one JSON object
    #[arg(long, value_name = "JSON", default_value = "{}")]
    args: String,
    /// Whom the proof is for
    #[arg(long, value_name = "URI")]
    audience: Option<String>,
    /// A nonce that the verifier gave
    #[arg(long, value_name = "NONCE", allow_hyphen_values = true)]
    nonce: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct TokenVerifyArgs {
    /// The trusted parties: a policy file or folder with issuer, agent, tool and server documents
    #[arg(long, value_name = "PATH")]
    trust: PathBuf,
    /// The time to verify at, seconds since the Unix epoch [default: now]
    #[arg(long, value_name = "UNIX")]
    now: Option<i64>,
    /// The audience that the verifier is
    #[arg(long, value_name = "URI")]
    audience: Option<String>,
    /// The tool that is called
    #[arg(long, value_name = "TOOL")]
    tool: String,
    /// The call's arguments, one JSON object
    #[arg(long, value_name = "JSON", default_value = "{}")]
    args: String,
    /// `off` lifts the agent-key registry, the required identity claims and the tool registry
    #[arg(long, value_enum, default_value = "on")]
    registry: RegistrySwitch,
    /// The nonce that the proof must carry
    #[arg(long, value_name = "NONCE", allow_hyphen_values = true)]
    nonce: Option<String>,
    /// Refuse a root without `aud`
    #[arg(long)]
    require_chain_audience: bool,
    /// Refuse a proof without `aat_aud`
    #[arg(long)]
    require_proof_audience: bool,
    /// The chain and its proof: a file, `-`, or the JSON itself
    #[arg(value_name = "PRESENTATION")]
    presentation: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RegistrySwitch {
    On,
    Off,
}

pub(super) fn run(command: TokenCommand, output: &CommandOutput) -> Result<(), CommandFailure> {
    let now = SystemClock.now();
    match command {
        TokenCommand::Keygen { out } => keygen(&out, output),
        TokenCommand::Issue { key, claims } => {
            let jws = issue::issue_root(&input::read_private_key(&key)?, &read_claims(&claims)?, now)
                .map_err(CommandFailure::misuse)?;
            print_token(&jws, output);
            Ok(())
        }
        TokenCommand::Delegate { key, parent, claims } => {
            let parent = read_presentation("--parent", &parent)?.chain;
            let jws = issue::issue_hop(&input::read_private_key(&key)?, &parent, &read_claims(&claims)?, now)
                .map_err(CommandFailure::misuse)?;
            print_token(&jws, output);
            Ok(())
        }
        TokenCommand::Prove(arguments) => prove(&arguments, now, output),
        TokenCommand::Inspect { presentation } => inspect(&presentation, output),
        TokenCommand::Verify(arguments) => verify(&arguments, output),
    }
}

fn keygen(out: &Path, output: &CommandOutput) -> Result<(), CommandFailure> {
    let public = create_key_file(out)?;
    let jwk: Value = serde_json::from_str(&public.to_jwk()).map_err(CommandFailure::failed)?;
    output.raw(&json!({ "jwk": jwk, "thumbprint": public.thumbprint().as_str() }).to_string());
    Ok(())
}

/// Makes a key. The private key goes into a new file that only its owner can read.
pub(super) fn create_key_file(out: &Path) -> Result<PublicKey, CommandFailure> {
    let key = PrivateKey::generate().map_err(CommandFailure::failed)?;
    let failed = |error: std::io::Error| CommandFailure::failed(format!("--out: `{}` cannot be written: {error}", out.display()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(out).map_err(failed)?;
    let write = |file: &mut File| {
        file.write_all(key.to_jwk().as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    remove_if_incomplete(out, write(&mut file)).map_err(failed)?;
    Ok(key.public_key().clone())
}

/// Removes a new file that was not written whole. A part of a key is of no use, and the next attempt could not make the file.
fn remove_if_incomplete(file: &Path, written: std::io::Result<()>) -> std::io::Result<()> {
    if written.is_err() {
        // If the file stays, the next attempt says so.
        let _ = std::fs::remove_file(file);
    }
    written
}

fn print_token(jws: &str, output: &CommandOutput) {
    if output.is_json() {
        output.json(&json!({ "jws": jws }));
    } else {
        output.raw(jws);
    }
}

fn prove(arguments: &TokenProveArgs, now: ClockReading, output: &CommandOutput) -> Result<(), CommandFailure> {
    let chain = read_presentation("--chain", &arguments.chain)?.chain;
    let args = read_call_arguments(&arguments.args)?;
    let call = ProofCall { tool: &arguments.tool, arguments: &args, audience: arguments.audience.as_deref() };
    let key = input::read_private_key(&arguments.key)?;
    let jws = issue::sign_proof(&key, &chain, &call, arguments.nonce.as_deref(), now).map_err(CommandFailure::misuse)?;
    print_token(&jws, output);
    Ok(())
}

fn inspect(presentation: &str, output: &CommandOutput) -> Result<(), CommandFailure> {
    let presentation = read_presentation("PRESENTATION", presentation)?;
    let chain = UnverifiedChain::parse(&presentation.chain).map_err(|rejection| CommandFailure::failed(rejection.to_string()))?;
    let text = |object: &JsonObject, name: &str| {
        object.member(name).map(|value| value.as_str().map_or_else(|| value.to_jcs(), str::to_owned))
    };
    let tokens = chain.tokens().iter().map(|token| {
        let parsed = |object: &JsonObject| {
            let mut jcs = String::new();
            object.write_jcs(&mut jcs);
            serde_json::from_str::<Value>(&jcs).unwrap_or(Value::Null)
        };
        json!({ "header": parsed(token.header()), "claims": parsed(token.claims()), "hop_hash": token.hop_hash(), "holder_thumbprint": token.holder_thumbprint() })
    });
    output.json(&json!({
        "sentence": chain.describe(),
        "tokens": tokens.collect::<Vec<_>>(),
        "has_proof": presentation.proof.is_some(),
        "verified": false,
    }));
    output.line(&chain.describe());
    let rows = chain.tokens().iter().enumerate().map(|(hop, token)| {
        let claim = |name| text(token.claims(), name).unwrap_or_else(|| "-".to_owned());
        let holder = token.holder_thumbprint().unwrap_or_else(|| "-".to_owned());
        vec![hop.to_string(), claim("jti"), claim("iat"), claim("exp"), token.hop_hash().to_owned(), holder]
    });
    output.line("");
    output.table(&["HOP", "JTI", "IAT", "EXP", "HOP HASH", "HOLDER KEY"], rows.collect());
    output.line("");
    output.line("nothing of this was verified: `portcullis token verify` does");
    Ok(())
}

fn verify(arguments: &TokenVerifyArgs, output: &CommandOutput) -> Result<(), CommandFailure> {
    let args = read_call_arguments(&arguments.args)?;
    let text = input::read_file_or_json("PRESENTATION", &arguments.presentation)?;
    let outcome = match presentation_verifier(arguments) {
        Ok(judge) => judge(&text, &args)?,
        Err(failure) => return Err(failure),
    };
    let (verdict, reason, hop, message) = match outcome {
        Ok(()) => ("PERMIT", Reason::Ok, None, Reason::Ok.message().to_owned()),
        Err(rejection) => ("DENY", rejection.reason, rejection.hop, rejection.message),
    };
    let answer = json!({ "verdict": verdict, "reason": reason.as_str(), "hop": hop, "message": message });
    output.raw(&answer.to_string());
    if verdict == "PERMIT" { Ok(()) } else { Err(CommandFailure::exit_code_only(CommandFailure::DENIED)) }
}

type PresentationVerifier<'a> = Box<dyn Fn(&[u8], &JsonObject) -> Result<Result<(), Rejection>, CommandFailure> + 'a>;

/// Reads the trusted issuers, keys and tools, and returns a function that judges a presentation by them.
fn presentation_verifier(arguments: &TokenVerifyArgs) -> Result<PresentationVerifier<'_>, CommandFailure> {
    let files = read_folder(&arguments.trust).map_err(CommandFailure::misuse)?;
    let parsed = parse_files(&files);
    let registered = arguments.registry == RegistrySwitch::On;
    // Groups, applications and permissions are not needed here, so a folder without them is accepted.
    if let Some(error) = parsed.diagnostics.iter().find(|diagnostic| diagnostic.is_error()) {
        return Err(CommandFailure::misuse(format!("--trust: {error}")));
    }
    let trust = build_trust_table(&parsed.documents).map_err(|error| CommandFailure::misuse(format!("--trust: {error}")))?;
    let tools = registered_tools(&parsed.documents);
    let options = VerificationOptions {
        registry: if registered { RegistryMode::Required } else { RegistryMode::Off },
        require_chain_audience: arguments.require_chain_audience,
        require_proof_audience: arguments.require_proof_audience,
        nonce: arguments.nonce.clone(),
        ..VerificationOptions::default()
    };
    let now = arguments
        .now
        .map_or_else(|| SystemClock.now(), |unix_s| ClockReading { unix_ns: unix_s.saturating_mul(1_000_000_000), boot_ns: 0 });
    Ok(Box::new(move |text, args| {
        let audience = arguments.audience.as_deref();
        let judged = || {
            let presentation = Presentation::parse(text)?;
            let chain = token::verify(&presentation.chain, &trust, &options, now)?;
            chain.check_audience(audience, &options)?;
            if !args.iter().all(|(_, value)| value.is_comparable()) {
                let message = "the arguments hold a number beyond ±(2^53-1), or with more digits than a double keeps, which cannot be compared".to_owned();
                return Err(Rejection { reason: Reason::ArgumentRefused, hop: None, message });
            }
            let proof = presentation.proof.unwrap_or_default();
            let expected = ProofCall { tool: &arguments.tool, arguments: args, audience };
            token::verify_proof(&chain, &proof, &expected, &options, now)?;
            if registered && !tools.contains(arguments.tool.as_str()) {
                let message = format!("the tool `{}` is not registered", arguments.tool);
                return Err(Rejection { reason: Reason::ToolUnknown, hop: None, message });
            }
            chain.check_call(&arguments.tool, args)
        };
        Ok(judged())
    }))
}

fn registered_tools(documents: &[Document]) -> HashSet<String> {
    let mut tools = HashSet::new();
    for document in documents {
        match &document.body {
            DocumentBody::Tool(_) => drop(tools.insert(document.key.id.clone())),
            DocumentBody::Server(server) => tools.extend(server.tools.keys().map(|tool| format!("{}/{tool}", server.id))),
            _ => {}
        }
    }
    tools
}

fn read_claims(argument: &str) -> Result<String, CommandFailure> {
    let content = input::read_file_or_json("--claims", argument)?;
    String::from_utf8(content).map_err(|_| CommandFailure::misuse("--claims: is not UTF-8"))
}

fn read_presentation(name: &str, argument: &str) -> Result<Presentation, CommandFailure> {
    let text = input::read_file_or_json(name, argument)?;
    Presentation::parse(&text).map_err(|rejection| CommandFailure::misuse(format!("{name}: {rejection}")))
}

fn read_call_arguments(argument: &str) -> Result<JsonObject, CommandFailure> {
    let text = input::read_json("--args", argument)?;
    parse_object(&text).map_err(|error| CommandFailure::misuse(format!("--args: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_not_written_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("k.jwk");
        std::fs::write(&file, "{\"kty\":").unwrap();
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(remove_if_incomplete(&file, Err(full)).is_err() && !file.exists());
        create_key_file(&file).unwrap();
        // A file of somebody else is never removed.
        assert!(create_key_file(&file).is_err() && file.exists());
    }
}
