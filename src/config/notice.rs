//! Receivers of notices, and the secrets that sign what they get.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use super::{Secret, SecretSource};
use crate::keyring::name::Name;
use crate::keyring::notice::Event;
use crate::keyring::time::Span;

/// What a secret begins with (Standard Webhooks, "Signature scheme").
const PREFIX: &str = "whsec_";
/// Bytes that a secret may have (ibid.).
const BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Secrets that sign at once: the new one and those on their way out.
const MOST_SECRETS: usize = 4;

/// Somebody who is told what becomes of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    pub name: Name,
    /// May contain a secret in its query; not for logs.
    pub url: String,
    pub secret: SecretSource,
    pub events: Vec<Event>,
    /// `None`: every keyset.
    pub keysets: Option<Vec<Name>>,
    /// How long before a planned transition it is told.
    pub before: Vec<Span>,
    /// PEM certificates: who else signs is not trusted. `None`: the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
    /// Of one attempt.
    pub timeout: Span,
    /// How long after its event a notice is still tried.
    pub give_up_after: Span,
}

impl Receiver {
    /// Whether it is to hear of this.
    pub fn wants(&self, event: Event) -> bool {
        event == Event::Test || self.events.contains(&event)
    }

    /// Whether it is to hear of this keyset.
    pub fn follows(&self, keyset: &Name) -> bool {
        self.keysets.as_ref().is_none_or(|names| names.contains(keyset))
    }
}

/// The secrets that sign a receiver's notices, each of them every notice. They do not show.
#[derive(Clone, PartialEq, Eq)]
pub struct NoticeSecrets(Vec<Zeroizing<Vec<u8>>>);

impl NoticeSecrets {
    /// Reads `whsec_…`, or several of them with white space between: while a secret is exchanged.
    pub fn parse(secret: &Secret) -> Result<Self, NoticeSecretError> {
        let text = std::str::from_utf8(secret.expose()).map_err(|_| NoticeSecretError::Malformed)?;
        let secrets = text.split_ascii_whitespace().map(one).collect::<Result<Vec<_>, _>>()?;
        if secrets.is_empty() || secrets.len() > MOST_SECRETS {
            return Err(NoticeSecretError::Count { found: secrets.len() });
        }
        Ok(NoticeSecrets(secrets))
    }

    /// The keys themselves, for the one place that signs.
    pub fn expose(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|secret| secret.as_slice())
    }
}

impl std::fmt::Debug for NoticeSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NoticeSecrets(…)")
    }
}

/// Why a secret cannot sign notices. Quotes nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoticeSecretError {
    #[error(
        "it is not whsec_ and 24 to 64 bytes in base64: make one with `printf 'whsec_%s\\n' \"$(openssl rand -base64 32)\"`"
    )]
    Malformed,
    #[error("it has {found} secrets: one to {MOST_SECRETS} may sign at once")]
    Count { found: usize },
}

fn one(text: &str) -> Result<Zeroizing<Vec<u8>>, NoticeSecretError> {
    let encoded = text.strip_prefix(PREFIX).ok_or(NoticeSecretError::Malformed)?;
    let bytes = Zeroizing::new(STANDARD.decode(encoded).map_err(|_| NoticeSecretError::Malformed)?);
    if BYTES.contains(&bytes.len()) { Ok(bytes) } else { Err(NoticeSecretError::Malformed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<usize, NoticeSecretError> {
        NoticeSecrets::parse(&Secret::new(text.as_bytes()).unwrap()).map(|secrets| secrets.0.len())
    }

    #[test]
    fn a_secret_is_long_enough_and_says_what_it_is() {
        let secret = |bytes: usize| format!("whsec_{}", STANDARD.encode(vec![7; bytes]));
        for (text, count) in [(secret(24), 1), (secret(64) + "\n", 1), (secret(32) + "\n" + &secret(24) + "\n", 2)] {
            assert_eq!(parse(&text), Ok(count));
        }
        for text in [secret(23), secret(65), STANDARD.encode([7; 32]), "whsec_%".to_owned(), "x".to_owned()] {
            assert_eq!(parse(&text), Err(NoticeSecretError::Malformed), "{text}");
        }
        assert_eq!(parse(&(secret(24) + " ").repeat(5)), Err(NoticeSecretError::Count { found: 5 }));
        assert_eq!(parse(" "), Err(NoticeSecretError::Count { found: 0 }));
    }

    #[test]
    fn a_secret_does_not_show() {
        let secrets = NoticeSecrets::parse(&Secret::new(b"whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").unwrap()).unwrap();
        assert_eq!(format!("{secrets:?}"), "NoticeSecrets(…)");
    }
}
