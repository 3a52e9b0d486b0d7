//! Tokens that no verifier may accept, each made from one that every verifier does accept.

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// A token and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Forgery {
    pub what: &'static str,
    pub token: String,
}

/// Somebody with a key pair of the right kind that the issuer never published.
pub struct Stranger {
    alg: String,
    key: PrivateKey,
}

enum PrivateKey {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Stranger {
    pub fn new(alg: &str) -> Self {
        let key = match alg {
            "ES256" => PrivateKey::Ecdsa(ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING)),
            "ES384" => PrivateKey::Ecdsa(ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING)),
            "RS256" | "PS256" => PrivateKey::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key")),
            "EdDSA" => PrivateKey::Ed25519(Ed25519KeyPair::generate().expect("a key")),
            _ => panic!("no stranger knows {alg}"),
        };
        Stranger { alg: alg.to_owned(), key }
    }

    /// Every forgery of `token`, a valid one signed by the key whose published entry is `jwk`, while the document
    /// also holds `other_kid`.
    pub fn forgeries(&self, token: &str, jwk: &Value, other_kid: &str) -> Vec<Forgery> {
        let parts = Parts::of(token);
        let with = |changes: Value| merged(&parts.header, changes);
        let unsigned = |header: &Value, claims: &Value| format!("{}.{}", encode(header), encode(claims));
        let signed = |header: &Value| {
            let message = unsigned(header, &parts.claims);
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes())))
        };
        let keep_signature =
            |header: &Value, claims: &Value| format!("{}.{}", unsigned(header, claims), parts.signature);
        let hs256 = |secret: &[u8]| {
            let message = unsigned(&with(json!({"alg": "HS256"})), &parts.claims);
            let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message.as_bytes());
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(tag))
        };
        let later = parts.claims["exp"].as_u64().expect("exp is a number") + 3600;
        let none = unsigned(&with(json!({"alg": "none"})), &parts.claims);
        let raw = URL_SAFE_NO_PAD.decode(&parts.signature).expect("a signature is base64url");
        let with_signature = |bytes: &[u8]| {
            format!("{}.{}", token.rsplit_once('.').expect("three parts").0, URL_SAFE_NO_PAD.encode(bytes))
        };
        let mut flipped = raw.clone();
        flipped[raw.len() / 2] ^= 1;
        [
            ("alg none without a signature", format!("{none}.")),
            ("alg none with the signature kept", format!("{none}.{}", parts.signature)),
            ("alg nOnE", unsigned(&with(json!({"alg": "nOnE"})), &parts.claims) + "."),
            ("HS256 with the public key as PEM for a secret", hs256(pem(jwk).as_bytes())),
            ("HS256 with the public key as DER for a secret", hs256(&spki(jwk))),
            ("HS256 with the public key as JWK for a secret", hs256(jwk.to_string().as_bytes())),
            ("another published kid", keep_signature(&with(json!({"kid": other_kid})), &parts.claims)),
            ("sub altered", keep_signature(&parts.header, &merged(&parts.claims, json!({"sub": "root"})))),
            ("exp altered", keep_signature(&parts.header, &merged(&parts.claims, json!({"exp": later})))),
            ("one bit of the signature altered", with_signature(&flipped)),
            ("signature of zeros", with_signature(&vec![0; raw.len()])),
            ("signature cut short", with_signature(&raw[..raw.len() - 1])),
            ("signature missing", with_signature(&[])),
            ("a stranger's key under the kid of the active one", signed(&parts.header)),
            ("a stranger's key under an unknown kid", signed(&with(json!({"kid": "c3RyYW5nZXI"})))),
            ("a stranger's key without a kid", signed(&with(json!({"kid": null})))),
            ("a stranger's key brought along as jwk", signed(&with(json!({"jwk": self.jwk(), "kid": null})))),
        ]
        .map(|(what, token)| Forgery { what, token })
        .into()
    }

    /// One of the forgeries, another one for each number.
    pub fn forgery(&self, nth: usize, token: &str, jwk: &Value, other_kid: &str) -> Forgery {
        let forgeries = self.forgeries(token, jwk, other_kid);
        forgeries[nth % forgeries.len()].clone()
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.key {
            PrivateKey::Ecdsa(key) => key.sign(&random, message).expect("it signs").as_ref().to_vec(),
            PrivateKey::Ed25519(key) => key.sign(message).as_ref().to_vec(),
            PrivateKey::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                let padding: &dyn signature::RsaEncoding =
                    if self.alg == "PS256" { &signature::RSA_PSS_SHA256 } else { &signature::RSA_PKCS1_SHA256 };
                key.sign(padding, &random, message, &mut signature).expect("it signs");
                signature
            }
        }
    }

    fn jwk(&self) -> Value {
        let mut jwk = match &self.key {
            PrivateKey::Ecdsa(key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(key.public_key().as_ref().len() / 2);
                let crv = if self.alg == "ES256" { "P-256" } else { "P-384" };
                json!({"kty": "EC", "crv": crv, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)})
            }
            PrivateKey::Ed25519(key) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key.public_key().as_ref())})
            }
            PrivateKey::Rsa(key) => {
                let (n, e) = (key.public_key().modulus(), key.public_key().exponent());
                let number = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
                json!({
                    "kty": "RSA",
                    "n": number(n.big_endian_without_leading_zero()),
                    "e": number(e.big_endian_without_leading_zero()),
                })
            }
        };
        jwk["alg"] = self.alg.as_str().into();
        jwk
    }
}

/// A compact JWS, decoded.
struct Parts {
    header: Value,
    claims: Value,
    signature: String,
}

impl Parts {
    fn of(token: &str) -> Self {
        let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            panic!("a token has three parts")
        };
        let object = |part| {
            let bytes = URL_SAFE_NO_PAD.decode(part).expect("a part is base64url");
            serde_json::from_slice(&bytes).expect("a part is JSON")
        };
        Parts { header: object(header), claims: object(claims), signature: signature.to_owned() }
    }
}

/// `value` with members replaced; null removes one.
fn merged(value: &Value, changes: Value) -> Value {
    let mut value = value.clone();
    let members = value.as_object_mut().expect("an object");
    for (name, change) in changes.as_object().expect("an object") {
        match change {
            Value::Null => members.remove(name),
            _ => members.insert(name.clone(), change.clone()),
        };
    }
    value
}

fn encode(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn ecdsa(algorithm: &'static signature::EcdsaSigningAlgorithm) -> EcdsaKeyPair {
    EcdsaKeyPair::generate(algorithm).expect("a key")
}

/// The SubjectPublicKeyInfo of a published key.
fn spki(jwk: &Value) -> Vec<u8> {
    use p256::pkcs8::EncodePublicKey as _;
    let member = |name: &str| {
        URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap_or_default()).expect("a member of a JWK is base64url")
    };
    let der = match jwk["crv"].as_str() {
        Some("P-256") => p256::PublicKey::from_sec1_bytes(&[vec![4], member("x"), member("y")].concat())
            .expect("a point")
            .to_public_key_der(),
        Some("P-384") => p384::PublicKey::from_sec1_bytes(&[vec![4], member("x"), member("y")].concat())
            .expect("a point")
            .to_public_key_der(),
        Some("Ed25519") => {
            let bytes = member("x").try_into().expect("32 bytes");
            ed25519_dalek::VerifyingKey::from_bytes(&bytes).expect("a point").to_public_key_der()
        }
        _ => {
            let number = |name| rsa::BoxedUint::from_be_slice_vartime(&member(name));
            rsa::RsaPublicKey::new(number("n"), number("e")).expect("an RSA key").to_public_key_der()
        }
    };
    der.expect("a public key has a DER form").into_vec()
}

fn pem(jwk: &Value) -> String {
    let base64 = STANDARD.encode(spki(jwk));
    let lines: Vec<_> = base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
}
