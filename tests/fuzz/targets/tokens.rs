//! Tokens, as `jwksd verify` and `jwksd inspect` read them. An input is a token as it stands; or, where it begins with
//! `sign KID` and a line feed, a header and a payload on two further lines, which are signed with that key here: nothing
//! that is mutated would ever have a good signature.

use std::sync::LazyLock;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{DecodingKey, Validation};
use jwksd::backend::material::PrivateKeyMaterial;
use jwksd::backend::token::{Jws, decode, verify_token, weaknesses};
use jwksd::keyring::jwk::{Kid, ParsedJwk, PublicBytes};
use jwksd::keyring::time::{Span, Timestamp};
use serde_json::Value;

use super::{Verdict, assert_presentable};

const ISSUER: &str = "https://auth.example.com";
const AUDIENCE: &str = "https://api.example.com";
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

/// A published key, its private half, and how jsonwebtoken sees it.
struct Known {
    published: ParsedJwk,
    signer: Signer,
    theirs: DecodingKey,
    alg: jsonwebtoken::Algorithm,
}

enum Signer {
    Es256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rs256(RsaKeyPair),
}

static KNOWN: LazyLock<[Known; 3]> = LazyLock::new(|| {
    [
        Known::new("es", "ES256", include_bytes!("../../vectors/keys/p256-pkcs8.pem")),
        Known::new("ed", "EdDSA", include_bytes!("../../vectors/keys/ed25519-pkcs8.pem")),
        Known::new("rs", "RS256", include_bytes!("../../vectors/keys/rsa2048-pkcs8.pem")),
    ]
});

static PUBLISHED: LazyLock<Vec<ParsedJwk>> =
    LazyLock::new(|| KNOWN.iter().map(|known| known.published.clone()).collect());

impl Known {
    fn new(kid: &str, alg: &str, pem: &[u8]) -> Self {
        let material = PrivateKeyMaterial::import(pem).expect("a vector").material;
        let der = material.to_pkcs8_der().expect("it can be encoded");
        let signer = match alg {
            "ES256" => {
                let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der).expect("a P-256 key");
                Signer::Es256(pair)
            }
            "EdDSA" => Signer::Ed25519(Ed25519KeyPair::from_pkcs8(&der).expect("an Ed25519 key")),
            _ => Signer::Rs256(RsaKeyPair::from_pkcs8(&der).expect("an RSA key")),
        };
        let public = material.public();
        let theirs = match public.to_bytes().expect("a sound key") {
            PublicBytes::Ec { point, .. } => DecodingKey::from_ec_der(&point),
            PublicBytes::Ed25519(point) => DecodingKey::from_ed_der(&point),
            PublicBytes::Rsa { n, e } => DecodingKey::from_rsa_raw_components(&n, &e),
        };
        let algorithm = public.algorithm_named(alg);
        let kid = Some(Kid::parse(kid).expect("a kid"));
        let published = ParsedJwk { public: public.clone(), kid, algorithm };
        Known { published, signer, theirs, alg: alg.parse().expect("an algorithm of jsonwebtoken") }
    }

    fn kid(&self) -> &str {
        self.published.kid.as_ref().map_or("", Kid::as_str)
    }

    fn sign(&self, header: &[u8], payload: &[u8]) -> String {
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let (message, random) = (input.as_bytes(), SystemRandom::new());
        let signature = match &self.signer {
            Signer::Es256(pair) => pair.sign(&random, message).expect("it signs").as_ref().to_vec(),
            Signer::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
            Signer::Rs256(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).expect("it signs");
                signature
            }
        };
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

pub fn run(input: &[u8]) -> Verdict {
    match to_be_signed(input) {
        Some((known, header, payload)) => judge(&known.sign(header, payload)),
        None => std::str::from_utf8(input).map_or(Verdict::Refused, judge),
    }
}

fn to_be_signed(input: &[u8]) -> Option<(&'static Known, &[u8], &[u8])> {
    let mut lines = input.strip_prefix(b"sign ")?.splitn(3, |byte| *byte == b'\n');
    let (kid, header, payload) = (lines.next()?, lines.next()?, lines.next()?);
    let known = KNOWN.iter().find(|known| known.kid().as_bytes() == kid)?;
    Some((known, header, payload.strip_suffix(b"\n").unwrap_or(payload)))
}

fn judge(token: &str) -> Verdict {
    inspecting_is_total(token);
    let verified = verify_token(token, &PUBLISHED, NOW, ISSUER, Some(AUDIENCE), Span::ZERO);
    match verified {
        Err(error) => {
            assert_presentable(&error.to_string(), 2048);
            Verdict::Refused
        }
        Ok(claims) => {
            let jws = Jws::parse(token).expect("a verified token can be taken apart");
            let kid = jws.header["kid"].as_str().expect("a verified token names its key");
            let known = KNOWN.iter().find(|known| known.kid() == kid).expect("and the key is published");
            let published = known.published.algorithm.expect("with its algorithm");
            assert_eq!(jws.header["alg"], published.alg(), "only the key's own algorithm verifies");
            jsonwebtoken_accepts(token, known, &claims);
            Verdict::Accepted
        }
    }
}

fn inspecting_is_total(token: &str) {
    match decode(token) {
        Err(error) => assert_presentable(&error.to_string(), 2048),
        Ok(decoded) => {
            for weakness in weaknesses(&decoded, NOW) {
                assert_presentable(&weakness.to_string(), 64 * 1024);
            }
        }
    }
}

/// The same key and rules in a foreign implementation. It asks the system for the time, so that is compared here.
fn jsonwebtoken_accepts(token: &str, known: &Known, ours: &serde_json::Map<String, Value>) {
    let mut rules = Validation::new(known.alg);
    rules.leeway = 0;
    rules.validate_exp = false;
    rules.validate_nbf = false;
    rules.set_audience(&[AUDIENCE]);
    rules.set_issuer(&[ISSUER]);
    rules.set_required_spec_claims(&["iss", "aud"]);
    match jsonwebtoken::decode::<serde_json::Map<String, Value>>(token, &known.theirs, &rules) {
        Ok(theirs) => assert_eq!(theirs.claims, *ours, "both read the same claims"),
        // It wants a certain type of members that say nothing about validity (`typ`, `url`, `zip`): the signature it is.
        Err(error) if matches!(error.kind(), ErrorKind::Json(_)) => {
            let (message, signature) = token.rsplit_once('.').expect("a token has dots");
            let verified = jsonwebtoken::crypto::verify(signature, message.as_bytes(), &known.theirs, known.alg);
            assert!(verified.is_ok_and(|verified| verified), "verified, but jsonwebtoken does not: {token}");
        }
        Err(error) => panic!("verified, but jsonwebtoken refuses it: {error}: {token}"),
    }
    assert_eq!(ours["iss"], ISSUER);
    let named = ours["aud"].as_array().is_some_and(|several| several.iter().any(|one| one == AUDIENCE));
    assert!(named || ours["aud"] == AUDIENCE, "{}", ours["aud"]);
    let now = NOW.as_secs() as f64;
    assert!(ours["exp"].as_f64().is_some_and(|exp| exp > now), "expired");
    assert!(ours.get("nbf").is_none_or(|nbf| nbf.as_f64().is_some_and(|nbf| nbf <= now)), "not yet valid");
}
