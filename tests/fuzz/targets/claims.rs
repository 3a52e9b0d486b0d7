//! Sign requests: a line that chooses the keyset's rules and the client's audiences (three hex digits or none), then the body.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use jwksd::keyring::claims::{
    MAX_AUDIENCES, MAX_DEPTH, MAX_JTI_CHARS, MAX_MEMBERS, MAX_PAYLOAD_BYTES, Prepared, TokenRules, parse_request,
};
use jwksd::keyring::json::parse_strict;
use jwksd::keyring::policy::TokenPolicy;
use jwksd::keyring::time::{Span, Timestamp};
use serde_json::{Map, Value};

use super::{Verdict, assert_presentable};

const ISSUER: &str = "https://auth.example.com/tenant-a";
const JTI: &str = "018f3c1e-0000-7000-8000-000000000000";
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_750);
const AUDIENCES: [&str; 2] = ["https://api.example.com", "b"];

/// A keyset's policy with what may be missing from it, by the bits of a number.
struct Rules {
    policy: TokenPolicy,
    rules: TokenRules,
    client: Option<Vec<String>>,
}

static RULES: LazyLock<Vec<Rules>> = LazyLock::new(|| (0..64).map(Rules::new).collect());

impl Rules {
    fn new(choice: usize) -> Self {
        let chosen = |bit: usize| choice >> bit & 1 == 1;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let policy = TokenPolicy {
            max_ttl: Span::MINUTE.times(15),
            default_ttl: Span::MINUTE.times(5),
            required_claims: if chosen(0) { words(&["aud", "sub", "jti", "iss"]) } else { Vec::new() },
            forbidden_claims: if chosen(1) { words(&["password", "ssn", "Straße", "key"]) } else { Vec::new() },
            audiences: if chosen(2) { words(&AUDIENCES) } else { Vec::new() },
            types: if chosen(3) { words(&["application/at+jwt", "JWT"]) } else { words(&["JWT", "at+jwt"]) },
            backdate: if chosen(4) { Span::MINUTE } else { Span::ZERO },
        };
        let client = chosen(5).then(|| words(&AUDIENCES[1..]));
        Rules { rules: TokenRules::new(ISSUER, &policy), policy, client }
    }
}

pub fn run(input: &[u8]) -> Verdict {
    let at = input.iter().position(|byte| *byte == b'\n').filter(|at| *at <= 3);
    let choice = at.and_then(|at| std::str::from_utf8(&input[..at]).ok());
    let choice = choice.and_then(|hex| usize::from_str_radix(hex, 16).ok());
    let body = at.filter(|_| choice.is_some()).map_or(input, |at| &input[at + 1..]);
    let rules = &RULES[choice.unwrap_or(0) % RULES.len()];
    let request = match parse_request(body) {
        Ok(request) => request,
        Err(error) => {
            assert_presentable(&error.to_string(), 2048);
            return Verdict::Refused;
        }
    };
    match rules.rules.issue(&request, NOW, JTI, rules.client.as_deref()) {
        Ok(prepared) => {
            what_is_issued_keeps_the_rules(body, rules, &prepared);
            Verdict::Accepted
        }
        Err(error) => {
            assert_presentable(&error.to_string(), 8 * 1024);
            Verdict::Refused
        }
    }
}

fn what_is_issued_keeps_the_rules(body: &[u8], rules: &Rules, prepared: &Prepared) {
    assert!(prepared.payload.len() <= MAX_PAYLOAD_BYTES);
    // No member stands twice in the request or in the payload: the strict reader says so.
    let request = parse_strict(body).expect("an accepted request is strict JSON");
    let Ok(Value::Object(payload)) = parse_strict(&prepared.payload) else {
        panic!("the payload is no strict JSON object: {}", String::from_utf8_lossy(&prepared.payload))
    };
    let asked = request["claims"].as_object().expect("claims are an object");
    the_daemons_claims_are_its_own(asked, &payload, &rules.policy, prepared);
    callers_claims_are_as_given(asked, &payload);
    let mut members = 0;
    no_forbidden_member(&Value::Object(asked.clone()), &rules.policy, &mut members, 1);
    assert!(members <= MAX_MEMBERS);
    audiences_are_allowed(&payload, rules);
    for claim in &rules.policy.required_claims {
        assert!(payload.get(claim).is_some_and(|value| !value.is_null()), "`{claim}` is required");
    }
    let typ = rules.rules.types().nth(prepared.typ).expect("the type is one of the keyset's");
    if typ.ends_with("at+jwt") {
        assert!(["sub", "aud", "client_id"].iter().all(|claim| payload.contains_key(*claim)), "RFC 9068 §2.2");
    }
}

fn the_daemons_claims_are_its_own(
    asked: &Map<String, Value>,
    payload: &Map<String, Value>,
    policy: &TokenPolicy,
    prepared: &Prepared,
) {
    let number = |claim: &str| payload[claim].as_i64().unwrap_or_else(|| panic!("{claim} is no whole number"));
    let (iat, nbf, exp) = (number("iat"), number("nbf"), number("exp"));
    assert_eq!(payload["iss"], ISSUER);
    assert_eq!(iat, (NOW - policy.backdate).as_secs());
    assert!(exp > NOW.as_secs() && exp <= (NOW + policy.max_ttl).as_secs(), "exp {exp}");
    assert!(nbf < exp, "nbf {nbf}");
    assert!(asked.contains_key("nbf") || nbf == iat);
    assert_eq!((prepared.issued_at, prepared.expires_at, prepared.expires_in), (iat, exp, exp - NOW.as_secs()));
    let jti = payload["jti"].as_str().expect("jti is text");
    assert_eq!(jti, prepared.jti);
    assert!(!jti.trim().is_empty() && jti.chars().count() <= MAX_JTI_CHARS);
    assert!(asked.contains_key("jti") || jti == JTI);
    for claim in ["exp", "nbf", "jti"] {
        assert!(asked.get(claim).is_none_or(|given| *given == payload[claim]), "`{claim}` as given");
    }
}

fn callers_claims_are_as_given(asked: &Map<String, Value>, payload: &Map<String, Value>) {
    let daemons = ["iss", "iat", "nbf", "exp", "jti"];
    for (name, value) in asked {
        assert_eq!(payload.get(name), Some(value), "`{name}` as given");
    }
    let added: BTreeSet<&str> = payload.keys().map(String::as_str).filter(|name| !asked.contains_key(*name)).collect();
    assert!(added.iter().all(|name| daemons.contains(name)), "{added:?}");
    assert!(!asked.contains_key("iss") && !asked.contains_key("iat"));
}

fn no_forbidden_member(value: &Value, policy: &TokenPolicy, members: &mut usize, depth: usize) {
    let folded = |name: &str| name.to_uppercase().to_lowercase();
    match value {
        Value::Object(object) => {
            assert!(depth <= MAX_DEPTH);
            *members += object.len();
            for (name, value) in object {
                let forbidden = policy.forbidden_claims.iter().any(|forbidden| folded(forbidden) == folded(name));
                assert!(!forbidden, "`{name}` is forbidden");
                no_forbidden_member(value, policy, members, depth + 1);
            }
        }
        Value::Array(items) => {
            assert!(depth <= MAX_DEPTH);
            items.iter().for_each(|item| no_forbidden_member(item, policy, members, depth + 1));
        }
        _ => {}
    }
}

fn audiences_are_allowed(payload: &Map<String, Value>, rules: &Rules) {
    let named: Vec<&str> = match payload.get("aud") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(several)) => several.iter().map(|one| one.as_str().expect("an audience is text")).collect(),
        Some(other) => panic!("aud is {other}"),
    };
    assert!(named.len() <= MAX_AUDIENCES && named.iter().collect::<BTreeSet<_>>().len() == named.len());
    let lists = [Some(&rules.policy.audiences).filter(|list| !list.is_empty()), rules.client.as_ref()];
    for list in lists.into_iter().flatten() {
        assert!(!named.is_empty() && named.iter().all(|one| list.iter().any(|allowed| allowed == one)), "{named:?}");
    }
}
