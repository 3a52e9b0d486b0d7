//! The cluster's keys, and tokens as its API server makes them for pods.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use aws_lc_rs::{hmac, signature};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::support::unix_now;

pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

pub struct ClusterKey {
    pub kid: String,
    key: RsaKeyPair,
}

impl ClusterKey {
    pub fn new(kid: &str) -> Self {
        ClusterKey { kid: kid.to_owned(), key: RsaKeyPair::generate(KeySize::Rsa2048).unwrap() }
    }

    /// As the API server publishes it.
    pub fn jwk(&self) -> Value {
        self.jwk_as(&self.kid)
    }

    pub fn jwk_as(&self, kid: &str) -> Value {
        let public = self.key.public_key();
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let (n, e) = (public.modulus(), public.exponent());
        json!({
            "use": "sig", "kty": "RSA", "kid": kid, "alg": "RS256",
            "n": text(n.big_endian_without_leading_zero()), "e": text(e.big_endian_without_leading_zero()),
        })
    }

    pub fn token(&self, claims: &Value) -> String {
        self.token_as(&self.kid, claims)
    }

    /// Signed by this key, and saying that it was another.
    pub fn token_as(&self, kid: &str, claims: &Value) -> String {
        let input = signing_input(&json!({ "alg": "RS256", "kid": kid }), claims);
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), input.as_bytes(), &mut signature).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// RFC 8725 §2.1: the public key as the secret of an HMAC.
    pub fn hmac_token(&self, claims: &Value) -> String {
        let input = signing_input(&json!({ "alg": "HS256", "kid": self.kid }), claims);
        let secret = hmac::Key::new(hmac::HMAC_SHA256, self.key.public_key().as_ref());
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(hmac::sign(&secret, input.as_bytes())))
    }

    pub fn unsigned_token(&self, claims: &Value) -> String {
        format!("{}.", signing_input(&json!({ "alg": "none", "kid": self.kid }), claims))
    }

    /// Signed by this key in another way than it is published for.
    pub fn pss_token(&self, claims: &Value) -> String {
        let input = signing_input(&json!({ "alg": "PS256", "kid": self.kid }), claims);
        let mut signature = vec![0; self.key.public_modulus_len()];
        let rng = SystemRandom::new();
        self.key.sign(&signature::RSA_PSS_SHA256, &rng, input.as_bytes(), &mut signature).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn signing_input(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// What a projected token of this service account says, for ten minutes from now.
pub fn claims(namespace: &str, name: &str) -> Value {
    let now = unix_now().as_secs();
    json!({
        "iss": ISSUER, "aud": ["jwksd"], "sub": format!("system:serviceaccount:{namespace}:{name}"),
        "iat": now, "nbf": now, "exp": now + 600, "jti": "0f1d0a2e-1d40-4d9a-a8a9-1c9f0a3ee0c1",
        "kubernetes.io": {
            "namespace": namespace, "node": { "name": "node-1", "uid": "b3f1" }, "pod": { "name": "pod-1", "uid": "c7a2" },
            "serviceaccount": { "name": name, "uid": "a1b2" },
        },
    })
}

/// The same with one claim changed; `null` takes it away.
pub fn with(mut claims: Value, name: &str, value: Value) -> Value {
    match value {
        Value::Null => _ = claims.as_object_mut().unwrap().remove(name),
        value => claims[name] = value,
    }
    claims
}
