//! `jwksd recover`: one history of several, after a store went backwards or two writers diverged.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::installation::{KeysetEntry, KeysetState, unwrap_data_keys};
use super::seen::{Position, SeenMark, claimed_mark, judge};
use super::{INSTALLATION, Installation, LedgerError, header, refuse_inconsistent};
use crate::keyring::name::Name;
use crate::keyring::record::{Key, KeyState, Keyring, Superseded};
use crate::keyring::recover::{Recovered, Recovery, ServedKey, recover};
use crate::keyring::time::{Span, Timestamp};
use crate::random;
use crate::seal::KeyEncryptionKey;
use crate::seal::data_keys::DataKeys;
use crate::store::record::{Kind, UnverifiedRecord, open_record, seal_record};
use crate::store::{Digest, Document, Store, StoreError};

/// Replicas that reported within this are asked what they saw.
const REPORTED_WITHIN: Span = Span::DAY;

/// Records beside the store's own.
pub struct Evidence {
    pub store: Arc<dyn Store>,
    /// Where they are, for people.
    pub label: String,
}

/// What is asked of a recovery.
pub struct RecoveryRequest<'a> {
    pub evidence: &'a [Evidence],
    /// By keyset: what verifiers are served today.
    pub served: &'a BTreeMap<Name, Vec<ServedKey>>,
    /// Go on although somebody saw more than there are records of.
    pub lose_newer: bool,
    pub dry_run: bool,
    pub actor: &'a str,
    pub reason: Option<&'a str>,
    pub now: Timestamp,
}

/// What a recovery did, or would do.
pub struct RecoveryOutcome {
    /// Keysets with a new history, in order of name.
    pub keysets: Vec<RecoveredKeyset>,
    /// Keysets of which nothing is left, and which begin anew.
    pub renewed: Vec<Name>,
    /// The installation's record is the newest that is known.
    pub installation_is_intact: bool,
    /// Records that could not be used, and why.
    pub unusable: Vec<String>,
}

impl RecoveryOutcome {
    /// Nothing was, or would be, written.
    pub fn is_nothing(&self) -> bool {
        self.keysets.is_empty() && self.renewed.is_empty() && self.installation_is_intact
    }
}

pub struct RecoveredKeyset {
    pub recovered: Recovered,
    /// Where the history is that it goes on from.
    pub base: String,
}

/// Why there was no recovery. Nothing was written, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(
        "there is no installation's record that the configured seal opens: give a copy of the store with --from{}",
        .unusable.iter().map(|problem| format!("; {problem}")).collect::<String>()
    )]
    NoInstallation { unusable: Vec<String> },
    #[error("{label} is of the installation {found}, the store of {expected}: leave it out")]
    OtherInstallation { label: String, found: String, expected: String },
    #[error(
        "the keyset `{keyset}` has no record that can be read, neither in the store nor in what --from names; give a copy \
         that has one, or repeat with --lose-newer to begin it anew: its first key then waits for propagation"
    )]
    NoRecord { keyset: Name },
    #[error(
        "{who} saw a generation {seen} of the keyset `{keyset}` that none of the records is or comes from, the newest being \
         generation {newest}: give a copy of what it saw with --from, or what it serves with --jwks; --lose-newer goes on \
         without"
    )]
    NewerSeen { keyset: Name, who: String, seen: u64, newest: u64 },
}

impl From<StoreError> for RecoverError {
    fn from(error: StoreError) -> Self {
        RecoverError::Ledger(error.into())
    }
}

/// The installations found, and the keys that open them.
struct Opened {
    keys: DataKeys,
    /// With where each was found; the store's own first, if it is there.
    installations: Vec<(Installation, Position)>,
    /// Of the bytes in the store: what is replaced.
    stored: Option<Digest>,
    /// The store's own is readable.
    own: bool,
}

/// The histories of one keyset.
#[derive(Default)]
struct Histories {
    keyrings: Vec<Keyring>,
    /// Of the records that these are, in the same order.
    positions: Vec<Position>,
    labels: Vec<String>,
    /// Of the bytes in the store.
    stored: Option<Digest>,
    /// The store's own record is readable: it is the first.
    own: bool,
    /// Who saw what.
    seen: Vec<(String, Seen)>,
}

enum Seen {
    /// A mark's.
    Record(Position),
    /// Of a replica's report: it does not tell of which history.
    Generation(u64),
}

/// Merges what the store and the evidence hold and writes it as new histories, of the keysets for which the store does
/// not hold the newest. Repeating it after a crash finishes it.
pub async fn recover_store(
    store: Arc<dyn Store>,
    keks: &[Arc<dyn KeyEncryptionKey>],
    request: &RecoveryRequest<'_>,
) -> Result<RecoveryOutcome, RecoverError> {
    let mut unusable = Vec::new();
    let opened = open_installations(store.as_ref(), keks, request, &mut unusable).await?;
    let mut installation =
        merged(&opened.installations).ok_or(RecoverError::NoInstallation { unusable: Vec::new() })?;
    let reports = match store.shared() {
        Some(shared) => shared.replicas(REPORTED_WITHIN).await?,
        None => Vec::new(),
    };
    let mut known: BTreeMap<Name, Histories> = BTreeMap::new();
    for name in installation.keysets.keys() {
        let mut histories = histories_of(name, store.as_ref(), request, &opened.keys, &mut unusable).await?;
        histories.seen.extend(reports.iter().filter_map(|replica| {
            let generation = replica.report.generations.get(name).copied()?;
            Some((format!("the replica {}", replica.report.replica), Seen::Generation(generation)))
        }));
        known.insert(name.clone(), histories);
    }
    let mut recovered: BTreeMap<Name, (Option<Digest>, RecoveredKeyset)> = BTreeMap::new();
    let mut renewed = Vec::new();
    for (name, entry) in &mut installation.keysets {
        let Some(histories) = known.get(name) else { continue };
        let served = request.served.get(name).map(|served| served_of(name, served, &known));
        if histories.is_intact(entry, served.as_deref()) {
            continue;
        }
        let Some(merged) = histories.recover(name, served.as_deref(), request)? else {
            *entry = KeysetEntry {
                first: false,
                state: KeysetState::Creating,
                lineage: random::id(),
                issuer: entry.issuer.clone(),
            };
            renewed.push(name.clone());
            continue;
        };
        entry.lineage.clone_from(&merged.recovered.keyring.lineage);
        entry.state = KeysetState::Created;
        recovered.insert(name.clone(), (histories.stored, merged));
    }
    let backwards = opened.is_older_than_marked(store.as_ref()).await?;
    if !request.dry_run && (backwards || !recovered.is_empty() || !renewed.is_empty()) {
        installation.journal.note(request.now, "recovered", request.actor, request.reason, [], None);
        installation.journal.tidy(request.now);
        write(store.as_ref(), &opened, &installation, &recovered).await?;
        for name in &renewed {
            if let Some(found) = known.get(name).and_then(|histories| histories.stored) {
                discard(store.as_ref(), name, found).await?;
            }
            store.remove(&Document::Seen(name.clone())).await?;
        }
    }
    let keysets = recovered.into_values().map(|(_, keyset)| keyset).collect();
    Ok(RecoveryOutcome { keysets, renewed, installation_is_intact: !backwards, unusable })
}

/// What is served of this keyset: the other keysets of its issuer stand in the same document.
fn served_of(name: &Name, served: &[ServedKey], known: &BTreeMap<Name, Histories>) -> Vec<ServedKey> {
    let others = known.iter().filter(|(other, _)| *other != name).flat_map(|(_, histories)| &histories.keyrings);
    let others: Vec<_> = others.flat_map(|keyring| &keyring.keys).map(|key| &key.public).collect();
    served.iter().filter(|key| !others.contains(&&key.public)).cloned().collect()
}

/// Removes a record of which nothing can be read, unless somebody changed it meanwhile.
async fn discard(store: &dyn Store, name: &Name, found: Digest) -> Result<(), StoreError> {
    let document = Document::Keyring(name.clone());
    match store.read(&document).await?.map(|bytes| Digest::of(&bytes)) {
        Some(digest) if digest != found => Err(StoreError::Conflict { document: store.locate(&document) }),
        _ => store.remove(&document).await,
    }
}

impl Histories {
    /// Whether the store's own record is the newest that anybody knows, and of this history.
    fn is_intact(&self, entry: &KeysetEntry, served: Option<&[ServedKey]>) -> bool {
        let (Some(own), Some(position)) = (self.keyrings.first().filter(|_| self.own), self.positions.first()) else {
            return self.keyrings.is_empty()
                && self.seen.is_empty()
                && self.stored.is_none()
                && entry.state == KeysetState::Creating;
        };
        let unknown = |key: &ServedKey| {
            !own.keys.iter().any(|ours| ours.public == key.public) && !own.has_revoked(&key.kid, &key.public)
        };
        own.lineage == entry.lineage
            && self.keyrings.iter().all(|other| other == own || goes_on_from(own, other))
            && self.seen.iter().all(|(_, seen)| seen.leads_to(own, position))
            && !served.is_some_and(|served| served.iter().any(unknown))
    }

    /// One history of them all; `None` when there is no record left and that is to be lived with.
    fn recover(
        &self,
        name: &Name,
        served: Option<&[ServedKey]>,
        request: &RecoveryRequest<'_>,
    ) -> Result<Option<RecoveredKeyset>, RecoverError> {
        let Some(newest) = self.keyrings.iter().map(|keyring| keyring.generation).max() else {
            return if request.lose_newer { Ok(None) } else { Err(RecoverError::NoRecord { keyset: name.clone() }) };
        };
        let is_known =
            |seen: &Seen| self.keyrings.iter().zip(&self.positions).any(|(keyring, at)| seen.leads_to(keyring, at));
        if let Some((who, seen)) = self.seen.iter().find(|(_, seen)| !is_known(seen))
            && !request.lose_newer
            && served.is_none()
        {
            let (who, seen) = (who.clone(), seen.generation());
            return Err(RecoverError::NewerSeen { keyset: name.clone(), who, seen, newest });
        }
        let seen: Vec<Superseded> = self.seen.iter().flat_map(|(_, seen)| self.superseded(seen)).collect();
        let recovery = Recovery {
            lineage: random::id(),
            actor: request.actor,
            reason: request.reason,
            now: request.now,
            served,
            seen: &seen,
        };
        let merged = recover(&self.keyrings, &recovery);
        Ok(merged.map(|recovered| RecoveredKeyset { base: self.labels[recovered.base].clone(), recovered }))
    }
}

impl Histories {
    fn superseded(&self, seen: &Seen) -> Vec<Superseded> {
        let of = |lineage: &str, generation| Superseded { lineage: lineage.to_owned(), generation };
        match seen {
            Seen::Record(seen) => vec![of(&seen.lineage, seen.generation)],
            Seen::Generation(seen) => self.keyrings.iter().map(|keyring| of(&keyring.lineage, *seen)).collect(),
        }
    }
}

impl Seen {
    /// Whether who saw this accepts that record: it is the same, or comes after it.
    fn leads_to(&self, keyring: &Keyring, position: &Position) -> bool {
        match self {
            Seen::Record(seen) => judge("", seen, position, &keyring.supersedes).is_ok(),
            Seen::Generation(seen) => *seen <= keyring.generation,
        }
    }

    fn generation(&self) -> u64 {
        match self {
            Seen::Record(seen) => seen.generation,
            Seen::Generation(generation) => *generation,
        }
    }
}

/// Whether `other` is an earlier state that `own` may have come from, and forgot nothing that matters.
fn goes_on_from(own: &Keyring, other: &Keyring) -> bool {
    let known = |lineage: &str| own.lineage == lineage || own.supersedes.iter().any(|former| former.lineage == lineage);
    // Those that ended long ago are not listed any more.
    let still = |key: &Key| match own.key_by_kid(key.kid.as_str()) {
        Some(_) => true,
        None => key.serial < own.next_serial && own.key(key.serial).is_none(),
    };
    let mut keys = other.keys.iter().filter(|key| key.state.is_published());
    let mut revoked = other.keys.iter().filter(|key| key.state == KeyState::Revoked);
    known(&other.lineage)
        && other.generation < own.generation
        && other.written_at <= own.written_at
        && keys.all(|key| still(key) || own.has_revoked(&key.kid, &key.public))
        && revoked.all(|key| own.has_revoked(&key.kid, &key.public))
}

impl Opened {
    /// Whether the store's own installation is not the last one that its mark and the others know.
    async fn is_older_than_marked(&self, store: &dyn Store) -> Result<bool, LedgerError> {
        let Some((own, position)) = self.installations.first().filter(|_| self.own) else { return Ok(true) };
        let marked = mark_of_installation(store).await;
        let refused = marked.is_some_and(|marked| judge("", &marked, position, &own.supersedes).is_err());
        let others = self.installations.iter().skip(1);
        let is_before = |other: &Position| {
            other.digest == position.digest
                || own.supersedes.iter().any(|former| former.lineage == other.lineage)
                || other.lineage == position.lineage && other.generation < position.generation
        };
        Ok(refused || !others.map(|(_, other)| other).all(is_before))
    }
}

/// One that cannot be read says nothing.
async fn mark_of_installation(store: &dyn Store) -> Option<Position> {
    let document = Document::SeenInstallation;
    claimed_mark(store, &document, Kind::SeenInstallation, INSTALLATION).await.ok().flatten()
}

async fn open_installations(
    store: &dyn Store,
    keks: &[Arc<dyn KeyEncryptionKey>],
    request: &RecoveryRequest<'_>,
    unusable: &mut Vec<String>,
) -> Result<Opened, RecoverError> {
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    let own = store.read(&Document::Installation).await?;
    let stored = own.as_ref().map(|bytes| Digest::of(bytes));
    found.extend(own.map(|bytes| (store.locate(&Document::Installation), bytes)));
    for evidence in request.evidence {
        let bytes = evidence.store.read(&Document::Installation).await?;
        found.extend(bytes.map(|bytes| (format!("the installation in {}", evidence.label), bytes)));
    }
    let mut keys: Option<DataKeys> = None;
    let mut installations: Vec<(Installation, Position)> = Vec::new();
    let mut usable = false;
    for (at, (label, bytes)) in found.iter().enumerate() {
        let opened = async {
            let unverified = UnverifiedRecord::parse(label, bytes, Kind::Installation, INSTALLATION)?;
            let claimed: Installation = unverified.unverified_body(label)?;
            let theirs = unwrap_data_keys(label, &claimed, keks).await?;
            let record = unverified.authenticate(label, &theirs)?;
            Ok::<_, LedgerError>((claimed, Position::of(&record), theirs))
        };
        match opened.await {
            // What may pass is no reason to go on without it.
            Err(error) if error.may_pass() => return Err(error.into()),
            Err(error) => unusable.push(error.to_string()),
            Ok((claimed, position, theirs)) => {
                if let Some(known) = keys.as_ref().filter(|known| known.installation() != claimed.id) {
                    let (found, expected) = (claimed.id, known.installation().to_owned());
                    return Err(RecoverError::OtherInstallation { label: label.clone(), found, expected });
                }
                usable |= at == 0 && stored.is_some();
                let newer = installations.iter().all(|(_, other)| other.generation <= position.generation);
                if newer || keys.is_none() {
                    keys = Some(theirs);
                }
                installations.push((claimed, position));
            }
        }
    }
    let keys = keys.ok_or_else(|| RecoverError::NoInstallation { unusable: unusable.clone() })?;
    Ok(Opened { keys, installations, stored, own: usable })
}

/// The newest installation with everything that any of them knows.
fn merged(installations: &[(Installation, Position)]) -> Option<Installation> {
    let (newest, _) = installations.iter().max_by_key(|(_, position)| position.generation)?;
    let mut merged = newest.clone();
    for (other, position) in installations {
        for (name, entry) in &other.keysets {
            merged.keysets.entry(name.clone()).or_insert_with(|| entry.clone());
        }
        for (url, entry) in &other.issuers {
            merged.issuers.entry(url.clone()).or_insert_with(|| entry.clone());
        }
        merged.journal.next_seq = merged.journal.next_seq.max(other.journal.next_seq);
        let former = Superseded { lineage: position.lineage.clone(), generation: position.generation };
        for one in std::iter::once(former).chain(other.supersedes.iter().cloned()) {
            match merged.supersedes.iter_mut().find(|known| known.lineage == one.lineage) {
                Some(known) => known.generation = known.generation.max(one.generation),
                None => merged.supersedes.push(one),
            }
        }
    }
    Some(merged)
}

async fn histories_of(
    name: &Name,
    store: &dyn Store,
    request: &RecoveryRequest<'_>,
    keys: &DataKeys,
    unusable: &mut Vec<String>,
) -> Result<Histories, RecoverError> {
    let mut histories = Histories::default();
    let document = Document::Keyring(name.clone());
    let own = (store, store.locate(&document));
    let others = request
        .evidence
        .iter()
        .map(|evidence| (evidence.store.as_ref(), format!("the keyring of `{name}` in {}", evidence.label)));
    for (at, (source, label)) in std::iter::once(own).chain(others).enumerate() {
        let Some(bytes) = source.read(&document).await? else { continue };
        if at == 0 {
            histories.stored = Some(Digest::of(&bytes));
        }
        let opened = || -> Result<(Keyring, Position), LedgerError> {
            let record = open_record(&label, &bytes, Kind::Keyring, name.as_str(), keys)?;
            let (keyring, position) = (record.body(&label)?, Position::of(&record));
            refuse_inconsistent(&label, name, &position, &keyring)?;
            Ok((keyring, position))
        };
        match opened() {
            Err(error) => unusable.push(error.to_string()),
            Ok((keyring, position)) => {
                histories.positions.push(position);
                histories.own |= at == 0;
                histories.keyrings.push(keyring);
                histories.labels.push(label);
            }
        }
    }
    // Some sources have no marks; one that cannot be read says nothing, a stranger's neither.
    if let Ok(Some(seen)) = claimed_mark(store, &Document::Seen(name.clone()), Kind::Seen, name.as_str()).await {
        histories.seen.push(("this store".to_owned(), Seen::Record(seen)));
    }
    for evidence in request.evidence {
        if let Ok(Some(seen)) = SeenMark::of_keyring(evidence.store.as_ref(), keys, name).read().await {
            histories.seen.push((evidence.label.clone(), Seen::Record(seen)));
        }
    }
    Ok(histories)
}

/// The installation first: replicas that saw the former histories accept both, in whatever order they look.
async fn write(
    store: &dyn Store,
    opened: &Opened,
    installation: &Installation,
    recovered: &BTreeMap<Name, (Option<Digest>, RecoveredKeyset)>,
) -> Result<(), RecoverError> {
    let marked = mark_of_installation(store).await;
    let highest = opened.installations.iter().map(|(_, position)| position.generation);
    let highest = highest.chain(marked.iter().map(|marked| marked.generation)).max().unwrap_or(0);
    let mut installation = installation.clone();
    if let Some(marked) = marked {
        let one = Superseded { lineage: marked.lineage, generation: marked.generation };
        match installation.supersedes.iter_mut().find(|known| known.lineage == one.lineage) {
            Some(known) => known.generation = known.generation.max(one.generation),
            None => installation.supersedes.push(one),
        }
    }
    // Replicas may have seen changes of the installation that no copy has; what they hold of it is in their keyrings too.
    for known in &mut installation.supersedes {
        known.generation = u64::MAX;
    }
    let position = Position {
        lineage: random::id(),
        generation: highest.saturating_add(1),
        previous: None,
        digest: Digest([0; 32]),
    };
    let location = store.locate(&Document::Installation);
    let bytes =
        seal_record(&location, &header(Kind::Installation, INSTALLATION, &position), &installation, &opened.keys)
            .map_err(LedgerError::from)?;
    store.replace(&Document::Installation, opened.stored, &bytes).await?;
    let position = Position { digest: Digest::of(&bytes), ..position };
    // First the copy: one that is newer than its mark is admitted, an older one is not.
    store.keep(&Document::Installation, &bytes).await?;
    SeenMark::of_installation(store, &opened.keys).write(&position).await?;
    for (name, (stored, keyset)) in recovered {
        let keyring = &keyset.recovered.keyring;
        let document = Document::Keyring(name.clone());
        let position = Position {
            lineage: keyring.lineage.clone(),
            generation: keyring.generation,
            previous: None,
            digest: Digest([0; 32]),
        };
        let location = store.locate(&document);
        let bytes = seal_record(&location, &header(Kind::Keyring, name.as_str(), &position), keyring, &opened.keys)
            .map_err(LedgerError::from)?;
        store.replace(&document, *stored, &bytes).await?;
        let position = Position { digest: Digest::of(&bytes), ..position };
        store.keep(&document, &bytes).await?;
        SeenMark::of_keyring(store, &opened.keys, name).write(&position).await?;
    }
    Ok(())
}
