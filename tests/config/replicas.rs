//! Roles, stores that several processes share, the replication listener and publishers.

use jwksd::config::{Postgres, ProcessRole, Publisher, PublisherKind, Upstream};

use super::*;

const FILE: &str = "path = \"data/keyrings\"";
const POSTGRES: &str = "kind = \"postgres\"\nurl_file = \"db.url\"";
const MANAGER: (&str, &str) = ("\n[public]", "role = \"manager\"\n[public]");
const NO_SIGNER: (&str, &str) = ("[signer]\nlisten = \"127.0.0.1:8621\"\n", "");

/// All that a signer needs.
const SIGNER: &str = r#"
role = "signer"
[signer]
listen = "127.0.0.1:8621"
[store]
kind = "upstream"
urls = ["https://jwksd.example.com:8624"]
token_file = "edge.token"
[seal]
path = "data/seal.key"
"#;

fn signer_with(replacements: &[(&str, &str)]) -> String {
    replacements.iter().fold(SIGNER.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the signer has no {from:?}");
        text.replacen(from, to, 1)
    })
}

fn valid_signer(replacements: &[(&str, &str)]) -> Loaded {
    load(&toml(signer_with(replacements))).unwrap_or_else(|error| panic!("{error}"))
}

fn words(loaded: &Loaded) -> Vec<String> {
    loaded.warnings.iter().map(ToString::to_string).collect()
}

fn name(text: &str) -> jwksd::keyring::name::Name {
    jwksd::keyring::name::Name::parse(text).expect("a name")
}

#[test]
fn every_role_works_with_a_database() {
    for (role, expected) in
        [("all", ProcessRole::All), ("manager", ProcessRole::Manager), ("signer", ProcessRole::Signer)]
    {
        let role = format!("role = \"{role}\"\n[public]");
        let mut replacements = vec![("\n[public]", role.as_str()), (FILE, POSTGRES)];
        if expected == ProcessRole::Manager {
            replacements.push(NO_SIGNER);
        }
        let config = valid(&replacements).config;
        assert_eq!(config.role, expected);
        assert_eq!(config.store.kind.as_str(), "postgres");
    }
    assert_eq!(valid(&[]).config.role, ProcessRole::All);
}

#[test]
fn a_database_has_defaults_for_all_but_its_url() {
    let config = valid(&[(FILE, POSTGRES)]).config;
    let expected = Postgres {
        url: SecretSource::File("db.url".into()),
        ca_file: None,
        schema: "jwksd".to_owned(),
        statement_timeout: Span::from_secs(5),
        connections: 4,
    };
    assert_eq!(config.store.kind, StoreKind::Postgres(expected));
    assert_eq!((config.store.staleness_limit, config.store.publish_lag), (Span::HOUR, Span::MINUTE));
    assert_eq!((config.store.initialise, config.store.state_path), (Initialise::Never, None));
}

#[test]
fn every_setting_of_a_database_is_read() {
    let store = "kind = \"postgres\"\nurl_env = \"DATABASE_URL\"\nca_file = \"ca.pem\"\nschema = \"_auth2\"\n\
         statement_timeout = \"100ms\"\nconnections = 64\nstate_path = \"data/replica\"\ninitialise = \"if-empty\"\n\
         staleness_limit = \"10m\"\npublish_lag = \"20s\"";
    let store = valid(&[(FILE, store)]).config.store;
    let expected = Postgres {
        url: SecretSource::Environment("DATABASE_URL".to_owned()),
        ca_file: Some("ca.pem".into()),
        schema: "_auth2".to_owned(),
        statement_timeout: Span::from_millis(100),
        connections: 64,
    };
    assert_eq!(store.kind, StoreKind::Postgres(expected));
    assert_eq!((store.staleness_limit, store.publish_lag), (Span::MINUTE.times(10), Span::from_secs(20)));
    assert_eq!((store.initialise, store.state_path), (Initialise::IfEmpty, Some("data/replica".into())));
}

#[test]
fn the_limits_of_a_shared_store_are_part_of_every_policy_and_of_its_timing() {
    let rotation = |store: &str| valid(&[(FILE, store)]).config.keysets[0].policy.rotation.clone();
    let given = rotation(&format!("{POSTGRES}\nstaleness_limit = \"10m\"\npublish_lag = \"20s\""));
    assert_eq!((given.staleness_limit, given.publish_lag), (Span::MINUTE.times(10), Span::from_secs(20)));
    let default = rotation(POSTGRES);
    assert_eq!((default.staleness_limit, default.publish_lag), (Span::HOUR, Span::MINUTE));
    let file = rotation(&format!("{FILE}\nstaleness_limit = \"10m\"\npublish_lag = \"20s\""));
    assert_eq!((file.staleness_limit, file.publish_lag), (Span::ZERO, Span::ZERO));

    // caches 5m + publish_lag 2h + clock_skew 1m
    let slow = format!("{POSTGRES}\npublish_lag = \"2h\"");
    let findings = valid(&[(FILE, &slow), ("\"30d\"", "\"30d\"\npropagation = \"2h\"")]).timing;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].message.contains("store.publish_lag 2h"), "{}", findings[0].message);
    assert!(findings[0].message.ends_with("= 2h6m: raise it to at least 2h6m"), "{}", findings[0].message);
}

#[test]
fn the_limits_count_for_a_file_store_that_others_read_from() {
    let replication = (
        "\n[public]",
        "\n[replication]\nlisten = \"127.0.0.1:8624\"\n[replication.client.edge]\ntoken_file = \"edge.token\"\n[public]",
    );
    let limits = |replacements: &[(&str, &str)]| {
        let rotation = valid(replacements).config.keysets[0].policy.rotation.clone();
        (rotation.staleness_limit, rotation.publish_lag)
    };
    assert_eq!(limits(&[]), (Span::ZERO, Span::ZERO));
    assert_eq!(limits(&[replication]), (Span::HOUR, Span::MINUTE));
    // Signers of such a store would stop at once if a reload took the limits away under them.
    let (alone, serving) = (valid(&[]).config, valid(&[replication]).config);
    for (from, to) in [(&alone, &serving), (&serving, &alone)] {
        let changes = jwksd::config::restart_first(from, to);
        assert!(changes.iter().any(|change| change.starts_with("replication: ")), "{changes:?}");
    }
}

#[test]
fn a_limit_that_could_not_be_read_is_not_counted_with_another_value() {
    let store = format!("{POSTGRES}\npublish_lag = 2");
    let message = error(base_with(&[(FILE, &store), ("\"30d\"", "\"30d\"\npropagation = \"2h\"")]));
    assert!(message.starts_with("test.toml: 1 problem\n  store.publish_lag: expected a duration"), "{message}");
}

#[test]
fn a_signer_needs_neither_issuers_nor_keysets_nor_a_public_listener() {
    let loaded = valid_signer(&[]);
    let config = &loaded.config;
    let expected = Upstream {
        urls: vec!["https://jwksd.example.com:8624".to_owned()],
        token: SecretSource::File("edge.token".into()),
        ca_file: None,
        keysets: None,
    };
    assert_eq!(config.store.kind, StoreKind::Upstream(expected));
    assert_eq!((config.role, &config.public), (ProcessRole::Signer, &None));
    assert!(config.issuers.is_empty() && config.keysets.is_empty() && config.publishers.is_empty());
    assert_eq!(config.listeners().map(|(table, _)| table).collect::<Vec<_>>(), ["signer"]);
    assert_eq!((words(&loaded), &loaded.timing), (vec![], &vec![]));
}

#[test]
fn every_setting_of_an_upstream_is_read() {
    let config = valid_signer(&[
        (
            "[\"https://jwksd.example.com:8624\"]",
            "[\"https://a.example.com/jwksd/\", \"http://127.0.0.1:1\", \"http://[::1]\"]",
        ),
        (
            "token_file = \"edge.token\"",
            "token_env = \"EDGE\"\nca_file = \"ca\"\nkeysets = [\"a\", \"b\"]\nstate_path = \"s\"",
        ),
        ("\"127.0.0.1:8621\"", "\"127.0.0.1:8621\"\nclient.x = { token_file = \"x\", keysets = [\"b\"] }"),
    ])
    .config;
    let expected = Upstream {
        urls: ["https://a.example.com/jwksd", "http://127.0.0.1:1", "http://[::1]"].map(String::from).to_vec(),
        token: SecretSource::Environment("EDGE".to_owned()),
        ca_file: Some("ca".into()),
        keysets: Some(vec![name("a"), name("b")]),
    };
    assert_eq!(config.store.kind, StoreKind::Upstream(expected));
    assert_eq!(config.store.state_path, Some("s".into()));
}

#[test]
fn a_signer_may_name_keysets_that_only_managers_know() {
    let clients = "\"127.0.0.1:8621\"\nclient.x = { token_file = \"x\", keysets = [\"billing\"] }";
    let config = valid_signer(&[("\"127.0.0.1:8621\"", clients)]).config;
    assert_eq!(config.signer.unwrap().clients[0].keysets, Some(vec![name("billing")]));
}

#[test]
fn what_publishes_an_issuer_fetches_all_of_it() {
    let some = ("token_file = \"edge.token\"", "token_file = \"edge.token\"\nkeysets = [\"default\"]");
    valid_signer(&[some]);
    let public = ("[signer]", "[public]\nlisten = \"127.0.0.1:8620\"\n[signer]");
    valid_signer(&[public]);
    let refused = load(&toml(signer_with(&[some, public]))).unwrap_err().to_string();
    assert!(refused.contains("store.keysets: names a part of the keysets"), "{refused}");
}

#[test]
fn one_file_serves_all_roles_and_says_what_a_signer_ignores() {
    let text = base_with(&[
        (FILE, &format!("{POSTGRES}\ninitialise = \"if-empty\"\npublish_lag = \"1m\"\nstaleness_limit = \"1h\"")),
        ("every = \"30d\"", "propagation = \"1m\""),
        ("[log]", "[defaults.tokens]\nmax_ttl = \"5m\"\n[log]"),
    ]);
    let signer = [("JWKSD__ROLE".to_owned(), "signer".to_owned())].into_iter();
    let loaded = config::load(&toml(text.clone()), signer).unwrap();
    insta::assert_snapshot!(words(&loaded).join("\n"));
    assert!(loaded.config.issuers.is_empty() && loaded.config.keysets.is_empty());
    assert_eq!(loaded.config.store.initialise, Initialise::Never);
    // What a manager would refuse is not the signer's to judge.
    assert_eq!(loaded.timing, vec![]);
    let all = load(&toml(text)).unwrap();
    assert_eq!((all.timing.len(), all.config.keysets.len()), (1, 1));
}

#[test]
fn what_a_signer_ignores_is_validated_in_form() {
    let message = error(signer_with(&[(
        "[seal]",
        "[issuer.main]\nurl = \"ftp://a\"\n[keyset.a]\nalgorithm = \"none\"\n[defaults.rotation]\nevry = \"1d\"\n[seal]",
    )]));
    for path in ["issuer.main.url", "keyset.a.algorithm", "defaults.rotation.evry"] {
        assert!(message.contains(&format!("\n  {path}: ")), "{path} is not in: {message}");
    }
}

#[test]
fn managers_hand_out_records_to_those_who_have_a_token() {
    let replication = "[replication]\nlisten = \"0.0.0.0:8624\"\ntls = { cert_file = \"c\", key_file = \"k\" }\n\
         [replication.client.edge]\ntoken_file = \"edge.token\"\n[replication.client.other]\ntoken_env = \"OTHER\"\n[log]";
    for store in [FILE, POSTGRES] {
        let config = valid(&[("[log]", replication), (FILE, store)]).config;
        let clients = &config.replication.as_ref().unwrap().clients;
        let seen: Vec<_> = clients.iter().map(|client| (client.name.as_str(), client.token.to_string())).collect();
        let expected = [("edge", "file edge.token"), ("other", "variable OTHER")];
        assert_eq!(seen, expected.map(|(name, token)| (name, token.to_owned())));
        assert_eq!(config.listeners().last().unwrap().0, "replication");
        let files = ["c", "data/admin.token", "edge.token", "k"].map(PathBuf::from);
        assert_eq!(config.reloadable_files(), files);
    }
    let socket =
        "[replication]\nlisten = \"unix:/run/r.sock\"\nsocket_mode = \"0660\"\nclient.a.token_file = \"a\"\n[log]";
    let config = valid(&[("[log]", socket), (FILE, POSTGRES), MANAGER, NO_SIGNER]).config;
    assert_eq!(config.replication.unwrap().listener.address.to_string(), "unix:/run/r.sock");
}

#[test]
fn publishers_stand_beside_the_policy_of_their_issuer() {
    let publishers = "[issuer.main.publish.web]\nkind = \"file\"\npath = \"/srv/www\"\n\
         [issuer.main.publish.cdn]\nkind = \"s3\"\nbucket = \"example-jwks\"\nprefix = \"a/b/\"\nregion = \"eu-central-1\"\n\
         endpoint_url = \"http://127.0.0.1:4566\"\n\
         [issuer.main.publish.plain]\nkind = \"s3\"\nbucket = \"example-jwks\"\n[log]";
    let (with, without) = (valid(&[("[log]", publishers)]).config, valid(&[]).config);
    assert_eq!(with.issuers, without.issuers);
    let s3 = |prefix: &str, region: Option<&str>, endpoint_url: Option<&str>| PublisherKind::S3 {
        bucket: "example-jwks".to_owned(),
        prefix: prefix.to_owned(),
        region: region.map(String::from),
        endpoint_url: endpoint_url.map(String::from),
    };
    let publisher = |text: &str, kind| Publisher { issuer: name("main"), name: name(text), kind };
    let expected = [
        publisher("web", PublisherKind::File { path: "/srv/www".into() }),
        publisher("cdn", s3("a/b", Some("eu-central-1"), Some("http://127.0.0.1:4566"))),
        publisher("plain", s3("", None, None)),
    ];
    assert_eq!(with.publishers, expected);
    assert_eq!(with.publishers[1].table(), "issuer.main.publish.cdn");
}

/// Two issuers, each with a publisher of these settings.
fn two_publishers(first: &str, second_url: &str, second: &str) -> String {
    base_with(&[
        ("\"ES256\"", "\"ES256\"\nissuer = \"main\""),
        (
            "[log]",
            &format!(
                "[issuer.main.publish.a]\n{first}\n[issuer.other]\nurl = \"{second_url}\"\n[issuer.other.publish.b]\n\
                 {second}\n[log]"
            ),
        ),
    ])
}

#[test]
fn publishers_may_share_a_place_as_long_as_no_document_is_written_twice() {
    let other = "https://auth.example.com/other";
    let bucket = "kind = \"s3\"\nbucket = \"example-jwks\"";
    let folder = |path: &str| format!("kind = \"file\"\npath = \"{path}\"");
    for (first, second) in [
        (bucket.to_owned(), bucket.to_owned()),
        (bucket.to_owned(), format!("{bucket}\nendpoint_url = \"https://s3.example.com\"\nprefix = \"other\"")),
        (folder("/srv/a"), folder("/srv/b")),
    ] {
        let text = two_publishers(&first, other, &second);
        load(&toml(text)).unwrap_or_else(|error| panic!("{first}\n{second}\n{error}"));
    }
    // A URL's path and a publisher's can meet.
    for (first, second) in [
        (folder("/srv/./www/other"), folder("/srv/www")),
        (format!("{bucket}\nprefix = \"p/other\""), format!("{bucket}\nprefix = \"p/\"")),
    ] {
        let message = error(two_publishers(&first, other, &second));
        assert!(message.contains("issuer.other.publish.b: "), "{message}");
        assert!(message.contains("is written by issuer.main.publish.a too: give each its own place"), "{message}");
    }
}

#[test]
fn a_document_is_not_published_where_another_one_needs_a_folder() {
    let folder = "kind = \"file\"\npath = \"/srv/www\"";
    let message = error(two_publishers(folder, "https://auth.example.com/other", folder));
    assert!(
        message.contains(
            "issuer.other.publish.b: /srv/www/.well-known/oauth-authorization-server would be a file for one and a folder \
             for the other of this and issuer.main.publish.a: give them different folders, or one issuer discovery = \"off\""
        ),
        "{message}"
    );
    let nested = "jwks_paths = [\"/keys/v1\", \"/keys\"]\n[keyset.default]";
    let publisher = |kind: &str| format!("[issuer.main.publish.a]\n{kind}\n[log]");
    let message = error(base_with(&[("[keyset.default]", nested), ("[log]", &publisher(folder))]));
    assert!(message.contains("issuer.main.publish.a: /srv/www/keys would be both a file and a folder"), "{message}");
    valid(&[("[keyset.default]", nested), ("[log]", &publisher("kind = \"s3\"\nbucket = \"example-jwks\""))]);
    let quiet = two_publishers(folder, "https://auth.example.com/other\"\ndiscovery = \"off", folder);
    load(&toml(quiet)).unwrap_or_else(|error| panic!("{error}"));
}

const BROKEN: &[Broken] = &[
    ("a role nobody knows", &[("\n[public]", "role = \"sinner\"\n[public]")]),
    ("a manager with a folder", &[MANAGER, NO_SIGNER]),
    ("a signer with a folder", &[("\n[public]", "role = \"signer\"\n[public]")]),
    ("a manager that signs", &[MANAGER, (FILE, POSTGRES)]),
    (
        "a manager that does not publish",
        &[("\n[public]\nlisten = \"127.0.0.1:8620\"", "role = \"manager\""), NO_SIGNER, (FILE, POSTGRES)],
    ),
    (
        "a signer that hands out records",
        &[
            ("\n[public]", "role = \"signer\"\n[public]"),
            (FILE, POSTGRES),
            ("[log]", "[replication]\nlisten = \"127.0.0.1:8624\"\nclient.a.token_file = \"a\"\n[log]"),
        ],
    ),
    (
        "a signer with publishers",
        &[
            ("\n[public]", "role = \"signer\"\n[public]"),
            (FILE, POSTGRES),
            ("[log]", "[issuer.main.publish.web]\nkind = \"file\"\npath = \"/srv/www\"\n[log]"),
        ],
    ),
    (
        "a signer that neither signs nor publishes",
        &[("\n[public]\nlisten = \"127.0.0.1:8620\"", "role = \"signer\""), NO_SIGNER, (FILE, POSTGRES)],
    ),
    (
        "an upstream of a process that is not only a signer",
        &[(FILE, "kind = \"upstream\"\nurls = [\"https://a.example.com\"]\ntoken_file = \"a\"")],
    ),
    ("a store in Kubernetes", &[(FILE, "kind = \"kubernetes\"\ninitialise = \"always\"")]),
    ("a database without URL", &[(FILE, "kind = \"postgres\"")]),
    ("a database with two URLs", &[(FILE, "kind = \"postgres\"\nurl_file = \"a\"\nurl_env = \"B\"")]),
    (
        "a database's secrets in the configuration",
        &[(
            FILE,
            "kind = \"postgres\"\nurl = \"postgres://hunter2@db\"\ndsn = \"hunter2\"\nuser = \"hunter2\"\n\
             password = \"hunter2\"\nsecret = \"hunter2\"\nca = \"hunter2\"",
        )],
    ),
    ("a URL in place of a variable's name", &[(FILE, "kind = \"postgres\"\nurl_env = \"postgres://u:hunter2@db\"")]),
    (
        "settings of a database that cannot be",
        &[(
            FILE,
            "kind = \"postgres\"\nurl_file = \"a\"\nschema = \"Auth\"\nstatement_timeout = \"99ms\"\nconnections = 1\n\
             staleness_limit = \"0s\"\npublish_lag = \"0s\"\ninitialise = \"always\"",
        )],
    ),
    (
        "more settings of a database that cannot be",
        &[(
            FILE,
            "kind = \"postgres\"\nurl_file = \"a\"\nschema = \"pg_jwksd\"\nstatement_timeout = \"61s\"\nconnections = 65",
        )],
    ),
    (
        "a folder with what belongs to others",
        &[(
            FILE,
            "path = \"data/keyrings\"\nstate_path = \"a\"\nurl_file = \"a\"\nurl_env = \"A\"\nca_file = \"a\"\n\
             schema = \"a\"\nstatement_timeout = \"1s\"\nconnections = 4\nurls = [\"https://a\"]\ntoken_file = \"a\"\n\
             token_env = \"A\"\nkeysets = [\"default\"]",
        )],
    ),
    (
        "a database with what belongs to others",
        &[(FILE, "kind = \"postgres\"\nurl_file = \"u\"\npath = \"a\"\nurls = [\"https://a\"]\ntoken_file = \"a\"")],
    ),
    ("a database's URL in the seal's file", &[(FILE, "kind = \"postgres\"\nurl_file = \"data/seal.key\"")]),
    (
        "a signer's token that is an operator's",
        &[("[log]", "[replication]\nlisten = \"127.0.0.1:8624\"\nclient.a.token_file = \"data/admin.token\"\n[log]")],
    ),
    (
        "a seal that is the folder of copies",
        &[(FILE, "kind = \"postgres\"\nurl_file = \"u\"\nstate_path = \"data/seal.key\"")],
    ),
    ("a replication listener without clients", &[("[log]", "[replication]\nlisten = \"127.0.0.1:8624\"\n[log]")]),
    (
        "a replication listener in clear text",
        &[("[log]", "[replication]\nlisten = \"0.0.0.0:8624\"\nclient.a.token_file = \"a\"\n[log]")],
    ),
    (
        "a replication listener at another's address",
        &[("[log]", "[replication]\nlisten = \"127.0.0.1:8620\"\nclient.a.token_file = \"a\"\n[log]")],
    ),
    (
        "replication clients that cannot be",
        &[(
            "[log]",
            "[replication]\nlisten = \"127.0.0.1:8624\"\n[replication.client.none]\n\
             [replication.client.two]\ntoken_file = \"a\"\ntoken_env = \"A\"\n\
             [replication.client.inline]\ntoken = \"hunter2\"\n[replication.client.variable]\ntoken_env = \"hunter2!\"\n\
             [replication.client.b]\ntoken_file = \"b\"\n[replication.client.c]\ntoken_file = \"b\"\n[log]",
        )],
    ),
    (
        "publishers that cannot be",
        &[(
            "[log]",
            "[issuer.main.publish.none]\n[issuer.main.publish.other]\nkind = \"gcs\"\n\
             [issuer.main.publish.nowhere]\nkind = \"file\"\n\
             [issuer.main.publish.both]\nkind = \"file\"\npath = \"a\"\nbucket = \"abc\"\nprefix = \"p\"\nregion = \"r\"\n\
             endpoint_url = \"https://a\"\n\
             [issuer.main.publish.bucketless]\nkind = \"s3\"\npath = \"a\"\n\
             [issuer.main.publish.wrong]\nkind = \"s3\"\nbucket = \"My_Bucket\"\nprefix = \"/a//b\"\nregion = \"Frankfurt\"\n\
             endpoint_url = \"http://s3.example.com\"\naccess_key_id = \"hunter2\"\ncache_control = \"no-store\"\n[log]",
        )],
    ),
    (
        "two publishers at one place",
        &[(
            "[log]",
            "[issuer.main.publish.a]\nkind = \"file\"\npath = \"/srv/www\"\n\
             [issuer.main.publish.b]\nkind = \"file\"\npath = \"/srv/./www/\"\n[log]",
        )],
    ),
    (
        "a published store, its secrets, and a publisher among records",
        &[(
            "[log]",
            "[issuer.main.publish.a]\nkind = \"file\"\npath = \"data\"\n\
             [issuer.main.publish.b]\nkind = \"file\"\npath = \"data/keyrings/www\"\n[log]",
        )],
    ),
];

/// As above, with replacements in [`SIGNER`].
const BROKEN_SIGNERS: &[Broken] = &[
    ("an upstream of nowhere", &[("urls = [\"https://jwksd.example.com:8624\"]\n", "")]),
    ("an upstream of nobody", &[("[\"https://jwksd.example.com:8624\"]", "[]")]),
    ("an upstream without token", &[("token_file = \"edge.token\"\n", "")]),
    ("an upstream with two tokens", &[("[seal]", "token_env = \"EDGE\"\n[seal]")]),
    ("a token in the configuration", &[("token_file = \"edge.token\"", "token = \"hunter2\"")]),
    (
        "URLs that are none of managers",
        &[(
            "[\"https://jwksd.example.com:8624\"]",
            "[\"http://jwksd.example.com\", \"https://u:hunter2@a.example.com\", \"https://a.example.com?a=b\", \
             \"https://a.example.com/#a\", \"a.example.com\", \"https://a.example.com\", \"https://A.example.com/\"]",
        )],
    ),
    (
        "nine managers",
        &[(
            "[\"https://jwksd.example.com:8624\"]",
            "[\"https://a1\", \"https://a2\", \"https://a3\", \"https://a4\", \"https://a5\", \"https://a6\", \"https://a7\", \
             \"https://a8\", \"https://a9\"]",
        )],
    ),
    ("no keyset", &[("[seal]", "keysets = []\n[seal]")]),
    ("keysets that are none", &[("[seal]", "keysets = [\"a\", \"B_1\", \"a\"]\n[seal]")]),
    ("an initialisation", &[("[seal]", "initialise = \"never\"\n[seal]")]),
    ("a folder and a database", &[("[seal]", "path = \"a\"\nurl_env = \"A\"\nschema = \"a\"\n[seal]")]),
    (
        "a client of a keyset that does not come",
        &[
            ("[seal]", "keysets = [\"orders\"]\n[seal]"),
            ("8621\"", "8621\"\nclient.x = { token_file = \"x\", keysets = [\"order\"] }"),
        ],
    ),
    (
        "a client of a keyset that cannot be",
        &[("8621\"", "8621\"\nclient.x = { token_file = \"x\", keysets = [\"A_1\"] }")],
    ),
    ("the token in the seal's file", &[("\"edge.token\"", "\"data/seal.key\"")]),
    ("no seal", &[("[seal]\npath = \"data/seal.key\"\n", "")]),
];

#[test]
fn what_replicas_cannot_have_is_refused_in_these_words() {
    let mut seen = String::new();
    let broken = BROKEN.iter().map(|(name, replacements)| (name, base_with(replacements)));
    let signers = BROKEN_SIGNERS.iter().map(|(name, replacements)| (name, signer_with(replacements)));
    for (name, text) in broken.chain(signers) {
        let message = error(text);
        assert!(!message.contains("hunter2"), "{name}: a secret is quoted: {message}");
        seen.push_str(&format!("# {name}\n{message}\n\n"));
    }
    insta::assert_snapshot!(seen);
}

#[test]
fn nine_publishers_are_too_many() {
    let publishers = |count: usize| {
        let one = |n| format!("[issuer.main.publish.p{n}]\nkind = \"file\"\npath = \"/srv/{n}\"\n");
        base_with(&[("[log]", &((0..count).map(one).collect::<String>() + "[log]"))])
    };
    assert_eq!(load(&toml(publishers(8))).unwrap().config.publishers.len(), 8);
    let message = error(publishers(9));
    assert!(message.contains("issuer.main.publish: has 9 publishers: at most 8 per issuer"), "{message}");
}

#[test]
fn secrets_among_the_copies_of_a_replica_are_warned_of() {
    let store = format!("{POSTGRES}\nstate_path = \"data\"");
    let seen: Vec<_> = words(&valid(&[(FILE, &store)])).into_iter().filter(|line| line.contains("folder")).collect();
    assert_eq!(
        seen,
        [
            "seal.path: lies in the folder of store.state_path: a copy of the store would hold seal.path too",
            "admin.token.operator.file: lies in the folder of store.state_path: a copy of the store would hold \
             admin.token.operator.file too",
        ]
    );
}

#[test]
fn limits_that_keep_the_store_busy_are_warned_of() {
    let store = format!("{POSTGRES}\nstaleness_limit = \"900ms\"\npublish_lag = \"1ms\"");
    let seen: Vec<_> =
        words(&valid(&[(FILE, &store)])).into_iter().filter(|line| line.contains("is for tests")).collect();
    let message = "is for tests: every replica asks the store several times within it";
    assert_eq!(seen, [format!("store.staleness_limit: 900ms {message}"), format!("store.publish_lag: 1ms {message}")]);
    let store = format!("{POSTGRES}\nstaleness_limit = \"1s\"\npublish_lag = \"1s\"");
    assert!(!words(&valid(&[(FILE, &store)])).iter().any(|line| line.contains("is for tests")));
}

#[test]
fn the_environment_sets_role_and_store() {
    let variables = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>().into_iter()
    };
    let good = variables(&[
        ("JWKSD__ROLE", "signer"),
        ("JWKSD__STORE__SCHEMA", "other"),
        ("JWKSD__STORE__CONNECTIONS", "8"),
        ("JWKSD__STORE__STATEMENT_TIMEOUT", "1s"),
        ("JWKSD__STORE__STATE_PATH", "data/replica"),
    ]);
    let config = config::load(&toml(base_with(&[(FILE, POSTGRES)])), good).unwrap().config;
    let StoreKind::Postgres(postgres) = &config.store.kind else { panic!("{:?}", config.store) };
    assert_eq!((postgres.schema.as_str(), postgres.connections), ("other", 8));
    assert_eq!((config.role, postgres.statement_timeout), (ProcessRole::Signer, Span::SECOND));
    let bad = variables(&[("JWKSD__STORE__URL", "postgres://u:hunter2@db"), ("JWKSD__STORE__URLS", "https://hunter2")]);
    let message = config::load(&toml(base_with(&[(FILE, POSTGRES)])), bad).unwrap_err().to_string();
    assert!(message.contains("are named in `urls`) (set by JWKSD__STORE__URL)"), "{message}");
    assert!(
        message.contains("JWKSD__STORE__URLS: store.urls is a list: set it in the configuration file"),
        "{message}"
    );
    assert!(!message.contains("hunter2"), "{message}");
}

#[test]
fn role_store_and_publishers_need_a_restart_and_the_clients_of_signers_do_not() {
    let replication = |client: &str| {
        format!("[replication]\nlisten = \"127.0.0.1:8624\"\n[replication.client.a]\ntoken_file = \"{client}\"\n[log]")
    };
    let publisher = |path: &str| format!("[issuer.main.publish.web]\nkind = \"file\"\npath = \"{path}\"\n[log]");
    let with = |store: &str, log: &str| valid(&[(FILE, store), ("[log]", log)]).config;
    let old = with(POSTGRES, &replication("a"));
    let limits = format!("{POSTGRES}\nstaleness_limit = \"2h\"\npublish_lag = \"2m\"\ninitialise = \"if-empty\"");
    assert_eq!(config::restart_needed(&old, &with(&limits, &replication("b"))), Vec::<String>::new());
    let further = format!("{POSTGRES}\nca_file = \"ca\"\nschema = \"s\"\nstatement_timeout = \"1s\"\nconnections = 9");
    let manager = valid(&[MANAGER, NO_SIGNER, (FILE, POSTGRES), ("[log]", &replication("a"))]).config;
    let upstream = |replacements: &[(&str, &str)]| valid_signer(replacements).config;
    let seen = [
        config::restart_needed(&old, &with(POSTGRES, "[log]")),
        config::restart_needed(&old, &with(FILE, &replication("a"))),
        config::restart_needed(&old, &with(&further, &replication("a"))),
        config::restart_needed(
            &old,
            &with("kind = \"postgres\"\nurl_env = \"URL\"\nstate_path = \"s\"", &replication("a")),
        ),
        config::restart_needed(&old, &manager),
        config::restart_needed(&with(FILE, &publisher("/srv/a")), &with(FILE, &publisher("/srv/b"))),
        config::restart_needed(
            &upstream(&[]),
            &upstream(&[("edge.token\"", "other.token\"\nkeysets = [\"a\", \"b\"]")]),
        ),
        config::restart_needed(&upstream(&[]), &upstream(&[("https://jwksd", "https://jwksd-1")])),
    ];
    insta::assert_snapshot!(seen.map(|lines| lines.join("\n")).join("\n---\n"));
}

#[test]
fn nothing_is_taken_before_the_restart_for_another_role_or_a_store_with_other_limits() {
    let file = valid(&[]).config;
    let all = valid(&[(FILE, POSTGRES)]).config;
    let manager = valid(&[MANAGER, NO_SIGNER, (FILE, POSTGRES)]).config;
    let other = valid(&[(FILE, "kind = \"postgres\"\nurl_file = \"other.url\"")]).config;
    let needs = "needs a restart, before which nothing of the change is taken";
    assert_eq!(config::restart_first(&file, &all), [format!("store.kind: file → postgres {needs}")]);
    let both = [format!("role: manager → all {needs}"), format!("store.kind: postgres → file {needs}")];
    assert_eq!(config::restart_first(&manager, &file), both);
    assert_eq!(config::restart_first(&all, &other), Vec::<String>::new());
    assert_eq!(config::restart_first(&manager, &manager), Vec::<String>::new());
}

#[test]
fn files_of_shared_stores_and_of_replication_are_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let keys = |problems: &[config::Problem]| problems.iter().map(|p| p.path.clone()).collect::<Vec<_>>();
    let store = format!("kind = \"postgres\"\nurl_file = {:?}\nca_file = {:?}", path("url"), path("ca"));
    let replication =
        format!("[replication]\nlisten = \"127.0.0.1:8624\"\nclient.a.token_file = {:?}\n[log]", path("edge"));
    let manager = valid(&[
        (FILE, &store),
        ("[log]", &replication),
        ("data/seal.key", &path("seal.key")),
        ("data/admin.token", &path("admin")),
    ]);
    let missing = ["replication.client.a.token_file", "store.url_file", "store.ca_file"].map(String::from).to_vec();
    assert_eq!(keys(&config::examine_files(&manager.config).problems), missing);
    let signer = valid_signer(&[
        ("\"edge.token\"", &format!("{:?}\nca_file = {:?}", path("edge"), path("ca"))),
        ("data/seal.key", &path("seal.key")),
    ]);
    let missing = ["store.token_file", "store.ca_file"].map(String::from).to_vec();
    assert_eq!(keys(&config::examine_files(&signer.config).problems), missing);

    for name in ["url", "ca", "edge"] {
        std::fs::write(folder.path().join(name), "short\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(folder.path().join(name), mode).unwrap();
    }
    let report = config::examine_files(&manager.config);
    let loose = ["replication.client.a.token_file", "replication.client.a.token_file", "store.url_file"];
    assert_eq!((report.problems, keys(&report.warnings)), (vec![], loose.map(String::from).to_vec()));
}
