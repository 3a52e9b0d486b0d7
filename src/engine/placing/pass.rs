//! One look at everything that an issuer has at a place, and whatever it takes for that to be right.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderValue;

use super::super::Engine;
use super::super::cell::{Directory, IssuerCell, KeysetCell, RouteKind};
use super::super::publish::cache_control;
use super::super::start::paths;
use super::Place;
use crate::keyring::discovery::discovery_document;
use crate::keyring::jwk::jwks_document;
use crate::keyring::placement::{Found, Generations, Reason, Standing, Verdict, Writer, verdict};
use crate::keyring::publication::Served;
use crate::keyring::record::{KeyState, Keyring};
use crate::keyring::time::Span;
use crate::publisher::{Headers, Operation, Outgoing, Placed, PublishError};

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
struct Rendering {
    documents: Vec<(String, RouteKind, Outgoing)>,
    generations: Generations,
    keyrings: Vec<Arc<Keyring>>,
    /// Knows what became of keysets that left the issuer.
    directory: Arc<Directory>,
    writer: Writer,
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
            settled = self.settle_document(place, &rendering, (path, *kind, document), &mut findings).await;
            if settled.is_err() {
                break;
            }
        }
        let pass = if findings.behind { Pass::Behind } else { Pass::Right };
        self.take_note(place, issuer, rendering, findings, settled.is_ok()).await;
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
        let mut written = false;
        for _ in 0..ATTEMPTS {
            let found = place.publisher.read(path).await?;
            let keys = KeysFound::of(found.as_ref(), rendering);
            if rendering.withdrawing && !keys.revoked {
                return Ok(());
            }
            if kind == RouteKind::Jwks {
                findings.look(path, &keys);
            }
            let reason = match rendering.decide(found.as_ref(), document) {
                Verdict::Current => {
                    findings.note(kind, keys);
                    return Ok(());
                }
                Verdict::Leave(reason) => {
                    self.tell(place, path, rendering, kind, found.as_ref(), &reason, "it stays", findings);
                    findings.behind = true;
                    findings.note(kind, keys);
                    return Ok(());
                }
                Verdict::Write(reason) => reason,
            };
            if !written {
                self.tell(place, path, rendering, kind, found.as_ref(), &reason, "it is replaced", findings);
            }
            match place.publisher.put(path, document, found.as_ref().map(|found| &found.version)).await {
                Ok(()) => written = true,
                Err(PublishError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let place = place.publisher.locate(path);
        if !written {
            return Err(PublishError::Conflict { place });
        }
        let problem = "what is read back is not what was written: see who else writes there".to_owned();
        Err(PublishError::Failed { operation: Operation::Write, place, problem, source: None })
    }

    /// Says what is wrong with what was found, if no writer of ours has left it so.
    #[allow(clippy::too_many_arguments, reason = "what is told")]
    fn tell(
        &self,
        place: &Place,
        path: &str,
        rendering: &Rendering,
        kind: RouteKind,
        found: Option<&Placed>,
        reason: &Reason,
        then: &str,
        findings: &mut Findings,
    ) {
        let confirmed = place.state().confirmed.clone();
        let regressed = || {
            let placed = found.and_then(generations_of);
            let confirmed = confirmed.as_ref();
            placed.zip(confirmed).is_some_and(|(placed, confirmed)| {
                placed.compare(confirmed, &rendering.known(&placed)) == Standing::Older
            })
        };
        let foreign = match reason {
            Reason::Nothing => confirmed.is_some(),
            Reason::Older => regressed(),
            // A crash between two files, another order in the configuration or another release leave that too.
            Reason::Altered => match kind {
                RouteKind::Jwks => self.is_inexplicable(found, rendering),
                RouteKind::Discovery => confirmed.is_some(),
            },
            reason => reason.is_foreign(rendering.writer),
        };
        let location = place.publisher.locate(path);
        if foreign {
            findings.foreign = true;
            tracing::error!(issuer = %place.issuer, publisher = %place.name, place = %location, "what is published there was changed by somebody else: {reason}; {then}");
        } else if !matches!(reason, Reason::Nothing | Reason::Older) {
            tracing::warn!(issuer = %place.issuer, publisher = %place.name, place = %location, "{reason}; {then}");
        }
    }

    /// Whether a key set has or lacks what no rendering of ours would.
    fn is_inexplicable(&self, found: Option<&Placed>, rendering: &Rendering) -> bool {
        let (Some(found), Some(keyring)) = (found, rendering.keyrings.first()) else { return true };
        let keyrings: Vec<&Keyring> = rendering.keyrings.iter().map(Arc::as_ref).collect();
        let found = Served::parse(&found.body);
        !found.discrepancies(&keyrings, &keyring.policy.issuer, self.clock.now()).is_empty()
    }

    /// Remembers what a pass found, and has everything planned again that depends on it. Where the pass was not
    /// `complete`, what it did not come to is as it was.
    async fn take_note(
        &self,
        place: &Place,
        issuer: &Arc<IssuerCell>,
        rendering: Rendering,
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
            if complete && !findings.behind {
                state.confirmed = Some(rendering.generations);
            }
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

impl Rendering {
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
    fn known(&self, placed: &Generations) -> Generations {
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

fn generations_of(found: &Placed) -> Option<Generations> {
    Generations::parse(found.generations.as_deref()?)
}
