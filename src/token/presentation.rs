//! Reads a presentation from text: the JSON object of the drafts, or the tokens of a chain with one token per line.
//!
//! It only splits the text; nothing in it is verified. Gateways send the same parts as fields of a message.

use bytes::Bytes;

use super::Rejection;
use super::jws::malformed_token;
use crate::model::json::{self, Value};
use crate::model::reason::Reason;

/// Maximum size of a presentation: a chain, a proof, and space for ignored members.
pub const PRESENTATION_BYTES_MAX: usize = 256 * 1024;

/// A chain, and its proof of possession if the call has one.
#[derive(Clone, PartialEq, Eq)]
pub struct Presentation {
    /// Compact JWS tokens, root first; never empty.
    pub chain: Vec<Bytes>,
    /// The compact JWS of the proof.
    pub proof: Option<Bytes>,
}

impl Presentation {
    /// Reads `{"aat_chain": [...], "aat_pop": "..."}`, or one JWS per line, root first. Other members are ignored.
    ///
    /// # Errors
    /// [`Reason::TokenMalformed`], or [`Reason::TokenTooLarge`] above [`PRESENTATION_BYTES_MAX`].
    pub fn parse(json_or_lines: &[u8]) -> Result<Self, Rejection> {
        if json_or_lines.len() > PRESENTATION_BYTES_MAX {
            let message = format!("{} bytes: a presentation has at most {PRESENTATION_BYTES_MAX}", json_or_lines.len());
            return Err(Rejection::new(Reason::TokenTooLarge, message));
        }
        let text = json_or_lines.trim_ascii();
        let presentation = if text.starts_with(b"{") { Self::parse_json(text)? } else { Self::parse_lines(text) };
        if presentation.chain.is_empty() {
            return Err(malformed_token("the presentation has no token: send the root's JWS at least"));
        }
        Ok(presentation)
    }

    fn parse_json(text: &[u8]) -> Result<Self, Rejection> {
        let object =
            json::parse_object(text).map_err(|error| malformed_token(format!("the presentation is not JSON: {error}")))?;
        let chain = object.member("aat_chain").and_then(Value::as_array);
        let chain = chain.ok_or_else(|| malformed_token("the presentation has no `aat_chain`, a list of compact JWS"))?;
        let token = |value: &Value| value.as_str().map(|token| Bytes::copy_from_slice(token.as_bytes()));
        let chain: Option<Vec<Bytes>> = chain.iter().map(token).collect();
        let proof =
            object.member("aat_pop").map(|proof| token(proof).ok_or_else(|| malformed_token("`aat_pop` is not a string")));
        Ok(Self {
            chain: chain.ok_or_else(|| malformed_token("`aat_chain` holds something that is not a string"))?,
            proof: proof.transpose()?,
        })
    }

    fn parse_lines(text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
        Self { chain: lines.map(Bytes::copy_from_slice).collect(), proof: None }
    }
}

/// Prints sizes only, because a token is a credential.
impl std::fmt::Debug for Presentation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes: Vec<usize> = self.chain.iter().map(Bytes::len).collect();
        f.debug_struct("Presentation")
            .field("chain_bytes", &sizes)
            .field("proof_bytes", &self.proof.as_ref().map(Bytes::len))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<(&[&str], Option<&str>), Reason>) {
        let parsed = Presentation::parse(text.as_bytes());
        let expected = expected.map(|(chain, proof)| Presentation {
            chain: chain.iter().map(|token| Bytes::copy_from_slice(token.as_bytes())).collect(),
            proof: proof.map(|proof| Bytes::copy_from_slice(proof.as_bytes())),
        });
        assert_eq!(parsed.map_err(|refused| refused.reason), expected, "{text:.80}");
    }

    #[test]
    fn json_or_lines() {
        check(r#" {"aat_chain":["a.b.c","d.e.f"],"aat_pop":"g.h.i","more":1}"#, Ok((&["a.b.c", "d.e.f"], Some("g.h.i"))));
        check(r#"{"aat_chain":["a"]}"#, Ok((&["a"], None)));
        check("\n a.b.c \r\n\n d.e.f\n", Ok((&["a.b.c", "d.e.f"], None)));
        for text in [
            "",
            " \n ",
            "{",
            "{}",
            r#"{"aat_chain":[]}"#,
            r#"{"aat_chain":"a.b.c"}"#,
            r#"{"aat_chain":[1]}"#,
            r#"{"aat_chain":["a"],"aat_pop":null}"#,
            r#"{"aat_chain":["a"],"aat_chain":["b"]}"#,
        ] {
            check(text, Err(Reason::TokenMalformed));
        }
        let longest = "x".repeat(PRESENTATION_BYTES_MAX);
        check(&longest, Ok((&[&longest], None)));
        check(&"x".repeat(PRESENTATION_BYTES_MAX + 1), Err(Reason::TokenTooLarge));
    }

    #[test]
    fn debug_output_holds_no_token() {
        let presentation = Presentation::parse(br#"{"aat_chain":["canary"],"aat_pop":"canary"}"#).unwrap();
        assert_eq!(format!("{presentation:?}"), "Presentation { chain_bytes: [6], proof_bytes: Some(6) }");
    }
}
