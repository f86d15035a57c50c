//! Reads the input of commands: files, standard input (`-`), files by `@`, and JSON in the argument. Sizes are bounded, and errors
//! name the argument.

use std::fs::File;
use std::io::Read;

use bytes::Bytes;

use super::CommandFailure;
use crate::model::json::{Value, parse_object};
use crate::model::time::{Clock as _, SystemClock};
use crate::token::{PRESENTATION_BYTES_MAX, Presentation, PrivateKey, ProofCall, UnverifiedChain, issue};

/// Largest file or standard input of any argument, in bytes.
const INPUT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Reads an argument that names a file: `-`, `@F`, or a path.
pub(super) fn read_file(name: &str, argument: &str) -> Result<Vec<u8>, CommandFailure> {
    match argument {
        "-" => read_bounded(name, "standard input", std::io::stdin().lock()),
        path => {
            let path = path.strip_prefix('@').unwrap_or(path);
            let file =
                File::open(path).map_err(|error| CommandFailure::misuse(format!("{name}: cannot read `{path}`: {error}")))?;
            read_bounded(name, path, file)
        }
    }
}

/// Reads an argument that is a file name or, if it begins with `{`, the JSON itself.
pub(super) fn read_file_or_json(name: &str, argument: &str) -> Result<Vec<u8>, CommandFailure> {
    if argument.trim_start().starts_with('{') { Ok(argument.as_bytes().to_vec()) } else { read_file(name, argument) }
}

/// Reads an argument that is JSON: `-`, `@F`, or the JSON itself.
pub(super) fn read_json(name: &str, argument: &str) -> Result<Vec<u8>, CommandFailure> {
    if argument == "-" || argument.starts_with('@') { read_file(name, argument) } else { Ok(argument.as_bytes().to_vec()) }
}

/// Reads the tokens and the proof of a presentation. Nothing of it is verified.
pub(super) fn read_presentation(argument: &str) -> Result<(Vec<Bytes>, Bytes), CommandFailure> {
    let text = read_file_or_json("--presentation", argument)?;
    if text.len() > PRESENTATION_BYTES_MAX {
        return Err(CommandFailure::misuse(format!("--presentation: {} bytes: at most {PRESENTATION_BYTES_MAX}", text.len())));
    }
    let presentation =
        Presentation::parse(&text).map_err(|rejection| CommandFailure::misuse(format!("--presentation: {rejection}")))?;
    Ok((presentation.chain, presentation.proof.unwrap_or_default()))
}

/// Reads a private key from a JWK file.
pub(super) fn read_private_key(argument: &str) -> Result<PrivateKey, CommandFailure> {
    let content = zeroize::Zeroizing::new(read_file_or_json("--key", argument)?);
    PrivateKey::from_jwk(&content).map_err(|error| CommandFailure::misuse(format!("--key: {error}")))
}

/// Makes a new proof by the holder of a chain's leaf. Without an audience the proof is for the root's audience.
pub(super) fn make_proof(
    key: &str,
    chain: &[Bytes],
    tool: &str,
    arguments_json: &[u8],
    audience: &str,
) -> Result<Bytes, CommandFailure> {
    let key = read_private_key(key)?;
    let arguments = parse_object(arguments_json).map_err(|error| CommandFailure::misuse(format!("--args: {error}")))?;
    let root =
        UnverifiedChain::parse(chain).map_err(|rejection| CommandFailure::misuse(format!("--presentation: {rejection}")))?;
    let own = root.tokens().first().and_then(|root| root.claims().member("aud")).and_then(Value::as_str);
    let audience = Some(audience).filter(|audience| !audience.is_empty()).or(own);
    let call = ProofCall { tool, arguments: &arguments, audience };
    issue::sign_proof(&key, chain, &call, None, SystemClock.now()).map(Bytes::from).map_err(CommandFailure::misuse)
}

/// The tool that a proof names. Nothing of it is verified.
pub(super) fn tool_of_proof(proof: &Bytes) -> Option<String> {
    let proof = UnverifiedChain::parse(std::slice::from_ref(proof)).ok()?;
    proof.tokens().first()?.claims().member("aat_tool")?.as_str().map(str::to_owned)
}

fn read_bounded(name: &str, from: &str, reader: impl Read) -> Result<Vec<u8>, CommandFailure> {
    let mut content = Vec::new();
    reader
        .take(INPUT_BYTES_MAX + 1)
        .read_to_end(&mut content)
        .map_err(|error| CommandFailure::misuse(format!("{name}: cannot read {from}: {error}")))?;
    if content.len() as u64 > INPUT_BYTES_MAX {
        return Err(CommandFailure::misuse(format!("{name}: {from} is over {INPUT_BYTES_MAX} bytes")));
    }
    Ok(content)
}
