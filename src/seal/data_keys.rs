//! Data keys: what the seal wraps, and what in turn encrypts private keys and authenticates records.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::keyring::name::legible;

use super::cipher::{Cipher, SECRET_LEN, derive, hex};

/// Length of a message authentication code (HMAC-SHA256) in bytes.
pub const MAC_LEN: usize = 32;

/// No private key is longer: RSA-4096 as PKCS#8 takes 2.4 KB.
const LONGEST_PLAINTEXT: usize = 64 * 1024;
const VERSION: &str = "v1";
const NONCE_LEN: usize = 12;

/// The secret of one data key, as the seal wraps it. Wiped when dropped, never shown.
pub struct DataKeySecret(Zeroizing<[u8; SECRET_LEN]>);

impl DataKeySecret {
    pub fn generate() -> Self {
        DataKeySecret(crate::random::secret())
    }

    /// The bytes that a seal unwrapped; `None` if there are not exactly 32.
    pub fn from_unwrapped(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(|secret| DataKeySecret(Zeroizing::new(secret)))
    }

    /// For wrapping, and nothing else.
    pub fn expose(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }
}

impl fmt::Debug for DataKeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKeySecret(…)")
    }
}

/// The unwrapped data keys of an installation. New private keys are sealed and new records authenticated with the
/// current one; the others only read, until `jwksd reseal` drops them.
///
/// Each secret is split by HKDF-SHA256, in a domain of its installation, into a key for authentication (HMAC-SHA256) and
/// one for encryption (AES-256-GCM). Neither a record nor a private key of another installation can pass here, even if
/// the same secret were used twice.
pub struct DataKeys {
    installation: String,
    current: String,
    keys: BTreeMap<String, DataKey>,
}

struct DataKey {
    authentication: hmac::Key,
    encryption: Cipher,
}

/// Data keys that arrive when the seal is opened.
#[derive(Debug, Default)]
pub struct LateDataKeys(OnceLock<Arc<DataKeys>>);

impl LateDataKeys {
    /// The data keys are there; those of a later call are ignored.
    pub fn arrive(&self, keys: Arc<DataKeys>) {
        self.0.get_or_init(|| keys);
    }

    /// `None`: the seal has not been opened yet.
    pub fn arrived(&self) -> Option<&DataKeys> {
        self.0.get().map(AsRef::as_ref)
    }
}

/// Why something could not be authenticated or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataKeyError {
    #[error("it is not in the form v1.KEY.NONCE.CIPHERTEXT")]
    Malformed,
    #[error("it needs the data key `{id}`, which this installation does not have")]
    UnknownKey { id: String },
    #[error("it was changed, or made for something else")]
    Mismatch,
    #[error("it is longer than {LONGEST_PLAINTEXT} bytes")]
    TooLong,
}

impl DataKeys {
    /// The data keys of `installation`, by id; `current` must be among them. Ids contain no `.`.
    pub fn new(
        installation: &str,
        current: &str,
        secrets: impl IntoIterator<Item = (String, DataKeySecret)>,
    ) -> Result<Self, DataKeyError> {
        let keys: BTreeMap<_, _> =
            secrets.into_iter().map(|(id, secret)| (id, DataKey::new(installation, &secret))).collect();
        if !keys.contains_key(current) {
            return Err(DataKeyError::UnknownKey { id: current.to_owned() });
        }
        Ok(DataKeys { installation: installation.to_owned(), current: current.to_owned(), keys })
    }

    /// One new random data key, not wrapped by anything: for tests of what is built on this.
    pub fn ephemeral(installation: &str) -> Self {
        let id = Self::new_id();
        let keys = BTreeMap::from([(id.clone(), DataKey::new(installation, &DataKeySecret::generate()))]);
        DataKeys { installation: installation.to_owned(), current: id, keys }
    }

    /// A new random id for a data key.
    pub fn new_id() -> String {
        format!("dk-{}", hex(&crate::random::bytes::<6>()))
    }

    pub fn installation(&self) -> &str {
        &self.installation
    }

    /// Id of the data key that new things are made with.
    pub fn current(&self) -> &str {
        &self.current
    }

    /// HMAC-SHA256 with the authentication key of `key_id` over `parts`, each preceded by its length as 8 big-endian
    /// bytes, so that no two different lists have the same encoding.
    pub fn mac(&self, key_id: &str, parts: &[&[u8]]) -> Result<[u8; MAC_LEN], DataKeyError> {
        let mut context = hmac::Context::with_key(&self.key(key_id)?.authentication);
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(context.sign().as_ref());
        Ok(mac)
    }

    /// Checks a code made by [`mac`](Self::mac), in constant time.
    pub fn verify_mac(&self, key_id: &str, parts: &[&[u8]], mac: &[u8]) -> Result<(), DataKeyError> {
        let expected = self.mac(key_id, parts)?;
        let equal = subtle::ConstantTimeEq::ct_eq(&expected[..], mac);
        if equal.into() { Ok(()) } else { Err(DataKeyError::Mismatch) }
    }

    /// Encrypts a private key under the current data key, bound to `associated_data`:
    /// `v1.<data key id>.<nonce>.<ciphertext>`, the latter two in base64url.
    ///
    /// Nonces are 96 random bits, which is safe for 2³² private keys per data key (NIST SP 800-38D §8.3).
    pub fn seal_private(&self, associated_data: &[u8], plaintext: &[u8]) -> Result<String, DataKeyError> {
        if plaintext.len() > LONGEST_PLAINTEXT {
            return Err(DataKeyError::TooLong);
        }
        let sealed = self.key(&self.current)?.encryption.seal(associated_data, plaintext);
        let (nonce, ciphertext) = (URL_SAFE_NO_PAD.encode(sealed.nonce), URL_SAFE_NO_PAD.encode(&sealed.ciphertext));
        Ok(format!("{VERSION}.{}.{nonce}.{ciphertext}", self.current))
    }

    /// The inverse of [`seal_private`](Self::seal_private), with whichever data key it names.
    pub fn open_private(&self, associated_data: &[u8], sealed: &str) -> Result<Zeroizing<Vec<u8>>, DataKeyError> {
        let (id, nonce, ciphertext) = split(sealed).ok_or(DataKeyError::Malformed)?;
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| DataKeyError::Malformed);
        let nonce: [u8; NONCE_LEN] = decode(nonce)?.try_into().map_err(|_| DataKeyError::Malformed)?;
        let ciphertext = decode(ciphertext)?;
        self.key(id)?.encryption.open(associated_data, nonce, &ciphertext).map_err(|_| DataKeyError::Mismatch)
    }

    /// Whether `sealed` is under the current data key.
    pub fn is_current(&self, sealed: &str) -> bool {
        split(sealed).is_some_and(|(id, _, _)| id == self.current)
    }

    fn key(&self, id: &str) -> Result<&DataKey, DataKeyError> {
        self.keys.get(id).ok_or_else(|| DataKeyError::UnknownKey { id: legible(id) })
    }
}

impl fmt::Debug for DataKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataKeys")
            .field("installation", &self.installation)
            .field("current", &self.current)
            .field("ids", &self.keys.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl DataKey {
    fn new(installation: &str, secret: &DataKeySecret) -> Self {
        let domain = format!("jwksd-data-key-v1:{installation}");
        let derive = |purpose| derive(secret.expose(), &domain, purpose);
        DataKey {
            authentication: hmac::Key::new(hmac::HMAC_SHA256, &derive("authenticate records")[..]),
            encryption: Cipher::new(&derive("encrypt private keys")),
        }
    }
}

fn split(sealed: &str) -> Option<(&str, &str, &str)> {
    let mut parts = sealed.split('.');
    let (version, id, nonce, ciphertext) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    (version == VERSION && parts.next().is_none()).then_some((id, nonce, ciphertext))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(installation: &str, current: &str, secrets: &[(&str, u8)]) -> DataKeys {
        let secrets = secrets
            .iter()
            .map(|&(id, byte)| (id.to_owned(), DataKeySecret::from_unwrapped(&[byte; SECRET_LEN]).unwrap()));
        DataKeys::new(installation, current, secrets).unwrap()
    }

    #[test]
    fn a_sealed_private_key_opens_only_where_it_belongs() {
        let ours = keys("one", "a", &[("a", 1), ("b", 2)]);
        let sealed = ours.seal_private(b"keyset 1", b"private").unwrap();
        assert!(sealed.starts_with("v1.a.") && ours.is_current(&sealed), "{sealed}");
        assert_eq!(&**ours.open_private(b"keyset 1", &sealed).unwrap(), b"private");

        assert_eq!(ours.open_private(b"keyset 2", &sealed).unwrap_err(), DataKeyError::Mismatch);
        let other_installation = keys("two", "a", &[("a", 1)]);
        assert_eq!(other_installation.open_private(b"keyset 1", &sealed).unwrap_err(), DataKeyError::Mismatch);
        let relabelled = sealed.replacen("v1.a.", "v1.b.", 1);
        assert_eq!(ours.open_private(b"keyset 1", &relabelled).unwrap_err(), DataKeyError::Mismatch);
        let unknown = sealed.replacen("v1.a.", "v1.c.", 1);
        assert_eq!(ours.open_private(b"keyset 1", &unknown).unwrap_err(), DataKeyError::UnknownKey { id: "c".into() });
    }

    #[test]
    fn an_older_data_key_still_opens_after_the_current_one_changed() {
        let sealed = keys("one", "a", &[("a", 1)]).seal_private(b"", b"private").unwrap();
        let both = keys("one", "b", &[("a", 1), ("b", 2)]);
        assert!(!both.is_current(&sealed));
        assert_eq!(&**both.open_private(b"", &sealed).unwrap(), b"private");
    }

    #[test]
    fn no_changed_character_passes() {
        let keys = keys("one", "a", &[("a", 1)]);
        let sealed = keys.seal_private(b"", b"private").unwrap();
        for at in 0..sealed.len() {
            for replacement in ["A", "_", ".", "=", "", "é"] {
                let changed = format!("{}{replacement}{}", &sealed[..at], &sealed[at + 1..]);
                assert!(changed == sealed || keys.open_private(b"", &changed).is_err(), "{changed}");
            }
        }
        for garbage in ["", "v1", "v1.a", "v1.a..", "v2.a.b.c", "v1.a.b.c.d"] {
            assert!(keys.open_private(b"", garbage).is_err());
        }
    }

    #[test]
    fn parts_cannot_be_shifted_into_each_other() {
        let keys = keys("one", "a", &[("a", 1)]);
        let mac = keys.mac("a", &[b"ab", b"c"]).unwrap();
        keys.verify_mac("a", &[b"ab", b"c"], &mac).unwrap();
        for other in [&[&b"a"[..], b"bc"][..], &[b"abc"], &[b"ab", b"c", b""], &[b"", b"ab", b"c"]] {
            assert_eq!(keys.verify_mac("a", other, &mac).unwrap_err(), DataKeyError::Mismatch);
        }
        assert!(keys.verify_mac("a", &[b"ab", b"c"], &mac[..31]).is_err());
        assert!(keys.verify_mac("b", &[b"ab", b"c"], &mac).is_err());
    }

    #[test]
    fn installations_and_purposes_do_not_share_keys() {
        let mac = |installation: &str| keys(installation, "a", &[("a", 1)]).mac("a", &[b"x"]).unwrap();
        assert_ne!(mac("one"), mac("two"));
        let secret = DataKeySecret::from_unwrapped(&[1; 32]).unwrap();
        assert_ne!(derive(secret.expose(), "d", "authenticate"), derive(secret.expose(), "d", "encrypt"));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let keys = keys("one", "a", &[("a", 0xAB)]);
        let secret = DataKeySecret::from_unwrapped(&[0xAB; 32]).unwrap();
        for shown in [format!("{keys:?}"), format!("{secret:?}"), format!("{:?}", Cipher::new(&[0xAB; 32]))] {
            assert!(!shown.contains("171") && !shown.to_lowercase().contains("abab"), "{shown}");
        }
    }

    #[test]
    fn limits_hold() {
        let keys = DataKeys::ephemeral("one");
        assert_eq!(keys.seal_private(b"", &vec![0; LONGEST_PLAINTEXT + 1]).unwrap_err(), DataKeyError::TooLong);
        assert!(DataKeySecret::from_unwrapped(&[1; 31]).is_none());
        assert!(DataKeys::new("one", "missing", []).is_err());
    }
}
