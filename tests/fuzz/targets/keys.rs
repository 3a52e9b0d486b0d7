//! Keys that somebody imports: PEM, JWK, JWK Set; the same input as a private and as a public key.

use jwksd::backend::material::{MaterialError, PrivateKeyMaterial, import_public};
use jwksd::backend::verify::Verifier;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::json::parse_strict;
use jwksd::keyring::jwk::{ParsedJwk, PublicBytes, PublicJwk, PublishedEntry, jwks_document, parse_jwks};
use serde_json::Value;

use super::{Verdict, assert_presentable};

/// Members that may stand in the published document.
const PUBLISHED: [&str; 9] = ["kty", "kid", "use", "alg", "crv", "x", "y", "n", "e"];
/// Members that never may.
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "k", "priv"];

pub fn run(input: &[u8]) -> Verdict {
    let mut verdict = Verdict::Refused;
    match PrivateKeyMaterial::import(input) {
        Ok(imported) => {
            verdict = Verdict::Accepted;
            reads_back(&imported.material);
            let public = imported.material.public().clone();
            if let Some(described) = &imported.described {
                assert_eq!(described.public, public, "the halves belong together");
                same_members(input, &public);
            }
            let shown = format!("{imported:?}");
            assert!(private_members(input).iter().all(|text| !shown.contains(text)), "Debug shows a private part");
            publishable(imported.described.unwrap_or(ParsedJwk { public, kid: None, algorithm: None }));
        }
        Err(error) => says_nothing_private(input, &error),
    }
    match import_public(input) {
        Ok(keys) => {
            verdict = Verdict::Accepted;
            if let [key] = keys.as_slice() {
                same_members(input, &key.public);
            }
            keys.into_iter().for_each(publishable);
        }
        Err(error) => says_nothing_private(input, &error),
    }
    verdict
}

/// As PKCS#8, the form in which it is stored.
fn reads_back(material: &PrivateKeyMaterial) {
    let der = material.to_pkcs8_der().expect("what was imported can be encoded");
    let again = PrivateKeyMaterial::from_pkcs8_der(&der).expect("and read again");
    assert_eq!(again.public(), material.public());
}

/// What is accepted is strong, has one encoding, and shows nothing but public members when it is published.
fn publishable(key: ParsedJwk) {
    let kid = key.kid_or_thumbprint();
    let algorithms = key.public.algorithms();
    let algorithm = key.algorithm.or(algorithms.first().copied()).expect("an accepted key can serve an algorithm");
    assert!(key.public.fits(algorithm));
    Verifier::new(algorithm, &key.public).expect("aws-lc takes what is accepted");
    strong(&key.public, algorithm);
    let entry = PublishedEntry { kid: &kid, algorithm, public: &key.public };
    let document = jwks_document([entry].into_iter());
    let document = parse_strict(&document).expect("the published document is strict JSON");
    let published = document["keys"][0].as_object().expect("with one key");
    assert!(published.keys().all(|member| PUBLISHED.contains(&member.as_str())), "{published:?}");
    let again = parse_jwks(&document).expect("it is a JWK Set");
    assert_eq!(again, [Ok(ParsedJwk { public: key.public, kid: Some(kid), algorithm: Some(algorithm) })]);
}

fn strong(public: &PublicJwk, algorithm: Algorithm) {
    match (public.to_bytes().expect("accepted members are well formed"), algorithm) {
        (PublicBytes::Rsa { n, e }, _) => {
            assert!([256, 384, 512].contains(&n.len()) && n[0] & 0x80 != 0 && n[n.len() - 1] & 1 == 1);
            assert_eq!(e, [1, 0, 1]);
        }
        (PublicBytes::Ec { point, .. }, Algorithm::Es256) => assert_eq!((point.len(), point[0]), (65, 4)),
        (PublicBytes::Ec { point, .. }, Algorithm::Es384) => assert_eq!((point.len(), point[0]), (97, 4)),
        (PublicBytes::Ed25519(_), Algorithm::EdDsa { .. }) => {}
        (_, other) => panic!("{other} does not fit the key"),
    }
}

/// The public members of a JWK are taken over as they are; a modulus without leading zeros.
fn same_members(input: &[u8], public: &PublicJwk) {
    let Ok(Value::Object(given)) = parse_strict(input.trim_ascii()) else { return };
    let Ok(Value::Object(taken)) = serde_json::to_value(public) else { panic!("a public key is an object") };
    for (name, value) in taken.iter().filter(|(name, _)| given.contains_key(*name) && *name != "n") {
        assert_eq!(given[name], *value, "`{name}` of the JWK");
    }
}

fn says_nothing_private(input: &[u8], error: &MaterialError) {
    let message = error.to_string();
    assert_presentable(&message, 2048);
    let private = [private_members(input), lines_of_pem(input)].concat();
    let leaked = private.into_iter().find(|text| message.contains(text));
    assert_eq!(leaked, None, "a message shows a private part: {message}");
}

/// The values of a JWK's private members, where they stand nowhere else.
fn private_members(input: &[u8]) -> Vec<String> {
    let Ok(Value::Object(jwk)) = serde_json::from_slice::<Value>(input) else { return Vec::new() };
    let values = PRIVATE.iter().filter_map(|member| jwk.get(*member)?.as_str());
    only_once(input, values.filter(|value| value.len() >= 8))
}

/// Of each line of a PEM's content the beginning: a cut line is as bad as a whole one.
fn lines_of_pem(input: &[u8]) -> Vec<String> {
    let Ok(text) = std::str::from_utf8(input) else { return Vec::new() };
    if !text.contains("PRIVATE KEY") {
        return Vec::new();
    }
    let content = text.lines().filter(|line| !line.contains("-----")).filter_map(|line| line.get(..16));
    only_once(input, content.filter(|piece| piece.bytes().all(|byte| byte.is_ascii_graphic())))
}

fn only_once<'a>(input: &[u8], texts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let input = String::from_utf8_lossy(input);
    texts.filter(|text| input.matches(*text).count() == 1).map(str::to_owned).collect()
}
