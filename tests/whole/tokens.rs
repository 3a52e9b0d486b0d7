//! Applications that ask for tokens, verifiers that are shown them at the moments that matter, and what both may see.

use std::sync::atomic::Ordering::Relaxed;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwksd::engine::{Issued, SignFailure};
use jwksd::keyring::claims::parse_request;
use serde::Deserialize;

use crate::audience::Verdict;
use crate::keys::{KeyId, id_of, pair};
use crate::life::BEGINNING;
use crate::world::{Due, KEYSETS, Note, RECOVERY, Source, World};

/// What verifiers read of a token.
pub struct Token {
    pub key: KeyId,
    /// `nbf` and `exp`, in seconds.
    pub lives: (i64, i64),
    presentations: u32,
}

/// A token is shown to some verifiers.
#[derive(Clone, Debug)]
pub struct Present {
    token: u64,
    /// To those whose clocks are so much ahead, or to any.
    ahead: Option<i64>,
    count: usize,
    is_last: bool,
}

#[derive(Deserialize)]
struct Header<'a> {
    alg: &'a str,
    kid: &'a str,
}

#[derive(Deserialize)]
struct Claims {
    nbf: i64,
    iat: i64,
    exp: i64,
}

const REQUEST: &[u8] = br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#;

impl World {
    /// Every keyset's application asks one replica, or all.
    pub async fn sign(&mut self, all: bool) -> Result<(), String> {
        let one = self.random.below(self.seats.len() as u64) as usize;
        for seat in (0..self.seats.len()).filter(|seat| all || *seat == one) {
            let now = self.now();
            let (signs, stopped) = (self.seats[seat].signs(), self.seats[seat].is_stopped(now));
            let Some(engine) = self.seats[seat].engine().filter(|_| signs && !stopped).cloned() else { continue };
            for keyset in KEYSETS.iter().take(self.setup.keysets) {
                let Some(cell) = engine.keyset(keyset) else { continue };
                let (engine, notes, from) = (engine.clone(), self.notes.clone(), self.source(seat, keyset));
                let (truth, hub, under_way) = (self.truth, self.common.hub.clone(), self.seats[seat].under_way.clone());
                let work = async move {
                    under_way.fetch_add(1, Relaxed);
                    let request = parse_request(REQUEST).unwrap();
                    let issued = engine.sign(&cell, &request, None, "sim").await;
                    let issued = issued.map_err(|failure| match &failure {
                        SignFailure::Drained => (failure.to_string(), Some("drained")),
                        SignFailure::Ours { reason, cause } => {
                            let stated = engine.missing_to_sign().join("; ");
                            (format!("{cause} (stated: {stated})"), Some(reason.as_str()))
                        }
                        other => (other.to_string(), None),
                    });
                    let (shown, at) = (cell.snapshot.load().keyring.generation, truth.now());
                    notes.lock().unwrap().push(Note::Signed { from, shown, at, issued });
                    under_way.fetch_sub(1, Relaxed);
                    hub.news.notify_one();
                };
                // A remote signature takes time, and a process can die over it.
                match self.setup.is_remote {
                    true => _ = tokio::spawn(work),
                    false => work.await,
                }
            }
        }
        Ok(())
    }

    pub fn signed(
        &mut self,
        from: &Source,
        (shown, at): (u64, i64),
        issued: Result<Issued, (String, Option<&'static str>)>,
    ) -> Result<(), String> {
        match issued {
            Ok(issued) => self.issued(from, (shown, at), &issued),
            Err((why, reason)) => self.not_signed(from.seat, &from.keyset, &why, reason),
        }
    }

    /// A token left at `now`, when the keyring of generation `shown` was shown.
    fn issued(&mut self, from: &Source, (shown, now): (u64, i64), issued: &Issued) -> Result<(), String> {
        let Source { seat, process, ref keyset } = *from;
        let name = self.seats[seat].name.clone();
        let (key, lives) = self.read(&issued.token).map_err(|wrong| format!("{name} signs {wrong}"))?;
        let document = World::document(keyset);
        let longest = self.setup.policies.iter().map(|policy| policy.tokens.max_ttl.as_millis()).max().unwrap();
        let latest = BEGINNING.as_millis() + now + self.setup.ahead_max + longest;
        if lives.1 * 1000 > latest {
            return Err(format!("{name} signs a token that lives until {}", lives.1));
        }
        if self.answered.contains(&(seat, process, key)) {
            return Err(format!("{name} lets out a token of the revoked key {key}, and had answered its revocation"));
        }
        if self.records.revoked.get(&key).is_some_and(|(generation, _)| *generation <= shown) {
            return Err(format!("{name} lets out a token of the revoked key {key}"));
        }
        if self.records.drained.get(&document).is_some_and(|generation| *generation <= shown) {
            return Err(format!("{name} signs with key {key} for a keyset that is drained"));
        }
        let limit = self.setup.policies.iter().map(|policy| policy.rotation.staleness_limit.as_millis()).max().unwrap();
        let answered = self.seats[seat].way.answered().unwrap_or(0);
        if !self.setup.is_single && now > answered + limit + 2_500 {
            return Err(format!("{name} signs with key {key}, and the store answered last at {answered}"));
        }
        if self.records.of(&document).is_none() || !self.records.known.contains(&key) {
            return Err(format!("{name} signs with key {key} before it is stored"));
        }
        self.stats.tokens += 1;
        self.next_token += 1;
        let last = lives.1 * 1000 - BEGINNING.as_millis() + self.setup.ahead_max;
        let until = self.lives_until.entry(key).or_insert(last);
        *until = last.max(*until);
        self.tokens.insert(self.next_token, Token { key, lives, presentations: 0 });
        self.show_when_it_matters(self.next_token, lives);
        Ok(())
    }

    /// At once, as soon as it lives for the slowest clock, some time, and at its last moment for each clock.
    fn show_when_it_matters(&mut self, token: u64, (nbf, exp): (i64, i64)) {
        let now = self.now();
        let (begin, end) = (nbf * 1000 - BEGINNING.as_millis(), exp * 1000 - BEGINNING.as_millis());
        let some = 12;
        let show = |ahead, is_last| Due::Present(Present { token, ahead, count: some, is_last });
        let h = self.setup.ahead_max;
        let mut dues = vec![(now, show(None, false))];
        if begin + h > now {
            dues.push((begin + h, show(Some(-h), false)));
        }
        let between = self.random.below((end - now).max(1).unsigned_abs());
        dues.push((now + i64::try_from(between).unwrap(), show(None, false)));
        if self.random.below(2) == 0 {
            dues.push((end - h - 1, show(Some(h), false)));
        }
        dues.push((end + h - 1, show(Some(-h), true)));
        for (at, due) in dues {
            if at >= now {
                self.at(at, due);
            }
        }
    }

    /// A token that somebody else signed, from some time on.
    pub fn present_earlier(&mut self, key: KeyId, lives: (i64, i64), from: i64) {
        let (now, h) = (self.now(), self.setup.ahead_max);
        let end = lives.1 * 1000 - BEGINNING.as_millis();
        let mut show = vec![(end - h - 1, Some(h), false), (end + h - 1, Some(-h), true)];
        let between = i64::try_from(self.importing.below((end - now).max(1).unsigned_abs())).unwrap();
        show.insert(0, (now + between, None, false));
        show.retain(|(at, ..)| *at >= from);
        if show.is_empty() {
            return;
        }
        self.next_token += 1;
        self.stats.earlier += 1;
        self.tokens.insert(self.next_token, Token { key, lives, presentations: 0 });
        for (at, ahead, is_last) in show {
            let present = Present { token: self.next_token, ahead, count: 12, is_last };
            self.at(at, Due::Present(present));
        }
    }

    /// What any verifier reads, checked with the key that it names.
    fn read(&self, token: &str) -> Result<(KeyId, (i64, i64)), String> {
        let (message, signature) = token.rsplit_once('.').ok_or("no token")?;
        let (header, payload) = message.split_once('.').ok_or("no token")?;
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|error| error.to_string());
        let (header, payload) = (decode(header)?, decode(payload)?);
        let header: Header<'_> = serde_json::from_slice(&header).map_err(|error| error.to_string())?;
        let claims: Claims = serde_json::from_slice(&payload).map_err(|error| error.to_string())?;
        let key = id_of(header.kid).ok_or("with an unknown kid")?;
        let proved = pair(key).verifies(message.as_bytes(), &decode(signature)?, self.setup.is_remote);
        if !proved || header.alg != pair(key).algorithm().alg() || claims.nbf > claims.iat || claims.exp <= claims.iat {
            return Err(format!("what no verifier takes: {payload:?}"));
        }
        Ok((key, (claims.nbf, claims.exp)))
    }

    /// A keyset signs unless a stated reason holds.
    fn not_signed(&mut self, seat: usize, keyset: &str, why: &str, reason: Option<&'static str>) -> Result<(), String> {
        self.stats.refusals += 1;
        let now = self.now();
        let name = self.seats[seat].name.clone();
        let Some(reason) = reason else { return Err(format!("{name} refuses a good request for {keyset}: {why}")) };
        let stated = !why.ends_with("(stated: )");
        let record = self.records.of(&World::document(keyset));
        let has_active = record.is_some_and(|record| record.active().is_some());
        let long_well = now > self.well_since[seat] + RECOVERY && now > self.kms_well_since + RECOVERY;
        // A key that was revoked may be gone before its signer has heard of that.
        let shown = self.seats[seat].cell(keyset).map_or(0, |cell| cell.snapshot.load().keyring.generation);
        let behind = record.is_some_and(|record| shown < record.generation);
        let promoted = self.records.promotions.get(&World::document(keyset)).map_or(now, |(_, at)| *at);
        let excused = match reason {
            "drained" => record.is_some_and(|record| record.drained) || behind || !long_well,
            "no_active_key" => stated && (!has_active || !long_well || now < promoted + RECOVERY),
            "stale_keyring" => stated && !self.setup.is_single && !long_well,
            "backend_throttled" => self.setup.is_remote && !long_well,
            "key_disabled" => stated && (behind || !long_well),
            "backend_unavailable" | "backend_timeout" | "verification_failed" => stated && !long_well,
            _ => false,
        };
        match excused {
            true => Ok(()),
            false => Err(format!("{name} does not sign for {keyset} without need: {reason}: {why}")),
        }
    }

    pub fn present(&mut self, present: &Present) -> Result<(), String> {
        let Some(token) = self.tokens.get_mut(&present.token) else { return Ok(()) };
        token.presentations += 1;
        let (key, lives) = (token.key, token.lives);
        let now = self.now();
        let counted = self.with_audience(|audience, balancer| {
            let (mut accepted, mut unreachable, mut rejected) = (0, 0, None);
            let count = audience.verifiers.len();
            let begin = audience.random.below(count as u64) as usize;
            let mut shown = 0;
            for turn in 0..count {
                let number = (begin + turn) % count;
                if present.ahead.is_some_and(|ahead| audience.verifiers[number].ahead != ahead) {
                    continue;
                }
                shown += 1;
                match audience.verify(number, key, lives, now, balancer) {
                    Verdict::Accepted => accepted += 1,
                    Verdict::NotLive => {}
                    Verdict::Unreachable => unreachable += 1,
                    Verdict::UnknownKey => rejected = rejected.or(Some(number)),
                }
                if shown == present.count {
                    break;
                }
            }
            (shown, accepted, unreachable, rejected)
        })?;
        let (shown, accepted, unreachable, rejected) = counted;
        self.stats.presentations += shown as u64;
        self.stats.accepted += accepted;
        self.stats.unreachable += unreachable;
        if present.is_last {
            self.tokens.remove(&present.token);
        }
        let Some(number) = rejected else { return Ok(()) };
        if self.is_excused(key) {
            self.stats.excused += 1;
            return Ok(());
        }
        let verifier = &self.audience.verifiers[number];
        let class = &self.audience.classes[verifier.class];
        Err(format!(
            "verifier {number} ({class:?}, {} ms ahead) rejects a live token of key {key} {lives:?}",
            verifier.ahead
        ))
    }

    /// Revoked keys are to be rejected; a key that an emergency put to work may be unknown until caches have run out.
    fn is_excused(&self, key: KeyId) -> bool {
        let window = self.setup.policies.iter().map(|policy| policy.visibility_window().as_millis()).max().unwrap();
        let young = self.served_since.get(&key).is_none_or(|since| self.now() < since + window);
        self.records.revoked.contains_key(&key) || (young && self.records.early.contains(&key))
    }
}
