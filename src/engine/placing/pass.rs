//! One look at everything that an issuer has at a place, and whatever it takes for that to be right.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderValue;

use super::super::Engine;
use super::super::cell::{Directory, IssuerCell, KeysetCell, RouteKind};
use super::super::publish::cache_control;
use super::super::start::paths;
use super::blame::Left;
use super::{Place, State};
use crate::keyring::discovery::discovery_document;
use crate::keyring::jwk::jwks_document;
use crate::keyring::placement::{Found, Generations, Reason, Verdict, Writer, verdict};
use crate::keyring::publication::Served;
use crate::keyring::record::{KeyState, Keyring};
use crate::keyring::time::Span;
use crate::publisher::{Headers, Operation, Outgoing, Placed, PublishError, Version};

/// How often one document is compared and written before somebody else gets a turn.
const ATTEMPTS: u32 = 4;

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// Everything that there is to place was read back.
    Right,
    /// There is nothing to place before the seal opens or the issuer has begun.
    NotYet,
    /// Something is there that this process may not replace.
    Behind,
}

/// An issuer as it is to be placed.
pub(super) struct Rendering {
    documents: Vec<(String, RouteKind, Outgoing)>,
    generations: Generations,
    pub(super) keyrings: Vec<Arc<Keyring>>,
    /// Knows what became of keysets that left the issuer.
    directory: Arc<Directory>,
    pub(super) writer: Writer,
    /// No key is published: only what shows a revoked one is replaced. The last document stays else.
    withdrawing: bool,
}

/// What a pass found.
#[derive(Default)]
struct Findings {
    /// Kids that every key set of the place shows.
    shown: Option<BTreeSet<String>>,
    /// Key sets that lack a key which counts as published.
    lacking: BTreeSet<String>,
    /// One did, at some moment of the pass.
    lacked: bool,
    foreign: bool,
    behind: bool,
}

impl Engine {
    pub(super) async fn pass(&self, place: &Place, issuer: &Arc<IssuerCell>) -> Result<Pass, PublishError> {
        if self.is_sealed() || issuer.is_withheld() {
            return Ok(Pass::NotYet);
        }
        let Some(rendering) = self.rendering(issuer) else { return Ok(Pass::Right) };
        let mut findings = Findings::default();
        let mut settled = Ok(());
        for (path, kind, document) in &rendering.documents {
            // A path that fails does not keep a revoked key at the next one.
            let done = self.settle_document(place, &rendering, (path, *kind, document), &mut findings).await;
            settled = settled.and(done);
        }
        let pass = if findings.behind { Pass::Behind } else { Pass::Right };
        self.take_note(place, issuer, &rendering, findings, settled.is_ok()).await;
        settled.map(|()| pass)
    }

    /// What the issuer's places are to show; `None`: they stay as they are.
    fn rendering(&self, issuer: &Arc<IssuerCell>) -> Option<Rendering> {
        let policy = issuer.policy.load_full();
        // Before the keyrings: they are at least as new.
        let document = issuer.document.load_full();
        let keyrings = self.keyrings_of(issuer);
        let (writer, directory) = (self.writer_of(issuer), self.directory());
        let outgoing =
            |kind: RouteKind, body: Bytes, cache_control: &HeaderValue, generations: &Generations| Outgoing {
                body,
                headers: Headers {
                    content_type: kind.media_type().to_owned(),
                    cache_control: cache_control.to_str().unwrap_or_default().to_owned(),
                },
                generations: generations.to_string(),
            };
        let Some(document) = document else {
            let revoked = |keyring: &Arc<Keyring>| keyring.keys.iter().any(|key| key.state == KeyState::Revoked);
            if !keyrings.iter().any(revoked) {
                return None;
            }
            let generations = Generations::of(keyrings.iter().map(Arc::as_ref));
            let cache_control = cache_control(std::iter::once(policy.as_ref()));
            let body = Bytes::from(jwks_document(std::iter::empty()));
            let key_sets = paths(&policy).into_iter().filter(|(_, kind)| *kind == RouteKind::Jwks);
            let documents = key_sets
                .map(|(path, kind)| (path, kind, outgoing(kind, body.clone(), &cache_control, &generations)))
                .collect();
            return Some(Rendering { documents, generations, keyrings, directory, writer, withdrawing: true });
        };
        let body = |kind| match kind {
            RouteKind::Jwks => document.body.clone(),
            RouteKind::Discovery => discovery_document(&issuer.url, &document.algs).into(),
        };
        let generations = document.generations.clone();
        let documents = paths(&policy)
            .into_iter()
            .map(|(path, kind)| (path, kind, outgoing(kind, body(kind), &document.cache_control, &generations)))
            .collect();
        Some(Rendering { documents, generations, keyrings, directory, writer, withdrawing: false })
    }

    fn writer_of(&self, issuer: &Arc<IssuerCell>) -> Writer {
        let (directory, boot) = (self.directory(), self.clock.boot());
        let doubtful = |cell: &Arc<KeysetCell>| {
            let snapshot = cell.snapshot.load();
            snapshot.frozen.is_some() || cell.is_stale(snapshot.keyring.policy.rotation.staleness_limit, boot)
        };
        if directory.keysets_of(issuer).any(doubtful) {
            return Writer::Doubtful;
        }
        if self.is_shared() { Writer::Replica } else { Writer::Sole }
    }

    /// Looks at one document and replaces it where it should be another, until it is read back or may not be replaced.
    async fn settle_document(
        &self,
        place: &Place,
        rendering: &Rendering,
        (path, kind, document): (&str, RouteKind, &Outgoing),
        findings: &mut Findings,
    ) -> Result<(), PublishError> {
        let mut left = place.state().left.get(path).cloned();
        // What the last write of this pass has replaced, if it was carried out.
        let mut replaced: Option<Option<Version>> = None;
        for _ in 0..ATTEMPTS {
            let found = place.publisher.read(path).await?;
            let keys = KeysFound::of(found.as_ref(), rendering);
            if rendering.withdrawing && !keys.revoked {
                return Ok(());
            }
            if kind == RouteKind::Jwks {
                findings.look(path, &keys);
            }
            let decided = rendering.decide(found.as_ref(), document);
            let version = found.as_ref().map(|found| &found.version);
            // What a write was confirmed for and has not touched says more of the storage than of anybody else.
            let untouched = replaced.as_ref().is_some_and(|replaced| replaced.as_ref() == version);
            if let Verdict::Write(reason) | Verdict::Leave(reason) = &decided
                && !untouched
            {
                let foreign = rendering.is_foreign(reason, kind, found.as_ref(), left.as_ref(), self.clock.now());
                findings.foreign |= foreign;
                let then = if matches!(decided, Verdict::Write(_)) { "it is replaced" } else { "it stays" };
                tell(place, path, reason, foreign, then);
            }
            match decided {
                Verdict::Current => {
                    place.state().settled(path, rendering.left(document, true));
                    findings.note(kind, keys);
                    return Ok(());
                }
                Verdict::Leave(_) => {
                    findings.behind = true;
                    findings.note(kind, keys);
                    return Ok(());
                }
                Verdict::Write(_) => {}
            }
            place.state().tried(path);
            match place.publisher.put(path, document, version).await {
                Ok(()) => {
                    left = Some(rendering.left(document, false));
                    replaced = Some(version.cloned());
                }
                Err(PublishError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let place = place.publisher.locate(path);
        if replaced.is_none() {
            return Err(PublishError::Conflict { place });
        }
        let problem = "what is read back is not what was written: see who else writes there".to_owned();
        Err(PublishError::Failed { operation: Operation::Write, place, problem, source: None })
    }

    /// Remembers what a pass found, and has everything planned again that depends on it. Where the pass was not
    /// `complete`, what it did not come to is as it was.
    async fn take_note(
        &self,
        place: &Place,
        issuer: &Arc<IssuerCell>,
        rendering: &Rendering,
        findings: Findings,
        complete: bool,
    ) {
        let boot = self.clock.boot();
        let (news, back) = {
            let mut state = place.state();
            let lacking = !findings.lacking.is_empty() || (state.lacking && !complete);
            let back = (state.lacking || findings.lacked) && !lacking;
            let shown = findings.shown.filter(|_| complete).unwrap_or_else(|| state.shown.clone());
            let news = back || shown != state.shown || lacking != state.lacking;
            // Whoever looks only now and then is to see it, too.
            let over = |since: &Span| complete && boot.saturating_sub(*since) >= self.interval_of(place);
            state.foreign_since =
                if findings.foreign { Some(boot) } else { state.foreign_since.filter(|at| !over(at)) };
            (state.shown, state.lacking) = (shown, lacking);
            state.forget_others(rendering);
            (news, back)
        };
        if back {
            // Verifiers may have fetched meanwhile what lacked a key: promotions wait until all could look again.
            issuer.set_resumed_boot_ms(boot.as_millis());
            tracing::warn!(issuer = %issuer.url, publisher = %place.name, "keys that count as published were missing there and are back; promotions wait until verifiers could see them");
        }
        if news {
            let directory = self.directory();
            for cell in directory.keysets_of(issuer) {
                self.edit(cell, |shown| self.stamp(cell, shown)).await;
                cell.wake.notify_one();
            }
        }
    }
}

/// Says what is wrong with what was found, once while it lasts.
fn tell(place: &Place, path: &str, reason: &Reason, foreign: bool, then: &str) {
    if !foreign && matches!(reason, Reason::Nothing | Reason::Older) {
        return;
    }
    let told = (foreign, format!("{reason}; {then}"));
    if place.state().told.insert(path.to_owned(), told.clone()).is_some_and(|before| before == told) {
        return;
    }
    let (location, told) = (place.publisher.locate(path), told.1);
    if foreign {
        tracing::error!(issuer = %place.issuer, publisher = %place.name, place = %location, "what is published there was changed by somebody else: {told}");
    } else {
        tracing::warn!(issuer = %place.issuer, publisher = %place.name, place = %location, "{told}");
    }
}

impl State {
    /// A document of ours was read back at the path.
    fn settled(&mut self, path: &str, left: Left) {
        self.left.insert(path.to_owned(), left);
        self.told.remove(path);
    }

    /// The path is about to be written to.
    fn tried(&mut self, path: &str) {
        if let Some(left) = self.left.get_mut(path) {
            left.surely = false;
        }
    }

    /// Paths that the issuer has no more: what becomes of them is not ours to know.
    fn forget_others(&mut self, rendering: &Rendering) {
        let is_ours = |path: &String| rendering.documents.iter().any(|(ours, ..)| ours == path);
        self.left.retain(|path, _| is_ours(path));
        self.told.retain(|path, _| is_ours(path));
    }
}

impl Rendering {
    fn left(&self, document: &Outgoing, surely: bool) -> Left {
        Left { generations: self.generations.clone(), document: document.clone(), surely }
    }

    fn decide(&self, found: Option<&Placed>, document: &Outgoing) -> Verdict {
        let generations = found.and_then(generations_of);
        let found = match (found, &generations) {
            (None, _) => Found::Nothing,
            (Some(_), None) => Found::Unmarked,
            (Some(found), Some(generations)) => Found::Marked { generations, same: found.is(document) },
        };
        let known = generations.as_ref().map(|placed| self.known(placed)).unwrap_or_default();
        verdict(found, &self.generations, &known, self.writer)
    }

    /// Where the keysets of a mark stand now, whatever their issuer.
    pub(super) fn known(&self, placed: &Generations) -> Generations {
        let cells = placed.keysets().filter_map(|keyset| self.directory.keysets.get(keyset));
        let keyrings: Vec<_> = cells.map(|cell| cell.snapshot.load().keyring.clone()).collect();
        Generations::exactly(keyrings.iter().map(Arc::as_ref))
    }
}

impl Findings {
    fn look(&mut self, path: &str, keys: &KeysFound) {
        if keys.lacks {
            self.lacked = true;
            self.lacking.insert(path.to_owned());
        } else {
            self.lacking.remove(path);
        }
    }

    fn note(&mut self, kind: RouteKind, keys: KeysFound) {
        if kind == RouteKind::Jwks {
            self.shown = Some(match self.shown.take() {
                None => keys.shown,
                Some(shown) => shown.intersection(&keys.shown).cloned().collect(),
            });
        }
    }
}

/// What a key set shows of an issuer's keys.
struct KeysFound {
    /// Published ones, with exactly their members.
    shown: BTreeSet<String>,
    /// One that counts as published is not among them.
    lacks: bool,
    /// A revoked one is.
    revoked: bool,
}

impl KeysFound {
    fn of(found: Option<&Placed>, rendering: &Rendering) -> Self {
        let served = Served::parse(found.map(|found| found.body.as_ref()).unwrap_or_default());
        let mut keys = KeysFound { shown: BTreeSet::new(), lacks: false, revoked: false };
        for key in rendering.keyrings.iter().flat_map(|keyring| &keyring.keys) {
            let shows = served.shows(key);
            keys.revoked |= shows && key.state == KeyState::Revoked;
            if !key.state.is_published() {
                continue;
            }
            keys.lacks |= !shows && key.published_at.is_some();
            if shows {
                keys.shown.insert(key.kid.to_string());
            }
        }
        keys
    }
}

pub(super) fn generations_of(found: &Placed) -> Option<Generations> {
    Generations::parse(found.generations.as_deref()?)
}
