//! The simulation has teeth: rules with a flaw, and worlds that are not as declared, are found.

use jwksd::keyring::change::Change;
use jwksd::keyring::record::{Key, KeyState, Keyring};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;
use jwksd::simulation::rules::Ours;
use jwksd::simulation::{Caching, Scenario};

use crate::found;
use crate::rules::{Misled, Miswritten};

fn halved(span: Span) -> Span {
    Span::from_millis(span.as_millis() / 2)
}

#[test]
fn a_promotion_before_propagation_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        keyring.policy.rotation.propagation = halved(keyring.policy.rotation.propagation);
        keyring.policy.rotation.schedule = Schedule::Every(keyring.policy.rotation.propagation + Span::SECOND);
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn a_removal_before_the_overlap_has_passed_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        for key in &mut keyring.keys {
            (key.ttl_bound, key.overlap_bound) = (halved(key.ttl_bound), Span::ZERO);
        }
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn an_overlap_that_counts_from_the_creation_of_the_key_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        for key in &mut keyring.keys {
            key.stopped_at = key.stopped_at.map(|_| key.created_at);
        }
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn a_bound_that_is_forgotten_when_max_ttl_is_lowered_is_found() {
    let forgetful = Miswritten {
        after: |change: &Change, next: &mut Keyring| {
            if let Change::AdoptPolicy(policy) = change {
                for key in &mut next.keys {
                    (key.ttl_bound, key.overlap_bound) = (policy.tokens.max_ttl, policy.overlap());
                }
            }
        },
        decided: |_: &Keyring, _: &mut Keyring| (),
    };
    let lowered = |scenario: &mut Scenario| {
        let mut policy = scenario.policies[0].clone();
        policy.tokens.max_ttl = Span::SECOND;
        policy.tokens.default_ttl = Span::SECOND;
        scenario.policies.push(policy);
    };
    assert!(found(&forgetful, lowered).is_some());
    assert_eq!(found(&Ours, lowered), None, "the daemon's own rules remember");
}

#[test]
fn a_revoked_key_that_signs_on_is_found() {
    let deaf = Miswritten {
        after: |_: &Change, _: &mut Keyring| (),
        decided: |before: &Keyring, next: &mut Keyring| {
            // The answer says revoked, the record does not.
            let revoked = |key: &&Key| next.key(key.serial).is_some_and(|key| key.state == KeyState::Revoked);
            if before.keys.iter().any(|key| key.state == KeyState::Active && revoked(&key)) {
                next.keys.clone_from(&before.keys);
            }
        },
    };
    assert!(found(&deaf, |_| ()).is_some());
}

#[test]
fn what_is_true_but_not_declared_is_found() {
    let hours = Span::HOUR.times(2);
    assert!(found(&Ours, |scenario| scenario.reality.layers = scenario.reality.layers + hours).is_some(), "a layer");
    let slower = |scenario: &mut Scenario| {
        scenario.reality.verifiers.push(Caching { name: "slower".to_owned(), sees_new: hours.times(2) });
    };
    assert!(found(&Ours, slower).is_some(), "a slower verifier");
    assert!(found(&Ours, |scenario| scenario.reality.skew = hours).is_some(), "clocks");
    let lag = |scenario: &mut Scenario| {
        if scenario.reality.replicas > 1 {
            scenario.reality.lag = hours;
        }
    };
    assert!(found(&Ours, lag).is_some(), "late replicas");
}
