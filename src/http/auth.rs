//! Bearer tokens with names (RFC 6750): compared in constant time, exchanged while running, and guessing slowed per
//! address without ever delaying a valid token.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use axum::response::{IntoResponse, Response};
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tokio::sync::Semaphore;

use super::listener::Peer;
use super::problem::{Problem, ProblemType};
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};

/// A token's name (for the audit log) and what it allows. Of the secret only the SHA-256 is kept: tokens are long and
/// random, so nothing slower is needed.
pub struct Token<R> {
    pub name: Name,
    pub role: R,
    digest: [u8; 32],
}

impl<R: fmt::Debug> fmt::Debug for Token<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("name", &self.name).field("role", &self.role).finish_non_exhaustive()
    }
}

/// All tokens that are valid at one time.
#[derive(Debug)]
pub struct TokenSet<R> {
    tokens: Vec<Arc<Token<R>>>,
}

impl<R> Default for TokenSet<R> {
    fn default() -> Self {
        TokenSet { tokens: Vec::new() }
    }
}

impl<R> TokenSet<R> {
    /// Adds a token. `secret` is the exact text after `Bearer `; the caller trims a file's newline.
    pub fn insert(&mut self, name: Name, secret: &[u8], role: R) -> Result<(), TokenError> {
        if secret.is_empty() || !secret.iter().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::NotAToken { name });
        }
        let digest: [u8; 32] = Sha256::digest(secret).into();
        if let Some(other) = self.tokens.iter().find(|other| other.name == name || other.digest == digest) {
            return Err(TokenError::Repeated { name, other: other.name.clone() });
        }
        self.tokens.push(Arc::new(Token { name, role, digest }));
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Compares with every token, so that the time taken tells neither which one matched nor how far one did.
    pub fn find(&self, presented: &[u8]) -> Option<&Arc<Token<R>>> {
        let digest: [u8; 32] = Sha256::digest(presented).into();
        let mut found = u32::MAX;
        for (index, token) in (0u32..).zip(&self.tokens) {
            found.conditional_assign(&index, token.digest.ct_eq(&digest));
        }
        self.tokens.get(found as usize)
    }
}

/// Why a secret cannot be a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "token {name}: the secret is empty or holds spaces or control characters; write one line of printable ASCII"
    )]
    NotAToken { name: Name },
    #[error("token {name}: {other} has the same name or the same secret; give each token a secret of its own")]
    Repeated { name: Name, other: Name },
}

/// Who presents a token, for slowing down those who guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An address; of IPv6 the /64, which one host commands.
    Address(IpAddr),
    /// A user at the other end of a Unix socket.
    Uid(u32),
}

impl From<&Peer> for Source {
    fn from(peer: &Peer) -> Self {
        match peer {
            Peer::Tcp(address) => match address.ip().to_canonical() {
                IpAddr::V6(ip) => Source::Address(Ipv6Addr::from_bits(ip.to_bits() & !(u64::MAX as u128)).into()),
                v4 => Source::Address(v4),
            },
            Peer::Unix { uid, .. } => Source::Uid(*uid),
        }
    }
}

/// Checks `Authorization` headers against a token set that can be exchanged while running.
pub struct Authenticator<R> {
    tokens: ArcSwap<TokenSet<R>>,
    clock: Clock,
    failed: Mutex<FailedLogins>,
    failures: AtomicU64,
    /// Bounds the connections that wait for a delayed refusal.
    waiting: Semaphore,
}

type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How many refusals may be delayed at once; further ones are answered 429 at once.
const MOST_WAITING: usize = 64;

impl<R> Authenticator<R> {
    pub fn new(tokens: TokenSet<R>, clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Authenticator {
            tokens: ArcSwap::from_pointee(tokens),
            clock: Arc::new(clock),
            failed: Mutex::default(),
            failures: AtomicU64::new(0),
            waiting: Semaphore::new(MOST_WAITING),
        }
    }

    /// Replaces all tokens, for requests that arrive from now on.
    pub fn replace(&self, tokens: TokenSet<R>) {
        self.tokens.store(Arc::new(tokens));
    }

    /// How many requests were refused since the start.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The token a request presents, or the answer to give, which comes after the delay that the source has earned. A
    /// valid token is never delayed.
    pub async fn authenticate(&self, headers: &HeaderMap, source: Source) -> Result<Arc<Token<R>>, Unauthorized> {
        let refusal = match self.check(headers, source) {
            Ok(token) => return Ok(token),
            Err(refusal) => refusal,
        };
        if !refusal.delay.is_zero() {
            let Ok(_place) = self.waiting.try_acquire() else {
                return Err(Unauthorized { reason: Reason::TooMany(refusal.delay) });
            };
            tokio::time::sleep(refusal.delay.to_std()).await;
        }
        Err(Unauthorized { reason: refusal.reason })
    }

    /// The valid token that a request presents, if it does; counts nothing.
    pub fn recognise(&self, headers: &HeaderMap) -> Option<Arc<Token<R>>> {
        let Presented::Secret(secret) = presented(headers) else { return None };
        self.tokens.load().find(secret).cloned()
    }

    /// Decides without waiting; counts a failure.
    pub fn check(&self, headers: &HeaderMap, source: Source) -> Result<Arc<Token<R>>, Refusal> {
        let (reason, delay) = match presented(headers) {
            Presented::Secret(secret) => match self.tokens.load().find(secret) {
                Some(token) => return Ok(token.clone()),
                None => {
                    let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                    (Reason::Wrong, failed.record(source, (self.clock)()))
                }
            },
            Presented::Nothing => (Reason::Missing, Span::ZERO),
            Presented::Garbage => (Reason::Wrong, Span::ZERO),
        };
        self.failures.fetch_add(1, Ordering::Relaxed);
        Err(Refusal { reason, delay })
    }
}

/// A refusal that is still to be delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    reason: Reason,
    /// How long the answer must wait.
    pub delay: Span,
}

/// The answer to a request without a valid token: 401, or 429 where too many such answers wait already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unauthorized {
    reason: Reason,
}

impl IntoResponse for Unauthorized {
    fn into_response(self) -> Response {
        let challenge = match self.reason {
            Reason::TooMany(delay) => {
                let seconds = delay.as_secs().unsigned_abs();
                return Problem::new(ProblemType::TooManyFailedLogins).retry_after(seconds).into_response();
            }
            Reason::Missing => "Bearer realm=\"jwksd\"",
            Reason::Wrong => "Bearer realm=\"jwksd\", error=\"invalid_token\"",
        };
        let mut response = Problem::new(ProblemType::Unauthorized).into_response();
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        response
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Missing,
    Wrong,
    TooMany(Span),
}

/// The token that a request presents, if it presents one, whatever it is.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    match presented(headers) {
        Presented::Secret(secret) => Some(secret),
        Presented::Nothing | Presented::Garbage => None,
    }
}

enum Presented<'a> {
    Nothing,
    Garbage,
    Secret(&'a [u8]),
}

fn presented(headers: &HeaderMap) -> Presented<'_> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (value, None) = (values.next(), values.next()) else { return Presented::Garbage };
    let Some(value) = value else { return Presented::Nothing };
    match value.as_bytes().split_at_checked(7) {
        Some((scheme, secret)) if scheme.eq_ignore_ascii_case(b"bearer ") && !secret.is_empty() => {
            Presented::Secret(secret.trim_ascii())
        }
        _ => Presented::Garbage,
    }
}

/// Failures by source: at most [`FailedLogins::SOURCES`], each forgiven with time.
#[derive(Default)]
struct FailedLogins {
    sources: HashMap<Source, Failures>,
}

#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    last: Timestamp,
}

impl FailedLogins {
    const SOURCES: usize = 4096;
    /// A person may mistype this often before the wait begins.
    const FREE: u32 = 2;
    const FIRST_DELAY: Span = Span::from_millis(100);
    const LONGEST_DELAY: Span = Span::from_millis(3000);
    /// One failure is forgiven for each such time without another.
    const FORGIVEN_AFTER: Span = Span::from_millis(10_000);
    /// More change nothing but how long forgiving takes.
    const MOST: u32 = 10;

    /// Counts one failure and says how long its answer must wait.
    fn record(&mut self, source: Source, now: Timestamp) -> Span {
        if !self.sources.contains_key(&source) && self.sources.len() >= Self::SOURCES {
            self.make_room(now);
        }
        let failures = self.sources.entry(source).or_insert(Failures { count: 0, last: now });
        failures.count = (failures.remaining(now) + 1).min(Self::MOST);
        failures.last = now;
        match failures.count.checked_sub(Self::FREE + 1) {
            None => Span::ZERO,
            Some(doublings) => Self::FIRST_DELAY.times(1 << doublings).min(Self::LONGEST_DELAY),
        }
    }

    /// Forgets the forgiven; where there are none, the one that was silent for longest.
    fn make_room(&mut self, now: Timestamp) {
        self.sources.retain(|_, failures| failures.remaining(now) > 0);
        if self.sources.len() >= Self::SOURCES {
            let oldest = self.sources.iter().min_by_key(|(_, failures)| failures.last).map(|(source, _)| *source);
            oldest.and_then(|source| self.sources.remove(&source));
        }
    }
}

impl Failures {
    fn remaining(self, now: Timestamp) -> u32 {
        let forgiven = now.since(self.last).as_millis() / FailedLogins::FORGIVEN_AFTER.as_millis();
        self.count.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;

    use super::*;

    const RIGHT: &str = "right-token";

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn bearer(secret: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::try_from(format!("Bearer {secret}")).unwrap())])
    }

    fn address(last: u8) -> Source {
        Source::Address(IpAddr::from([192, 0, 2, last]))
    }

    struct Fixture {
        now: Arc<AtomicI64>,
        auth: Authenticator<&'static str>,
    }

    fn fixture() -> Fixture {
        let mut tokens = TokenSet::default();
        tokens.insert(name("alice"), RIGHT.as_bytes(), "operator").unwrap();
        tokens.insert(name("bob"), b"another", "viewer").unwrap();
        let now = Arc::new(AtomicI64::new(1_000_000));
        let clock = now.clone();
        let auth = Authenticator::new(tokens, move || Timestamp::from_millis(clock.load(Ordering::SeqCst)));
        Fixture { now, auth }
    }

    impl Fixture {
        fn failing(&self, source: Source) -> Span {
            self.auth.check(&bearer("wrong"), source).unwrap_err().delay
        }

        fn pass(&self, span: Span) {
            self.now.fetch_add(span.as_millis(), Ordering::SeqCst);
        }
    }

    #[test]
    fn a_token_is_known_by_its_whole_secret_only() {
        let Fixture { auth, .. } = fixture();
        assert_eq!(auth.check(&bearer(RIGHT), address(1)).unwrap().name.as_str(), "alice");
        assert_eq!(auth.check(&bearer("another"), address(1)).unwrap().role, "viewer");
        for wrong in ["right-toke", "right-token2", "RIGHT-TOKEN", "", "right-token another"] {
            assert!(auth.check(&bearer(wrong), address(1)).is_err(), "{wrong}");
        }
        let mut twice = bearer(RIGHT);
        twice.append(AUTHORIZATION, HeaderValue::from_static("Bearer another"));
        assert!(auth.check(&twice, address(1)).is_err());
        let basic = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Basic cmlnaHQtdG9rZW4="))]);
        assert!(auth.check(&basic, address(1)).is_err());
        assert!(auth.check(&HeaderMap::new(), address(1)).is_err());
        assert_eq!(auth.failures(), 8);
        assert!(TokenSet::<()>::default().find(b"").is_none());
    }

    #[test]
    fn guessing_becomes_slow_while_the_valid_token_stays_fast() {
        let fixture = fixture();
        let delays: Vec<i64> = (0..10).map(|_| fixture.failing(address(1)).as_millis()).collect();
        assert_eq!(delays, [0, 0, 100, 200, 400, 800, 1600, 3000, 3000, 3000]);
        assert!(fixture.auth.check(&bearer(RIGHT), address(1)).is_ok());
        assert!(fixture.failing(address(2)).is_zero(), "another address pays for the first");
        fixture.pass(FailedLogins::FORGIVEN_AFTER.times(5));
        assert_eq!(fixture.failing(address(1)).as_millis(), 800);
        fixture.pass(Span::DAY);
        assert!(fixture.failing(address(1)).is_zero());
    }

    #[tokio::test(start_paused = true)]
    async fn only_refusals_wait_and_not_too_many_at_once() {
        let fixture = Arc::new(fixture());
        for _ in 0..20 {
            fixture.failing(address(1));
        }
        let guess = |fixture: Arc<Fixture>| {
            tokio::spawn(async move { fixture.auth.authenticate(&bearer("wrong"), address(1)).await.unwrap_err() })
        };
        let begun = tokio::time::Instant::now();
        let waiting: Vec<_> = (0..MOST_WAITING).map(|_| guess(fixture.clone())).collect();
        tokio::task::yield_now().await;
        let surplus = guess(fixture.clone()).await.unwrap();
        assert!(matches!(surplus.reason, Reason::TooMany(_)), "{surplus:?}");
        assert!(fixture.auth.authenticate(&bearer(RIGHT), address(1)).await.is_ok());
        assert_eq!(begun.elapsed(), std::time::Duration::ZERO);
        for guess in waiting {
            assert_eq!(guess.await.unwrap().reason, Reason::Wrong);
        }
        assert_eq!(begun.elapsed(), FailedLogins::LONGEST_DELAY.to_std());
    }

    #[test]
    fn the_table_of_addresses_is_bounded_and_forgets_the_oldest() {
        let mut failed = FailedLogins::default();
        let source = |n: u32| Source::Address(IpAddr::from(n.to_be_bytes()));
        for n in 0..2 * FailedLogins::SOURCES as u32 {
            failed.record(source(n), Timestamp::from_millis(i64::from(n)));
            assert!(failed.sources.len() <= FailedLogins::SOURCES);
        }
        assert!(!failed.sources.contains_key(&source(0)));
        assert!(failed.sources.contains_key(&source(2 * FailedLogins::SOURCES as u32 - 1)));
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let source = |text: &str| Source::from(&Peer::Tcp(text.parse().unwrap()));
        assert_eq!(source("[2001:db8::1]:1"), source("[2001:db8::ffff:0:0:2]:2"));
        assert_ne!(source("[2001:db8::1]:1"), source("[2001:db8:0:1::1]:1"));
        assert_eq!(source("[::ffff:192.0.2.1]:1"), source("192.0.2.1:9"));
    }

    #[test]
    fn tokens_can_be_exchanged_and_repeated_ones_are_refused() {
        let Fixture { auth, .. } = fixture();
        let mut tokens = TokenSet::default();
        tokens.insert(name("carol"), b"new", "viewer").unwrap();
        assert!(matches!(tokens.insert(name("dave"), b"new", "viewer"), Err(TokenError::Repeated { .. })));
        assert!(matches!(tokens.insert(name("carol"), b"x", "viewer"), Err(TokenError::Repeated { .. })));
        for bad in [&b""[..], b"two words", b"line\n", b"caf\xc3\xa9"] {
            assert!(matches!(tokens.insert(name("eve"), bad, "viewer"), Err(TokenError::NotAToken { .. })));
        }
        assert!(!format!("{tokens:?}").contains("digest"));
        auth.replace(tokens);
        assert!(auth.check(&bearer(RIGHT), address(1)).is_err());
        assert!(auth.check(&bearer("new"), address(1)).is_ok());
    }

    #[test]
    fn a_refusal_challenges_for_a_bearer_token() {
        let missing = Unauthorized { reason: Reason::Missing }.into_response();
        assert_eq!(
            (missing.status().as_u16(), &missing.headers()[WWW_AUTHENTICATE]),
            (401, &HeaderValue::from_static("Bearer realm=\"jwksd\""))
        );
        let surplus = Unauthorized { reason: Reason::TooMany(Span::SECOND.times(3)) }.into_response();
        assert_eq!(
            (surplus.status().as_u16(), &surplus.headers()["retry-after"]),
            (429, &HeaderValue::from_static("3"))
        );
    }
}
