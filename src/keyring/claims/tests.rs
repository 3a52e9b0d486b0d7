use std::fmt::Write;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// 2026-11-24T10:00:00Z and most of a second.
const NOW: Timestamp = Timestamp::from_millis(1_795_514_400_789);
const NOW_SECS: i64 = 1_795_514_400;
const JTI: &str = "b0c5f3d2-0b1f-4b7e-9b43-5d0b7b6a4a11";

fn policy() -> TokenPolicy {
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    TokenPolicy {
        max_ttl: Span::MINUTE.times(15),
        default_ttl: Span::MINUTE.times(5),
        required_claims: texts(&["aud", "sub"]),
        forbidden_claims: texts(&["password", "password_hash", "ssn", "secret"]),
        audiences: Vec::new(),
        types: texts(&["JWT", "at+jwt"]),
        backdate: Span::ZERO,
    }
}

fn rules_with(change: impl FnOnce(&mut TokenPolicy)) -> TokenRules {
    let mut policy = policy();
    change(&mut policy);
    TokenRules::new("https://auth.example.com", &policy)
}

fn rules() -> TokenRules {
    rules_with(|_| ())
}

fn issue(rules: &TokenRules, body: &str) -> Result<Prepared, ClaimError> {
    rules.issue(&parse_request(body.as_bytes())?, NOW, JTI, None)
}

fn refusal(rules: &TokenRules, body: &str) -> ClaimError {
    issue(rules, body).expect_err(body)
}

fn claims_of(prepared: &Prepared) -> Value {
    serde_json::from_slice(&prepared.payload).unwrap()
}

fn text_of(prepared: Prepared) -> String {
    String::from_utf8(prepared.payload).unwrap()
}

#[test]
fn the_daemon_adds_its_five_claims_to_the_callers() {
    let prepared =
        issue(&rules(), r#"{"claims": {"sub": "alice", "aud": ["a", "b"], "n": {"x": [1, null]}}}"#).unwrap();
    assert_eq!((prepared.issued_at, prepared.expires_at, prepared.expires_in), (NOW_SECS, NOW_SECS + 300, 300));
    assert_eq!((prepared.typ, prepared.jti.as_str()), (0, JTI));
    assert_eq!(
        text_of(prepared),
        r#"{"iss":"https://auth.example.com","sub":"alice","aud":["a","b"],"n":{"x":[1,null]},"#.to_owned()
            + r#""iat":1795514400,"nbf":1795514400,"exp":1795514700,"jti":"b0c5f3d2-0b1f-4b7e-9b43-5d0b7b6a4a11"}"#
    );
}

#[test]
fn a_life_may_be_asked_for_as_a_duration_as_seconds_or_as_exp() {
    let max = NOW_SECS + 900;
    for (asked, expected) in [
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":"15m"}"#.to_owned(), max),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":"14m 60s"}"#.to_owned(), max),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":"\u0031s"}"#.to_owned(), NOW_SECS + 1),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":900}"#.to_owned(), max),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":1}"#.to_owned(), NOW_SECS + 1),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":900.0}"#.to_owned(), max),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":9E+2}"#.to_owned(), max),
        (r#"{"claims":{"sub":"a","aud":"b"},"ttl":10e-1}"#.to_owned(), NOW_SECS + 1),
        (r#"{"claims":{"sub":"a","aud":"b"}}"#.to_owned(), NOW_SECS + 300),
        (format!(r#"{{"claims":{{"sub":"a","aud":"b","exp":{max}}}}}"#), max),
        (format!(r#"{{"claims":{{"exp":{},"sub":"a","aud":"b"}}}}"#, NOW_SECS + 1), NOW_SECS + 1),
    ] {
        let prepared = issue(&rules(), &asked).expect(&asked);
        assert_eq!((prepared.expires_at, prepared.expires_in), (expected, expected - NOW_SECS), "{asked}");
        assert_eq!(claims_of(&prepared)["exp"], expected, "{asked}");
    }
}

#[test]
fn a_default_life_longer_than_the_longest_is_cut() {
    let rules = rules_with(|policy| policy.max_ttl = Span::MINUTE);
    assert_eq!(issue(&rules, r#"{"claims":{"sub":"a","aud":"b"}}"#).unwrap().expires_in, 60);
}

#[test]
fn backdating_moves_iat_and_nbf_but_never_exp_or_a_callers_nbf() {
    let rules = rules_with(|policy| policy.backdate = Span::from_millis(30_500));
    let prepared = issue(&rules, r#"{"claims":{"sub":"a","aud":"b"},"ttl":60}"#).unwrap();
    let claims = claims_of(&prepared);
    assert_eq!((&claims["iat"], &claims["nbf"]), (&json!(NOW_SECS - 30), &json!(NOW_SECS - 30)));
    assert_eq!((prepared.issued_at, claims["exp"].as_i64()), (NOW_SECS - 30, Some(NOW_SECS + 60)));

    let later = NOW_SECS + 10;
    let prepared = issue(&rules, &format!(r#"{{"claims":{{"sub":"a","aud":"b","nbf":{later}}}}}"#)).unwrap();
    assert_eq!(claims_of(&prepared)["nbf"], later);
}

#[test]
fn a_callers_token_id_stands_in_place_of_ours() {
    let prepared = issue(&rules(), r#"{"claims":{"jti":"\u00e9-1","sub":"a","aud":"b"}}"#).unwrap();
    assert_eq!(prepared.jti, "é-1");
    assert_eq!(claims_of(&prepared)["jti"], "é-1");
    let longest = "é".repeat(MAX_JTI_CHARS);
    let prepared = issue(&rules(), &json!({"claims": {"sub": "a", "aud": "b", "jti": longest}}).to_string()).unwrap();
    assert_eq!(prepared.jti, longest);
}

#[test]
fn numbers_and_strings_reach_the_token_as_written() {
    for value in [
        "18446744073709551615",
        "-9223372036854775808",
        "9007199254740993",
        "123456789012345678901234567890123456789",
        "0.1000000000000000055511151231257827",
        "1.10",
        "-0",
        "1E+2",
        "1e-999",
        r#""\u0041\/ \ud83d\ude00 \" \\""#,
        r#""žluťoučký 🦄 \u0000""#,
        r#"["],[",{"}":"{"},[],{},true,false,null]"#,
    ] {
        let prepared = issue(&rules(), &format!(r#" {{ "claims" : {{"sub":"a","aud":"b","x":{value}}} }} "#)).unwrap();
        let text = text_of(prepared);
        assert!(text.contains(&format!(r#","x":{value},"#)), "{text}");
    }
}

#[test]
fn a_type_is_chosen_without_regard_to_case_and_never_spelled_by_the_caller() {
    let rules =
        rules_with(|policy| policy.types = vec!["JWT".into(), "at+jwt".into(), "application/logout+jwt".into()]);
    assert_eq!(rules.types().collect::<Vec<_>>(), ["JWT", "at+jwt", "application/logout+jwt"]);
    for (asked, expected) in [
        ("jwt", 0),
        ("JWT", 0),
        ("application/JWT", 0),
        ("AT+JWT", 1),
        ("Application/at+jwt", 1),
        ("logout+jwt", 2),
        ("application/logout+JWT", 2),
    ] {
        let body = json!({"claims": {"sub": "a", "aud": "b", "client_id": "c"}, "typ": asked}).to_string();
        assert_eq!(issue(&rules, &body).unwrap().typ, expected, "{asked}");
    }
}

#[test]
fn an_access_token_needs_what_rfc_9068_demands_whatever_the_keyset_requires() {
    let rules = rules_with(|policy| {
        policy.required_claims.clear();
        policy.types = vec!["application/at+jwt".into()];
    });
    for claim in ["sub", "aud", "client_id"] {
        let mut claims = json!({"sub": "a", "aud": "b", "client_id": "c"});
        claims.as_object_mut().unwrap().remove(claim);
        assert_eq!(
            refusal(&rules, &json!({ "claims": claims }).to_string()).to_string(),
            format!("claims.{claim} is missing or empty: RFC 9068 §2.2 requires it of a token of the type at+jwt")
        );
    }
    assert!(issue(&rules, r#"{"claims":{"sub":"a","aud":"b","client_id":"c"}}"#).is_ok());
}

#[test]
fn a_required_claim_that_says_nothing_is_missing() {
    let rules = rules_with(|policy| policy.required_claims = vec!["tenant".into(), "exp".into(), "iss".into()]);
    for nothing in ["null", r#""""#, r#"" \t""#, "[]", "{}", r#"[""]"#, "[null,[]]"] {
        let error = refusal(&rules, &format!(r#"{{"claims":{{"tenant":{nothing}}}}}"#));
        assert_eq!(error.to_string(), "claims.tenant is missing or empty: this keyset requires it", "{nothing}");
        assert_eq!((error.rejection(), error.problem()), (Rejection::Claims, ClaimProblem::ClaimMissing));
    }
    for something in ["0", "false", r#""x""#, r#"["",0]"#, r#"{"":null}"#] {
        assert!(issue(&rules, &format!(r#"{{"claims":{{"tenant":{something}}}}}"#)).is_ok(), "{something}");
    }
    assert!(issue(&rules, r#"{"claims":{"x":{"tenant":"only inside"}}}"#).is_err());
    assert!(issue(&rules, r#"{"claims":{"Tenant":"in another case"}}"#).is_err());
}

#[test]
fn audiences_must_be_on_the_keysets_list_and_on_the_clients() {
    let rules = rules_with(|policy| {
        policy.audiences = vec!["https://a".into(), "https://b".into()];
        policy.required_claims.clear();
    });
    let client = ["https://b".to_owned(), "https://c".to_owned()];
    let issue = |claims: Value, client| {
        let body = json!({ "claims": claims }).to_string();
        rules.issue(&parse_request(body.as_bytes()).unwrap(), NOW, JTI, client).map_err(|error| {
            let reason = error.rejection().as_str();
            format!("{reason}: {error}")
        })
    };
    assert!(issue(json!({"aud": ["https://a", "https://b"]}), None).is_ok());
    assert!(issue(json!({"aud": "https://b"}), Some(&client[..])).is_ok());
    let refused = |claims, client| issue(claims, client).unwrap_err();
    assert_eq!(
        refused(json!({"aud": ["https://b", "https://B"]}), None),
        "audience: claims.aud: `https://B` is not an audience that this keyset may name"
    );
    assert_eq!(
        refused(json!({"aud": "https://c"}), Some(&client[..])),
        "audience: claims.aud: `https://c` is not an audience that this keyset may name"
    );
    assert_eq!(
        refused(json!({"aud": ["https://b", "https://a"]}), Some(&client[..])),
        "audience: claims.aud: `https://a` is not an audience that this client may name"
    );
    assert_eq!(
        refused(json!({"aud": "https://a"}), Some(&[])),
        "audience: claims.aud: `https://a` is not an audience that this client may name"
    );
    assert_eq!(
        refused(json!({"x": 1}), None),
        "claims: claims.aud is missing or empty: the audiences of this keyset are limited, so its tokens must name one"
    );
}

#[test]
fn a_client_with_its_own_audiences_must_name_one_even_where_the_keyset_takes_any() {
    let rules = rules_with(|policy| policy.required_claims.clear());
    let request = parse_request(br#"{"claims":{}}"#).unwrap();
    assert!(rules.issue(&request, NOW, JTI, None).is_ok());
    assert_eq!(
        rules.issue(&request, NOW, JTI, Some(&["https://a".to_owned()])).unwrap_err().to_string(),
        "claims.aud is missing or empty: the audiences of this client are limited, so its tokens must name one"
    );
}

#[test]
fn limits_are_met_exactly() {
    let rules = rules();
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"claims":{{"sub":"a","aud":"b","x":{open}{close}}}}}"#)
    };
    assert!(issue(&rules, &nested(MAX_DEPTH - 1)).is_ok());
    let too_deep = refusal(&rules, &nested(MAX_DEPTH)).to_string();
    assert!(too_deep.ends_with("[0][0] is nested deeper than 32 levels"), "{too_deep}");

    let wide = |members: usize| {
        let inner: Map<String, Value> = (0..members - 3).map(|n| (format!("m{n}"), json!(n))).collect();
        json!({"claims": {"sub": "a", "aud": "b", "x": inner}}).to_string()
    };
    assert!(issue(&rules, &wide(MAX_MEMBERS)).is_ok());
    let error = refusal(&rules, &wide(MAX_MEMBERS + 1)).to_string();
    assert!(error.starts_with("claims.x.m") && error.ends_with("one member more than the 256 that claims may have"));

    let audiences = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| n.to_string()).collect();
        json!({"claims": {"sub": "a", "aud": names}}).to_string()
    };
    assert!(issue(&rules, &audiences(MAX_AUDIENCES)).is_ok());
    assert_eq!(refusal(&rules, &audiences(MAX_AUDIENCES + 1)).to_string(), "claims.aud names more than 64 audiences");

    let long = |len: usize| json!({"claims": {"sub": "a", "aud": "b", "x": "x".repeat(len)}}).to_string();
    let rest = issue(&rules, &long(0)).unwrap().payload.len();
    let longest = issue(&rules, &long(MAX_PAYLOAD_BYTES - rest)).unwrap();
    assert_eq!(longest.payload.len(), MAX_PAYLOAD_BYTES);
    assert_eq!(
        refusal(&rules, &long(MAX_PAYLOAD_BYTES - rest + 1)).to_string(),
        "claims are too many: the payload would be longer than 16384 bytes"
    );
}

#[test]
fn nesting_without_end_costs_no_stack() {
    for open in ["[", r#"{"a":"#] {
        let endless = format!(r#"{{"claims":{{"x":{}"#, open.repeat(20_000));
        assert_eq!(refusal(&rules(), &endless).rejection(), Rejection::Malformed);
    }
    let closed = format!(r#"{{"claims":{{"x":{}{}}}}}"#, "[".repeat(30_000), "]".repeat(30_000));
    assert_eq!(refusal(&rules(), &closed).problem(), ClaimProblem::ClaimInvalid);
}

#[test]
fn every_bad_request_is_refused_and_told_why() {
    let requests = [
        // What cannot be read.
        "",
        "{",
        "nonsense",
        r#"{"claims":{}} x"#,
        r#"{"claims":{},}"#,
        r#"{"claims":{"a":01}}"#,
        r#"{"claims":{"a":NaN}}"#,
        "{\"claims\":{\"a\":\"\n\"}}",
        "\u{feff}{}",
        "[]",
        r#"[{"sub":"a"},600]"#,
        "null",
        "{}",
        r#"{"claims":null}"#,
        r#"{"claims":[]}"#,
        r#"{"claims":"{}"}"#,
        r#"{"claims":{},"claims":{}}"#,
        r#"{"claims":{},"ttl":1,"\u0074tl":2}"#,
        r#"{"claims":{},"alg":"none"}"#,
        r#"{"claims":{},"header":{"alg":"HS256"}}"#,
        r#"{"claims":{},"TTL":1}"#,
        r#"{"claims":{},"\ud800":1}"#,
        r#"{"claims":{},"ttl":null}"#,
        r#"{"claims":{},"ttl":true}"#,
        r#"{"claims":{},"ttl":["10m"]}"#,
        r#"{"claims":{},"typ":null}"#,
        r#"{"claims":{},"typ":5}"#,
        // Lives.
        r#"{"claims":{},"ttl":0}"#,
        r#"{"claims":{},"ttl":-5}"#,
        r#"{"claims":{},"ttl":1.5}"#,
        r#"{"claims":{},"ttl":15e-1}"#,
        r#"{"claims":{},"ttl":-0.0}"#,
        r#"{"claims":{},"ttl":1e999}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"ttl":1e300}"#,
        r#"{"claims":{},"ttl":"600"}"#,
        r#"{"claims":{},"ttl":"500ms"}"#,
        r#"{"claims":{},"ttl":"0s"}"#,
        r#"{"claims":{},"ttl":"soon"}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"ttl":901}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"ttl":"16m"}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"ttl":99999999999999999999}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":1795515000},"ttl":600}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":1795515301}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":99999999999999999999}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":1795514400}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":0}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":-1}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":1795514500.5}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":"1795514500"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":null}}"#,
        r#"{"claims":{"sub":"a","aud":"b","nbf":1795514700}}"#,
        r#"{"claims":{"sub":"a","aud":"b","nbf":"now"}}"#,
        // What only the daemon says.
        r#"{"claims":{"sub":"a","aud":"b","iss":"https://auth.example.com"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","iat":1795514400}}"#,
        r#"{"claims":{"sub":"a","aud":"b","\u0069ss":"x"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","EXP":9999999999}}"#,
        r#"{"claims":{"sub":"a","aud":"b","iſs":"x"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","Aud":"x"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","jti":""}}"#,
        r#"{"claims":{"sub":"a","aud":"b","jti":7}}"#,
        // What is missing.
        r#"{"claims":{"sub":"a"}}"#,
        r#"{"claims":{"aud":"b"}}"#,
        r#"{"claims":{"sub":null,"aud":"b"}}"#,
        r#"{"claims":{"sub":"a","aud":[]}}"#,
        r#"{"claims":{"sub":"a","aud":[""]}}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"typ":"at+jwt"}"#,
        r#"{"claims":{"aud":"b","client_id":"c"},"typ":"at+jwt"}"#,
        // What is forbidden, and where.
        r#"{"claims":{"sub":"a","aud":"b","password":"hunter2"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","user":{"Password":"hunter2"}}}"#,
        r#"{"claims":{"sub":"a","aud":"b","users":[[1],[{"x":{}},{"x":{"SSN":1}}]]}}"#,
        r#"{"claims":{"sub":"a","aud":"b","p\u0061ssword_HASH":1}}"#,
        r#"{"claims":{"sub":"a","aud":"b","ſecret":1}}"#,
        // What is wrong inside.
        r#"{"claims":{"sub":"a","aud":"b","x":1,"x":2}}"#,
        r#"{"claims":{"sub":"a","aud":"b","sub":"root"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","exp":1795514500,"\u0065xp":1795514600}}"#,
        r#"{"claims":{"sub":"a","aud":"b","x y":[0,{"z.":1,"z.":1}]}}"#,
        r#"{"claims":{"sub":"a","aud":"b","x":["\ud800"]}}"#,
        r#"{"claims":{"sub":"a","aud":"b","\udc00":1}}"#,
        r#"{"claims":{"sub":"a","aud":"b","x":{"y":1e999}}}"#,
        r#"{"claims":{"sub":5,"aud":"b"}}"#,
        r#"{"claims":{"sub":["a"],"aud":"b"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","scope":["read"]}}"#,
        r#"{"claims":{"sub":"a","aud":"b","client_id":1}}"#,
        r#"{"claims":{"sub":"a","aud":"b","azp":{}}}"#,
        r#"{"claims":{"sub":"a","aud":"b","nonce":null}}"#,
        r#"{"claims":{"sub":"a","aud":"b","acr":0}}"#,
        r#"{"claims":{"sub":"a","aud":"b","auth_time":"1795514400"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","amr":"pwd"}}"#,
        r#"{"claims":{"sub":"a","aud":"b","amr":["pwd",1]}}"#,
        r#"{"claims":{"sub":"a","aud":1}}"#,
        r#"{"claims":{"sub":"a","aud":{"x":1}}}"#,
        r#"{"claims":{"sub":"a","aud":["b",1]}}"#,
        r#"{"claims":{"sub":"a","aud":["b",["c"]]}}"#,
        r#"{"claims":{"sub":"a","aud":["b",""]}}"#,
        r#"{"claims":{"sub":"a","aud":["b","\u0062"]}}"#,
        // Types.
        r#"{"claims":{"sub":"a","aud":"b"},"typ":"none"}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"typ":""}"#,
        r#"{"claims":{"sub":"a","aud":"b"},"typ":"logout+jwt\u001b[31m"}"#,
    ];
    let mut refusals = String::new();
    for body in requests {
        let error = refusal(&rules(), body);
        let (reason, problem) = (error.rejection().as_str(), error.problem().slug());
        let shown = body.replace('\n', "⏎").replace('\u{feff}', "<BOM>");
        writeln!(refusals, "{shown}\n  {reason} {problem}: {error}").unwrap();
    }
    insta::assert_snapshot!(refusals);
}

#[test]
fn neither_refusals_nor_debug_output_show_values_of_claims() {
    let long = "x".repeat(100_000);
    let request = format!(r#"{{"claims":{{"sub":"s3cr3t","aud":"b","{long}":"s3cr3t","password":"s3cr3t"}}}}"#);
    let error = refusal(&rules(), &request);
    assert!(!format!("{error:?} {error}").contains("s3cr3t"));
    let body = br#"{"claims":{"sub":"s3cr3t","aud":"b"}}"#;
    let parsed = parse_request(body).unwrap();
    let prepared = rules().issue(&parsed, NOW, JTI, None).unwrap();
    assert!(!format!("{parsed:?} {prepared:?}").contains("s3cr3t"));
}

#[test]
fn what_a_refusal_quotes_is_cut() {
    let long = "x".repeat(60_000);
    for body in [
        format!(r#"{{"{long}":1}}"#),
        format!(r#"{{"claims":{{}},"ttl":"{long}"}}"#),
        format!(r#"{{"claims":{{}},"typ":"{long}"}}"#),
        format!(r#"{{"claims":{{"{long}":{{"{long}":1e999}}}}}}"#),
    ] {
        assert!(refusal(&rules(), &body).to_string().len() < 400);
    }
}

#[test]
fn an_issuer_or_token_id_with_quotes_cannot_break_out() {
    let rules = TokenRules::new(r#"https://a/","admin":true,"x":""#, &policy());
    let request = parse_request(br#"{"claims":{"sub":"a","aud":"b"}}"#).unwrap();
    let claims = claims_of(&rules.issue(&request, NOW, r#"","admin":true,"y":""#, None).unwrap());
    assert_eq!(claims["iss"], r#"https://a/","admin":true,"x":""#);
    assert_eq!(claims["jti"], r#"","admin":true,"y":""#);
    assert!(claims.get("admin").is_none());
}

#[test]
fn the_labels_of_rejections_and_problems_are_the_documented_ones() {
    assert_eq!(Rejection::ALL.map(Rejection::as_str), ["ttl", "claims", "audience", "malformed"]);
    assert_eq!(ClaimProblem::TtlTooLong.slug(), "ttl-too-long");
}

/// Any JSON value; names that the rules care about are frequent.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (NOW_SECS - 100..NOW_SECS + 2_000).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a-z]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 48, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            btree_map(any_name(), inner, 0..6).prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "[a-z_]{1,8}",
        4 => any::<String>(),
        1 => proptest::sample::select(vec!["sub", "aud", "exp", "nbf", "jti", "Iss", "iat", "scope", "amr", ""]).prop_map(String::from),
        1 => proptest::sample::select(FORBIDDEN.to_vec()).prop_map(String::from),
    ]
}

const FORBIDDEN: [&str; 6] = ["password", "PASSWORD", "Password_Hash", "ssn", "sSn", "seCret"];

/// Objects that the rules let pass.
fn clean_claims() -> impl Strategy<Value = Map<String, Value>> {
    (btree_map("x[a-z]{1,6}|é.{0,3}", any_json().prop_map(without_forbidden), 0..8), "[a-z]{1,9}").prop_map(
        |(members, subject)| {
            let mut claims: Map<String, Value> = members.into_iter().collect();
            claims.insert("sub".into(), subject.clone().into());
            claims.insert("aud".into(), vec![subject.clone(), subject + "2"].into());
            claims
        },
    )
}

fn is_forbidden(name: &str) -> bool {
    let name = name.to_lowercase();
    policy().forbidden_claims.contains(&name)
}

fn without_forbidden(value: Value) -> Value {
    match value {
        Value::Object(members) => members
            .into_iter()
            .filter(|(name, _)| !is_forbidden(name))
            .map(|(name, value)| (name, without_forbidden(value)))
            .collect(),
        Value::Array(elements) => elements.into_iter().map(without_forbidden).collect(),
        leaf => leaf,
    }
}

fn holds_forbidden(value: &Value) -> bool {
    match value {
        Value::Object(members) => members.iter().any(|(name, value)| is_forbidden(name) || holds_forbidden(value)),
        Value::Array(elements) => elements.iter().any(holds_forbidden),
        _ => false,
    }
}

/// A request of whatever kind, with enough right in it to be granted now and then.
fn any_request() -> impl Strategy<Value = Value> {
    let ttl = prop_oneof![
        4 => Just(None),
        2 => (0..2_000_i64).prop_map(|secs| Some(secs.into())),
        1 => any::<i64>().prop_map(|secs| Some(secs.into())),
        1 => "[0-9]{1,4}(ms|s|m|h|d)".prop_map(|text| Some(text.into())),
    ];
    let typ = prop_oneof![3 => Just(None), 1 => Just(Some("at+jwt")), 1 => Just(Some("jwt")), 1 => Just(Some("x"))];
    let time = || prop_oneof![2 => Just(None), 1 => (NOW_SECS - 10..NOW_SECS + 1_000).prop_map(Some)];
    let noise = prop_oneof![3 => Just(Value::Null), 1 => any_json()];
    (clean_claims(), noise, time(), time(), ttl, typ).prop_map(|(mut claims, noise, exp, nbf, ttl, typ)| {
        claims.insert("noise".into(), noise.clone());
        claims.extend(noise.as_object().cloned().unwrap_or_default());
        claims.extend(exp.map(|exp| ("exp".to_owned(), exp.into())));
        claims.extend(nbf.map(|nbf| ("nbf".to_owned(), nbf.into())));
        let mut request = json!({ "claims": claims });
        let members = request.as_object_mut().unwrap();
        members.extend(ttl.map(|ttl| ("ttl".to_owned(), ttl)));
        members.extend(typ.map(|typ| ("typ".to_owned(), typ.into())));
        request
    })
}

proptest! {
    #[test]
    fn no_token_outlives_max_ttl_and_every_token_lives(
        request in any_request(),
        now in 0..250_000_000_000_000_i64,
        anchored in any::<bool>(),
        max_ttl in 1..2_000_i64,
        default_ttl in 1..2_000_i64,
        backdate in 0..100_000_i64,
    ) {
        let now = if anchored { NOW } else { Timestamp::from_millis(now) };
        let rules = rules_with(|policy| {
            policy.max_ttl = Span::from_secs(max_ttl);
            policy.default_ttl = Span::from_secs(default_ttl);
            policy.backdate = Span::from_millis(backdate);
        });
        let body = request.to_string();
        let Ok(parsed) = parse_request(body.as_bytes()) else { return Ok(()) };
        let Ok(prepared) = rules.issue(&parsed, now, JTI, None) else { return Ok(()) };
        let claims = claims_of(&prepared);
        let date = |name: &str| claims[name].as_i64().unwrap();
        prop_assert!(date("exp") * 1000 <= now.as_millis() + max_ttl * 1000);
        prop_assert!(date("exp") * 1000 > now.as_millis());
        prop_assert!(date("nbf") < date("exp"));
        prop_assert!(date("iat") * 1000 <= now.as_millis());
        prop_assert_eq!(prepared.expires_at, date("exp"));
        prop_assert_eq!(prepared.issued_at, date("iat"));
        prop_assert_eq!(prepared.expires_in, date("exp") - now.as_secs());
        prop_assert!(prepared.payload.len() <= MAX_PAYLOAD_BYTES);
        prop_assert!(!holds_forbidden(&claims));
    }

    #[test]
    fn the_payload_is_the_callers_claims_and_the_daemons_five(claims in clean_claims(), pretty in any::<bool>()) {
        let request = json!({ "claims": claims });
        let body = if pretty { serde_json::to_string_pretty(&request).unwrap() } else { request.to_string() };
        let prepared = issue(&rules(), &body).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let mut expected = serde_json::from_str::<Value>(&body).unwrap()["claims"].take();
        expected["iss"] = "https://auth.example.com".into();
        expected["iat"] = NOW_SECS.into();
        expected["nbf"] = NOW_SECS.into();
        expected["exp"] = (NOW_SECS + 300).into();
        expected["jti"] = JTI.into();
        prop_assert_eq!(claims_of(&prepared), expected);
    }

    #[test]
    fn a_forbidden_name_is_found_wherever_it_stands(
        mut claims in clean_claims(),
        name in proptest::sample::select(FORBIDDEN.to_vec()),
        wraps in vec(any::<bool>(), 0..12),
        value in any_json().prop_map(without_forbidden),
    ) {
        let planted = wraps.into_iter().fold(json!({ name: value }), |inner, array| {
            if array { json!([0, inner]) } else { json!({ "w": inner }) }
        });
        claims.insert("zz".into(), planted);
        let error = refusal(&rules(), &json!({ "claims": claims }).to_string());
        prop_assert!(matches!(&error, ClaimError::Forbidden { path } if path.ends_with(name)), "{}", error);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(request) = parse_request(&bytes) {
            let _ = rules().issue(&request, NOW, JTI, None);
        }
    }

    #[test]
    fn no_damage_to_a_request_makes_it_panic_or_pass_as_other_json(
        request in any_request(),
        damage in vec((any::<proptest::sample::Index>(), proptest::sample::select(b"\"\\{}[]:,u0e-.d8 \xff".to_vec())), 1..4),
    ) {
        let mut bytes = request.to_string().into_bytes();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let Ok(parsed) = parse_request(&bytes) else { return Ok(()) };
        let Ok(prepared) = rules().issue(&parsed, NOW, JTI, None) else { return Ok(()) };
        let asked = serde_json::from_slice::<Value>(&bytes).unwrap()["claims"].take();
        let mut signed = claims_of(&prepared);
        for daemons in ["iss", "iat", "nbf", "exp", "jti"] {
            if asked.get(daemons).is_none() {
                signed.as_object_mut().unwrap().remove(daemons);
            }
        }
        prop_assert_eq!(signed, asked);
    }
}
