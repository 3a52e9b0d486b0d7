//! The configuration from outside: what is refused and in which words, what is read, which defaults hold.

#[path = "config/replicas.rs"]
mod replicas;

use std::path::{Path, PathBuf};

use jwksd::config::{
    self, Address, ClientCredential, Config, ConfigErrors, Format, Initialise, Loaded, LogFormat, LogLevel, Role,
    SecretSource, Source, StoreKind, Watch,
};
use jwksd::keyring::algorithm::{Algorithm, EdLabel, RsaBits};
use jwksd::keyring::policy::{Bootstrap, Discovery};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;

/// Valid; the broken ones below are this with a replacement or two.
const BASE: &str = r#"
[public]
listen = "127.0.0.1:8620"
[signer]
listen = "127.0.0.1:8621"
[admin]
listen = "127.0.0.1:8622"
[admin.token.operator]
role = "operator"
file = "data/admin.token"
[ops]
listen = "127.0.0.1:8623"
[store]
path = "data/keyrings"
[seal]
path = "data/seal.key"
[issuer.main]
url = "https://auth.example.com"
[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
every = "30d"
[keyset.default.tokens]
max_ttl = "15m"
[log]
"#;

fn toml(text: impl Into<String>) -> Source {
    Source::Text { name: "test.toml".into(), text: text.into(), format: Format::Toml }
}

fn load(source: &Source) -> Result<Loaded, ConfigErrors> {
    config::load(source, std::iter::empty())
}

fn base_with(replacements: &[(&str, &str)]) -> String {
    let mut text = BASE.to_owned();
    for (from, to) in replacements {
        assert!(text.contains(from), "the base has no {from:?}");
        text = text.replacen(from, to, 1);
    }
    text
}

fn valid(replacements: &[(&str, &str)]) -> Loaded {
    load(&toml(base_with(replacements))).unwrap_or_else(|error| panic!("{error}"))
}

fn error(text: impl Into<String>) -> String {
    match load(&toml(text)) {
        Ok(loaded) if loaded.timing.is_empty() => panic!("was accepted"),
        Ok(loaded) => loaded.timing.iter().map(|finding| format!("timing: {finding}")).collect::<Vec<_>>().join("\n"),
        Err(error) => error.to_string(),
    }
}

/// A name and what to replace in the base.
type Broken = (&'static str, &'static [(&'static str, &'static str)]);

const BROKEN: &[Broken] = &[
    // Structure and types
    ("a misspelt key", &[("every = ", "evry = ")]),
    ("a key nobody knows", &[("[log]", "[log]\ncolour = \"blue\"")]),
    ("a misspelt table", &[("[signer]", "[singer]")]),
    ("a quoted key with a line break", &[("[log]", "[log]\n\"a\\nb\" = 1")]),
    ("a table that is a text", &[("[log]", "[log]\n[defaults]\nrotation = \"30d\"")]),
    ("a text that is a table", &[("url = \"https://auth.example.com\"", "url = { host = \"auth.example.com\" }")]),
    ("a duration without unit", &[("\"30d\"", "30")]),
    ("a duration that is none", &[("\"30d\"", "\"a month\"")]),
    ("a duration in months", &[("\"30d\"", "\"1month\"")]),
    ("a duration that is a date", &[("\"30d\"", "2026-01-01")]),
    ("a duration with microseconds", &[("\"30d\"", "\"5us\"")]),
    ("a number that is a text", &[("every = \"30d\"", "successors = \"two\"")]),
    ("a negative number", &[("every = \"30d\"", "successors = -1")]),
    ("a number with a fraction", &[("every = \"30d\"", "successors = 1.5")]),
    ("a boolean that is a text", &[("[log]", "[log]\nsignatures = \"yes\"")]),
    ("a list that is a text", &[("max_ttl = \"15m\"", "audiences = \"https://api.example.com\"")]),
    ("a list with a number", &[("max_ttl = \"15m\"", "audiences = [\"a\", 7]")]),
    ("an empty text", &[("\"https://auth.example.com\"", "\"\"")]),
    ("a control character", &[("\"data/keyrings\"", "\"data\\u0000keyrings\"")]),
    // Keysets and issuers
    (
        "no keyset",
        &[(
            "[keyset.default]\nalgorithm = \"ES256\"\n[keyset.default.rotation]\nevery = \"30d\"\n[keyset.default.tokens]\nmax_ttl = \"15m\"\n",
            "",
        )],
    ),
    ("a bad keyset name", &[("[keyset.default]", "[keyset.Default_1]\nalgorithm = \"ES256\"\n[keyset.default]")]),
    (
        "only a bad keyset name",
        &[
            ("[keyset.default]", "[keyset.X]"),
            ("[keyset.default.rotation]", "[keyset.X.rotation]"),
            ("[keyset.default.tokens]", "[keyset.X.tokens]"),
        ],
    ),
    ("no algorithm", &[("algorithm = \"ES256\"\n", "")]),
    ("a misspelt algorithm", &[("\"ES256\"", "\"ES265\"")]),
    ("a symmetric algorithm", &[("\"ES256\"", "\"HS256\"")]),
    ("no signature at all", &[("\"ES256\"", "\"none\"")]),
    ("Ed25519 by its other name", &[("\"ES256\"", "\"Ed25519\"")]),
    ("a small RSA key", &[("\"ES256\"", "\"RS256\"\nrsa_bits = 1024")]),
    ("RSA bits of an EC key", &[("\"ES256\"", "\"ES256\"\nrsa_bits = 2048")]),
    ("an EdDSA label of an EC key", &[("\"ES256\"", "\"ES256\"\neddsa_label = \"EdDSA\"")]),
    ("an unknown EdDSA label", &[("\"ES256\"", "\"EdDSA\"\neddsa_label = \"ed25519\"")]),
    ("a backend of a later release", &[("\"ES256\"", "\"ES256\"\nbackend = \"openbao\"")]),
    ("a backend nobody knows", &[("\"ES256\"", "\"ES256\"\nbackend = \"vault\"")]),
    ("no issuer", &[("[issuer.main]\nurl = \"https://auth.example.com\"\n", "")]),
    ("an unknown issuer", &[("\"ES256\"", "\"ES256\"\nissuer = \"mian\"")]),
    ("an ambiguous issuer", &[("[log]", "[issuer.other]\nurl = \"https://auth.example.com/other\"\n[log]")]),
    ("an issuer without URL", &[("url = ", "max_age = \"5m\" # ")]),
    ("an issuer URL with a query", &[("auth.example.com\"", "auth.example.com/?tenant=a\"")]),
    ("an issuer URL with a password", &[("https://auth", "https://user:hunter2@auth")]),
    ("an issuer URL with another scheme", &[("https://auth", "ftp://auth")]),
    ("an issuer URL without host", &[("https://auth.example.com", "https://")]),
    ("an issuer URL with percent-encoding", &[("auth.example.com\"", "auth.example.com/a%20b\"")]),
    (
        "two issuers with one URL",
        &[
            ("\"ES256\"", "\"ES256\"\nissuer = \"main\""),
            ("[log]", "[issuer.other]\nurl = \"https://AUTH.example.com/\"\n[log]"),
        ],
    ),
    (
        "two issuers at one path",
        &[
            ("\"ES256\"", "\"ES256\"\nissuer = \"main\""),
            ("[log]", "[issuer.other]\nurl = \"https://other.example.com\"\n[log]"),
        ],
    ),
    ("a relative further path", &[("[keyset.default]", "jwks_paths = [\"oauth/keys\"]\n[keyset.default]")]),
    ("a further path with dots", &[("[keyset.default]", "jwks_paths = [\"/a/../keys\"]\n[keyset.default]")]),
    (
        "a further path that is served already",
        &[("[keyset.default]", "jwks_paths = [\"/.well-known/jwks.json\", \"/keys\", \"/keys\"]\n[keyset.default]")],
    ),
    ("a max_age of zero", &[("[keyset.default]", "max_age = \"0s\"\n[keyset.default]")]),
    ("a max_age of years", &[("[keyset.default]", "max_age = \"9999d\"\n[keyset.default]")]),
    ("discovery nobody knows", &[("[keyset.default]", "discovery = \"full\"\n[keyset.default]")]),
    (
        "probes without encryption, to metadata, given twice, and no URL",
        &[(
            "[keyset.default]",
            "probes = [\"http://auth.example.com/keys\", \"https://169.254.169.254/keys\", \"https://[fe80::1]/keys\", \
             \"https://a.example.com\", \"https://a.example.com\", \"keys\"]\n[keyset.default]",
        )],
    ),
    (
        "nine probes",
        &[(
            "[keyset.default]",
            "probes = [\"https://a/1\", \"https://a/2\", \"https://a/3\", \"https://a/4\", \"https://a/5\", \
             \"https://a/6\", \"https://a/7\", \"https://a/8\", \"https://a/9\"]\n[keyset.default]",
        )],
    ),
    // Rotation and tokens
    ("every together with schedule", &[("every = \"30d\"", "every = \"30d\"\nschedule = \"@monthly\"")]),
    (
        "every together with schedule in the defaults",
        &[("[log]", "[defaults.rotation]\nevery = \"30d\"\nschedule = \"@monthly\"\n[log]")],
    ),
    ("a timezone without schedule", &[("every = \"30d\"", "every = \"30d\"\ntimezone = \"Europe/Berlin\"")]),
    ("a schedule with six fields", &[("every = \"30d\"", "schedule = \"0 0 10 1 * *\"")]),
    ("a timezone that is none", &[("every = \"30d\"", "schedule = \"@monthly\"\ntimezone = \"Berlin\"")]),
    ("a schedule that never fires", &[("every = \"30d\"", "schedule = \"0 0 30 2 *\"")]),
    ("rotation without end", &[("\"30d\"", "\"0s\"")]),
    ("no successors", &[("every = \"30d\"", "successors = 0")]),
    (
        "no successors by default",
        &[("[log]", "[defaults.rotation]\nsuccessors = 0\n[keyset.other]\nalgorithm = \"ES256\"\n[log]")],
    ),
    ("a bootstrap nobody knows", &[("every = \"30d\"", "bootstrap = \"now\"")]),
    ("a verifier nobody knows", &[("every = \"30d\"", "verifiers = [\"envoyy\"]")]),
    ("a verifier without cache", &[("every = \"30d\"", "verifiers = [{ name = \"billing\" }]")]),
    ("a verifier with a bad name", &[("every = \"30d\"", "verifiers = [{ name = \"Billing API\", cache = \"1h\" }]")]),
    (
        "a verifier with a key too many",
        &[("every = \"30d\"", "verifiers = [{ name = \"b\", cache = \"1h\", old = \"1d\" }]")],
    ),
    ("a verifier that is a number", &[("every = \"30d\"", "verifiers = [36]")]),
    ("a verifier with a bad duration", &[("every = \"30d\"", "verifiers = [\"36 hrz\"]")]),
    ("a forbidden claim of the daemon", &[("max_ttl = \"15m\"", "forbidden_claims = [\"password\", \"EXP\"]")]),
    ("a claim both required and forbidden", &[("max_ttl = \"15m\"", "forbidden_claims = [\"Sub\"]")]),
    (
        "audiences without the claim",
        &[("max_ttl = \"15m\"", "required_claims = [\"sub\"]\nforbidden_claims = [\"aud\"]\naudiences = [\"a\"]")],
    ),
    ("a claim twice", &[("max_ttl = \"15m\"", "required_claims = [\"aud\", \"sub\", \"aud\"]")]),
    ("an empty audience", &[("max_ttl = \"15m\"", "audiences = [\" \"]")]),
    ("no types", &[("max_ttl = \"15m\"", "types = []")]),
    ("types that are none", &[("max_ttl = \"15m\"", "types = [\"JWT\", \"a b\", \"/x\", \"a/b/c\", \"JWT\"]")]),
    ("a long backdate", &[("max_ttl = \"15m\"", "backdate = \"1d\"")]),
    ("a default life over the longest", &[("max_ttl = \"15m\"", "max_ttl = \"15m\"\ndefault_ttl = \"16m\"")]),
    ("a propagation shorter than caches", &[("every = \"30d\"", "propagation = \"1m\"")]),
    ("rotation faster than propagation", &[("\"30d\"", "\"12h\"")]),
    // Listeners
    ("no public listener", &[("[public]\nlisten = \"127.0.0.1:8620\"\n", "")]),
    ("a listener without address", &[("listen = \"127.0.0.1:8623\"\n", "")]),
    ("an address without port", &[("127.0.0.1:8623", "127.0.0.1")]),
    ("an address without host", &[("127.0.0.1:8623", ":8623")]),
    ("an address by name", &[("127.0.0.1:8623", "localhost:8623")]),
    ("an address that is a URL", &[("127.0.0.1:8623", "http://127.0.0.1:8623")]),
    ("a port that is none", &[("127.0.0.1:8623", "127.0.0.1:99999")]),
    ("a socket without unix:", &[("127.0.0.1:8623", "/run/jwksd/ops.sock")]),
    ("a socket with an authority", &[("127.0.0.1:8623", "unix:///run/jwksd/ops.sock")]),
    ("a socket without path", &[("127.0.0.1:8623", "unix:")]),
    (
        "a socket with a long path",
        &[(
            "127.0.0.1:8623",
            "unix:/run/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx/x.sock",
        )],
    ),
    ("a mode that is none", &[("\"127.0.0.1:8621\"", "\"unix:/run/s.sock\"\nsocket_mode = \"rw-rw----\"")]),
    ("a mode that shuts the owner out", &[("\"127.0.0.1:8621\"", "\"unix:/run/s.sock\"\nsocket_mode = \"0066\"")]),
    ("a mode as a number", &[("\"127.0.0.1:8621\"", "\"unix:/run/s.sock\"\nsocket_mode = 0o660")]),
    ("a mode of a TCP address", &[("\"127.0.0.1:8621\"", "\"127.0.0.1:8621\"\nsocket_mode = \"0660\"")]),
    (
        "TLS on a socket",
        &[("\"127.0.0.1:8621\"", "\"unix:/run/s.sock\"\ntls = { cert_file = \"c.pem\", key_file = \"k.pem\" }")],
    ),
    ("TLS without key", &[("\"127.0.0.1:8620\"", "\"127.0.0.1:8620\"\ntls = { cert_file = \"c.pem\" }")]),
    (
        "mutual TLS",
        &[(
            "\"127.0.0.1:8620\"",
            "\"127.0.0.1:8620\"\ntls = { cert_file = \"c.pem\", key_file = \"k.pem\", client_ca_file = \"ca.pem\" }",
        )],
    ),
    ("two listeners on one address", &[("127.0.0.1:8623", "127.0.0.1:8620")]),
    ("two listeners on one port of all interfaces", &[("127.0.0.1:8623", "0.0.0.0:8620")]),
    ("two listeners on one port of both families", &[("127.0.0.1:8623", "[::]:8620")]),
    ("two listeners on one mapped address", &[("127.0.0.1:8623", "[::ffff:127.0.0.1]:8620")]),
    ("two listeners on one socket", &[("127.0.0.1:8623", "unix:/run/a.sock"), ("127.0.0.1:8620", "unix:/run/a.sock")]),
    // Who may do what
    ("an open signer", &[("127.0.0.1:8621", "0.0.0.0:8621")]),
    (
        "a signer with clients in clear text",
        &[("\"127.0.0.1:8621\"", "\"0.0.0.0:8621\"\nclient.a.token_file = \"a.token\"")],
    ),
    (
        "a signer with TLS that anyone may use",
        &[("\"127.0.0.1:8621\"", "\"0.0.0.0:8621\"\ntls = { cert_file = \"c.pem\", key_file = \"k.pem\" }")],
    ),
    ("an admin listener in clear text", &[("127.0.0.1:8622", "0.0.0.0:8622")]),
    (
        "an admin listener without tokens",
        &[("[admin.token.operator]\nrole = \"operator\"\nfile = \"data/admin.token\"\n", "")],
    ),
    ("an admin token without role", &[("role = \"operator\"\n", "")]),
    ("an admin token with a role nobody knows", &[("role = \"operator\"", "role = \"admin\"")]),
    ("an admin token from nowhere", &[("file = \"data/admin.token\"\n", "")]),
    (
        "an admin token from two places",
        &[("file = \"data/admin.token\"", "file = \"data/admin.token\"\nenv = \"TOKEN\"")],
    ),
    ("an admin token in the configuration", &[("file = \"data/admin.token\"", "token = \"hunter2-hunter2\"")]),
    ("an admin token in place of a variable's name", &[("file = \"data/admin.token\"", "env = \"hunter2-hunter2\"")]),
    ("an admin token in a variable that is a setting", &[("file = \"data/admin.token\"", "env = \"JWKSD__TOKEN\"")]),
    (
        "two admin tokens in one file",
        &[("[ops]", "[admin.token.second]\nrole = \"viewer\"\nfile = \"data/admin.token\"\n[ops]")],
    ),
    ("an admin token in the seal's file", &[("\"data/admin.token\"", "\"./data/seal.key\"")]),
    ("a client without credential", &[("[admin]", "[signer.client.a]\nkeysets = [\"default\"]\n[admin]")]),
    ("a client with two credentials", &[("[admin]", "[signer.client.a]\nuid = 1\ntoken_file = \"a\"\n[admin]")]),
    ("a client's user ID over TCP", &[("[admin]", "[signer.client.a]\nuid = 1000\n[admin]")]),
    ("a client's certificate in clear text", &[("[admin]", "[signer.client.a]\nsan = \"a.internal\"\n[admin]")]),
    (
        "a client's certificate on a socket",
        &[("\"127.0.0.1:8621\"", "\"unix:/run/s.sock\"\nclient.a.san = \"spiffe://example.com/a\"")],
    ),
    ("a client who is many", &[("[admin]", "[signer.client.a]\nsan = \"*.internal\"\n[admin]")]),
    ("a client who is a trust domain", &[("[admin]", "[signer.client.a]\nsan = \"spiffe://a\"\n[admin]")]),
    ("a client who is an address", &[("[admin]", "[signer.client.a]\nsan = \"10.0.0.7\"\n[admin]")]),
    ("a client who is nobody", &[("[admin]", "[signer.client.a]\nservice_account = \"orders\"\n[admin]")]),
    (
        "two clients with one certificate",
        &[(
            "\"127.0.0.1:8621\"",
            "\"127.0.0.1:8621\"\ntls = { cert_file = \"c\", key_file = \"k\", client_ca_file = \"ca\" }\n\
             client.a.san = \"a.internal\"\nclient.b.san = \"A.internal\"",
        )],
    ),
    (
        "an authority without clients",
        &[(
            "\"127.0.0.1:8621\"",
            "\"127.0.0.1:8621\"\ntls = { cert_file = \"c\", key_file = \"k\", client_ca_file = \"ca\" }\n\
             client.a.token_file = \"a\"",
        )],
    ),
    (
        "an operator with two roles",
        &[(
            "[ops]",
            "[admin.tls]\ncert_file = \"c\"\nkey_file = \"k\"\nclient_ca_file = \"ca\"\n\
             [admin.client.operator]\nrole = \"viewer\"\nsan = \"a.internal\"\n[ops]",
        )],
    ),
    ("an operator without authority", &[("[ops]", "[admin.client.a]\nrole = \"viewer\"\nsan = \"a.internal\"\n[ops]")]),
    ("an operator without a name", &[("[ops]", "[admin.client.a]\nrole = \"viewer\"\n[ops]")]),
    (
        "a cluster's keys in clear text",
        &[("[log]", "[kubernetes]\njwks_url = \"http://kubernetes.default.svc/keys\"\naudience = \" jwksd\"\n[log]")],
    ),
    ("a client's token in the configuration", &[("[admin]", "[signer.client.a]\ntoken = \"hunter2\"\n[admin]")]),
    (
        "a client of an unknown keyset",
        &[("[admin]", "[signer.client.a]\ntoken_file = \"a\"\nkeysets = [\"defualt\"]\n[admin]")],
    ),
    (
        "a client of no keyset and no audience",
        &[("[admin]", "[signer.client.a]\ntoken_file = \"a\"\nkeysets = []\naudiences = []\n[admin]")],
    ),
    (
        "two clients with one token",
        &[("[admin]", "[signer.client.a]\ntoken_file = \"a\"\n[signer.client.b]\ntoken_file = \"a\"\n[admin]")],
    ),
    ("a signature in no time", &[("\"127.0.0.1:8621\"", "\"127.0.0.1:8621\"\nsign_deadline = \"0s\"")]),
    ("a signature in an hour", &[("\"127.0.0.1:8621\"", "\"127.0.0.1:8621\"\nsign_deadline = \"1h\"")]),
    // Store, seal, the rest
    ("no store and no seal", &[("[store]\npath = \"data/keyrings\"\n[seal]\npath = \"data/seal.key\"\n", "")]),
    ("a store without path", &[("path = \"data/keyrings\"", "kind = \"file\"")]),
    ("a store of a later release", &[("path = \"data/keyrings\"", "path = \"data/keyrings\"\nkind = \"kubernetes\"")]),
    ("a store nobody knows", &[("path = \"data/keyrings\"", "path = \"data/keyrings\"\nkind = \"redis\"")]),
    (
        "an initialisation nobody knows",
        &[("path = \"data/keyrings\"", "path = \"data/keyrings\"\ninitialise = \"always\"")],
    ),
    ("a seal of an unknown kind", &[("path = \"data/seal.key\"", "kind = \"aws_kms\"\nkey_id = \"alias/a\"")]),
    ("an aws-kms seal without its key", &[("path = \"data/seal.key\"", "kind = \"aws-kms\"")]),
    (
        "an aws-kms seal with a path",
        &[("path = \"data/seal.key\"", "kind = \"aws-kms\"\nkey_id = \"alias/a\"\npath = \"a\"")],
    ),
    ("a file seal with a KMS key", &[("path = \"data/seal.key\"", "path = \"data/seal.key\"\nkey_id = \"alias/a\"")]),
    ("a KMS key that is none", &[("path = \"data/seal.key\"", "kind = \"aws-kms\"\nkey_id = \"jwksd seal\"")]),
    (
        "the ARN of something else",
        &[("path = \"data/seal.key\"", "kind = \"aws-kms\"\nkey_id = \"arn:aws:s3:eu-central-1:111122223333:key/a\"")],
    ),
    (
        "an earlier KMS key that is the present one",
        &[(
            "path = \"data/seal.key\"",
            "kind = \"aws-kms\"\nkey_id = \"alias/a\"\nprevious.old = { kind = \"aws-kms\", key_id = \"alias/a\" }",
        )],
    ),
    ("a seal in the configuration", &[("path = \"data/seal.key\"", "key = \"hunter2\"")]),
    ("a PEM key in place of a path", &[("\"data/seal.key\"", "\"\"\"-----BEGIN PRIVATE KEY-----\nhunter2\"\"\"")]),
    ("a seal that is the store", &[("\"data/seal.key\"", "\"data/keyrings\"")]),
    (
        "an earlier seal that is the present one",
        &[("[issuer.main]", "[seal.previous.old]\npath = \"data/seal.key\"\n[issuer.main]")],
    ),
    ("an earlier seal without path", &[("[issuer.main]", "[seal.previous.old]\n[issuer.main]")]),
    (
        "AWS KMS settings that cannot be",
        &[(
            "[log]",
            "[backend.aws-kms]\nregion = \"Frankfurt\"\nendpoint_url = \"kms.example.com\"\nattempt_timeout = \"0s\"\n\
             concurrency = 0\ndeletion_window = \"36h\"\n[log]",
        )],
    ),
    (
        "AWS credentials in the configuration",
        &[("[log]", "[backend.aws-kms]\naccess_key_id = \"AKIA\"\nsecret_access_key = \"hunter2\"\n[log]")],
    ),
    ("a role", &[("\n[public]", "role = \"publisher\"\n[public]")]),
    ("a long shutdown", &[("\n[public]", "shutdown_delay = \"2h\"\n[public]")]),
    ("a log format nobody knows", &[("[log]", "[log]\nformat = \"jsn\"")]),
    ("a log level nobody knows", &[("[log]", "[log]\nlevel = \"verbose\"")]),
];

#[test]
fn what_is_broken_is_refused_in_these_words() {
    let mut seen = String::new();
    for (name, replacements) in BROKEN {
        let message = error(base_with(replacements));
        assert!(!message.contains("hunter2"), "{name}: a secret is quoted: {message}");
        seen.push_str(&format!("# {name}\n{message}\n\n"));
    }
    insta::assert_snapshot!(seen);
}

#[test]
fn what_is_wrong_with_a_receiver_of_notices_is_said_without_its_secrets() {
    let notice = "[notice.ops]\nurl = \"http://hooks.example.com/x?sig=hunter2\"\nsecret = \"hunter2\"\n\
                  events = [\"key.activatd\"]\nkeysets = [\"nobody\"]\nbefore = [\"0s\"]\ntimeout = \"1h\"\n\n[public]";
    let message = error(base_with(&[("[public]", notice)]));
    for expected in [
        "notice.ops.url: must begin with https://",
        "notice.ops.secret: secrets do not stand in the configuration",
        "notice.ops.events: \"key.activatd\" is not an event; did you mean `key.activated`?",
        "notice.ops.keysets: \"nobody\" is not a keyset",
        "notice.ops.before: 0s is not more than nothing",
        "notice.ops.timeout: 1h is not between 100ms and 1m",
    ] {
        assert!(message.contains(expected), "{expected} is missing in\n{message}");
    }
    assert!(!message.contains("hunter2"), "{message}");
}

#[test]
fn more_than_the_limits_is_refused() {
    let many = |n: usize| (0..n).map(|i| format!("\"a{i}\"")).collect::<Vec<_>>().join(", ");
    let long = "x".repeat(3000);
    let cases = [
        error(base_with(&[("max_ttl = \"15m\"", &format!("audiences = [{}]", many(65)))])),
        error(base_with(&[("data/keyrings", &long)])),
        error(base_with(&[("[log]", &format!("[log]\n{} = 1", "x".repeat(70)))])),
        error(base_with(&[("\"ES256\"", &format!("\"{}\"", "x".repeat(1000)))])),
        error(base_with(&[("https://auth.example.com", &format!("https://auth.example.com/{}", "x".repeat(600)))])),
    ];
    insta::assert_snapshot!(cases.join("\n"));
}

#[test]
fn several_mistakes_are_reported_at_once() {
    let text = r#"
role = "publisher"
[public]
listen = "0.0.0.0:8620"
[signer]
listen = "0.0.0.0:8621"
[admin]
listen = "127.0.0.1:8620"
tokn = 1
[store]
kind = "postgres"
url = "postgres://"
[issuer.main]
url = "auth.example.com"
max_age = 300
[keyset.default]
algorithm = "ES265"
[keyset.default.rotation]
propagation = "1m"
propagaton = "2m"
[keyset.default.tokens]
clock_skew = "soon"
[keyset.second]
algorithm = "ES256"
[keyset.second.rotation]
every = "1h"
"#;
    insta::assert_snapshot!(error(text));
}

#[test]
fn timing_is_not_judged_by_values_that_could_not_be_read() {
    let message = error(base_with(&[("every = \"30d\"", "every = \"12h\"\npropagation = 5")]));
    assert_eq!(
        message,
        "test.toml: 1 problem\n  keyset.default.rotation.propagation: expected a duration, found an integer: say the \
         unit, \"5s\"?"
    );
}

#[test]
fn a_small_term_that_could_not_be_read_hides_no_timing() {
    let message = error(base_with(&[
        ("every = \"30d\"", "propagation = \"1m\""),
        ("max_ttl = \"15m\"", "clock_skew = 60"),
        ("[keyset.default]", "max_age = 300\n[keyset.default]"),
    ]));
    for path in ["keyset.default.rotation.propagation", "keyset.default.tokens.clock_skew", "issuer.main.max_age"] {
        assert!(message.contains(&format!("\n  {path}: ")), "{path} is not in: {message}");
    }
}

#[test]
fn verifiers_that_could_not_be_read_hide_nothing_of_those_that_could() {
    for other in ["\"envoi\"", "5", "{ name = \"x\" }", "\"36x\""] {
        let list = format!("propagation = \"1m\"\nverifiers = [{other}, \"36h\", \"aws-api-gateway\"]");
        let message = error(base_with(&[("every = \"30d\"", &list)]));
        assert!(message.contains("keyset.default.rotation.verifiers[0]"), "{message}");
        assert!(message.contains("keyset.default.rotation.propagation: "), "{other}: {message}");
        assert!(message.contains("slowest verifier 36h"), "{message}");
        assert!(message.contains("aws-api-gateway cannot read algorithm ES256"), "{message}");
        let alone = format!("propagation = \"1m\"\nverifiers = [{other}]");
        let message = error(base_with(&[("every = \"30d\"", &alone)]));
        assert!(!message.contains("declares none"), "{other} is declared: {message}");
    }
}

#[test]
fn an_empty_list_of_audiences_is_no_way_to_allow_any() {
    for (from, to, path) in [
        ("max_ttl = \"15m\"", "audiences = []", "keyset.default.tokens.audiences"),
        ("[keyset.default]", "[defaults.tokens]\naudiences = []\n[keyset.default]", "defaults.tokens.audiences"),
    ] {
        let message = error(base_with(&[(from, to)]));
        assert!(message.contains(&format!("{path}: an empty list allows no audience: leave it out")), "{message}");
    }
}

#[test]
fn refused_timing_alone_leaves_a_configuration_for_keysets_that_exist() {
    let loaded = valid(&[("every = \"30d\"", "propagation = \"1m\"")]);
    assert_eq!(loaded.timing.len(), 1);
    assert_eq!(loaded.timing[0].path(), "keyset.default.rotation.propagation");
    assert_eq!(loaded.config.keysets.len(), 1);
}

#[test]
fn syntax_errors_say_the_format_and_the_place() {
    let json = |text: &str| Source::Text { name: "test.json".into(), text: text.into(), format: Format::Json };
    let errors = [
        load(&toml("[public]\nlisten = 127.0.0.1\n")).unwrap_err().to_string(),
        load(&toml("[public\n")).unwrap_err().to_string(),
        load(&toml("a = 1\na = 2\n")).unwrap_err().to_string(),
        load(&toml("public:\n  listen: x\n")).unwrap_err().to_string(),
        load(&json("{\"public\": {\n  \"listen\": }")).unwrap_err().to_string(),
        load(&json("")).unwrap_err().to_string(),
        load(&json("{\"a\": 1,\n\"a\": 2}")).unwrap_err().to_string(),
        load(&json("[1]")).unwrap_err().to_string(),
        load(&json("{} {}")).unwrap_err().to_string(),
    ];
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn defaults_are_those_of_the_design() {
    let text = r#"
[public]
listen = "127.0.0.1:8620"
[store]
path = "data/keyrings"
[seal]
path = "data/seal.key"
[issuer.main]
url = "https://auth.example.com"
[keyset.default]
algorithm = "ES256"
"#;
    let config = load(&toml(text)).unwrap().config;
    let policy = &config.keysets[0].policy;
    let span = |text| Span::parse(text).unwrap();
    assert_eq!(policy.rotation.schedule, Schedule::Every(span("30d")));
    assert_eq!(policy.rotation.propagation, span("24h"));
    assert_eq!(policy.rotation.successors, 2);
    assert_eq!(policy.rotation.overlap_extra, Span::ZERO);
    assert_eq!(policy.rotation.bootstrap, Bootstrap::Wait);
    assert_eq!(policy.rotation.verifiers, []);
    assert_eq!(policy.rotation.clock_skew, span("60s"));
    assert_eq!((policy.rotation.staleness_limit, policy.rotation.publish_lag), (Span::ZERO, Span::ZERO));
    assert_eq!(policy.issuer.max_age, span("5m"));
    assert_eq!(policy.issuer.stale_if_error, Span::ZERO);
    assert_eq!(policy.issuer.caches, [span("5m")]);
    assert_eq!(policy.issuer.discovery, Discovery::Minimal);
    assert_eq!(policy.issuer.jwks_paths, Vec::<String>::new());
    assert_eq!(policy.backend, "local");
    assert_eq!(policy.tokens.max_ttl, span("15m"));
    assert_eq!(policy.tokens.default_ttl, span("5m"));
    assert_eq!(policy.tokens.required_claims, ["aud", "sub"]);
    assert_eq!(policy.tokens.forbidden_claims, ["password", "password_hash", "ssn", "secret"]);
    assert_eq!(policy.tokens.types, ["JWT", "at+jwt"]);
    assert_eq!(policy.tokens.audiences, Vec::<String>::new());
    assert_eq!(policy.tokens.backdate, Span::ZERO);
    assert_eq!((config.store.initialise, config.store.staleness_limit), (Initialise::Never, span("1h")));
    assert_eq!(config.store.publish_lag, span("1m"));
    assert_eq!(config.shutdown_delay, Span::ZERO);
    assert_eq!((config.log.format, config.log.level, config.log.signatures), (LogFormat::Text, LogLevel::Info, false));
    assert!(config.signer.is_none() && config.admin.is_none() && config.ops.is_none());

    let config = valid(&[]).config;
    assert_eq!(config.signer.unwrap().sign_deadline, span("2s"));
}

#[test]
fn the_default_life_of_tokens_is_never_longer_than_the_longest() {
    let config = valid(&[("max_ttl = \"15m\"", "max_ttl = \"1m\"")]).config;
    assert_eq!(config.keysets[0].policy.tokens.default_ttl, Span::MINUTE);
}

#[test]
fn keysets_take_from_the_defaults_what_they_do_not_say() {
    let config = valid(&[(
        "[log]",
        "[defaults.rotation]\nschedule = \"@monthly\"\ntimezone = \"Europe/Berlin\"\nsuccessors = 3\npropagation = \"2d\"\n\
         [defaults.tokens]\nmax_ttl = \"1h\"\nclock_skew = \"5s\"\naudiences = [\"a\"]\n\
         [keyset.second]\nalgorithm = \"PS256\"\nrsa_bits = 3072\n\
         [keyset.second.tokens]\naudiences = [\"b\"]\n\
         [keyset.third]\nalgorithm = \"EdDSA\"\neddsa_label = \"Ed25519\"\n\
         [keyset.third.rotation]\nschedule = \"@weekly\"\n[log]",
    )])
    .config;
    let [first, second, third] = &config.keysets[..] else { panic!("{:?}", config.keysets) };
    assert_eq!([&first.name, &second.name, &third.name].map(|name| name.as_str()), ["default", "second", "third"]);
    assert_eq!(first.policy.rotation.schedule, Schedule::Every(Span::parse("30d").unwrap()));
    assert_eq!(first.policy.tokens.max_ttl, Span::parse("15m").unwrap());
    assert_eq!(first.policy.tokens.audiences, ["a"]);
    assert_eq!(first.policy.rotation.clock_skew, Span::parse("5s").unwrap());
    assert_eq!(second.policy.rotation.schedule, Schedule::cron("@monthly", Some("Europe/Berlin")).unwrap());
    assert_eq!(second.policy.rotation.successors, 3);
    assert_eq!(second.policy.tokens.max_ttl, Span::HOUR);
    assert_eq!(second.policy.tokens.audiences, ["b"]);
    assert_eq!(second.policy.algorithm, Algorithm::Ps256 { rsa_bits: RsaBits::B3072 });
    assert_eq!(third.policy.rotation.schedule, Schedule::cron("@weekly", Some("Europe/Berlin")).unwrap());
    assert_eq!(third.policy.algorithm, Algorithm::EdDsa { label: EdLabel::Ed25519 });
}

#[test]
fn keysets_stay_in_the_order_of_the_file() {
    let keysets = ["zulu", "alpha", "mike"].map(|name| format!("[keyset.{name}]\nalgorithm = \"ES256\"\n")).concat();
    let config = valid(&[("[log]", &format!("{keysets}[log]"))]).config;
    let names: Vec<_> = config.keysets.iter().map(|keyset| keyset.name.as_str()).collect();
    assert_eq!(names, ["default", "zulu", "alpha", "mike"]);
    assert_eq!(config.keyset("mike").unwrap().name.as_str(), "mike");
}

#[test]
fn ten_thousand_keysets_are_read() {
    let mut text = base_with(&[("\"ES256\"", "\"ES256\"\nissuer = \"main\"")]);
    text.push_str("[defaults.rotation]\nschedule = \"0 10 * * 2\"\ntimezone = \"Europe/Berlin\"\n");
    for n in 0..10_000 {
        text.push_str(&format!("[issuer.t{n}]\nurl = \"https://auth.example.com/t{n}\"\n"));
        text.push_str(&format!("[keyset.t{n}]\nissuer = \"t{n}\"\nalgorithm = \"ES256\"\n"));
    }
    let loaded = load(&toml(text)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((loaded.config.keysets.len(), loaded.timing.len()), (10_001, 0));
}

#[test]
fn listeners_and_credentials_are_read() {
    let config = valid(&[(
        "\"127.0.0.1:8621\"",
        "\"unix:/run/jwksd/signer.sock\"\nsocket_mode = \"0660\"\nsign_deadline = \"500ms\"\n\
         [signer.client.app]\nuid = 1000\nkeysets = [\"default\"]\naudiences = [\"a\"]\n\
         [signer.client.job]\ntoken_file = \"job.token\"\n",
    )])
    .config;
    let signer = config.signer.as_ref().unwrap();
    let address = Address::Unix { path: "/run/jwksd/signer.sock".into(), mode: 0o660 };
    assert_eq!(
        (signer.listener.address.to_string().as_str(), &signer.listener.address),
        ("unix:/run/jwksd/signer.sock", &address)
    );
    assert_eq!(signer.sign_deadline, Span::from_millis(500));
    let [app, job] = &signer.clients[..] else { panic!("{:?}", signer.clients) };
    assert_eq!((app.name.as_str(), &app.credential), ("app", &ClientCredential::Uid(1000)));
    assert_eq!(app.keysets.as_ref().unwrap()[0].as_str(), "default");
    assert_eq!(app.audiences.as_ref().unwrap(), &["a"]);
    assert_eq!(job.credential, ClientCredential::TokenFile("job.token".into()));
    assert_eq!((&job.keysets, &job.audiences), (&None, &None));
    let token = &config.admin.as_ref().unwrap().tokens[0];
    assert_eq!((token.name.as_str(), token.role), ("operator", Role::Operator));
    assert_eq!(token.source, SecretSource::File("data/admin.token".into()));
    assert_eq!(config.reloadable_files(), [PathBuf::from("data/admin.token"), "job.token".into()]);
}

#[test]
fn clients_known_by_certificates_and_service_accounts_are_read() {
    let loaded = valid(&[
        (
            "\"127.0.0.1:8621\"",
            "\"0.0.0.0:8621\"\ntls = { cert_file = \"c\", key_file = \"k\", client_ca_file = \"ca\" }\n\
             [signer.client.app]\nsan = \"App.Internal\"\n[signer.client.pod]\nservice_account = \"shop/orders\"\n",
        ),
        ("[log]", "[kubernetes]\nissuer = \"https://cluster\"\n[log]"),
    ]);
    let config = loaded.config;
    let clients = &config.signer.as_ref().unwrap().clients;
    assert_eq!(clients[0].credential, ClientCredential::San(config::San::Dns("app.internal".to_owned())));
    let account = config::ServiceAccount { namespace: "shop".to_owned(), name: "orders".to_owned() };
    assert_eq!(clients[1].credential, ClientCredential::ServiceAccount(account));
    let expected = config::Kubernetes { issuer: Some("https://cluster".to_owned()), ..config::Kubernetes::default() };
    assert_eq!(config.kubernetes, expected);
    assert!(config.reloadable_files().contains(&"ca".into()));
    assert!(!config.needs_certificates("signer"), "the pod shows none");
    let idle = valid(&[("[log]", "[kubernetes]\n[log]")]).warnings;
    assert!(idle.iter().any(|warning| warning.path == "kubernetes"), "{idle:?}");
    let same = valid(&[("[log]", "[kubernetes]\nissuer = \"https://a\"\naudience = \"https://a\"\n[log]")]).warnings;
    assert!(same.iter().any(|warning| warning.path == "kubernetes.audience"), "{same:?}");
}

#[test]
fn dubious_settings_are_warned_of() {
    let texts = |replacements: &[(&str, &str)]| {
        valid(replacements).warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let seen = [
        texts(&[("https://auth.example.com", "http://auth.example.com")]),
        texts(&[("https://auth.example.com", "http://127.0.0.1:8620")]),
        texts(&[("127.0.0.1:8621\"", "unix:/run/s.sock\"\nsocket_mode = \"0666\"")]),
        texts(&[("data/seal.key", "./data/keyrings/seal.key")]),
        texts(&[("max_ttl = \"15m\"", "required_claims = [\"sub\", \"exp\"]")]),
        texts(&[("[keyset.default]", "caches = [\"1m\"]\n[keyset.default]")]),
        texts(&[("[keyset.default]", "caches = []\n[keyset.default]")]),
        texts(&[
            ("\"ES256\"", "\"ES256\"\nissuer = \"main\""),
            ("[log]", "[issuer.other]\nurl = \"https://auth.example.com/other\"\n[log]"),
        ]),
    ];
    insta::assert_snapshot!(seen.join("\n---\n"));
}

#[test]
fn claims_the_daemon_sets_are_not_demanded_of_callers() {
    let config = valid(&[("max_ttl = \"15m\"", "required_claims = [\"sub\", \"exp\", \"jti\"]")]).config;
    assert_eq!(config.keysets[0].policy.tokens.required_claims, ["sub"]);
}

#[test]
fn the_environment_overrides_single_values() {
    let variables = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>().into_iter()
    };
    let good = variables(&[
        ("JWKSD__PUBLIC__LISTEN", "127.0.0.1:9000"),
        ("JWKSD__KEYSET__DEFAULT__ALGORITHM", "RS256"),
        ("JWKSD__KEYSET__DEFAULT__RSA_BITS", "4096"),
        ("JWKSD__DEFAULTS__ROTATION__PROPAGATION", "2d"),
        ("JWKSD__LOG__SIGNATURES", "true"),
        ("JWKSD_CONFIG", "elsewhere.toml"),
        ("HOME", "/root"),
    ]);
    let config = config::load(&toml(BASE), good).unwrap().config;
    assert_eq!(config.public.unwrap().address.to_string(), "127.0.0.1:9000");
    assert_eq!(config.keysets[0].policy.algorithm, Algorithm::Rs256 { rsa_bits: RsaBits::B4096 });
    assert_eq!(config.keysets[0].policy.rotation.propagation, Span::parse("2d").unwrap());
    assert!(config.log.signatures);

    let bad = variables(&[
        ("JWKSD__PUBLIC__LISTN", "127.0.0.1:9000"),
        ("JWKSD__KEYSET__OTHER__ALGORITHM", "RS256"),
        ("JWKSD__KEYSET__DEFAULT__ALGORITHM", "RS265"),
        ("JWKSD__ADMIN__TOKEN__OPERATOR__VALUE", "hunter2"),
        ("JWKSD__SEAL__KEY", "hunter2"),
    ]);
    insta::assert_snapshot!(config::load(&toml(BASE), bad).unwrap_err());
}

#[test]
fn json_means_the_same_as_toml() {
    for path in samples() {
        let text = std::fs::read_to_string(&path).unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        let json = serde_json::to_string_pretty(&table).unwrap();
        let json = Source::Text { name: "test.json".into(), text: json, format: Format::Json };
        assert_eq!(load(&json).unwrap().config, load(&Source::File(path)).unwrap().config);
    }
}

#[test]
fn a_file_named_json_is_json_and_others_are_toml() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("jwksd.JSON");
    std::fs::write(&json, "{").unwrap();
    assert!(load(&Source::File(json)).unwrap_err().to_string().contains("not valid JSON, line 1"));
    for name in ["jwksd.toml", "jwksd.conf", "jwksd"] {
        let path = folder.path().join(name);
        std::fs::write(&path, BASE).unwrap();
        let loaded = load(&Source::File(path.clone())).unwrap();
        assert_eq!(loaded.file.unwrap().0, path);
    }
}

#[test]
fn every_sample_loads_and_its_timing_holds() {
    let paths = samples();
    assert!(paths.len() >= 9, "{paths:?}");
    for path in paths {
        let loaded = load(&Source::File(path.clone())).unwrap_or_else(|error| panic!("{error}"));
        assert!(loaded.timing.is_empty(), "{}: {:?}", path.display(), loaded.timing);
    }
}

#[test]
fn the_built_in_configuration_is_the_default_file() {
    let built_in = load(&Source::Embedded).unwrap();
    let file = load(&Source::File(sample("config/jwksd.toml"))).unwrap();
    assert_eq!(built_in.config, file.config);
    assert_eq!(built_in.config.store.initialise, Initialise::IfEmpty);
    assert_eq!(built_in.config.listeners().count(), 4);
}

#[test]
fn the_reference_names_every_key_and_no_other() {
    let text = std::fs::read_to_string(sample("config/reference.toml")).unwrap();
    let table: toml::Value = toml::from_str(&text).unwrap();
    let stores = other_stores(&text).map(|store| toml::from_str::<toml::Value>(&store).unwrap());
    for key in config::known_keys() {
        let segments: Vec<&str> = key.path.split('.').collect();
        let leaf = segments[segments.len() - 1];
        match key.refused {
            // Keys that hold a secret are refused so that the message can say where it belongs; others are announced.
            Some(reason) if reason.contains("do not stand in the configuration") => {}
            Some(_) => assert!(
                text.lines().any(|line| line.starts_with('#') && line.contains(leaf)),
                "{} is not announced",
                key.path
            ),
            None => assert!(
                // A seal has a path or a key_id: its table shows one, the tables of earlier seals show both. A store is
                // of one kind: the others stand in comments.
                stands(&table, &segments)
                    || (segments[0] == "store" && stores.iter().any(|store| stands(store, &segments)))
                    || shared_table_is_explained(&segments)
                    // Other builds refuse it: tests/traces.rs loads it from the comments.
                    || (segments[..2] == ["telemetry", "traces"] && text.contains(&format!("\n# {leaf} = ")))
                    || (key.path == "seal.key_id" && stands(&table, &["seal", "previous", "NAME", "key_id"])),
                "{} is not in the reference",
                key.path
            ),
        }
    }
    // The other direction is that it loads: unknown keys are errors.
    load(&Source::File(sample("config/reference.toml"))).unwrap();
}

/// The two tables of shared stores in the comments of the reference.
fn other_stores(text: &str) -> [String; 2] {
    let mut blocks = text.split("# [store]\n").skip(1).map(|block| {
        let lines = block.lines().map_while(|line| line.strip_prefix('#')).map(str::trim_start);
        // What has no `=` explains the line before it.
        let settings = lines.filter(|line| line.contains(" = ")).collect::<Vec<_>>();
        format!("[store]\n{}\n", settings.join("\n"))
    });
    let stores = [blocks.next().expect("a first one"), blocks.next().expect("a second one")];
    assert!(blocks.next().is_none());
    stores
}

#[test]
fn the_other_stores_of_the_reference_load_and_show_the_defaults() {
    let text = std::fs::read_to_string(sample("config/reference.toml")).unwrap();
    let [postgres, upstream] = other_stores(&text);
    // The reference shows both places where a secret can be.
    let one = |store: &str, other: &str| {
        store.lines().filter(|line| !line.starts_with(other)).map(|line| format!("{line}\n")).collect::<String>()
    };
    let path = "[store]\npath = \"data/keyrings\"\n";
    let shown = valid(&[(path, &one(&postgres, "url_env"))]).config.store;
    let plain = valid(&[(path, "[store]\nkind = \"postgres\"\nurl_file = \"secrets/database.url\"\n")]).config.store;
    let mut expected = plain;
    expected.state_path.clone_from(&shown.state_path);
    let (StoreKind::Postgres(shown_postgres), StoreKind::Postgres(default)) = (&shown.kind, &mut expected.kind) else {
        panic!("{shown:?}")
    };
    default.ca_file.clone_from(&shown_postgres.ca_file);
    assert_eq!(shown, expected);
    assert!(shown.state_path.is_some() && shown_postgres.ca_file.is_some());
    // What publishes uses all keysets.
    let signer = [
        (path, one(&one(&upstream, "token_env"), "keysets")),
        ("\n[public]", "role = \"signer\"\n[public]".to_owned()),
    ];
    let shown = valid(&signer.each_ref().map(|(from, to)| (*from, to.as_str()))).config.store;
    assert!(matches!(&shown.kind, StoreKind::Upstream(upstream) if upstream.urls.len() == 2), "{shown:?}");
}

/// Whether some table that `segments` can mean has the key.
fn stands(value: &toml::Value, segments: &[&str]) -> bool {
    let Some((first, rest)) = segments.split_first() else { return true };
    let Some(table) = value.as_table() else { return false };
    match *first {
        "NAME" => table.values().any(|value| stands(value, rest)),
        key => table.get(key).is_some_and(|value| stands(value, rest)),
    }
}

/// Tables that are the same elsewhere are explained there: socket and TLS at the first listener, defaults at the keyset.
fn shared_table_is_explained(segments: &[&str]) -> bool {
    matches!(
        segments,
        ["defaults", ..]
            | ["public" | "admin" | "ops" | "replication", "socket_mode"]
            | ["signer" | "admin" | "ops" | "replication", "tls", ..]
            // On a Unix socket nobody shows a certificate.
            | ["signer", "client", "NAME", "san"]
    )
}

#[test]
fn the_reference_shows_the_defaults() {
    let reference = load(&Source::File(sample("config/reference.toml"))).unwrap().config;
    let plain = valid(&[("\"ES256\"", "\"RS256\"")]).config;
    let (shown, default) = (&reference.keysets[0].policy, &plain.keysets[0].policy);
    assert_eq!(shown.algorithm, default.algorithm);
    assert_eq!(shown.rotation.propagation, default.rotation.propagation);
    assert_eq!(shown.rotation.schedule, default.rotation.schedule);
    assert_eq!(shown.rotation.successors, default.rotation.successors);
    assert_eq!(shown.rotation.overlap_extra, default.rotation.overlap_extra);
    assert_eq!(shown.rotation.clock_skew, default.rotation.clock_skew);
    assert_eq!(shown.rotation.bootstrap, default.rotation.bootstrap);
    assert_eq!(shown.issuer.max_age, default.issuer.max_age);
    assert_eq!(shown.issuer.discovery, default.issuer.discovery);
    assert_eq!(shown.tokens.max_ttl, default.tokens.max_ttl);
    assert_eq!(shown.tokens.default_ttl, default.tokens.default_ttl);
    assert_eq!(shown.tokens.required_claims, default.tokens.required_claims);
    assert_eq!(shown.tokens.forbidden_claims, default.tokens.forbidden_claims);
    assert_eq!(shown.tokens.types, default.tokens.types);
    assert_eq!(shown.tokens.backdate, default.tokens.backdate);
    assert_eq!(reference.log, plain.log);
    assert_eq!(reference.telemetry, plain.telemetry);
    assert_eq!(reference.shutdown_delay, plain.shutdown_delay);
    assert_eq!(reference.store, plain.store);
    assert_eq!(reference.signer.unwrap().sign_deadline, plain.signer.unwrap().sign_deadline);
}

#[test]
fn the_first_file_that_exists_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second, named] = ["a.toml", "b.toml", "c.toml"].map(|name| folder.path().join(name));
    let searched = [first.as_path(), second.as_path()];
    let find = |flag: Option<&Path>, variable: Option<&str>| Source::find_among(flag, variable, &searched);
    assert_eq!(find(None, None), Source::Embedded);
    std::fs::write(&second, BASE).unwrap();
    assert_eq!(find(None, None), Source::File(second.clone()));
    std::fs::write(&first, BASE).unwrap();
    assert_eq!(find(None, None), Source::File(first.clone()));
    assert_eq!(find(None, Some("")), Source::File(first.clone()));
    // What is named is taken whether it exists or not; its absence is an error, not a reason to take another.
    assert_eq!(find(None, named.to_str()), Source::File(named.clone()));
    assert_eq!(find(Some(&first), named.to_str()), Source::File(first));
    let error = load(&Source::File(named.clone())).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot read the configuration {}; name another one with --config", named.display())
    );
}

#[test]
fn what_needs_a_restart_is_named_and_what_does_not_is_not() {
    let old = valid(&[]).config;
    let reloadable = valid(&[
        ("\"30d\"", "\"60d\""),
        ("https://auth", "https://login"),
        ("\"data/admin.token\"", "\"data/other.token\""),
        ("[log]", "[keyset.second]\nalgorithm = \"ES256\"\n[log]\nsignatures = true"),
        ("\n[public]", "shutdown_delay = \"5s\"\n[public]"),
    ])
    .config;
    assert_eq!(config::restart_needed(&old, &reloadable), Vec::<String>::new());
    let changed = valid(&[
        ("127.0.0.1:8620\"", "127.0.0.1:9620\"\ntls = { cert_file = \"c\", key_file = \"k\" }"),
        ("127.0.0.1:8621\"", "unix:/run/s.sock\"\nsocket_mode = \"0660\""),
        ("[ops]\nlisten = \"127.0.0.1:8623\"\n", ""),
        ("127.0.0.1:8622\"", "127.0.0.1:8622\"\npage = false"),
        ("data/keyrings", "data/other"),
        ("\"data/seal.key\"", "\"data/new.key\"\nprevious.old.path = \"data/seal.key\""),
        ("[log]", "[log]\nformat = \"json\"\nlevel = \"debug\""),
    ])
    .config;
    insta::assert_snapshot!(config::restart_needed(&old, &changed).join("\n"));
}

#[test]
fn files_that_must_exist_are_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let config: Config = valid(&[
        (
            "127.0.0.1:8620\"",
            &format!("127.0.0.1:8620\"\ntls = {{ cert_file = {:?}, key_file = {:?} }}", path("c"), path("k")),
        ),
        ("[admin]", &format!("[signer.client.a]\ntoken_file = {:?}\n[admin]", path("a.token"))),
        ("data/admin.token", &path("admin.token")),
        ("data/seal.key", &path("seal.key")),
    ])
    .config;
    let keys = |problems: &[config::Problem]| problems.iter().map(|p| p.path.clone()).collect::<Vec<_>>();
    let report = config::examine_files(&config);
    let missing = ["public.tls.cert_file", "public.tls.key_file", "signer.client.a.token_file"];
    assert_eq!((keys(&report.problems), keys(&report.warnings)), (missing.map(String::from).to_vec(), vec![]));

    for name in ["c", "k", "a.token", "admin.token", "seal.key"] {
        std::fs::write(folder.path().join(name), "short\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(folder.path().join(name), mode).unwrap();
    }
    let report = config::examine_files(&config);
    assert_eq!(report.problems, []);
    let loose = [
        "public.tls.key_file",
        "signer.client.a.token_file",
        "signer.client.a.token_file",
        "admin.token.operator.file",
        "admin.token.operator.file",
        "seal.path",
    ];
    assert_eq!(keys(&report.warnings), loose.map(String::from).to_vec());
}

#[tokio::test(start_paused = true)]
async fn a_swapped_symlink_is_seen_as_kubernetes_swaps_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (version, content) in [("..v1", "old"), ("..v2", "new"), ("..v3", "new")] {
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("jwksd.toml"), content).unwrap();
    }
    std::os::unix::fs::symlink("..v1", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/jwksd.toml", at("jwksd.toml")).unwrap();
    let swap = |version: &str| {
        std::os::unix::fs::symlink(version, at("..tmp")).unwrap();
        std::fs::rename(at("..tmp"), at("..data")).unwrap();
    };
    let mut watch = Watch::new([at("jwksd.toml")]);
    swap("..v2");
    assert_eq!(watch.changed().await, [at("jwksd.toml")]);
    // The same content at another place is no change.
    swap("..v3");
    let nothing = tokio::time::timeout(std::time::Duration::from_secs(60), watch.changed()).await;
    assert!(nothing.is_err(), "{nothing:?}");
}

fn sample(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn samples() -> Vec<PathBuf> {
    let mut paths = vec![sample("config/jwksd.toml"), sample("config/reference.toml")];
    let examples = std::fs::read_dir(sample("config/examples")).expect("the examples are there");
    paths.extend(examples.map(|entry| entry.expect("a readable folder").path()));
    paths.sort();
    paths
}

#[test]
fn a_key_in_aws_kms_may_be_named_in_each_way_that_the_service_knows() {
    let arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    let multi_region = "arn:aws-cn:kms:cn-north-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab";
    let alias_arn = "arn:aws:kms:eu-central-1:111122223333:alias/teams/jwksd";
    for key_id in [arn, multi_region, alias_arn, "alias/teams/jwksd_seal-1", "1234abcd-12ab-34cd-56ef-1234567890ab"] {
        let changed = BASE.replace("path = \"data/seal.key\"", &format!("kind = \"aws-kms\"\nkey_id = \"{key_id}\""));
        let loaded = load(&toml(&changed)).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(loaded.config.seal.key, config::SealKey::AwsKms { key_id: key_id.to_owned() });
    }
}

#[test]
fn telemetry_is_refused_in_words_that_help() {
    let refused = |tables: &str| match load(&toml(format!("{BASE}{tables}"))) {
        Err(ConfigErrors::Invalid(invalid)) => {
            invalid.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        }
        other => panic!("{tables}: {other:?}"),
    };
    let listeners = refused("[telemetry.access_log]\nlisteners = [\"sinner\"]\n");
    assert!(listeners.contains("telemetry.access_log.listeners") && listeners.contains("`signer`"), "{listeners}");
    for share in ["1.5", "-0.1", "2", "nan"] {
        let told = refused(&format!("[telemetry.access_log]\nsample_ratio = {share}\n"));
        assert!(told.contains("a share is from 0 (none) to 1 (all)"), "{told}");
    }
    assert!(refused("[telemetry.access_log]\nsample_ratio = \"10%\"\n").contains("such as 0.1"));
    assert!(refused("[telemetry.traces]\nendpoint = \"localhost:4318\"\n").contains("base URL of a collector"));
    if !cfg!(feature = "otel") {
        let told = refused("[telemetry.traces]\n");
        assert!(told.contains("telemetry.traces") && told.contains("--features otel"), "{told}");
    }
    let variables =
        [("JWKSD__TELEMETRY__ACCESS_LOG__ENABLED", "true"), ("JWKSD__TELEMETRY__ACCESS_LOG__SAMPLE_RATIO", "0.25")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let loaded = config::load(&toml(BASE), variables.into_iter()).unwrap().config.telemetry.access_log;
    assert!(loaded.enabled && loaded.sample_ratio.millionths() == 250_000, "{loaded:?}");
}
