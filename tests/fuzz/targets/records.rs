//! Stored records and sealed private keys. The first line says what the rest is: a kind and a name as they stand in a
//! record, or `private` and what the sealed key is bound to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::jwk::{PublishedEntry, jwks_document};
use jwksd::keyring::notice::Book;
use jwksd::keyring::outlook::outlook;
use jwksd::keyring::plan::{Desired, Facts, plan};
use jwksd::keyring::record::Keyring;
use jwksd::keyring::time::Timestamp;
use jwksd::seal::data_keys::{DataKeySecret, DataKeys};
use jwksd::store::ledger::Installation;
use jwksd::store::record::{Kind, UnverifiedRecord, open_record};
use jwksd::store::wire::{IndexBody, ReportBody};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::{Verdict, assert_presentable};

const LOCATION: &str = "data/keyrings/default.json";
const INSTALLATION: &str = "00000000000000000000000000000001";
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

const KINDS: [Kind; 6] =
    [Kind::Installation, Kind::Keyring, Kind::Seen, Kind::SeenInstallation, Kind::Alive, Kind::Notices];

/// Never the keys of an installation: those are random.
pub static KEYS: LazyLock<DataKeys> = LazyLock::new(|| {
    let secret = |byte| DataKeySecret::from_unwrapped(&[byte; 32]).expect("32 bytes");
    let secrets = [("dk-000000000001".to_owned(), secret(1)), ("dk-000000000002".to_owned(), secret(2))];
    DataKeys::new(INSTALLATION, "dk-000000000002", secrets).expect("the current one is there")
});

/// Everything that was ever sealed with [`KEYS`]: nobody else has them, so nothing else may be believed.
static SEALED: LazyLock<Vec<Sealed>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/records");
    let files = std::fs::read_dir(folder).expect("the corpus");
    let files = files.map(|file| file.expect("a file").path());
    let genuine =
        files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("sealed-")));
    genuine.map(|path| Sealed::of(&std::fs::read(path).expect("it is readable"))).collect()
});

/// What is authenticated, as the parser of JSON reads it.
#[derive(PartialEq)]
struct Sealed {
    label: Vec<u8>,
    content: BTreeMap<String, serde_json::Value>,
    body: String,
    plain: Vec<u8>,
}

impl Sealed {
    fn of(input: &[u8]) -> Self {
        let (label, rest) = split(input).expect("a sealed file has a first line");
        #[derive(serde::Deserialize)]
        struct Body<'a> {
            #[serde(borrow)]
            body: &'a RawValue,
        }
        let mut content: BTreeMap<String, serde_json::Value> = serde_json::from_slice(rest).unwrap_or_default();
        content.remove("body");
        // The same, whether it is written or left out.
        content.retain(|_, value| !value.is_null());
        let body = serde_json::from_slice::<Body<'_>>(rest).map(|it| it.body.get().to_owned()).unwrap_or_default();
        let plain = if content.is_empty() { rest.to_vec() } else { Vec::new() };
        Sealed { label: label.to_vec(), content, body, plain }
    }
}

pub fn run(input: &[u8]) -> Verdict {
    let Some((label, bytes)) = split(input) else { return Verdict::Refused };
    let Ok(label_text) = std::str::from_utf8(label) else { return Verdict::Refused };
    let (kind, name) = label_text.split_once(' ').unwrap_or((label_text, ""));
    if kind == "private" {
        return private_key(input, name, bytes);
    }
    bodies_are_read_as_written(bytes);
    let Some(kind) = KINDS.into_iter().find(|known| known.as_str() == kind) else { return Verdict::Refused };
    if let Ok(record) = UnverifiedRecord::parse(LOCATION, bytes, kind, name) {
        unverified_bodies_are_harmless(&record);
    }
    match open_record(LOCATION, bytes, kind, name, &KEYS) {
        Err(error) => {
            assert_presentable(&error.to_string(), 2048);
            Verdict::Refused
        }
        Ok(record) => {
            assert!(SEALED.contains(&Sealed::of(input)), "a record passes that nobody sealed");
            if let Err(error) = record.body::<Keyring>(LOCATION) {
                assert_presentable(&error.to_string(), 2048);
            }
            Verdict::Accepted
        }
    }
}

fn split(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = input.iter().position(|byte| *byte == b'\n')?;
    Some((&input[..at], &input[at + 1..]))
}

fn private_key(input: &[u8], bound_to: &str, bytes: &[u8]) -> Verdict {
    let Ok(sealed) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    match KEYS.open_private(bound_to.as_bytes(), sealed) {
        Ok(_) => {
            assert!(SEALED.contains(&Sealed::of(input)), "a private key opens that nobody sealed");
            Verdict::Accepted
        }
        Err(error) => {
            assert_presentable(&error.to_string(), 512);
            Verdict::Refused
        }
    }
}

/// While the seal is out of reach, key sets are served from records that nobody could authenticate.
fn unverified_bodies_are_harmless(record: &UnverifiedRecord<'_>) {
    for error in [
        record.unverified_body::<Keyring>(LOCATION).err(),
        record.unverified_body::<Installation>(LOCATION).err(),
        record.unverified_body::<Book>(LOCATION).err(),
    ] {
        error.into_iter().for_each(|error| assert_presentable(&error.to_string(), 2048));
    }
    if let Ok(keyring) = record.unverified_body::<Keyring>(LOCATION) {
        the_core_is_total(&keyring);
    }
}

/// The planner decides something about every record that can be read, and nothing private is published.
fn the_core_is_total(keyring: &Keyring) {
    let entries = keyring.published();
    let entries = entries.map(|key| PublishedEntry { kid: &key.kid, algorithm: key.algorithm, public: &key.public });
    let document = jwks_document(entries);
    let document: serde_json::Value = serde_json::from_slice(&document).expect("the document is JSON");
    let keys = document["keys"].as_array().expect("with keys");
    assert!(keys.iter().all(|key| ["d", "p", "q", "private"].iter().all(|member| key.get(member).is_none())));
    for desired in [Desired::Policy(&keyring.policy), Desired::Degraded, Desired::Absent] {
        let facts = Facts {
            unconfirmed: Some(Vec::new()),
            now: NOW,
            clock_frozen: false,
            removals_not_before: Timestamp::EPOCH,
            desired,
            published: keyring.published().map(|key| (key.serial, key.created_at)).collect(),
            stopped: BTreeMap::new(),
            seen: BTreeMap::new(),
            contested: BTreeSet::new(),
            issuer_served: true,
            resumed_at: None,
            lagging: BTreeMap::new(),
            room: 4,
            backoff: BTreeMap::new(),
        };
        let plan = plan(keyring, &facts);
        assert!(plan.wake.is_none_or(|wake| wake > NOW), "a planner that wakes in the past never sleeps");
        outlook(keyring, &facts);
    }
}

/// What can be read is written so that it reads the same.
fn bodies_are_read_as_written(bytes: &[u8]) {
    round_trip::<Keyring>(bytes);
    round_trip::<Installation>(bytes);
    round_trip::<Book>(bytes);
    round_trip::<IndexBody>(bytes);
    round_trip::<ReportBody>(bytes);
    round_trip::<Algorithm>(bytes);
    if let Ok(keyring) = serde_json::from_slice::<Keyring>(bytes) {
        the_core_is_total(&keyring);
    }
}

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(read) = serde_json::from_slice::<T>(bytes) else { return };
    let written = serde_json::to_vec(&read).expect("what was read can be written");
    let again: T = serde_json::from_slice(&written).unwrap_or_else(|error| panic!("{error}: {read:?}"));
    assert_eq!(again, read);
}
