//! The envelope of every stored document: JSON that people can read and that nobody without the seal can write.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Digest;
use crate::keyring::name::legible;
use crate::seal::data_keys::{DataKeyError, DataKeys};

/// The format this release writes. It reads this one and, once there is one, its predecessor.
pub const FORMAT: u32 = 1;

/// No document is longer, in bytes: what is longer is neither written nor read.
pub const LONGEST_RECORD: usize = 16 * 1024 * 1024;

/// Separates these authentication codes from all others made with the same key.
const DOMAIN: &[u8] = b"jwksd record";
const RELEASE: &str = concat!("jwksd ", env!("CARGO_PKG_VERSION"));

/// What a document is; a record of one kind never passes for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Installation,
    Keyring,
    Seen,
    SeenInstallation,
    Alive,
    Notices,
}

/// What the envelope says about its body.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    pub kind: Kind,
    /// The keyset of keyrings and seen marks; the kind's own name for the others.
    pub name: &'a str,
    /// Which history it belongs to; empty for documents without one.
    pub lineage: &'a str,
    pub generation: u64,
    /// Digest of the bytes that this document replaced.
    pub previous: Option<Digest>,
}

/// Writes a record under the current data key. The same arguments give the same bytes.
pub fn seal_record<B: Serialize>(
    location: &str,
    header: &Header<'_>,
    body: &B,
    keys: &DataKeys,
) -> Result<Vec<u8>, RecordError> {
    let unwritable = |problem: String| RecordError::new(location, RecordProblem::Unwritable { problem });
    let body = serde_json::to_string_pretty(body).map_err(|error| unwritable(error.to_string()))?;
    // Indented as a part of the whole; line feeds inside JSON strings are escaped, so only layout changes.
    let body = RawValue::from_string(body.replace('\n', "\n  ")).map_err(|error| unwritable(error.to_string()))?;
    let mut envelope = Envelope {
        format: FORMAT,
        written_by: RELEASE.into(),
        kind: header.kind.as_str().into(),
        installation: keys.installation().into(),
        name: header.name.into(),
        lineage: header.lineage.into(),
        generation: header.generation,
        previous: header.previous.map(|digest| digest.to_base64url().into()),
        data_key: keys.current().into(),
        mac: "".into(),
        body: &body,
    };
    let mac = keys
        .mac(keys.current(), &envelope.authenticated(header.previous).parts())
        .map_err(|error| unwritable(error.to_string()))?;
    envelope.mac = URL_SAFE_NO_PAD.encode(mac).into();
    let mut bytes = serde_json::to_vec_pretty(&envelope).map_err(|error| unwritable(error.to_string()))?;
    bytes.push(b'\n');
    if bytes.len() > LONGEST_RECORD {
        return Err(RecordError::new(location, RecordProblem::WouldBeTooLong { bytes: bytes.len() }));
    }
    Ok(bytes)
}

/// Reads and authenticates a record: it is of this kind, name and installation, and unchanged since somebody with the
/// data key wrote it. `location` is for messages.
pub fn open_record<'a>(
    location: &str,
    bytes: &'a [u8],
    kind: Kind,
    name: &str,
    keys: &DataKeys,
) -> Result<OpenedRecord<'a>, RecordError> {
    let unverified = UnverifiedRecord::parse(location, bytes, kind, name)?;
    unverified.authenticate(location, keys)
}

/// A record whose format, kind and name are right but whose authentication is still to be checked. The installation is
/// read in this state, since it holds the wrapped keys that authenticate it; everything, while the seal is out of reach.
pub struct UnverifiedRecord<'a> {
    envelope: Envelope<'a>,
    previous: Option<Digest>,
    digest: Digest,
}

/// An authenticated record.
#[derive(Debug)]
pub struct OpenedRecord<'a> {
    pub lineage: String,
    pub generation: u64,
    /// Digest of the bytes that this record replaced.
    pub previous: Option<Digest>,
    /// Digest of this record's bytes.
    pub digest: Digest,
    /// Id of the data key it is authenticated with.
    pub data_key: String,
    written_by: String,
    body: &'a RawValue,
}

/// A document that is not a record this installation can trust.
#[derive(Debug, thiserror::Error)]
#[error("{location} {problem}")]
pub struct RecordError {
    /// Where a person finds the document.
    pub location: String,
    pub problem: RecordProblem,
}

/// What is wrong with a record, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordProblem {
    #[error(
        "is not a record of jwksd (truncated or damaged at line {line}, column {column}): restore it, see docs/restore.md"
    )]
    Malformed { line: usize, column: usize },
    #[error("is {bytes} bytes long, more than any record may be: restore it, see docs/restore.md")]
    TooLong { bytes: usize },
    #[error(
        "would become {bytes} bytes long, and no record may be longer than {LONGEST_RECORD}: nothing was written, what is \
         stored is intact. Shorten what the configuration says of it, and report this: no other part of a record should grow so far"
    )]
    WouldBeTooLong { bytes: usize },
    #[error(
        "holds the {found}, not the {expected}: files were swapped; put each back in its place or restore them, see \
         docs/restore.md"
    )]
    WrongDocument { found: String, expected: String },
    #[error(
        "belongs to the installation {found}, not to {expected}: it came from another store; restore this one's own, \
         see docs/restore.md"
    )]
    OtherInstallation { found: String, expected: String },
    #[error(
        "has format {format}, written by {release}; this is {RELEASE}, which reads up to format {FORMAT}: run that \
         release or a newer one. Nothing was changed"
    )]
    NewerFormat { format: u32, release: String },
    #[error("has format {format}, which no release wrote: restore it, see docs/restore.md")]
    UnknownFormat { format: u32 },
    #[error(
        "is authenticated with the data key `{id}`, which this installation does not have: it is older than the last \
         reseal or comes from another store; restore store and seal together, see docs/restore.md"
    )]
    UnknownDataKey { id: String },
    #[error(
        "was changed or forged: its authentication code does not match. Keep a copy for the inquiry and restore it, \
         see docs/restore.md"
    )]
    Changed,
    #[error(
        "is authentic but does not read as this release writes it (line {line}, column {column} of its body): \
         run the release that wrote it, {release}"
    )]
    UnexpectedBody { line: usize, column: usize, release: String },
    #[error("cannot be written: {problem}")]
    Unwritable { problem: String },
}

impl<'a> UnverifiedRecord<'a> {
    /// Everything that can be checked without keys.
    pub fn parse(location: &str, bytes: &'a [u8], kind: Kind, name: &str) -> Result<Self, RecordError> {
        let wrong = |problem| RecordError::new(location, problem);
        if bytes.len() > LONGEST_RECORD {
            return Err(wrong(RecordProblem::TooLong { bytes: bytes.len() }));
        }
        let envelope = Envelope::parse(bytes).map_err(wrong)?;
        let expected = (kind.as_str(), name);
        if (envelope.kind.as_ref(), envelope.name.as_ref()) != expected {
            let describe = |(kind, name): (&str, &str)| {
                let text = if kind == name { kind.to_owned() } else { format!("{kind} of `{name}`") };
                legible(&text)
            };
            let found = describe((&envelope.kind, &envelope.name));
            return Err(wrong(RecordProblem::WrongDocument { found, expected: describe(expected) }));
        }
        let previous = match &envelope.previous {
            None => None,
            Some(text) => Some(Digest::from_base64url(text).ok_or(wrong(RecordProblem::Changed))?),
        };
        Ok(UnverifiedRecord { envelope, previous, digest: Digest::of(bytes) })
    }

    /// The installation that the record claims to belong to.
    pub fn installation(&self) -> &str {
        &self.envelope.installation
    }

    /// The history that the record claims to belong to.
    pub fn lineage(&self) -> &str {
        &self.envelope.lineage
    }

    /// The claimed generation.
    pub fn generation(&self) -> u64 {
        self.envelope.generation
    }

    /// The claimed predecessor's digest.
    pub fn previous(&self) -> Option<Digest> {
        self.previous
    }

    /// Digest of the record's bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The claimed body. Trust nothing in it before [`authenticate`](Self::authenticate).
    pub fn unverified_body<B: DeserializeOwned>(&self, location: &str) -> Result<B, RecordError> {
        // Before authentication a body that does not parse is just a damaged file.
        serde_json::from_str(self.envelope.body.get())
            .map_err(|error| RecordError::new(location, RecordProblem::malformed(&error)))
    }

    /// Checks that the record belongs to the installation of `keys` and is what was written.
    pub fn authenticate(self, location: &str, keys: &DataKeys) -> Result<OpenedRecord<'a>, RecordError> {
        let wrong = |problem| RecordError::new(location, problem);
        let envelope = self.envelope;
        if envelope.installation != keys.installation() {
            let found = legible(&envelope.installation);
            let expected = keys.installation().to_owned();
            return Err(wrong(RecordProblem::OtherInstallation { found, expected }));
        }
        let mac = URL_SAFE_NO_PAD.decode(envelope.mac.as_bytes()).map_err(|_| wrong(RecordProblem::Changed))?;
        keys.verify_mac(&envelope.data_key, &envelope.authenticated(self.previous).parts(), &mac).map_err(|error| {
            match error {
                DataKeyError::UnknownKey { id } => wrong(RecordProblem::UnknownDataKey { id }),
                _ => wrong(RecordProblem::Changed),
            }
        })?;
        Ok(OpenedRecord {
            lineage: envelope.lineage.into_owned(),
            generation: envelope.generation,
            previous: self.previous,
            digest: self.digest,
            data_key: envelope.data_key.into_owned(),
            written_by: envelope.written_by.into_owned(),
            body: envelope.body,
        })
    }
}

impl OpenedRecord<'_> {
    /// The authenticated content.
    pub fn body<B: DeserializeOwned>(&self, location: &str) -> Result<B, RecordError> {
        serde_json::from_str(self.body.get()).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            let release = self.written_by.clone();
            RecordError::new(location, RecordProblem::UnexpectedBody { line, column, release })
        })
    }
}

impl RecordError {
    pub(crate) fn new(location: &str, problem: RecordProblem) -> Self {
        RecordError { location: location.to_owned(), problem }
    }
}

impl RecordProblem {
    /// Whether it was met while writing: what is stored is as it was.
    pub fn is_of_writing(&self) -> bool {
        matches!(self, RecordProblem::WouldBeTooLong { .. } | RecordProblem::Unwritable { .. })
    }

    /// Only the place: the text around an error may be something that must not be shown.
    fn malformed(error: &serde_json::Error) -> Self {
        RecordProblem::Malformed { line: error.line(), column: error.column() }
    }
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Installation => "installation",
            Kind::Keyring => "keyring",
            Kind::Seen => "seen",
            Kind::SeenInstallation => "seen-installation",
            Kind::Alive => "alive",
            Kind::Notices => "notices",
        }
    }
}

impl Digest {
    /// SHA-256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut digest = [0; 32];
        digest.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref());
        Digest(digest)
    }

    pub fn to_base64url(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// `None` for anything but 32 bytes in canonical base64url without padding.
    pub fn from_base64url(text: &str) -> Option<Self> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(Digest)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_base64url())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    format: u32,
    #[serde(borrow)]
    written_by: Cow<'a, str>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    installation: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    lineage: Cow<'a, str>,
    generation: u64,
    previous: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data_key: Cow<'a, str>,
    #[serde(borrow)]
    mac: Cow<'a, str>,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// What every format has in common with this one.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
    #[serde(default)]
    written_by: Option<String>,
}

impl<'a> Envelope<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, RecordProblem> {
        match serde_json::from_slice::<Envelope<'a>>(bytes) {
            Ok(envelope) if envelope.format == FORMAT => Ok(envelope),
            // Another format may look different in any other respect.
            Ok(envelope) => Err(other_format(envelope.format, Some(&envelope.written_by))),
            Err(error) => match serde_json::from_slice::<AnyFormat>(bytes) {
                Ok(other) if other.format != FORMAT => Err(other_format(other.format, other.written_by.as_deref())),
                _ => Err(RecordProblem::malformed(&error)),
            },
        }
    }

    fn authenticated(&'a self, previous: Option<Digest>) -> Authenticated<'a> {
        Authenticated {
            envelope: self,
            format: self.format.to_be_bytes(),
            generation: self.generation.to_be_bytes(),
            previous: previous.map(|digest| digest.0),
        }
    }
}

fn other_format(format: u32, written_by: Option<&str>) -> RecordProblem {
    if format < FORMAT {
        return RecordProblem::UnknownFormat { format };
    }
    // Not authenticated: it is shown, not believed.
    let release = written_by.map_or_else(|| "a newer release".to_owned(), legible);
    RecordProblem::NewerFormat { format, release }
}

/// The fields that the authentication code covers, in the order that it covers them.
struct Authenticated<'a> {
    envelope: &'a Envelope<'a>,
    format: [u8; 4],
    generation: [u8; 8],
    previous: Option<[u8; 32]>,
}

impl Authenticated<'_> {
    /// Everything but the code itself. An absent predecessor is the empty part, which no digest is.
    fn parts(&self) -> [&[u8]; 11] {
        let envelope = self.envelope;
        [
            DOMAIN,
            &self.format,
            envelope.written_by.as_bytes(),
            envelope.kind.as_bytes(),
            envelope.installation.as_bytes(),
            envelope.name.as_bytes(),
            envelope.lineage.as_bytes(),
            &self.generation,
            self.previous.as_ref().map_or(&[], |digest| &digest[..]),
            envelope.data_key.as_bytes(),
            envelope.body.get().as_bytes(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const LOCATION: &str = "data/keyrings/default.json";

    fn header() -> Header<'static> {
        Header { kind: Kind::Keyring, name: "default", lineage: "l", generation: 44, previous: Some(Digest([7; 32])) }
    }

    fn body() -> Value {
        json!({ "keys": [{ "kid": "a\n\"b\"", "x": "é" }], "empty": {}, "number": 1 })
    }

    fn sealed(keys: &DataKeys) -> Vec<u8> {
        seal_record(LOCATION, &header(), &body(), keys).unwrap()
    }

    fn open<'a>(bytes: &'a [u8], keys: &DataKeys) -> Result<OpenedRecord<'a>, RecordError> {
        open_record(LOCATION, bytes, Kind::Keyring, "default", keys)
    }

    fn problem(bytes: &[u8], keys: &DataKeys) -> RecordProblem {
        open(bytes, keys).unwrap_err().problem
    }

    /// The record with one header field replaced.
    fn with(bytes: &[u8], field: &str, value: Value) -> Vec<u8> {
        let mut envelope: serde_json::Map<String, Value> = serde_json::from_slice(bytes).unwrap();
        envelope.insert(field.to_owned(), value);
        serde_json::to_vec_pretty(&envelope).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_and_is_readable() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        let record = open(&bytes, &keys).unwrap();
        assert_eq!((record.lineage.as_str(), record.generation), ("l", 44));
        assert_eq!((record.previous, record.digest), (Some(Digest([7; 32])), Digest::of(&bytes)));
        assert_eq!(record.body::<Value>(LOCATION).unwrap(), body());
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("{\n  \"format\": 1,\n  \"written_by\": \"jwksd "), "{text}");
        assert!(text.contains("\n  \"body\": {\n    \"empty\": {},\n"), "{text}");
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let keys = DataKeys::ephemeral("one");
        assert_eq!(sealed(&keys), sealed(&keys));
    }

    #[test]
    fn no_changed_byte_passes_for_different_content() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        for at in 0..bytes.len() {
            for mask in [0x01, 0x02, 0x10, 0x20, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= mask;
                if let Ok(record) = open(&changed, &keys) {
                    assert_eq!((record.generation, record.lineage.as_str()), (44, "l"), "byte {at} ^ {mask:#x}");
                    assert_eq!(record.previous, Some(Digest([7; 32])), "byte {at} ^ {mask:#x}");
                    assert_eq!(record.body::<Value>(LOCATION).unwrap(), body(), "byte {at} ^ {mask:#x}");
                    assert_ne!(record.digest, Digest::of(&bytes));
                }
            }
        }
    }

    #[test]
    fn no_beginning_of_a_record_passes() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        for length in 0..bytes.len() - 1 {
            assert!(matches!(problem(&bytes[..length], &keys), RecordProblem::Malformed { .. }), "{length}");
        }
    }

    #[test]
    fn every_field_is_authenticated() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        for (field, value) in [
            ("written_by", json!("jwksd 0.0.0")),
            ("lineage", json!("m")),
            ("generation", json!(45)),
            ("previous", json!(null)),
            ("previous", json!(Digest([8; 32]).to_base64url())),
            ("previous", json!("")),
            ("mac", json!("")),
            ("body", json!({})),
        ] {
            assert_eq!(problem(&with(&bytes, field, value), &keys), RecordProblem::Changed, "{field}");
        }
        let extra = with(&bytes, "extra", json!(1));
        assert!(matches!(problem(&extra, &keys), RecordProblem::Malformed { .. }));
    }

    #[test]
    fn a_file_in_another_ones_place_is_named() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        let other = open_record(LOCATION, &bytes, Kind::Keyring, "other", &keys).unwrap_err().to_string();
        assert!(other.contains("holds the keyring of `default`, not the keyring of `other`"), "{other}");
        let seen = open_record(LOCATION, &bytes, Kind::Seen, "default", &keys).unwrap_err().to_string();
        assert!(seen.contains("not the seen of `default`"), "{seen}");
        // Relabelling does not help.
        let relabelled = with(&bytes, "name", json!("other"));
        let error = open_record(LOCATION, &relabelled, Kind::Keyring, "other", &keys).unwrap_err();
        assert_eq!(error.problem, RecordProblem::Changed);
        let relabelled = with(&bytes, "kind", json!("seen"));
        let error = open_record(LOCATION, &relabelled, Kind::Seen, "default", &keys).unwrap_err();
        assert_eq!(error.problem, RecordProblem::Changed);
    }

    #[test]
    fn another_installations_record_is_named_and_cannot_be_relabelled() {
        let (ours, theirs) = (DataKeys::ephemeral("one"), DataKeys::ephemeral("two"));
        let bytes = sealed(&theirs);
        assert!(matches!(problem(&bytes, &ours), RecordProblem::OtherInstallation { .. }));
        let relabelled = with(&bytes, "installation", json!("one"));
        assert!(matches!(problem(&relabelled, &ours), RecordProblem::UnknownDataKey { .. }));
        let forged = with(&relabelled, "data_key", json!(ours.current()));
        assert_eq!(problem(&forged, &ours), RecordProblem::Changed);
    }

    #[test]
    fn a_newer_format_is_refused_by_the_name_of_its_release() {
        let keys = DataKeys::ephemeral("one");
        let newer = br#"{"format": 2, "written_by": "jwksd 7.1.0", "something": "else"}"#;
        for bytes in [&newer[..], &with(&sealed(&keys), "format", json!(2))] {
            assert!(matches!(problem(bytes, &keys), RecordProblem::NewerFormat { format: 2, .. }));
        }
        let message = open(newer, &keys).unwrap_err().to_string();
        assert!(message.contains("jwksd 7.1.0") && message.contains("Nothing was changed"), "{message}");
        assert_eq!(problem(br#"{"format": 0}"#, &keys), RecordProblem::UnknownFormat { format: 0 });
    }

    #[test]
    fn every_message_names_the_file_and_the_way_out() {
        let keys = DataKeys::ephemeral("one");
        let other = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        for (bytes, keys) in
            [(&b"{"[..], &keys), (b"", &keys), (&bytes, &other), (&with(&bytes, "generation", json!(1)), &keys)]
        {
            let message = open(bytes, keys).unwrap_err().to_string();
            assert!(message.starts_with(LOCATION) && message.contains("docs/restore.md"), "{message}");
        }
    }

    #[test]
    fn a_parse_error_shows_nothing_of_the_content() {
        let keys = DataKeys::ephemeral("one");
        let message = open(br#"{"format": "s3cret"}"#, &keys).unwrap_err().to_string();
        assert!(!message.contains("s3cret"), "{message}");
    }

    #[test]
    fn what_is_too_long_is_neither_written_nor_read() {
        let keys = DataKeys::ephemeral("one");
        let long = "x".repeat(LONGEST_RECORD);
        let error = seal_record(LOCATION, &header(), &long, &keys).unwrap_err();
        assert!(matches!(error.problem, RecordProblem::WouldBeTooLong { .. }));
        let spaces = " ".repeat(LONGEST_RECORD + 1);
        assert!(matches!(problem(spaces.as_bytes(), &keys), RecordProblem::TooLong { .. }));
    }

    #[test]
    fn an_authentic_body_of_another_shape_names_the_release_that_wrote_it() {
        let keys = DataKeys::ephemeral("one");
        let bytes = sealed(&keys);
        let message = open(&bytes, &keys).unwrap().body::<Vec<u8>>(LOCATION).unwrap_err().to_string();
        assert!(message.starts_with(LOCATION) && message.contains(RELEASE), "{message}");
    }

    #[test]
    fn deep_nesting_is_an_error() {
        let keys = DataKeys::ephemeral("one");
        let deep = "[".repeat(1_000_000);
        assert!(matches!(problem(deep.as_bytes(), &keys), RecordProblem::Malformed { .. }));
    }
}
