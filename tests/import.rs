//! Keys as OpenSSL and others write them: read where they are sound, refused with advice where they are not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy sees only #[test] functions as tests")]

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jwksd::backend::material::{MAX_IMPORT_BYTES, MaterialError, PrivateKeyMaterial, import_public};
use jwksd::keyring::algorithm::{Algorithm, RsaBits};
use jwksd::keyring::jwk::{PublicBytes, PublicJwk};
use serde_json::{Value, json};

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/vectors/keys/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn private(input: &[u8]) -> PublicJwk {
    PrivateKeyMaterial::import(input).unwrap().material.public().clone()
}

fn private_refusal(input: &[u8]) -> String {
    PrivateKeyMaterial::import(input).unwrap_err().to_string()
}

fn public(input: &[u8]) -> PublicJwk {
    let keys = import_public(input).unwrap();
    assert_eq!(keys.len(), 1);
    keys[0].public.clone()
}

fn public_refusal(input: &[u8]) -> String {
    import_public(input).unwrap_err().to_string()
}

fn rfc(path: &str) -> Value {
    let text = include_str!("vectors/jwk.json");
    serde_json::from_str::<Value>(text).unwrap().pointer(path).unwrap().clone()
}

fn jwk(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[test]
fn a_damaged_line_does_not_make_a_label_of_the_key() {
    let key = String::from_utf8(file("p256-sec1.pem")).unwrap();
    let key = &key[key.find("-----BEGIN EC PRIVATE").unwrap()..];
    let secret: String = key.lines().nth(1).unwrap().chars().take(12).collect();
    for damage in ["KEY----\n", "KEY\n", "KEY ", "KEY\r"] {
        let damaged = key.replacen("KEY-----\n", damage, 1);
        for input in [damaged.clone(), damaged + key] {
            let message = private_refusal(input.as_bytes());
            assert!(!message.contains(&secret), "{message}");
        }
    }
}

/// Rewrites the DER inside a PEM file.
fn edited(name: &str, edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let text = String::from_utf8(file(name)).unwrap();
    let mut lines = text.lines();
    let (begin, end) = (lines.next().unwrap(), lines.next_back().unwrap());
    let mut der = STANDARD.decode(lines.collect::<String>()).unwrap();
    edit(&mut der);
    format!("{begin}\n{}\n{end}\n", STANDARD.encode(der)).into_bytes()
}

#[test]
fn every_encoding_of_one_key_gives_the_same_key() {
    for (expected, others) in [
        ("p256-spki.pem", &["p256-pkcs8.pem", "p256-sec1.pem"][..]),
        ("p384-spki.pem", &["p384-pkcs8.pem", "p384-sec1.pem"]),
        ("ed25519-spki.pem", &["ed25519-pkcs8.pem"]),
        ("rsa2048-spki.pem", &["rsa2048-pkcs8.pem", "rsa2048-pkcs1.pem"]),
    ] {
        let expected = public(&file(expected));
        for name in others {
            assert_eq!(private(&file(name)), expected, "{name}");
        }
    }
    assert_eq!(public(&file("p256-spki-compressed.pem")), public(&file("p256-spki.pem")));
    assert_eq!(public(&file("rsa2048-pkcs1-public.pem")), public(&file("rsa2048-spki.pem")));
    assert!(private(&file("rsa2048-pss-pkcs8.pem")).fits(Algorithm::Ps256 { rsa_bits: RsaBits::B2048 }));
}

#[test]
fn line_ends_and_surrounding_white_space_do_not_matter() {
    let text = String::from_utf8(file("p256-pkcs8.pem")).unwrap();
    let expected = private(text.as_bytes());
    assert_eq!(private(text.replace('\n', "\r\n").as_bytes()), expected);
    assert_eq!(private(format!("\n\n {text}\n\n").as_bytes()), expected);
}

#[test]
fn what_openssl_writes_reads_back_from_our_own_encoding() {
    for name in ["p256-pkcs8.pem", "p384-sec1.pem", "rsa2048-pkcs1.pem", "ed25519-pkcs8.pem"] {
        let material = PrivateKeyMaterial::import(&file(name)).unwrap().material;
        let again = PrivateKeyMaterial::from_pkcs8_der(&material.to_pkcs8_der().unwrap()).unwrap();
        assert_eq!(again.public(), material.public());
    }
}

#[test]
fn the_jsonwebkey_crate_agrees_on_the_same_key() {
    for pointer in ["/rfc7515/a3/jwk", "/rfc7515/a2/jwk"] {
        let key: jsonwebkey::Key = serde_json::from_value(rfc(pointer)).unwrap();
        assert_eq!(private(key.to_pem().as_bytes()), private(&jwk(&rfc(pointer))));
        assert_eq!(public(key.to_public().unwrap().to_pem().as_bytes()), private(&jwk(&rfc(pointer))));
    }
}

#[test]
fn private_keys_that_cannot_be_used_are_refused_with_advice() {
    for (name, message) in [
        ("P-521-pkcs8.pem", "curve is P-521"),
        ("P-521-sec1.pem", "curve is P-521"),
        ("secp256k1-pkcs8.pem", "curve is secp256k1"),
        ("secp256k1-sec1.pem", "curve is secp256k1"),
        ("p256-explicit.pem", "named curve"),
        ("x25519-pkcs8.pem", "algorithm is X25519"),
        ("ed448-pkcs8.pem", "algorithm is Ed448"),
        ("rsa1024-pkcs8.pem", "1024 bits"),
        ("rsa2048-e3-pkcs8.pem", "65537"),
        ("rsa2048-three-primes.pem", "more than two primes"),
        ("p256-encrypted-pkcs8.pem", "decrypt it first with `openssl pkey"),
        ("p256-encrypted-sec1.pem", "decrypt it first with `openssl pkey"),
        ("p256-with-parameters.pem", "2 PEM blocks (EC PARAMETERS, EC PRIVATE KEY)"),
        ("certificate.pem", "openssl x509"),
        ("p256-spki.pem", "public-only key"),
    ] {
        let refusal = private_refusal(&file(name));
        assert!(refusal.contains(message), "{name}: {refusal}");
    }
}

#[test]
fn public_keys_that_cannot_be_used_are_refused_with_advice() {
    for (name, message) in [
        ("P-521-spki.pem", "curve is P-521"),
        ("secp256k1-spki.pem", "curve is secp256k1"),
        ("certificate.pem", "openssl x509"),
        ("p256-pkcs8.pem", "-pubout"),
        ("p256-sec1.pem", "-pubout"),
    ] {
        let refusal = public_refusal(&file(name));
        assert!(refusal.contains(message), "{name}: {refusal}");
    }
    let set = json!({"keys": [rfc("/rfc7517/a1/keys/1"), {"kty": "oct", "k": "AAAA"}]});
    assert!(public_refusal(&jwk(&set)).contains("key 2 of the JWK Set"));
    assert!(public_refusal(&jwk(&rfc("/rfc7517/a2/keys/1"))).contains("private member \"d\""));
    assert!(public_refusal(br#"{"kty":"EC","kty":"RSA"}"#).contains("twice"));
}

#[test]
fn files_that_are_no_single_key_are_refused_with_advice() {
    let pem = String::from_utf8(file("p256-pkcs8.pem")).unwrap();
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    for (input, message) in [
        (String::new(), "neither PEM nor a JWK"),
        ("hello".into(), "neither PEM nor a JWK"),
        (body.clone(), "neither PEM nor a JWK"),
        (format!("{pem}{pem}"), "2 PEM blocks"),
        (format!("{pem}garbage"), "text follows it"),
        (format!("Bag Attributes\n{pem}"), "text before"),
        (pem.replace("END PRIVATE", "END PUBLIC"), "does not match"),
        (pem.lines().take(2).collect(), "-----END … is missing"),
        (pem.replacen('M', "!", 2), "not base64"),
        ("-----BEGIN X".into(), "incomplete"),
        ("{".into(), "at line 1"),
        ("{}".into(), "\"kty\""),
        (r#"{"keys":[]}"#.into(), "one at a time"),
        ("[]".into(), "neither PEM nor a JWK"),
    ] {
        let refusal = private_refusal(input.as_bytes());
        assert!(refusal.contains(message), "{input}: {refusal}");
    }
    assert_eq!(PrivateKeyMaterial::import(&vec![b' '; MAX_IMPORT_BYTES + 1]).unwrap_err(), MaterialError::TooLong);
    assert_eq!(import_public(&vec![b'{'; MAX_IMPORT_BYTES + 1]).unwrap_err(), MaterialError::TooLong);
    assert_eq!(PrivateKeyMaterial::import(b"\xff\xfe").unwrap_err(), MaterialError::UnknownFormat);
    let der = STANDARD.decode(body).unwrap();
    assert!(private_refusal(&der).contains("neither PEM nor a JWK"));
}

#[test]
fn bytes_after_the_key_inside_the_pem_are_refused() {
    for name in ["p256-pkcs8.pem", "p256-sec1.pem", "rsa2048-pkcs1.pem", "rsa2048-pkcs8.pem", "ed25519-pkcs8.pem"] {
        private_refusal(&edited(name, |der| der.push(0)));
        private_refusal(&edited(name, |der| der.truncate(der.len() - 1)));
    }
    for name in ["p256-spki.pem", "rsa2048-spki.pem", "rsa2048-pkcs1-public.pem", "ed25519-spki.pem"] {
        public_refusal(&edited(name, |der| der.push(0)));
    }
}

#[test]
fn a_private_scalar_that_does_not_belong_to_the_point_is_refused() {
    // The scalar stands at a fixed place in these encodings.
    for (name, at) in [("p256-pkcs8.pem", 36 + 10), ("p256-sec1.pem", 7 + 10), ("p384-sec1.pem", 8 + 10)] {
        let refusal = private_refusal(&edited(name, |der| der[at] ^= 1));
        assert!(refusal.contains("do not belong together"), "{name}: {refusal}");
    }
    for pointer in ["/rfc7515/a3/jwk", "/rfc8037/a1"] {
        let mut key = rfc(pointer);
        key["d"] = URL_SAFE_NO_PAD.encode([5; 32]).into();
        assert!(private_refusal(&jwk(&key)).contains("does not belong to the public members"));
    }
}

#[test]
fn a_public_key_stated_beside_the_private_one_must_be_its_own() {
    use p256::pkcs8::PrivateKeyInfoRef;
    use p256::pkcs8::der::{Encode, asn1::BitStringRef};
    for algorithm in [Algorithm::Es256, Algorithm::Es384, Algorithm::EdDsa { label: Default::default() }] {
        let [own, other] = [(); 2].map(|()| PrivateKeyMaterial::generate(algorithm).unwrap());
        let der = own.to_pkcs8_der().unwrap();
        for (stated, accepted) in [(&own, true), (&other, false)] {
            let stated = match stated.public().to_bytes().unwrap() {
                PublicBytes::Ec { point, .. } => point,
                PublicBytes::Ed25519(point) => point.to_vec(),
                PublicBytes::Rsa { .. } => unreachable!("no RSA key is made here"),
            };
            let mut info = PrivateKeyInfoRef::try_from(der.as_slice()).unwrap();
            info.public_key = Some(BitStringRef::from_bytes(&stated).unwrap());
            let result = PrivateKeyMaterial::from_pkcs8_der(&info.to_der().unwrap());
            assert_eq!(result.is_ok(), accepted, "{algorithm}");
        }
    }
}

#[test]
fn no_changed_byte_of_an_rsa_key_goes_unnoticed() {
    let mut der_len = 0;
    edited("rsa2048-pkcs1.pem", |der| der_len = der.len());
    for at in (0..der_len).step_by(7) {
        private_refusal(&edited("rsa2048-pkcs1.pem", |der| der[at] ^= 0x10));
    }
    for member in ["n", "d", "p", "q", "dp", "dq", "qi"] {
        let mut key = rfc("/rfc7517/a2/keys/1");
        let mut bytes = URL_SAFE_NO_PAD.decode(key[member].as_str().unwrap()).unwrap();
        bytes[50] ^= 1;
        key[member] = URL_SAFE_NO_PAD.encode(bytes).into();
        private_refusal(&jwk(&key));
    }
}

#[test]
fn malformed_private_members_are_not_taken_for_absent_ones() {
    for (pointer, members) in [
        ("/rfc7515/a3/jwk", &["d"][..]),
        ("/rfc8037/a1", &["d"]),
        ("/rfc7515/a2/jwk", &["d", "p", "q", "dp", "dq", "qi"]),
    ] {
        for member in members {
            for value in
                [json!("!"), json!(""), json!(7), json!(null), json!(["AA"]), json!("AA=="), json!("A".repeat(60_000))]
            {
                let mut key = rfc(pointer);
                key[*member] = value.clone();
                private_refusal(&jwk(&key));
            }
            let mut key = rfc(pointer);
            key.as_object_mut().unwrap().remove(*member);
            private_refusal(&jwk(&key));
        }
    }
    let zero = json!({"kty": "EC", "crv": "P-256", "d": "A".repeat(43), "x": rfc("/rfc7515/a3/jwk/x"), "y": rfc("/rfc7515/a3/jwk/y")});
    private_refusal(&jwk(&zero));
}

#[test]
fn a_private_jwk_of_each_kind_is_read_with_its_kid_and_alg() {
    let p384 = private(&file("p384-pkcs8.pem"));
    let scalar = STANDARD
        .decode(
            String::from_utf8(file("p384-sec1.pem"))
                .unwrap()
                .lines()
                .filter(|l| !l.starts_with('-'))
                .collect::<String>(),
        )
        .unwrap()[8..56]
        .to_vec();
    let mut p384_jwk = serde_json::to_value(&p384).unwrap();
    p384_jwk["d"] = URL_SAFE_NO_PAD.encode(scalar).into();
    for (mut key, alg) in [
        (rfc("/rfc7515/a3/jwk"), "ES256"),
        (p384_jwk, "ES384"),
        (rfc("/rfc7515/a2/jwk"), "PS256"),
        (rfc("/rfc8037/a1"), "Ed25519"),
    ] {
        key["kid"] = "my key".into();
        key["alg"] = alg.into();
        key["use"] = "sig".into();
        key["key_ops"] = json!(["sign", "verify"]);
        let described = PrivateKeyMaterial::import(&jwk(&key)).unwrap().described.unwrap();
        assert_eq!(described.kid.unwrap().as_str(), "my key");
        assert_eq!(described.algorithm.unwrap().alg(), alg);
        for (member, value) in [
            ("alg", json!("HS256")),
            ("use", json!("enc")),
            ("key_ops", json!(["verify"])),
            ("kid", json!("\u{1}")),
            ("oth", json!([])),
        ] {
            let mut changed = key.clone();
            changed[member] = value;
            private_refusal(&jwk(&changed));
        }
    }
}

#[test]
fn primes_too_close_together_are_refused() {
    // Two 1024-bit primes whose first 96 bits agree, found with a search from a common start.
    let key = rfc("/own/close-primes");
    let refusal = private_refusal(&jwk(&key));
    assert!(refusal.contains("so close"), "{refusal}");
}

#[test]
fn no_message_or_debug_output_shows_a_secret() {
    let secret = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    let good = rfc("/rfc8037/a1");
    let imported = PrivateKeyMaterial::import(&jwk(&good)).unwrap();
    assert!(!format!("{imported:?}").contains(&secret[..12]));
    for (member, value) in [
        ("d", json!([secret])),
        ("d", json!({"x": secret})),
        ("d", json!(format!("{secret}{secret}"))),
        ("x", json!(secret)),
        ("key_ops", json!(secret)),
    ] {
        let mut key = good.clone();
        key[member] = value;
        let error = PrivateKeyMaterial::import(&jwk(&key)).unwrap_err();
        assert!(!format!("{error} {error:?}").contains(&secret[..12]), "{error:?}");
    }
    for name in ["p256-pkcs8.pem", "rsa2048-pkcs8.pem"] {
        let debug = format!("{:?}", PrivateKeyMaterial::import(&file(name)).unwrap().material);
        let public = format!("PrivateKeyMaterial {{ public: {:?}, .. }}", private(&file(name)));
        assert_eq!(debug, public);
    }
}

#[test]
fn no_truncation_of_any_key_panics() {
    for name in ["p256-pkcs8.pem", "p384-sec1.pem", "ed25519-pkcs8.pem", "p256-spki.pem", "rsa2048-pkcs1-public.pem"] {
        let text = file(name);
        for len in 0..text.len() {
            let _ = PrivateKeyMaterial::import(&text[..len]);
            let _ = import_public(&text[..len]);
        }
        let lines: String = String::from_utf8(text).unwrap().lines().filter(|line| !line.starts_with('-')).collect();
        let der_len = STANDARD.decode(lines).unwrap().len();
        for at in 0..der_len {
            for bit in [1, 0x80] {
                let changed = edited(name, |der| der[at] ^= bit);
                let _ = PrivateKeyMaterial::import(&changed);
                let _ = import_public(&changed);
            }
        }
    }
}
