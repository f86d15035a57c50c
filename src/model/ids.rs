//! Typed identities, so that an application cannot be passed for an agent. They hold shared strings, so a clone is cheap.
//!
//! A type does not validate its text: the code that reads an id from outside does. [`super::rows`] has the ids of stored rows as
//! text.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Wraps a string unchecked. The code that reads an id from outside must check it.
            pub fn new(id: impl Into<Arc<str>>) -> Self {
                Self(id.into())
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(id: &str) -> Self {
                Self(id.into())
            }
        }
    };
}

identifier!(
    /// An agent: a SPIFFE ID (SPIFFE-ID specification, section 2). [`spiffe_id_error`] checks it at every input.
    AgentId
);
identifier!(
    /// An application: the OAuth `client_id`.
    ApplicationId
);
identifier!(
    /// A tool, `server/tool`. The first slash ends the name of the server.
    ToolName
);
identifier!(
    /// A group of users, or of operators.
    GroupId
);
identifier!(
    /// A session: `sid` of the root token.
    SessionId
);
identifier!(
    /// A task: `txn` of the root token.
    TaskId
);
identifier!(
    /// The URI of an issuer of root tokens.
    IssuerUri
);
identifier!(
    /// An operator: a person or a pipeline that may administer.
    OperatorId
);
identifier!(
    /// The RFC 7638 SHA-256 thumbprint of a public key: 43 characters of unpadded base64url.
    Thumbprint
);

/// A user: issuer and subject. A subject has no meaning without its issuer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId {
    /// The issuer of the subject.
    pub issuer: IssuerUri,
    /// The subject, unique within the issuer.
    pub subject: Arc<str>,
}

impl UserId {
    /// The user with this issuer and subject.
    pub fn new(issuer: impl Into<IssuerUri>, subject: impl Into<Arc<str>>) -> Self {
        Self { issuer: issuer.into(), subject: subject.into() }
    }
}

impl UserId {
    /// A pseudonym of the user: base64url of SHA-256 over the history id, a line feed and the wire form.
    ///
    /// It lets a reader recognize one user without learning the names of others. It is the same for one store, and cannot be compared
    /// between stores. A reader who guesses a name can verify the guess.
    pub fn pseudonym(&self, history: &str) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, format!("{history}\n{self}").as_bytes());
        URL_SAFE_NO_PAD.encode(digest.as_ref())
    }
}

/// The wire form: the JSON array `["iss","sub"]`.
impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(self.subject.len() + 32);
        text.push('[');
        super::json::write_string(self.issuer.as_str(), &mut text);
        text.push(',');
        super::json::write_string(&self.subject, &mut text);
        text.push(']');
        f.write_str(&text)
    }
}

/// Whether a text has a control character. No id, name or audience may have one: it could forge a line, end a string, or imitate another
/// name.
pub fn contains_control_character(text: &str) -> bool {
    text.chars().any(char::is_control)
}

/// Returns what is wrong with the SPIFFE ID of a workload; `None` if it is well formed.
///
/// It has at most 2048 bytes: `spiffe://`, a trust domain of `a-z0-9.-_` (at most 255 bytes), and a path of at least one segment of
/// `A-Za-z0-9.-_`. It has no segment `.` or `..`, no trailing slash and no query (SPIFFE-ID, sections 2.1 to 2.3).
pub fn spiffe_id_error(id: &str) -> Option<&'static str> {
    if id.len() > 2048 {
        return Some("is longer than 2048 bytes");
    }
    let Some(rest) = id.strip_prefix("spiffe://") else {
        return Some("does not begin with `spiffe://`");
    };
    let Some((domain, path)) = rest.split_once('/') else {
        return Some("has no path: `spiffe://TRUST-DOMAIN/PATH` names a workload");
    };
    let domain_byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    if domain.is_empty() || domain.len() > 255 || !domain.bytes().all(domain_byte) {
        return Some("has a trust domain that is not 1 to 255 of `a-z0-9.-_`");
    }
    for segment in path.split('/') {
        if segment.is_empty() {
            return Some("has an empty path segment");
        }
        if segment == "." || segment == ".." {
            return Some("has a relative path segment");
        }
        if !segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) {
            return Some("has a character outside `A-Za-z0-9.-_` in its path");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spiffe_ids() {
        for good in ["spiffe://acme.example/agent/sales-assistant", "spiffe://a/b", "spiffe://a/B_.-9"] {
            assert_eq!(spiffe_id_error(good), None, "{good}");
        }
        for bad in [
            "",
            "spiffe://",
            "spiffe://acme",
            "spiffe://acme/",
            "spiffe://Acme/x",
            "spiffe://a/b/",
            "spiffe://a//b",
            "spiffe://a/../b",
            "spiffe://a/b?c",
            "spiffe://a/b#c",
            "spiffe://a:1/b",
            "spiffe://u@a/b",
            "spiffe://a/%41",
            "https://a/b",
            "SPIFFE://a/b",
            "spiffe://a/ü",
        ] {
            assert!(spiffe_id_error(bad).is_some(), "{bad}");
        }
        assert!(spiffe_id_error(&format!("spiffe://a/{}", "x".repeat(2048))).is_some());
    }

    /// The expected value is the output of `printf 'h\n["https://i","ana"]' | openssl dgst -sha256 -binary | basenc --base64url`.
    #[test]
    fn a_user_has_an_opaque_name_in_each_store() {
        let user = UserId::new("https://i", "ana");
        assert_eq!(user.pseudonym("h"), "zd2DDNgSnHtSqFMyDdIHBGdqaFkTlTcYbmeY8maALiQ");
        assert_ne!(user.pseudonym("h"), user.pseudonym("other"));
        assert_ne!(user.pseudonym("h"), UserId::new("https://i", "bob").pseudonym("h"));
    }

    #[test]
    fn a_user_is_written_as_a_json_array() {
        assert_eq!(UserId::new("https://i", "a\"b").to_string(), r#"["https://i","a\"b"]"#);
    }
}
