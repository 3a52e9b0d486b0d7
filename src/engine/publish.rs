//! Showing a stored keyring to requests: the JWKS first, then the signer, then what can no longer happen.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::HeaderValue;

use super::cell::{IssuerCell, KeysetCell};
use super::snapshot::{ActiveKey, JwksDocument, KeysetSnapshot, Stopped};
use super::{Engine, Wanted};
use crate::backend::BackendError;
use crate::backend::BackendErrorKind;
use crate::keyring::claims::TokenRules;
use crate::keyring::jwk::{PublishedEntry, jwks_document};
use crate::keyring::placement::Generations;
use crate::keyring::policy::IssuerPolicy;
use crate::keyring::record::{Key, KeyState, Keyring};
use crate::keyring::time::Span;

/// Private keys of one backend that are opened at once. When thousands of keysets rotate in one moment, each opens one on
/// a thread, and the threads that they would take are also those that make RSA signatures.
pub(super) const OPENED_AT_ONCE: usize = 32;

impl Engine {
    /// Opens the active key of `next` unless it is the one that signs already.
    pub(super) async fn ready_signer(
        &self,
        cell: &KeysetCell,
        next: &Keyring,
    ) -> Result<Option<Arc<ActiveKey>>, BackendError> {
        let Some(key) = next.active() else { return Ok(None) };
        let types = &next.policy.tokens.types;
        let current = cell.snapshot.load_full();
        if let Some(active) = current.active.as_ref().filter(|active| active.serial == key.serial) {
            let same = *types == current.keyring.policy.tokens.types;
            let (signer, requests) = (active.signer.clone(), active.requests.clone());
            let renewed = || Arc::new(ActiveKey::new(key, types, signer, requests, active.door.clone()));
            return Ok(Some(if same { active.clone() } else { renewed() }));
        }
        let signer = self.open(next, key).await?;
        let name = key.private.as_ref().and_then(|private| self.backend(&private.backend));
        let requests = self.metrics.register_backend(name.map_or("local", |backend| backend.name()));
        Ok(Some(Arc::new(ActiveKey::new(key, types, signer, requests, Arc::default()))))
    }

    pub(super) async fn open(&self, keyring: &Keyring, key: &Key) -> Result<crate::backend::Signer, BackendError> {
        let missing = |kind| BackendError { backend: "local", operation: "open", kind, source: None };
        let stored = self.stored_key(keyring, key).ok_or_else(|| missing(BackendErrorKind::NotFound))?;
        let name = key.private.as_ref().map(|private| private.backend.as_str()).unwrap_or_default();
        let backend = self.backend(name).ok_or_else(|| missing(BackendErrorKind::Unavailable))?;
        // None is ever closed.
        let _place = match self.opening.get(backend.name()) {
            Some(places) => places.acquire().await.ok(),
            None => None,
        };
        self.timed(backend, crate::telemetry::metrics::BackendOperation::Open, backend.open(&stored)).await
    }

    /// Swaps in a keyring that is durable, with the signer of its active key.
    pub(super) fn show(&self, cell: &Arc<KeysetCell>, next: Arc<Keyring>, signer: Option<Arc<ActiveKey>>) {
        let before = cell.snapshot.load_full();
        let revoked = before
            .active
            .as_ref()
            .filter(|active| next.key(active.serial).is_none_or(|key| key.state == KeyState::Revoked));
        if let Some(active) = revoked {
            active.door.close();
        }
        if next.policy != before.keyring.policy {
            cell.policy_moved(&before.desired);
        }
        let mut shown = (*before).clone();
        let same_rules = next.policy.tokens == before.keyring.policy.tokens
            && next.policy.issuer.url == before.keyring.policy.issuer.url;
        let rules = match same_rules {
            true => before.rules.clone(),
            false => Arc::new(TokenRules::new(&next.policy.issuer.url, &next.policy.tokens)),
        };
        shown.keyring = next.clone();
        shown.store_failing = false;
        if revoked.is_some() {
            // The successor is published already, or there is none.
            (shown.rules, shown.active) = (rules.clone(), signer.clone());
        }
        cell.snapshot.store(Arc::new(shown.clone()));
        self.render(&cell.issuer);
        // Headers and rules belong together: both hold the policy's types.
        (shown.rules, shown.active) = (rules, signer);
        cell.snapshot.store(Arc::new(shown.clone()));
        self.stamp(cell, &mut shown);
        cell.snapshot.store(Arc::new(shown));
        self.notices.news();
    }

    /// Notes what became true with the swap: which keys are public now, at every place too where the issuer has
    /// publishers, and which can sign no more.
    pub(super) fn stamp(&self, cell: &KeysetCell, shown: &mut KeysetSnapshot) {
        let boot = self.clock.boot();
        let keyring = shown.keyring.clone();
        let retiring = |key: &&Key| key.state == KeyState::Retiring && key.stopped_at.is_none();
        shown.stopped.retain(|serial, _| keyring.key(*serial).is_some_and(|key| retiring(&key)));
        for key in keyring.keys.iter().filter(retiring) {
            let stopped = Stopped { at: boot, latest: self.clock.latest() };
            shown.stopped.entry(key.serial).or_insert(stopped);
        }
        shown.published.retain(|serial, _| keyring.key(*serial).is_some_and(|key| key.state.is_published()));
        if self.is_open() && !cell.issuer.is_withheld() {
            for key in keyring.published().filter(|key| self.is_placed(&cell.issuer, key.kid.as_str())) {
                shown.published.entry(key.serial).or_insert(boot);
            }
        }
        shown.backoff.retain(|step, _| match step {
            crate::keyring::plan::SlowStep::Create { serial } => *serial >= keyring.next_serial,
            crate::keyring::plan::SlowStep::Destroy { serial } => {
                keyring.key(*serial).is_some_and(|key| key.private.is_some())
            }
        });
    }

    /// The public listener answers from now on: whatever its documents contain is published.
    pub async fn opened(&self) {
        let boot = self.clock.boot().as_millis();
        self.last_beat.store(boot, Ordering::Relaxed);
        self.open_since.store(boot, Ordering::Relaxed);
        self.open.store(true, Ordering::SeqCst);
        for cell in &self.directory().order {
            self.edit(cell, |shown| self.stamp(cell, shown)).await;
            cell.wake.notify_one();
        }
    }

    /// Changes a snapshot while nobody else does.
    pub(super) async fn edit(&self, cell: &KeysetCell, edit: impl FnOnce(&mut KeysetSnapshot)) {
        let _writer = cell.writer.lock().await;
        let mut shown = (*cell.snapshot.load_full()).clone();
        edit(&mut shown);
        cell.snapshot.store(Arc::new(shown));
    }

    /// Renders the issuer's JWKS from its keysets' snapshots: active, standby, pending, retiring; within these in the
    /// configuration's order, newest first (DESIGN §7).
    pub(super) fn render(&self, issuer: &Arc<IssuerCell>) {
        let _rendering = issuer.rendering.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let directory = self.directory.load();
        let cells: Vec<_> = directory.keysets_of(issuer).collect();
        let snapshots: Vec<_> =
            cells.iter().map(|cell| (cell.position.load(Ordering::Relaxed), cell.snapshot.load_full())).collect();
        let mut keys: Vec<(u8, usize, u64, &Key)> = Vec::new();
        for (position, snapshot) in &snapshots {
            for key in snapshot.keyring.published() {
                keys.push((rank(key.state), *position, u64::MAX - key.serial, key));
            }
        }
        keys.sort_by_key(|(rank, position, newest, _)| (*rank, *position, *newest));
        if keys.is_empty() {
            issuer.document.store(None);
            self.rendered(issuer);
            return;
        }
        let policies = snapshots.iter().map(|(_, snapshot)| &snapshot.keyring.policy.issuer);
        let entries = keys.iter().map(|(.., key)| PublishedEntry {
            kid: &key.kid,
            algorithm: key.algorithm,
            public: &key.public,
        });
        let body = jwks_document(entries);
        let mut algs: Vec<&'static str> = Vec::new();
        for (.., key) in &keys {
            if !algs.contains(&key.algorithm.alg()) {
                algs.push(key.algorithm.alg());
            }
        }
        issuer.document.store(Some(Arc::new(JwksDocument {
            etag: etag(&body),
            cache_control: cache_control(policies),
            keys: u32::try_from(keys.len()).unwrap_or(u32::MAX),
            body: body.into(),
            algs,
            generations: Generations::of(snapshots.iter().map(|(_, snapshot)| snapshot.keyring.as_ref())),
        })));
        self.rendered(issuer);
    }

    /// Changes what the configuration wants of a keyset.
    pub(super) async fn want(&self, cell: &KeysetCell, desired: Wanted) {
        self.edit(cell, |shown| shown.desired = desired).await;
        cell.wake.notify_one();
    }
}

fn rank(state: KeyState) -> u8 {
    match state {
        KeyState::Active => 0,
        KeyState::Standby => 1,
        KeyState::Pending => 2,
        KeyState::Retiring | KeyState::Retired | KeyState::Revoked => 3,
    }
}

fn etag(body: &[u8]) -> HeaderValue {
    use base64::Engine as _;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, body);
    let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&digest.as_ref()[..16]);
    HeaderValue::from_str(&format!("\"{text}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// The shortest lives of the policies in force: a longer one is used only once every keyset agreed to it.
pub(super) fn cache_control<'a>(policies: impl Iterator<Item = &'a IssuerPolicy>) -> HeaderValue {
    let lives = policies.map(|policy| (policy.max_age, policy.stale_if_error));
    let (max_age, stale) = lives.reduce(|a, b| (a.0.min(b.0), a.1.min(b.1))).unwrap_or_default();
    let mut text = format!("public, max-age={}", max_age.as_secs());
    if stale >= Span::SECOND {
        text.push_str(&format!(", stale-if-error={}", stale.as_secs()));
    }
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("public"))
}
