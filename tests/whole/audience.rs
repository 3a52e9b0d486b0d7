//! Everybody who verifies: caching layers in front of a balancer that asks any replica, and verifiers as FACTS says of
//! them, thousands where wanted. They know what was served as JSON, and nothing of the keyring.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use crate::keys::{KeyId, id_of, pair};
use crate::random::Random;

/// A served document: which keys stand in it.
#[derive(Debug)]
pub struct Served {
    pub keys: Vec<KeyId>,
    /// In milliseconds.
    pub max_age: i64,
    pub stale_if_error: i64,
    pub body: Bytes,
    pub cache_control: String,
}

#[derive(Deserialize)]
struct Jwks<'a> {
    #[serde(borrow)]
    keys: Vec<Jwk<'a>>,
}

/// Private members would be refused as unknown ones.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Jwk<'a> {
    kty: &'a str,
    crv: &'a str,
    x: &'a str,
    y: &'a str,
    kid: &'a str,
    alg: &'a str,
    #[serde(rename = "use")]
    usage: &'a str,
}

impl Served {
    pub fn parse(body: Bytes, cache_control: &str) -> Result<Served, String> {
        let jwks: Jwks<'_> = serde_json::from_slice(&body).map_err(|error| format!("no key set: {error}"))?;
        let mut keys = Vec::with_capacity(jwks.keys.len());
        for jwk in &jwks.keys {
            let id = id_of(jwk.kid).ok_or_else(|| format!("{} was never made", jwk.kid))?;
            let pair = pair(id);
            let (x, y) = &pair.coordinates;
            let right = (jwk.kty, jwk.crv, jwk.alg, jwk.usage) == ("EC", pair.curve(), pair.algorithm().alg(), "sig");
            if !right || (jwk.x, jwk.y) != (x, y) || keys.contains(&id) {
                return Err(format!("{} is not published as it is", jwk.kid));
            }
            keys.push(id);
        }
        if keys.is_empty() || keys.len() > 10 {
            return Err(format!("a key set of {}", keys.len()));
        }
        let seconds = |name: &str| {
            let found = cache_control.split(", ").find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            found.map_or(0, |seconds| seconds.parse::<i64>().unwrap() * 1000)
        };
        let (max_age, stale_if_error) = (seconds("max-age"), seconds("stale-if-error"));
        Ok(Served { keys, max_age, stale_if_error, body, cache_control: cache_control.to_owned() })
    }

    /// What another issuer serves.
    pub fn foreign() -> Arc<Served> {
        let body = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA","kid":"theirs","use":"sig","alg":"EdDSA"}]}"#;
        Arc::new(Served {
            keys: Vec::new(),
            max_age: 0,
            stale_if_error: 0,
            body: Bytes::from_static(body.as_bytes()),
            cache_control: String::new(),
        })
    }
}

/// How a verifier caches; spans in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub enum Class {
    /// Keeps a document for so long and asks no earlier (Envoy); on failure it goes on with what it has.
    Plain { cache: i64 },
    /// Also asks again when it does not know a kid, but not more often than that (jose, PyJWT).
    Refetches { cache: i64, cools: i64 },
    /// Keeps a document until a kid is unknown (go-oidc).
    Forever { cools: i64 },
    /// Does as Cache-Control says (NGINX).
    Obeys,
    /// Asks again for an unknown kid, but not before max-age has passed (Kubernetes).
    Waits,
    /// Asks every time.
    Asks,
}

impl Class {
    pub fn draw(random: &mut Random) -> Vec<Class> {
        let slow = [2_000, 5_000, 10_000, 16_000][random.below(4) as usize];
        let mut classes = vec![
            Class::Plain { cache: slow },
            Class::Refetches { cache: slow * 2, cools: slow / 2 },
            Class::Forever { cools: slow.min(3_000) },
            Class::Asks,
        ];
        if random.below(4) == 0 {
            classes.push(Class::Obeys);
            classes.push(Class::Waits);
        }
        classes
    }

    pub fn name(&self) -> &'static str {
        match self {
            Class::Plain { .. } => "plain",
            Class::Refetches { .. } => "refetches",
            Class::Forever { .. } => "forever",
            Class::Obeys => "obeys",
            Class::Waits => "waits",
            Class::Asks => "asks",
        }
    }

    /// The longest until it sees a new key; `None`: max-age.
    pub fn sees_new(&self) -> Option<i64> {
        match self {
            Class::Plain { cache } => Some(*cache),
            Class::Refetches { cools, .. } | Class::Forever { cools } => Some(*cools),
            Class::Obeys | Class::Waits => None,
            Class::Asks => Some(0),
        }
    }

    /// The longest that it keeps a document; `None`: max-age.
    pub fn cache(&self) -> Option<i64> {
        match self {
            Class::Plain { cache } | Class::Refetches { cache, .. } => Some(*cache),
            Class::Forever { .. } | Class::Waits => Some(i64::MAX / 4),
            Class::Obeys => None,
            Class::Asks => Some(0),
        }
    }

    pub fn forgets(&self) -> bool {
        !matches!(self, Class::Forever { .. } | Class::Waits)
    }
}

/// A document in a cache.
#[derive(Clone)]
struct Held {
    served: Arc<Served>,
    got: i64,
    /// When a replica answered with it.
    born: i64,
}

/// Who asks a replica for what it serves now.
pub trait Origin {
    fn ask(&mut self) -> Option<Arc<Served>>;
}

/// A caching layer; `keeps` is for how long, if not max-age.
struct Layer {
    keeps: Option<i64>,
    held: Option<Held>,
}

impl Layer {
    fn fetch(&mut self, now: i64, declared_age: i64, upstream: impl FnOnce() -> Option<Held>) -> Option<Held> {
        if let Some(held) = &self.held
            && now < held.got + self.keeps.unwrap_or(held.served.max_age)
        {
            return Some(held.clone());
        }
        match upstream() {
            Some(held) => self.held = Some(Held { got: now, ..held }),
            None => {
                let stale = |held: &Held| now < held.born + declared_age + held.served.stale_if_error;
                self.held = self.held.take().filter(stale);
            }
        }
        self.held.clone()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// Not valid yet, or no longer, by the verifier's clock.
    NotLive,
    /// It could not fetch when it should have.
    Unreachable,
    UnknownKey,
}

pub struct Verifier {
    pub class: usize,
    /// How far its clock is ahead, in milliseconds.
    pub ahead: i64,
    /// Which of the outer caches it asks; none: the balancer itself.
    edge: Option<usize>,
    held: Option<Held>,
    /// When it last asked, with or without success.
    asked: i64,
}

/// All of them.
pub struct Audience {
    pub classes: Vec<Class>,
    pub verifiers: Vec<Verifier>,
    shields: Vec<Layer>,
    edges: Vec<Layer>,
    edge_keeps: i64,
    flaky: u64,
    pub random: Random,
    pub fetches: u64,
    pub failures: u64,
}

impl Audience {
    pub fn new(classes: &[Class], count: usize, ahead_max: i64, edge: i64, flaky: u64, mut random: Random) -> Self {
        let layer = |keeps| Layer { keeps, held: None };
        let edges = if edge > 0 { 3 } else { 2 };
        let verifiers = (0..count).map(|number| Verifier {
            class: number % classes.len(),
            ahead: [-ahead_max, 0, ahead_max][(number / classes.len()) % 3],
            edge: (number % 7 != 6).then(|| random.below(edges) as usize),
            held: None,
            asked: i64::MIN / 2,
        });
        Audience {
            classes: classes.to_vec(),
            verifiers: verifiers.collect(),
            shields: (0..2).map(|_| layer(None)).collect(),
            edges: (0..edges).map(|_| layer(Some(edge))).collect(),
            edge_keeps: edge,
            flaky,
            random,
            fetches: 0,
            failures: 0,
        }
    }

    fn fetch(&mut self, edge: Option<usize>, now: i64, origin: &mut impl Origin) -> Option<Held> {
        self.fetches += 1;
        if self.flaky > 0 && self.random.below(1000) < self.flaky {
            self.failures += 1;
            return None;
        }
        self.layered(edge, now, origin)
    }

    /// The same of somebody who looks what is served there, and when a replica answered with it.
    pub fn through(&mut self, edge: Option<usize>, now: i64, origin: &mut impl Origin) -> Option<(Arc<Served>, i64)> {
        self.layered(edge, now, origin).map(|held| (held.served, held.born))
    }

    fn layered(&mut self, edge: Option<usize>, now: i64, origin: &mut impl Origin) -> Option<Held> {
        let mut ask = || origin.ask().map(|served| Held { served, got: now, born: now });
        let Some(edge) = edge else { return ask() };
        let shield = &mut self.shields[edge % 2];
        let declared = shield.held.as_ref().map_or(0, |held| held.served.max_age);
        if self.edge_keeps == 0 {
            return shield.fetch(now, declared, ask);
        }
        self.edges[edge].fetch(now, declared + self.edge_keeps, || shield.fetch(now, declared, ask))
    }

    /// Judges a token of `key` that lives from `nbf` to `exp`, in seconds, at `now` of true time.
    pub fn verify(
        &mut self,
        number: usize,
        key: KeyId,
        (nbf, exp): (i64, i64),
        now: i64,
        origin: &mut impl Origin,
    ) -> Verdict {
        let verifier = &self.verifiers[number];
        let clock = now + verifier.ahead + crate::life::BEGINNING.as_millis();
        if clock < nbf * 1000 || clock >= exp * 1000 {
            return Verdict::NotLive;
        }
        self.look_up(number, key, now, origin)
    }

    /// Whether a verifier knows the key, after asking for what it would ask for.
    pub fn look_up(&mut self, number: usize, key: KeyId, now: i64, origin: &mut impl Origin) -> Verdict {
        let verifier = &self.verifiers[number];
        let (class, edge) = (verifier.class, verifier.edge);
        let mut failed = false;
        let keeps = self.classes[class].cache();
        let fresh = |held: &Held| now < held.got.saturating_add(keeps.unwrap_or(held.served.max_age));
        if !verifier.held.as_ref().is_some_and(fresh) {
            failed = !self.refresh(number, edge, now, origin);
        }
        let knows = |held: &Option<Held>| held.as_ref().is_some_and(|held| held.served.keys.contains(&key));
        let verifier = &self.verifiers[number];
        if !knows(&verifier.held) && !failed && now > verifier.asked {
            let may = match &self.classes[class] {
                Class::Refetches { cools, .. } | Class::Forever { cools } => now >= verifier.asked + cools,
                Class::Waits => verifier.held.as_ref().is_none_or(|held| now >= held.got + held.served.max_age),
                Class::Plain { .. } | Class::Obeys | Class::Asks => false,
            };
            if may {
                failed = !self.refresh(number, edge, now, origin);
            }
        }
        let verifier = &self.verifiers[number];
        match knows(&verifier.held) {
            true => Verdict::Accepted,
            // A failure that is waited out counts for as long as nothing was fetched since.
            false if failed || verifier.held.is_none() => Verdict::Unreachable,
            false if verifier.held.as_ref().is_some_and(|held| held.got < verifier.asked) => Verdict::Unreachable,
            false => Verdict::UnknownKey,
        }
    }

    fn refresh(&mut self, number: usize, edge: Option<usize>, now: i64, origin: &mut impl Origin) -> bool {
        let fetched = self.fetch(edge, now, origin);
        let verifier = &mut self.verifiers[number];
        verifier.asked = now;
        match fetched {
            Some(held) => {
                verifier.held = Some(Held { got: now, ..held });
                true
            }
            None => false,
        }
    }
}
