#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use super::*;
use crate::keyring::change::{Change, Trigger};
use crate::keyring::jwk::EcCurve;
use crate::keyring::name::Name;
use crate::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy};
use crate::keyring::record::PrivateHandle;
use crate::keyring::schedule::Schedule;

fn at(secs: i64) -> Timestamp {
    Timestamp::from_secs(1_795_514_400 + secs)
}

fn policy() -> Policy {
    let name = |text| Name::parse(text).unwrap();
    Policy {
        issuer: IssuerPolicy {
            name: name("main"),
            url: "https://auth.example.com".to_owned(),
            max_age: Span::from_secs(300),
            stale_if_error: Span::ZERO,
            caches: vec![Span::from_secs(300)],
            jwks_paths: Vec::new(),
            discovery: Discovery::Minimal,
            probes: Vec::new(),
        },
        algorithm: Algorithm::Es256,
        backend: "local".to_owned(),
        rotation: RotationPolicy {
            schedule: Schedule::Every(Span::DAY),
            propagation: Span::HOUR,
            successors: 2,
            overlap_extra: Span::ZERO,
            bootstrap: Bootstrap::Wait,
            verifiers: Vec::new(),
            clock_skew: Span::MINUTE,
            staleness_limit: Span::ZERO,
            publish_lag: Span::ZERO,
        },
        tokens: TokenPolicy {
            max_ttl: Span::from_secs(900),
            default_ttl: Span::from_secs(300),
            required_claims: Vec::new(),
            forbidden_claims: Vec::new(),
            audiences: Vec::new(),
            types: Vec::new(),
            backdate: Span::ZERO,
        },
    }
}

fn public(name: &str) -> PublicJwk {
    PublicJwk::Ec { crv: EcCurve::P256, x: name.to_owned(), y: "y".to_owned() }
}

fn kid(name: &str) -> Kid {
    Kid(name.into())
}

fn new(name: &str) -> NewKey {
    let private = Some(PrivateHandle { backend: "local".to_owned(), handle: name.to_owned() });
    NewKey { kid: kid(name), algorithm: Algorithm::Es256, public: public(name), private }
}

fn served(names: &[&str]) -> Vec<ServedKey> {
    let served = |name: &&str| ServedKey { kid: kid(name), algorithm: Algorithm::Es256, public: public(name) };
    names.iter().map(served).collect()
}

fn add(keyring: &Keyring, name: &str, now: i64) -> Keyring {
    let added = keyring.after(&Change::Add(Box::new(new(name))), at(now));
    let serial = added.next_serial - 1;
    added.after(&Change::Observe { published: vec![(serial, at(now))], stopped: vec![], seen: vec![] }, at(now))
}

fn promote(keyring: &Keyring, name: &str, now: i64) -> Keyring {
    let serial = keyring.key_by_kid(name).unwrap().serial;
    let ready = keyring.after(&Change::Propagated(vec![serial]), at(now));
    ready.after(&Change::Promote { serial, trigger: Trigger::Operator, unpropagated: false }, at(now))
}

fn revoke(keyring: &Keyring, name: &str, now: i64) -> Keyring {
    let mut next = keyring.next(at(now));
    let serial = next.key_by_kid(name).unwrap().serial;
    let revocation = Revocation { reason: "leaked".to_owned(), actor: "somebody".to_owned(), at: at(now) };
    next.revoke(serial, &revocation);
    next
}

/// `a` signs, `b` stands by.
fn origin() -> Keyring {
    let empty = Keyring::new(Name::parse("default").unwrap(), "first".to_owned(), policy(), true, at(0));
    let keyring = promote(&add(&empty, "a", 1), "a", 2);
    let keyring = add(&keyring, "b", 3);
    let serial = keyring.key_by_kid("b").unwrap().serial;
    keyring.after(&Change::Propagated(vec![serial]), at(4000))
}

fn asked<'a>(served: Option<&'a [ServedKey]>, seen: &'a [Superseded]) -> Recovery<'a> {
    Recovery { lineage: "second".to_owned(), actor: "recover", reason: None, now: at(10_000), served, seen }
}

fn merge(histories: &[Keyring]) -> Recovered {
    recover(histories, &asked(None, &[])).unwrap()
}

fn state(recovered: &Recovered, name: &str) -> Option<KeyState> {
    recovered.keyring.key_by_kid(name).map(|key| key.state)
}

#[test]
fn nothing_comes_of_nothing() {
    assert_eq!(recover(&[], &asked(None, &[])), None);
}

#[test]
fn the_highest_generation_is_gone_on_from_and_of_equals_the_one_written_last() {
    let old = origin();
    let (early, late) = (add(&old, "c", 5000), add(&old, "d", 5001));
    assert_eq!(merge(&[old.clone(), early.clone(), late.clone()]).base, 2);
    assert_eq!(merge(&[late.clone(), early, old.clone()]).base, 0);
    let ahead = add(&add(&old, "c", 4001), "e", 4002);
    assert_eq!(merge(&[ahead, late]).base, 0);
}

#[test]
fn the_new_history_names_all_former_ones_and_is_beyond_what_anybody_saw() {
    let mut other = origin();
    other.lineage = "other".to_owned();
    other.supersedes = vec![Superseded { lineage: "earlier".to_owned(), generation: 3 }];
    let ours = add(&origin(), "c", 5000);
    let seen = [
        Superseded { lineage: "first".to_owned(), generation: 70 },
        Superseded { lineage: "earlier".to_owned(), generation: 2 },
    ];
    let made = recover(&[ours, other.clone()], &asked(None, &seen)).unwrap().keyring;
    assert_eq!((made.lineage.as_str(), made.generation), ("second", 71));
    let last = |lineage: &str| made.supersedes.iter().find(|one| one.lineage == lineage).map(|one| one.generation);
    assert_eq!((last("first"), last("other"), last("earlier")), (Some(70), Some(other.generation), Some(3)));
    assert_eq!(made.supersedes.len(), 3);
}

#[test]
fn private_keys_stay_bound_to_the_lineage_that_they_were_made_under() {
    let once = merge(&[origin()]).keyring;
    assert_eq!((once.key_lineage(), once.lineage.as_str()), ("first", "second"));
    let twice = merge(&[once]).keyring;
    assert_eq!(twice.key_lineage(), "first");
}

#[test]
fn keys_of_another_history_only_verify_for_as_long_as_their_tokens_may_live() {
    let mut fork = promote(&add(&origin(), "c", 5000), "b", 5001);
    fork.policy.tokens.max_ttl = Span::HOUR;
    let ours = add(&add(&origin(), "d", 6000), "e", 6001);
    let ours = add(&ours, "f", 6002);
    let made = merge(&[ours.clone(), fork]);
    assert_eq!(made.base, 0);
    assert_eq!(state(&made, "a"), Some(KeyState::Active), "the base's signer signs on");
    assert_eq!((state(&made, "c"), made.kept.clone()), (Some(KeyState::Retiring), vec![kid("c")]));
    let key = made.keyring.key_by_kid("c").unwrap();
    assert!(made.keyring.expires_at(key).unwrap() >= at(10_000) + Span::HOUR, "{key:?}");
    // Serials stay unique, and a key under another serial than it was sealed for is given up.
    let mut serials: Vec<_> = made.keyring.keys.iter().map(|key| key.serial).collect();
    serials.dedup();
    assert_eq!(serials.len(), made.keyring.keys.len());
    assert!(made.keyring.keys.iter().all(|key| key.serial < made.keyring.next_serial));
    assert_eq!((key.private.clone(), made.abandoned.clone()), (None, vec![kid("c")]));
}

#[test]
fn a_key_with_a_serial_of_its_own_keeps_its_private_half_until_that_is_destroyed() {
    let fork = add(&origin(), "c", 5000);
    let mut ours = origin();
    ours.generation += 10;
    let made = merge(&[ours.clone(), fork.clone()]);
    assert!(made.keyring.key_by_kid("c").unwrap().private.is_some());
    assert!(made.abandoned.is_empty());
    assert_eq!(made.keyring.next_serial, fork.next_serial);
    // Unless it was made in another life of the keyset, to which it is bound.
    let mut stranger = fork;
    stranger.lineage = "stranger".to_owned();
    assert_eq!(merge(&[ours, stranger]).abandoned, [kid("c")]);
}

#[test]
fn what_was_revoked_anywhere_is_revoked() {
    let fork = revoke(&origin(), "a", 5000);
    let ours = add(&add(&origin(), "c", 6000), "d", 6001);
    let made = merge(&[ours.clone(), fork]);
    assert_eq!((state(&made, "a"), made.revoked.clone()), (Some(KeyState::Revoked), vec![kid("a")]));
    assert_eq!(made.keyring.key_by_kid("a").unwrap().revocation.as_ref().unwrap().reason, "leaked");
    // A revoked key that ours never had comes along, and does not come back from a third history.
    let third = add(&origin(), "x", 4500);
    let gone = revoke(&third, "x", 4600);
    let made = merge(&[ours.clone(), gone, third]);
    assert_eq!(state(&made, "x"), Some(KeyState::Revoked));
    assert!(made.kept.is_empty());
    // Of one that is not listed any more the identity is enough.
    let mut forgotten = origin();
    forgotten.banned = vec!["b".to_owned()];
    let made = merge(&[ours, forgotten]);
    assert_eq!((state(&made, "b"), made.keyring.banned), (Some(KeyState::Revoked), vec!["b".to_owned()]));
}

#[test]
fn a_key_that_still_signs_elsewhere_is_kept_for_what_it_signs_there() {
    let fork = origin();
    let ours = promote(&origin(), "b", 5000);
    let serial = ours.key_by_kid("a").unwrap().serial;
    let stop = Change::Observe { published: vec![], stopped: vec![(serial, at(5000))], seen: vec![] };
    let ours = ours.after(&stop, at(5000));
    let ended = ours.after(&Change::Expire(vec![serial]), at(7000));
    for ours in [ours, ended] {
        let made = merge(&[ours, fork.clone()]);
        let key = made.keyring.key_by_kid("a").unwrap();
        assert_eq!((key.state, made.kept.clone()), (KeyState::Retiring, vec![kid("a")]));
        assert!(made.keyring.expires_at(key).unwrap() >= at(10_000) + policy().overlap());
    }
}

#[test]
fn a_key_of_both_keeps_the_longer_bounds() {
    let mut fork = origin();
    fork.keys[0].ttl_bound = Span::DAY;
    fork.keys[0].overlap_bound = Span::DAY.times(2);
    let made = merge(&[add(&origin(), "c", 5000), fork]);
    let key = made.keyring.key_by_kid("a").unwrap();
    assert_eq!((key.ttl_bound, key.overlap_bound), (Span::DAY, Span::DAY.times(2)));
}

#[test]
fn what_ended_elsewhere_comes_along_only_to_be_destroyed() {
    let with = add(&origin(), "c", 5000);
    let serial = with.key_by_kid("c").unwrap().serial;
    let ended = with.after(&Change::Withdraw(vec![serial]), at(5001));
    let destroyed = ended.after(&Change::Destroyed(serial), at(5002));
    let mut ours = origin();
    ours.generation += 10;
    assert_eq!(state(&merge(&[ours.clone(), ended]), "c"), Some(KeyState::Retired));
    assert_eq!(state(&merge(&[ours, destroyed]), "c"), None);
}

#[test]
fn a_successor_that_not_every_history_published_waits_again_and_the_signer_goes_on() {
    let ours = add(&origin(), "c", 5000);
    let ours = ours.after(&Change::Propagated(vec![ours.key_by_kid("c").unwrap().serial]), at(9000));
    let made = merge(&[origin(), ours.clone()]);
    let key = made.keyring.key_by_kid("c").unwrap();
    assert_eq!((key.state, key.published_at, key.since_generation), (KeyState::Pending, None, made.keyring.generation));
    assert_eq!(made.waiting, [kid("c")]);
    assert_eq!((state(&made, "a"), state(&made, "b")), (Some(KeyState::Active), Some(KeyState::Standby)));
    // The signer too, where it is a key that the others lack.
    let made = merge(&[origin(), promote(&ours, "c", 9500)]);
    assert_eq!((state(&made, "c"), made.waiting), (Some(KeyState::Active), vec![]));
}

#[test]
fn a_served_key_of_which_nothing_is_left_is_published_again() {
    let keys = served(&["a", "b", "lost"]);
    let made = recover(&[origin()], &asked(Some(&keys), &[])).unwrap();
    let key = made.keyring.key_by_kid("lost").unwrap();
    assert_eq!((key.state, key.private.clone(), made.kept.clone()), (KeyState::Retiring, None, vec![kid("lost")]));
    assert_eq!(made.keyring.expires_at(key), Some(at(10_000) + policy().overlap()));
    assert!(made.waiting.is_empty());
    // A revoked one is not, whatever some cache still serves.
    let made = recover(&[revoke(&origin(), "b", 5000)], &asked(Some(&keys), &[])).unwrap();
    assert_eq!(state(&made, "b"), Some(KeyState::Revoked));
}

#[test]
fn a_key_that_verifiers_are_not_served_does_not_sign_at_once() {
    let made = recover(&[origin()], &asked(Some(&served(&["b"])), &[])).unwrap();
    assert_eq!((state(&made, "a"), made.waiting.clone()), (Some(KeyState::Pending), vec![kid("a")]));
    assert_eq!((state(&made, "b"), made.keyring.last_promotion_at), (Some(KeyState::Standby), None));
    assert!(!made.keyring.first);
}

#[test]
fn what_a_newer_record_no_longer_served_does_not_come_back() {
    let seen = [Superseded { lineage: "first".to_owned(), generation: 99 }];
    let made = recover(&[origin()], &asked(Some(&served(&["b"])), &seen)).unwrap();
    assert_eq!((state(&made, "a"), made.revoked.clone()), (Some(KeyState::Revoked), vec![kid("a")]));
    assert_eq!(state(&made, "b"), Some(KeyState::Standby));
}

#[test]
fn it_is_told_in_the_journal() {
    let fork = revoke(&origin(), "a", 5000);
    let made = merge(&[add(&add(&origin(), "c", 6000), "d", 6001), fork]).keyring;
    let entry = made.journal.audit.last().unwrap();
    assert_eq!((entry.action.as_str(), entry.actor.as_str()), ("recovered", "recover"));
    assert!(entry.kids.contains(&kid("a")));
    let seqs: BTreeSet<u64> = made.journal.audit.iter().map(|entry| entry.seq).collect();
    assert_eq!(seqs.len(), made.journal.audit.len());
}
