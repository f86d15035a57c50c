//! Ed25519 public keys as JWK (RFC 8037), and their thumbprints (RFC 7638).
//!
//! Tokens (`cnf`), issuer documents and operator documents use them. This module refuses private members, other curves, encodings that are
//! not canonical, and points of small order, so that no caller has to.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::ids::Thumbprint;
use super::json::{JsonObject, Value};

/// An Ed25519 public key that is safe to verify with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    x: [u8; 32],
    thumbprint: Thumbprint,
}

/// A key of a JWK Set, with the name that its issuer gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedKey {
    /// The key.
    pub key: PublicKey,
    /// `kid`, if the JWK has one.
    pub kid: Option<String>,
}

/// Why a JWK is refused. One line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(&'static str);

/// Members that hold private or symmetric key material (RFC 7518, section 6; RFC 8037, section 2).
const PRIVATE_MEMBERS: &[&str] = &["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// 2^255 - 19, little endian: a canonical `y` is below it.
const FIELD_PRIME: [u8; 32] = {
    let mut bytes = [0xff; 32];
    bytes[0] = 0xed;
    bytes[31] = 0x7f;
    bytes
};

/// The `y` coordinates of all points of small order (orders 1, 2, 4 and 8): little endian, without the sign bit.
const SMALL_ORDER_Y: [[u8; 32]; 5] = {
    let mut one = [0; 32];
    one[0] = 1;
    let mut minus_one = FIELD_PRIME;
    minus_one[0] = 0xec;
    [
        [0; 32],
        one,
        minus_one,
        [
            0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5, 0xdf, 0xac,
            0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
        ],
        [
            0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20, 0x53,
            0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
        ],
    ]
};

impl PublicKey {
    /// Reads the 32 bytes of an Ed25519 public key (RFC 8032, section 5.1.2).
    ///
    /// # Errors
    /// If `y` is not canonical, or if the point is of small order. Such keys verify signatures that nobody made.
    pub fn from_bytes(x: [u8; 32]) -> Result<Self, Error> {
        let mut y = x;
        if let Some(top) = y.last_mut() {
            *top &= 0x7f;
        }
        if y.iter().rev().ge(FIELD_PRIME.iter().rev()) {
            return Err(Error("`x` of the key is not a canonical encoding"));
        }
        if SMALL_ORDER_Y.contains(&y) {
            return Err(Error("`x` of the key is a point of small order"));
        }
        let mut thumbprint_input = String::with_capacity(96);
        thumbprint_input.push_str(r#"{"crv":"Ed25519","kty":"OKP","x":""#);
        URL_SAFE_NO_PAD.encode_string(x, &mut thumbprint_input);
        thumbprint_input.push_str("\"}");
        let digest = ring::digest::digest(&ring::digest::SHA256, thumbprint_input.as_bytes());
        Ok(Self { x, thumbprint: Thumbprint::new(URL_SAFE_NO_PAD.encode(digest)) })
    }

    /// Reads a public JWK with `kty` `OKP`, `crv` `Ed25519` and `x`. Other members are ignored unless they are private.
    ///
    /// # Errors
    /// For another kind of key, private members, a `use` or `alg` for another purpose, or an invalid `x`.
    pub fn from_jwk(jwk: &JsonObject) -> Result<Self, Error> {
        let text = |name: &str| jwk.member(name).and_then(Value::as_str);
        if PRIVATE_MEMBERS.iter().any(|name| jwk.member(name).is_some()) {
            return Err(Error("the JWK holds private key material"));
        }
        if text("kty") != Some("OKP") || text("crv") != Some("Ed25519") {
            return Err(Error("the JWK is not an Ed25519 key: `kty` must be `OKP` and `crv` `Ed25519`"));
        }
        if jwk.member("use").is_some_and(|value| value.as_str() != Some("sig")) {
            return Err(Error("the JWK's `use` is not `sig`"));
        }
        if jwk.member("alg").is_some_and(|value| !matches!(value.as_str(), Some("Ed25519" | "EdDSA"))) {
            return Err(Error("the JWK's `alg` is not `Ed25519`"));
        }
        let x = text("x").ok_or(Error("the JWK has no `x`"))?;
        let x = URL_SAFE_NO_PAD.decode(x).map_err(|_| Error("`x` of the key is not unpadded base64url"))?;
        Self::from_bytes(x.try_into().map_err(|_| Error("`x` of the key is not 32 bytes"))?)
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.x
    }

    /// The thumbprint (RFC 7638) with SHA-256.
    pub fn thumbprint(&self) -> &Thumbprint {
        &self.thumbprint
    }

    /// The JWK with only its required members, in canonical order.
    pub fn to_jwk(&self) -> String {
        format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, URL_SAFE_NO_PAD.encode(self.x))
    }

    /// Whether this key made `signature` over `message` (RFC 8032). `ring` requires a reduced `s`.
    pub fn verifies_signature(&self, message: &[u8], signature: &[u8]) -> bool {
        ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, &self.x).verify(message, signature).is_ok()
    }
}

impl NamedKey {
    /// Reads a JWK with its `kid`.
    ///
    /// # Errors
    /// As [`PublicKey::from_jwk`], and for a `kid` that is not a string of 1 to 256 bytes.
    pub fn from_jwk(jwk: &JsonObject) -> Result<Self, Error> {
        let kid = match jwk.member("kid") {
            None => None,
            Some(Value::String(kid)) if (1..=256).contains(&kid.len()) => Some(kid.clone()),
            Some(_) => return Err(Error("the JWK's `kid` is not a string of 1 to 256 bytes")),
        };
        Ok(Self { key: PublicKey::from_jwk(jwk)?, kid })
    }
}

#[cfg(test)]
mod tests {
    use super::super::json::parse_object;
    use super::*;

    fn jwk(text: &str) -> Result<PublicKey, Error> {
        PublicKey::from_jwk(&parse_object(text.as_bytes()).unwrap())
    }

    #[test]
    fn thumbprint_of_rfc_8037() {
        let key = jwk(r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#).unwrap();
        assert_eq!(key.thumbprint().as_str(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        assert_eq!(jwk(&key.to_jwk()), Ok(key));
    }

    #[test]
    fn refused() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        for text in [
            format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}","d":"{x}"}}"#),
            format!(r#"{{"kty":"OKP","crv":"X25519","x":"{x}"}}"#),
            format!(r#"{{"kty":"EC","crv":"Ed25519","x":"{x}"}}"#),
            format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}="}}"#),
            format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}","use":"enc"}}"#),
            format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}","alg":"HS256"}}"#),
            r#"{"kty":"OKP","crv":"Ed25519"}"#.to_owned(),
            r#"{"kty":"OKP","crv":"Ed25519","x":"AAAA"}"#.to_owned(),
        ] {
            assert!(jwk(&text).is_err(), "{text}");
        }
    }

    /// The blocklist of libsodium, `ge25519_has_small_order` in `src/libsodium/crypto_core/ed25519/ref10/ed25519_ref10.c`, with the orders
    /// of the points as published there: little endian, without the sign of `x`. The last two entries are p and p + 1, which equal 0 and 1.
    const PUBLISHED: [(u32, &str); 7] = [
        (4, "0000000000000000000000000000000000000000000000000000000000000000"),
        (1, "0100000000000000000000000000000000000000000000000000000000000000"),
        (8, "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
        (8, "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
        (2, "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        (4, "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        (1, "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ];

    fn point(hex: &str, sign: u8) -> [u8; 32] {
        let mut bytes: Vec<u8> =
            (0..64).step_by(2).map(|at| u8::from_str_radix(hex.get(at..at + 2).unwrap(), 16).unwrap()).collect();
        bytes[31] |= sign << 7;
        bytes.try_into().unwrap()
    }

    #[test]
    fn small_order_and_non_canonical_points_are_refused_with_either_sign() {
        for (order, hex) in PUBLISHED {
            for sign in [0, 1] {
                assert!(PublicKey::from_bytes(point(hex, sign)).is_err(), "a point of order {order}: {hex}, sign {sign}");
            }
        }
        let mut above = FIELD_PRIME;
        for first in 0xed..=0xff {
            above[0] = first;
            assert!(PublicKey::from_bytes(above).is_err());
        }
        above[0] = 0xeb;
        assert!(PublicKey::from_bytes(above).is_ok());
    }

    /// Shows that each of these points must be refused, and that there are no others.
    ///
    /// The eight points whose order divides 8 verify signatures that nobody made, with `S` = 0 and an `R` of small order. Whether such a
    /// signature verifies depends only on the hash of the message modulo 8. A good key verifies none of them.
    #[test]
    fn points_of_small_order_verify_what_nobody_signed() {
        let canonical = PUBLISHED.iter().take(5).flat_map(|(order, hex)| {
            // `x` is 0 for the points of orders 1 and 2, so each of these orders has one point.
            let signs = if *order > 2 { 0..=1 } else { 0..=0 };
            signs.map(move |sign| (*order, point(hex, sign)))
        });
        let points: Vec<_> = canonical.collect();
        let of = |order: u32| points.iter().filter(|(one, _)| *one == order).count();
        assert_eq!([of(1), of(2), of(4), of(8)], [1, 1, 2, 4], "the points of a cyclic group of 8, all of them");
        let forged = |key: &[u8; 32]| {
            let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key);
            points.iter().any(|(_, r)| (0..64u8).any(|message| key.verify(&[message], &[*r, [0; 32]].concat()).is_ok()))
        };
        for (order, key) in &points {
            assert!(forged(key), "a point of order {order}: {key:x?}");
        }
        let good = jwk(r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#).unwrap();
        assert!(!forged(good.as_bytes()));
    }
}
