//! What the tags of a key say of its creation, and what proves that they are true.
//!
//! Tags can be copied by whoever may tag keys. So they end in a code that only this installation's secret makes, over
//! the other tags and the time at which the key was asked for: on a key that was made at another time they prove nothing.

use super::{AwsKmsBackend, CreationProof};
use crate::aws_kms::KeyDescription;
use crate::backend::KeyIdentity;
use crate::keyring::time::{Span, Timestamp};
use crate::random;

const INSTALLATION: &str = "jwksd:installation";
const LINEAGE: &str = "jwksd:lineage";
const KEYSET: &str = "jwksd:keyset";
const SERIAL: &str = "jwksd:serial";
const NONCE: &str = "jwksd:nonce";

const PROOF: &[u8] = b"jwksd aws-kms creation 2";

/// Between the time in the tags, by our clock, and the creation date, by the service's. The service takes no requests
/// whose time is 5 minutes off.
const TIMES_DIFFER_AT_MOST: Span = Span::from_secs(10 * 60);

/// The tags of a key, as far as they claim that this daemon made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Creation {
    pub(super) installation: String,
    pub(super) lineage: String,
    pub(super) keyset: String,
    pub(super) serial: String,
    random: String,
    asked_at: Timestamp,
    /// The data key that `code` was made with.
    with: String,
    code: Vec<u8>,
}

/// What tags claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    /// A key of `jwksd`, of whichever installation.
    Creation(Box<Creation>),
    /// Another installation's key.
    Foreign,
    /// Nothing. The tags of a new key are not visible everywhere at once.
    Nothing,
}

impl Creation {
    pub(super) fn read(tags: &[(String, String)]) -> Option<Self> {
        let tag = |name: &str| tags.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let nonce = tag(NONCE)?;
        let mut words = nonce.split('.');
        let (random, asked_at, with, code) = (words.next()?, words.next()?, words.next()?, words.next()?);
        Some(Creation {
            installation: tag(INSTALLATION)?,
            lineage: tag(LINEAGE)?,
            keyset: tag(KEYSET)?,
            serial: tag(SERIAL)?,
            random: random.to_owned(),
            asked_at: Timestamp::from_millis(asked_at.parse().ok()?),
            with: with.to_owned(),
            code: words.next().is_none().then(|| unhex(code))??,
        })
    }

    /// What the tags of a key of the account say to `installation`.
    pub(super) fn claimed(installation: &str, tags: &[(String, String)]) -> Claimed {
        let of = tags.iter().find(|(key, _)| key == INSTALLATION).map(|(_, value)| value.as_str());
        match (of, Creation::read(tags)) {
            (Some(of), _) if of != installation => Claimed::Foreign,
            (Some(_), Some(creation)) => Claimed::Creation(Box::new(creation)),
            _ => Claimed::Nothing,
        }
    }

    pub(super) fn is_of(&self, identity: &KeyIdentity) -> bool {
        self.installation == identity.installation
            && self.lineage == identity.lineage
            && self.keyset == identity.keyset.as_str()
            && self.serial == identity.serial.to_string()
    }

    /// Unique to one `CreateKey`.
    pub(super) fn nonce(&self) -> &str {
        &self.random
    }

    fn parts<'a>(&'a self, asked_at: &'a [u8]) -> [&'a [u8]; 7] {
        [
            PROOF,
            self.installation.as_bytes(),
            self.lineage.as_bytes(),
            self.keyset.as_bytes(),
            self.serial.as_bytes(),
            self.random.as_bytes(),
            asked_at,
        ]
    }

    fn tags(self) -> [(&'static str, String); 5] {
        let nonce = format!("{}.{}.{}.{}", self.random, self.asked_at.as_millis(), self.with, hex(&self.code));
        [
            (INSTALLATION, self.installation),
            (LINEAGE, self.lineage),
            (KEYSET, self.keyset),
            (SERIAL, self.serial),
            (NONCE, nonce),
        ]
    }

    /// Whether this installation's secret signed these tags.
    pub(super) fn is_signed(&self, proof: &dyn CreationProof) -> bool {
        proof.holds(&self.with, &self.parts(&self.asked_at.as_millis().to_be_bytes()), &self.code)
    }

    /// Whether `key` can be the key that was asked for: made by the service, for signatures, at that time.
    pub(super) fn fits(&self, key: &KeyDescription) -> bool {
        let at = key.created_at.is_some_and(|at| {
            let (earlier, later) = if at < self.asked_at { (at, self.asked_at) } else { (self.asked_at, at) };
            later.since(earlier) <= TIMES_DIFFER_AT_MOST
        });
        at && key.signs && key.born_there
    }
}

impl AwsKmsBackend {
    /// The tags of a key that is asked for now, and its nonce; `None` while the secret is not at hand.
    pub(super) fn tags(&self, identity: &KeyIdentity) -> Option<([(&'static str, String); 5], String)> {
        let mut creation = Creation {
            installation: identity.installation.clone(),
            lineage: identity.lineage.clone(),
            keyset: identity.keyset.to_string(),
            serial: identity.serial.to_string(),
            random: random::id(),
            asked_at: self.clock.wall(),
            with: String::new(),
            code: Vec::new(),
        };
        let (with, code) = self.proof.prove(&creation.parts(&creation.asked_at.as_millis().to_be_bytes()))?;
        (creation.with, creation.code) = (with, code);
        let nonce = creation.random.clone();
        Some((creation.tags(), nonce))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.is_ascii() && text.len().is_multiple_of(2) && text.len() <= 128;
    digits.then(|| (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws_kms::{KeySpec, KeyState};

    #[test]
    fn a_key_that_was_brought_along_or_made_at_another_time_is_none_of_ours() {
        let asked_at = Timestamp::from_secs(1_800_000_000);
        let word = || "x".to_owned();
        let creation = Creation {
            installation: word(),
            lineage: word(),
            keyset: word(),
            serial: word(),
            random: word(),
            asked_at,
            with: word(),
            code: Vec::new(),
        };
        let key = |after: i64| KeyDescription {
            arn: word(),
            state: KeyState::Enabled,
            spec: Some(KeySpec::EccNistP256),
            signs: true,
            encrypts: false,
            created_at: Some(Timestamp::from_secs(asked_at.as_secs() + after)),
            born_there: true,
        };
        for (after, fits) in [(0, true), (-600, true), (600, true), (-601, false), (601, false)] {
            assert_eq!(creation.fits(&key(after)), fits, "{after}");
        }
        assert!(!creation.fits(&KeyDescription { created_at: None, ..key(0) }));
        assert!(!creation.fits(&KeyDescription { signs: false, ..key(0) }));
        assert!(!creation.fits(&KeyDescription { born_there: false, ..key(0) }), "imported, or of a custom key store");
    }
}
