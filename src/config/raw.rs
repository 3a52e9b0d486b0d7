//! What a configuration file may contain: its keys and the types of their values, and nothing about their meaning.
//!
//! The tables are declared once, below; reading, the refusal of unknown keys and wrong types, the types of environment
//! variables and the completeness test of `config/reference.toml` all follow from that.

use std::path::PathBuf;

use crate::keyring::name::Name;
use crate::keyring::time::Span;

use super::problem::{At, Report};
use super::telemetry::Share;
use super::value::Value;

/// Lists are at most this long.
const LONGEST_LIST: usize = 64;
/// Texts are at most this long, in bytes.
const LONGEST_TEXT: usize = 2048;
/// Tables of named things (keysets, issuers, …) are at most this long.
const MOST_NAMED: usize = 20_000;

/// The type of a key's value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    Text,
    Integer,
    /// From 0 to 1.
    Share,
    Boolean,
    List,
    /// Known keys, in the order in which they are documented.
    Table(&'static [(&'static str, Shape)]),
    /// Any number of tables of one shape, each with a name.
    Named(&'static Shape),
    /// Recognised so that the refusal can say why.
    Refused(&'static str),
}

/// A value that can stand in the file.
pub(super) trait Field: Sized {
    const SHAPE: Shape;

    /// `None` when the value is not one; why is in the report.
    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self>;
}

macro_rules! key {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $name:literal) => {
        $name
    };
}

/// Declares tables: each field is optional, named as in the file (or as the literal after it).
macro_rules! tables {
    ($( $(#[$meta:meta])* $table:ident { $( $field:ident $($name:literal)? : $type:ty ),* $(,)? } )*) => { $(
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub(super) struct $table { $( pub(super) $field: Option<$type>, )* }

        impl Field for $table {
            const SHAPE: Shape = Shape::Table(const { &[ $( (key!($field $($name)?), <$type as Field>::SHAPE) ),* ] });

            fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
                let entries = table_entries(value, at, report)?;
                let mut table = Self::default();
                for (key, value) in entries {
                    let at = at.key(&key);
                    $( if key == key!($field $($name)?) {
                        table.$field = Field::read(value, &at, report);
                        continue;
                    } )*
                    report.unknown(at, &key, &[ $( key!($field $($name)?) ),* ]);
                }
                Some(table)
            }
        }
    )* };
}

tables! {
    /// The whole file.
    Root {
        role: String,
        shutdown_delay: Span,
        public: Public,
        signer: Signer,
        admin: Admin,
        ops: Public,
        replication: Replication,
        kubernetes: Kubernetes,
        store: Store,
        seal: Seal,
        issuer: Named<Issuer>,
        defaults: Defaults,
        keyset: Named<Keyset>,
        backend: Backends,
        notice: Named<Notice>,
        log: Log,
        telemetry: Telemetry,
    }
    /// A listener that has nothing beside its address.
    Public {
        listen: String,
        socket_mode: String,
        tls: Tls,
    }
    Signer {
        listen: String,
        socket_mode: String,
        sign_deadline: Span,
        tls: MutualTls,
        client: Named<SignerClient>,
    }
    SignerClient {
        token_file: PathBuf,
        uid: u32,
        keysets: Vec<String>,
        audiences: Vec<String>,
        san: String,
        service_account: String,
        token: InlineToken,
        secret: InlineToken,
        password: InlineToken,
    }
    Admin {
        listen: String,
        socket_mode: String,
        tls: MutualTls,
        page: bool,
        token: Named<AdminToken>,
        client: Named<AdminClient>,
    }
    AdminClient {
        role: String,
        san: String,
        token: InlineToken,
        secret: InlineToken,
        password: InlineToken,
    }
    AdminToken {
        role: String,
        file: PathBuf,
        env: String,
        token: InlineToken,
        value: InlineToken,
        secret: InlineToken,
        password: InlineToken,
    }
    Replication {
        listen: String,
        socket_mode: String,
        tls: Tls,
        client: Named<ReplicationClient>,
    }
    ReplicationClient {
        token_file: PathBuf,
        token_env: String,
        token: InlineToken,
        secret: InlineToken,
        password: InlineToken,
    }
    Tls {
        cert_file: PathBuf,
        key_file: PathBuf,
        client_ca_file: NoClientCertificates,
        cert: InlinePem,
        key: InlinePem,
    }
    /// TLS of a listener that may know clients by their certificates.
    MutualTls {
        cert_file: PathBuf,
        key_file: PathBuf,
        client_ca_file: PathBuf,
        cert: InlinePem,
        key: InlinePem,
        client_ca: InlinePem,
    }
    Kubernetes {
        issuer: String,
        jwks_url: String,
        ca_file: PathBuf,
        token_file: PathBuf,
        audience: String,
        token: InlineToken,
        ca: InlinePem,
    }
    Store {
        kind: String,
        path: PathBuf,
        initialise: String,
        staleness_limit: Span,
        publish_lag: Span,
        state_path: PathBuf,
        url_file: PathBuf,
        url_env: String,
        ca_file: PathBuf,
        schema: String,
        statement_timeout: Span,
        connections: u32,
        urls: Vec<String>,
        token_file: PathBuf,
        token_env: String,
        keysets: Vec<String>,
        url: InlineAccess,
        dsn: InlineAccess,
        user: InlineAccess,
        password: InlineAccess,
        token: InlineAccess,
        secret: InlineAccess,
        ca: InlinePem,
    }
    Seal {
        kind: String,
        path: PathBuf,
        previous: Named<PreviousSeal>,
        key_id: String,
        key: InlineSealKey,
        secret: InlineSealKey,
    }
    PreviousSeal {
        kind: String,
        path: PathBuf,
        key_id: String,
        key: InlineSealKey,
        secret: InlineSealKey,
    }
    Issuer {
        url: String,
        max_age: Span,
        stale_if_error: Span,
        caches: Vec<Span>,
        jwks_paths: Vec<String>,
        discovery: String,
        probes: Vec<String>,
        publish: Named<Publisher>,
    }
    Publisher {
        kind: String,
        path: PathBuf,
        bucket: String,
        prefix: String,
        region: String,
        endpoint_url: String,
        access_key_id: AwsCredentials,
        secret_access_key: AwsCredentials,
        session_token: AwsCredentials,
    }
    Defaults {
        rotation: Rotation,
        tokens: Tokens,
    }
    Keyset {
        issuer: String,
        algorithm: String,
        rsa_bits: u32,
        eddsa_label: String,
        backend: String,
        rotation: Rotation,
        tokens: Tokens,
    }
    Rotation {
        every: Span,
        schedule: String,
        timezone: String,
        propagation: Span,
        successors: u32,
        overlap_extra: Span,
        bootstrap: String,
        verifiers: Vec<Verifier>,
    }
    Tokens {
        max_ttl: Span,
        default_ttl: Span,
        clock_skew: Span,
        required_claims: Vec<String>,
        forbidden_claims: Vec<String>,
        audiences: Vec<String>,
        types: Vec<String>,
        backdate: Span,
    }
    Backends {
        aws_kms "aws-kms": AwsKmsBackend,
    }
    AwsKmsBackend {
        region: String,
        endpoint_url: String,
        attempt_timeout: Span,
        concurrency: u32,
        deletion_window: Span,
        cleanup_after: Span,
        access_key_id: AwsCredentials,
        secret_access_key: AwsCredentials,
        session_token: AwsCredentials,
    }
    Notice {
        url: String,
        secret_file: PathBuf,
        secret_env: String,
        events: Vec<String>,
        keysets: Vec<String>,
        before: Vec<Span>,
        ca_file: PathBuf,
        timeout: Span,
        give_up_after: Span,
        secret: InlineNoticeSecret,
        token: InlineNoticeSecret,
        password: InlineNoticeSecret,
    }
    Log {
        format: String,
        level: String,
        signatures: bool,
    }
    Telemetry {
        access_log: AccessLog,
        traces: Traces,
    }
    AccessLog {
        enabled: bool,
        listeners: Vec<String>,
        sample_ratio: Share,
    }
    Traces {
        endpoint: String,
        sample_ratio: Share,
    }
    NamedVerifier {
        name: String,
        cache: Span,
    }
}

impl From<Tls> for MutualTls {
    fn from(tls: Tls) -> Self {
        MutualTls { cert_file: tls.cert_file, key_file: tls.key_file, ..MutualTls::default() }
    }
}

/// Declares keys that are recognised and refused, with the reason.
macro_rules! refused {
    ($( $(#[$meta:meta])* $marker:ident: $reason:literal; )*) => { $(
        $(#[$meta])*
        #[derive(Debug)]
        pub(super) enum $marker {}

        impl Field for $marker {
            const SHAPE: Shape = Shape::Refused($reason);

            fn read(_: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
                report.refuse(at, $reason);
                None
            }
        }
    )* };
}

refused! {
    NoClientCertificates: "only [signer] and [admin] know clients by their certificates: leave it out here (verifiers, \
        kubelet and Prometheus show none, and signers show tokens to [replication])";
    AwsCredentials: "credentials do not stand in the configuration: leave them to the AWS credential chain (environment, \
        profile, IRSA, EKS Pod Identity, instance role)";
    InlineToken: "secrets do not stand in the configuration: write the token elsewhere and say where, with `file` or \
        `env` for an admin token, `token_file` for a signer client, `token_file` or `token_env` for others";
    InlineAccess: "secrets do not stand in the configuration: write the database's URL with user and password, or the \
        token for managers, elsewhere and say where, with `url_file` or `url_env`, `token_file` or `token_env` (the \
        managers themselves are named in `urls`)";
    InlineNoticeSecret: "secrets do not stand in the configuration: write the secret elsewhere and say where, with \
        `secret_file` or `secret_env`";
    InlinePem: "keys and certificates do not stand in the configuration: name their files with `cert_file` and \
        `key_file`, `client_ca_file` or `ca_file`";
    InlineSealKey: "secrets do not stand in the configuration: name the file of the key with `path`, or a \
        key in AWS KMS with `key_id`";
}

/// Tables with names, in the order of the file. Those whose name is not one are left out and reported.
#[derive(Debug)]
pub(super) struct Named<T> {
    pub(super) entries: Vec<(Name, T)>,
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Named { entries: Vec::new() }
    }
}

impl<T: Field> Field for Named<T> {
    const SHAPE: Shape = Shape::Named(&T::SHAPE);

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let given = table_entries(value, at, report)?;
        if given.len() > MOST_NAMED {
            report.refuse(at, format_args!("{} tables: at most {MOST_NAMED} are read", given.len()));
            return None;
        }
        let count = given.len();
        let mut entries = Vec::with_capacity(count);
        for (key, value) in given {
            let at_entry = at.key(&key);
            let name = Name::parse(&key).map_err(|error| report.refuse(at_entry, error));
            if let (Some(entry), Ok(name)) = (T::read(value, &at_entry, report), name) {
                entries.push((name, entry));
            }
        }
        if entries.len() < count {
            // An empty table is then no reason to say that there are none.
            report.break_silently(at);
        }
        Some(Named { entries })
    }
}

/// A declared verifier: a preset's name or a duration, or a name with how long it caches.
#[derive(Debug)]
pub(super) enum Verifier {
    Text(String),
    Cache {
        name: Name,
        cache: Span,
    },
    /// Refused already; the others of its list are examined all the same.
    Unreadable,
}

impl Field for Verifier {
    const SHAPE: Shape = Shape::Text;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let read = match value {
            Value::Text(_) => String::read(value, at, report).map(Verifier::Text),
            Value::Table(_) => NamedVerifier::read(value, at, report).and_then(|raw| Self::named(raw, at, report)),
            other => wrong_type(&other, "a preset's name, a duration or { name, cache }", at, report),
        };
        Some(read.unwrap_or(Verifier::Unreadable))
    }
}

impl Verifier {
    fn named(raw: NamedVerifier, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let name = report.require(at.key("name"), raw.name, "give the verifier a name");
        let cache = report.require(at.key("cache"), raw.cache, "say how long it caches, such as \"1h\"");
        let (name, cache) = (name?, cache?);
        match Name::parse(&name) {
            Ok(name) => Some(Verifier::Cache { name, cache }),
            Err(error) => {
                report.refuse(at.key("name"), error);
                None
            }
        }
    }
}

impl Field for String {
    const SHAPE: Shape = Shape::Text;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let Value::Text(text) = value else { return wrong_type(&value, "text", at, report) };
        let wrong = if text.contains("-----BEGIN") {
            "keys and certificates do not stand in the configuration: put them into a file and name that".to_owned()
        } else if text.trim().is_empty() {
            "must not be empty".to_owned()
        } else if text.len() > LONGEST_TEXT {
            format!("{} bytes: at most {LONGEST_TEXT}", text.len())
        } else if text.chars().any(char::is_control) {
            "contains a control character".to_owned()
        } else {
            return Some(text);
        };
        report.refuse(at, wrong);
        None
    }
}

impl Field for PathBuf {
    const SHAPE: Shape = Shape::Text;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        if !matches!(value, Value::Text(_)) {
            return wrong_type(&value, "the path of a file", at, report);
        }
        String::read(value, at, report).map(PathBuf::from)
    }
}

impl Field for Span {
    const SHAPE: Shape = Shape::Text;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        match value {
            Value::Text(text) => match Span::parse(&text) {
                Ok(span) => return Some(span),
                Err(_) if text.len() > 64 => report.refuse(at, "too long for a duration such as \"5m\""),
                Err(error) => report.refuse(at, error),
            },
            Value::Integer(number) => {
                report.refuse(at, format_args!("expected a duration, found an integer: say the unit, \"{number}s\"?"));
            }
            other => return wrong_type(&other, "a duration such as \"5m\"", at, report),
        }
        None
    }
}

impl Field for u32 {
    const SHAPE: Shape = Shape::Integer;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let Value::Integer(number) = value else { return wrong_type(&value, "an integer", at, report) };
        let read = u32::try_from(number).ok();
        if read.is_none() {
            report.refuse(at, format_args!("{number} is out of range: 0 to {}", u32::MAX));
        }
        read
    }
}

impl Field for Share {
    const SHAPE: Shape = Shape::Share;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let share = match value {
            Value::Fraction(share) => share,
            Value::Integer(0) => 0.0,
            Value::Integer(1) => 1.0,
            Value::Integer(_) => f64::NAN,
            other => return wrong_type(&other, "a share from 0 to 1, such as 0.1", at, report),
        };
        let read = Share::new(share);
        if read.is_none() {
            report.refuse(at, "out of range: a share is from 0 (none) to 1 (all)");
        }
        read
    }
}

impl Field for bool {
    const SHAPE: Shape = Shape::Boolean;

    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let Value::Boolean(boolean) = value else { return wrong_type(&value, "true or false", at, report) };
        Some(boolean)
    }
}

impl<T: Field> Field for Vec<T> {
    const SHAPE: Shape = Shape::List;

    /// A list with an entry that is wrong is no list: a shorter one could allow what the whole one forbids.
    fn read(value: Value, at: &At<'_>, report: &mut Report) -> Option<Self> {
        let Value::List(items) = value else { return wrong_type(&value, "a list", at, report) };
        if items.len() > LONGEST_LIST {
            report.refuse(at, format_args!("{} entries: at most {LONGEST_LIST}", items.len()));
            return None;
        }
        let given = items.len();
        let entries = items.into_iter().enumerate().filter_map(|(i, item)| T::read(item, &at.index(i), report));
        let entries: Vec<T> = entries.collect();
        if entries.len() < given {
            report.break_silently(at);
            return None;
        }
        Some(entries)
    }
}

fn table_entries(value: Value, at: &At<'_>, report: &mut Report) -> Option<Vec<(String, Value)>> {
    let Value::Table(entries) = value else { return wrong_type(&value, "a table", at, report) };
    Some(entries)
}

fn wrong_type<T>(found: &Value, expected: &str, at: &At<'_>, report: &mut Report) -> Option<T> {
    report.refuse(at, format_args!("expected {expected}, found {}", found.kind()));
    None
}

/// A key that a configuration may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownKey {
    /// Its path; `NAME` stands for the names of keysets, issuers and so on.
    pub path: String,
    /// Why it is refused, for keys that are recognised only to say so.
    pub refused: Option<&'static str>,
}

/// Every key of the configuration that has a value, in the order in which they are documented.
pub fn known_keys() -> Vec<KnownKey> {
    fn walk(shape: &Shape, path: String, keys: &mut Vec<KnownKey>) {
        match shape {
            Shape::Table(fields) => {
                for (name, field) in *fields {
                    let path = if path.is_empty() { (*name).to_owned() } else { format!("{path}.{name}") };
                    walk(field, path, keys);
                }
            }
            Shape::Named(inner) => walk(inner, format!("{path}.NAME"), keys),
            Shape::Refused(reason) => keys.push(KnownKey { path, refused: Some(reason) }),
            Shape::Text | Shape::Integer | Shape::Share | Shape::Boolean | Shape::List => {
                keys.push(KnownKey { path, refused: None })
            }
        }
    }
    let mut keys = Vec::new();
    walk(&Root::SHAPE, String::new(), &mut keys);
    keys
}
