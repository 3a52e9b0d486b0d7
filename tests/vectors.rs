//! Published vectors: the examples of RFC 7515, 7517, 7638 and 8037, and Project Wycheproof's for JOSE.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy sees only #[test] functions as tests")]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwksd::backend::material::{PrivateKeyMaterial, import_public};
use jwksd::backend::token::{Jws, TokenError, decode, verify_token};
use jwksd::backend::verify::verify;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::jwk::{JwkError, Kid, ParsedJwk, PublicJwk, parse_jwks};
use jwksd::keyring::time::{Span, Timestamp};
use serde_json::{Value, json};
use wycheproof_ng_kdf_jose::json_web::{TestName, TestSet};

fn rfc(path: &str) -> Value {
    serde_json::from_str::<Value>(include_str!("vectors/jwk.json")).unwrap().pointer(path).unwrap().clone()
}

fn without_private_members(jwk: &Value) -> Value {
    let mut jwk = jwk.clone();
    for member in ["d", "p", "q", "dp", "dq", "qi"] {
        jwk.as_object_mut().unwrap().remove(member);
    }
    jwk
}

fn public(jwk: &Value) -> PublicJwk {
    PublicJwk::from_jwk_json(&without_private_members(jwk)).unwrap().public
}

fn private(jwk: &Value) -> PrivateKeyMaterial {
    PrivateKeyMaterial::import(jwk.to_string().as_bytes()).unwrap().material
}

/// The parts of a token that a signature covers, and the signature.
fn taken_apart(token: &str) -> (&[u8], Vec<u8>) {
    let (input, signature) = token.rsplit_once('.').unwrap();
    (input.as_bytes(), URL_SAFE_NO_PAD.decode(signature).unwrap())
}

#[test]
fn the_signatures_of_rfc_7515_verify_with_their_keys() {
    for (example, alg) in [("/rfc7515/a2", "RS256"), ("/rfc7515/a3", "ES256")] {
        let jwk = rfc(&format!("{example}/jwk"));
        let token = rfc(&format!("{example}/token"));
        let token = token.as_str().unwrap();
        let public = public(&jwk);
        assert_eq!(private(&jwk).public(), &public);
        let algorithm = public.algorithm_named(alg).unwrap();
        let (input, mut signature) = taken_apart(token);
        verify(algorithm, &public, input, &signature).unwrap();
        assert_eq!(decode(token).unwrap().claims["iss"], "joe");
        // These tokens name no key, so none is chosen for them.
        let key = ParsedJwk { public: public.clone(), kid: None, algorithm: Some(algorithm) };
        assert_eq!(
            verify_token(token, &[key], Timestamp::from_secs(1_300_819_379), "joe", None, Span::ZERO),
            Err(TokenError::NoKid)
        );
        signature[0] ^= 1;
        assert!(verify(algorithm, &public, input, &signature).is_err());
    }
}

#[test]
fn the_unsecured_token_of_rfc_7515_is_refused() {
    let token = rfc("/rfc7515/a5/token");
    let result = verify_token(token.as_str().unwrap(), &[], Timestamp::EPOCH, "joe", None, Span::ZERO);
    assert_eq!(result, Err(TokenError::Unsigned));
}

#[test]
fn the_keys_of_rfc_7517_import_where_they_are_for_signatures() {
    for (set, is_private) in [("/rfc7517/a1", false), ("/rfc7517/a2", true)] {
        let keys = rfc(&format!("{set}/keys"));
        let (ec, rsa) = (&keys[0], &keys[1]);
        let parsed = PublicJwk::from_jwk_json(&without_private_members(rsa)).unwrap();
        assert_eq!(parsed.kid, Some(Kid("2011-04-29".into())));
        assert_eq!(parsed.algorithm.unwrap().alg(), "RS256");
        // The EC key of the examples is for encryption.
        let refused = PublicJwk::from_jwk_json(&without_private_members(ec)).unwrap_err();
        assert!(matches!(refused, JwkError::Use { .. }));
        let mut for_signatures = ec.clone();
        for_signatures["use"] = "sig".into();
        if is_private {
            assert!(matches!(PublicJwk::from_jwk_json(rsa), Err(JwkError::PrivateMember { member: "d" })));
            assert_eq!(private(rsa).public(), &parsed.public);
            assert_eq!(private(&for_signatures).public(), &public(&for_signatures));
        } else {
            assert_eq!(import_public(for_signatures.to_string().as_bytes()).unwrap()[0].kid, Some(Kid("1".into())));
        }
    }
}

#[test]
fn the_thumbprints_of_rfc_7638_and_8037_are_ours() {
    assert_eq!(public(&rfc("/rfc7638/s31/jwk")).thumbprint().as_str(), rfc("/rfc7638/s31/thumbprint"));
    assert_eq!(public(&rfc("/rfc8037/a2")).thumbprint().as_str(), rfc("/rfc8037/a3"));
    assert_eq!(private(&rfc("/rfc8037/a1")).public().thumbprint().as_str(), rfc("/rfc8037/a3"));
}

#[test]
fn the_ed25519_example_of_rfc_8037_verifies() {
    assert_eq!(private(&rfc("/rfc8037/a1")).public(), &public(&rfc("/rfc8037/a2")));
    let token = rfc("/rfc8037/a4");
    let (input, signature) = taken_apart(token.as_str().unwrap());
    let public = public(&rfc("/rfc8037/a2"));
    verify(public.algorithm_named("EdDSA").unwrap(), &public, input, &signature).unwrap();
    assert_eq!(Jws::parse(token.as_str().unwrap()).unwrap().payload, b"Example of Ed25519 signing");
}

/// What became of the vectors of one file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Valid, with an algorithm of ours: accepted.
    accepted: usize,
    /// Invalid, with keys we take: refused for the token.
    refused_token: usize,
    /// Invalid: refused for the key.
    refused_key: usize,
    /// Valid, but symmetric or of another algorithm: refused for that.
    unsupported: usize,
    /// Not signatures (JWE).
    skipped: usize,
}

/// The keys of a group, as `verify_token` would get them; `None` when a key cannot be used.
fn keys_of(group: &Value) -> Option<Vec<ParsedJwk>> {
    match group.get("keys") {
        Some(_) => parse_jwks(group).ok()?.into_iter().collect::<Result<_, _>>().ok(),
        None => Some(vec![PublicJwk::from_jwk_json(group).ok()?]),
    }
}

fn run(name: TestName) -> Tally {
    let mut tally = Tally::default();
    for group in TestSet::load(name).unwrap().test_groups {
        // Symmetric keys have no public half: what a careless importer might read is the secret.
        let keys = keys_of(group.public_key.as_ref().or(group.private_key.as_ref()).unwrap());
        for test in group.tests {
            let Some(jws) = test.jws else {
                tally.skipped += 1;
                continue;
            };
            let compact = jws.as_str().map_or_else(|| jws.to_string(), str::to_owned);
            let jws = Jws::parse(&compact);
            let accepted = match (&keys, &jws) {
                (Some(keys), Ok(jws)) => jws.verify(keys).is_ok(),
                _ => false,
            };
            let alg = jws.ok().and_then(|jws| jws.header.get("alg")?.as_str().map(str::to_owned));
            let supported = alg.is_some_and(|alg| Algorithm::ALL_ALGS.contains(&alg.as_str()));
            let valid = !test.result.must_fail();
            assert_eq!(accepted, valid && supported, "{name:?} {} {}", test.tc_id, test.comment);
            match (valid, supported, &keys) {
                (true, true, _) => tally.accepted += 1,
                (true, false, _) => tally.unsupported += 1,
                (false, _, Some(_)) => tally.refused_token += 1,
                (false, _, None) => tally.refused_key += 1,
            }
        }
    }
    tally
}

#[test]
fn wycheproof_signatures_give_the_expected_results() {
    assert_eq!(
        run(TestName::JsonWebSignature),
        Tally { accepted: 16, refused_token: 304, refused_key: 51, unsupported: 30, skipped: 0 }
    );
}

#[test]
fn wycheproof_keys_give_the_expected_results() {
    assert_eq!(
        run(TestName::JsonWebKey),
        Tally { accepted: 1, refused_token: 0, refused_key: 21, unsupported: 4, skipped: 0 }
    );
}

#[test]
fn wycheproof_jose_vectors_give_the_expected_results() {
    assert_eq!(
        run(TestName::JsonWebCrypto),
        Tally { accepted: 2, refused_token: 26, refused_key: 19, unsupported: 2, skipped: 34 }
    );
}

#[test]
fn wycheproof_private_keys_import_exactly_where_their_public_halves_do() {
    let mut imported = 0;
    for name in TestName::all() {
        for group in TestSet::load(name).unwrap().test_groups {
            let (Some(public), Some(private)) = (group.public_key, group.private_key) else { continue };
            let single = |jwk: Value| jwk.get("keys").map_or(jwk.clone(), |keys| keys[0].clone());
            let (public, mut private) = (single(public), single(private));
            // One of them lists its operations as one string, "sign, verify".
            if private.get("key_ops") == Some(&json!(["sign, verify"])) {
                private["key_ops"] = json!(["sign", "verify"]);
            }
            let public = PublicJwk::from_jwk_json(&public);
            match PrivateKeyMaterial::import(private.to_string().as_bytes()) {
                Ok(key) => {
                    assert_eq!(key.described.unwrap(), public.unwrap());
                    imported += 1;
                }
                Err(error) => assert!(public.is_err(), "{:?}: {error}", group.group_comment),
            }
        }
    }
    assert_eq!(imported, 12);
}
