//! Private Ed25519 keys: generation, the JWK form (RFC 8037), and signing.
//!
//! The seed is wiped when the key is dropped, and `Debug` never prints it. [`crate::model::jwk`] has the public keys.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::model::jwk::PublicKey;

/// Maximum size of a private JWK.
const JWK_BYTES_MAX: usize = 4 * 1024;

/// Why a private key could not be read or generated. The message never quotes the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyError {
    /// Not one JSON object with `kty`, `crv`, `x` and `d`.
    #[error("not a private JWK (RFC 8037): it needs `kty` `OKP`, `crv` `Ed25519`, `x` and `d`, each once")]
    Malformed,
    /// `x` is not the public key of `d`, or is a public key that is refused.
    #[error("`x` of the private JWK does not belong to its `d`")]
    Mismatch,
    /// The system returned no random bytes.
    #[error("the system gave no randomness for a new key")]
    Randomness,
}

/// An Ed25519 private key.
pub struct PrivateKey {
    seed: Zeroizing<[u8; 32]>,
    pair: Ed25519KeyPair,
    public: PublicKey,
}

impl PrivateKey {
    /// Generates a new key.
    ///
    /// # Errors
    /// [`PrivateKeyError::Randomness`].
    pub fn generate() -> Result<Self, PrivateKeyError> {
        let mut seed = Zeroizing::new([0; 32]);
        SystemRandom::new().fill(seed.as_mut_slice()).map_err(|_| PrivateKeyError::Randomness)?;
        Self::from_seed(*seed)
    }

    /// Derives the key of a seed (RFC 8032, section 5.1.5). The same seed always gives the same key.
    ///
    /// # Errors
    /// [`PrivateKeyError::Mismatch`] if the seed gives no usable public key. No such seed is known.
    pub fn from_seed(seed: [u8; 32]) -> Result<Self, PrivateKeyError> {
        let seed = Zeroizing::new(seed);
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.as_slice()).map_err(|_| PrivateKeyError::Malformed)?;
        let x = pair.public_key().as_ref().try_into().map_err(|_| PrivateKeyError::Mismatch)?;
        let public = PublicKey::from_bytes(x).map_err(|_| PrivateKeyError::Mismatch)?;
        Ok(Self { seed, pair, public })
    }

    /// Reads a private JWK. Members other than `kty`, `crv`, `x` and `d` are ignored.
    ///
    /// # Errors
    /// [`PrivateKeyError::Malformed`] or [`PrivateKeyError::Mismatch`].
    pub fn from_jwk(json: &[u8]) -> Result<Self, PrivateKeyError> {
        if json.len() > JWK_BYTES_MAX {
            return Err(PrivateKeyError::Malformed);
        }
        let jwk: PrivateJwk = serde_json::from_slice(json).map_err(|_| PrivateKeyError::Malformed)?;
        if jwk.kty != "OKP" || jwk.crv != "Ed25519" {
            return Err(PrivateKeyError::Malformed);
        }
        let mut seed = Zeroizing::new([0; 32]);
        let length = URL_SAFE_NO_PAD.decode_slice(jwk.d.0.as_bytes(), seed.as_mut_slice());
        if length != Ok(seed.len()) {
            return Err(PrivateKeyError::Malformed);
        }
        let key = Self::from_seed(*seed)?;
        if jwk.x != URL_SAFE_NO_PAD.encode(key.public.as_bytes()) {
            return Err(PrivateKeyError::Mismatch);
        }
        Ok(key)
    }

    /// The private JWK with its members in canonical order. Its holder can sign with the key.
    pub fn to_jwk(&self) -> Zeroizing<String> {
        let mut jwk = Zeroizing::new(String::with_capacity(256));
        jwk.push_str(r#"{"crv":"Ed25519","d":""#);
        jwk.push_str(&Zeroizing::new(URL_SAFE_NO_PAD.encode(self.seed.as_slice())));
        jwk.push_str(r#"","kty":"OKP","x":""#);
        URL_SAFE_NO_PAD.encode_string(self.public.as_bytes(), &mut jwk);
        jwk.push_str("\"}");
        jwk
    }

    /// The public key.
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// Signs a message (RFC 8032).
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

/// Prints the public key's thumbprint only.
impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").field("thumbprint", self.public.thumbprint()).finish_non_exhaustive()
    }
}

/// The members of a JWK that are read. The parser refuses duplicates of these members.
#[derive(Deserialize)]
struct PrivateJwk {
    kty: String,
    crv: String,
    x: String,
    d: ZeroizingString,
}

/// A string that is wiped when dropped, even if the rest of the JWK turns out to be invalid.
struct ZeroizingString(Zeroizing<String>);

impl<'de> Deserialize<'de> for ZeroizingString {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8037, appendix A.1.
    const JWK: &str = r#"{"kty":"OKP","crv":"Ed25519","d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;

    #[test]
    fn rfc_8037_signs_as_the_rfc_says() {
        let key = PrivateKey::from_jwk(JWK.as_bytes()).unwrap();
        assert_eq!(key.public_key().thumbprint().as_str(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        let signature = key.sign(b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc");
        let expected = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
        assert_eq!(URL_SAFE_NO_PAD.encode(signature), expected);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let key = PrivateKey::generate().unwrap();
        let again = PrivateKey::from_jwk(key.to_jwk().as_bytes()).unwrap();
        assert_eq!(again.public_key(), key.public_key());
        assert_ne!(PrivateKey::generate().unwrap().public_key(), key.public_key());
        let longest = format!("{JWK}{}", " ".repeat(JWK_BYTES_MAX - JWK.len()));
        assert!(PrivateKey::from_jwk(longest.as_bytes()).is_ok());
    }

    #[test]
    fn refused() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        for (jwk, expected) in [
            (JWK.replace(x, "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w"), PrivateKeyError::Mismatch),
            (JWK.replace("OKP", "EC"), PrivateKeyError::Malformed),
            (JWK.replace("Ed25519", "X25519"), PrivateKeyError::Malformed),
            (JWK.replace("uf2A\"", "uf2A=\""), PrivateKeyError::Malformed),
            (JWK.replace("\"d\"", "\"e\""), PrivateKeyError::Malformed),
            (JWK.replace("{", "{\"kty\":\"OKP\","), PrivateKeyError::Malformed),
            (format!("{JWK}{}", " ".repeat(JWK_BYTES_MAX)), PrivateKeyError::Malformed),
            ("[]".to_owned(), PrivateKeyError::Malformed),
        ] {
            assert_eq!(PrivateKey::from_jwk(jwk.as_bytes()).err(), Some(expected), "{jwk:.200}");
        }
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let key = PrivateKey::from_jwk(JWK.as_bytes()).unwrap();
        let text = format!("{key:?}");
        assert!(text.contains("kPrK_") && !text.contains("nWGxne") && !text.contains("seed"), "{text}");
    }
}
