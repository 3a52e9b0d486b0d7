//! Who may reach what, and how they prove who they are.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::config::problem::{Report, suggest};
use crate::config::raw;
use crate::config::{
    Address, Admin, AdminClient, AdminToken, ClientCredential, Listener, ProcessRole, Replication, ReplicationClient,
    Role, San, SecretSource, ServiceAccount, Signer, SignerClient, TlsFiles,
};
use crate::keyring::name::Name;
use crate::keyring::time::Span;

use super::secrets::{SecretKeys, TOKEN, secret};
use super::{at_most, choose, quoted};

const DEFAULT_SIGN_DEADLINE: Span = Span::from_secs(2);
const LONGEST_SIGN_DEADLINE: Span = Span::MINUTE;
/// Only the daemon's own user, unless the configuration says otherwise.
const DEFAULT_SOCKET_MODE: u32 = 0o600;
/// The size of `sun_path` less its terminating zero (unix(7)).
const LONGEST_SOCKET_PATH: usize = 107;

const ADMIN_TOKEN: SecretKeys = SecretKeys {
    file: "file",
    env: "env",
    noun: "the token",
    example: "ADMIN_TOKEN",
    inline: &["token", "value", "secret", "password"],
};

#[derive(Default)]
pub(super) struct Listeners {
    pub(super) public: Option<Listener>,
    pub(super) signer: Option<Signer>,
    pub(super) admin: Option<Admin>,
    pub(super) ops: Option<Listener>,
    pub(super) replication: Option<Replication>,
}

/// The tables of listeners, as they stand in the file.
pub(super) struct Given {
    pub(super) public: Option<raw::Public>,
    pub(super) signer: Option<raw::Signer>,
    pub(super) admin: Option<raw::Admin>,
    pub(super) ops: Option<raw::Public>,
    pub(super) replication: Option<raw::Replication>,
}

/// `keysets`: those that a client may name; `None`: whether there is one is not known.
pub(super) fn validate(
    given: Given,
    role: Option<ProcessRole>,
    keysets: Option<&HashSet<Name>>,
    report: &mut Report,
) -> Listeners {
    check_role(&given, role, report);
    let listeners = Listeners {
        public: given.public.and_then(|raw| plain_listener("public", raw, report)),
        signer: given.signer.and_then(|raw| self::signer(raw, keysets, report)),
        admin: given.admin.and_then(|raw| self::admin(raw, report)),
        ops: given.ops.and_then(|raw| plain_listener("ops", raw, report)),
        replication: given.replication.and_then(|raw| self::replication(raw, report)),
    };
    refuse_shared_addresses(&listeners, report);
    listeners
}

/// Which listeners a role needs, and which would promise what it does not do.
fn check_role(given: &Given, role: Option<ProcessRole>, report: &mut Report) {
    match role {
        Some(ProcessRole::Signer) => {
            let broken = report.is_broken("public") || report.is_broken("signer");
            if given.public.is_none() && given.signer.is_none() && !broken {
                report.refuse(
                    "signer",
                    "missing: a signer that listens neither for applications nor for verifiers does nothing; add [signer] \
                     with `listen = \"127.0.0.1:8621\"`",
                );
            }
            if given.replication.is_some() {
                report.refuse(
                    "replication",
                    "managers hand out records, and the role is \"signer\": leave the table out, or use role = \"all\" or \
                     \"manager\"",
                );
            }
        }
        Some(ProcessRole::All | ProcessRole::Manager) | None => {
            if given.public.is_none() && role.is_some() && !report.is_broken("public") {
                report.refuse(
                    "public",
                    "missing: without a public listener nothing is published, so no key may ever sign; add `listen = \
                     \"127.0.0.1:8620\"` under [public]",
                );
            }
            if role == Some(ProcessRole::Manager) && given.signer.is_some() {
                report.refuse(
                    "signer",
                    "a manager signs nothing for applications: leave the table out, or use role = \"all\" for a process \
                     that does both",
                );
            }
        }
    }
}

fn plain_listener(table: &str, raw: raw::Public, report: &mut Report) -> Option<Listener> {
    listener(table, raw.listen, raw.socket_mode, raw.tls.map(raw::MutualTls::from), report)
}

fn signer(raw: raw::Signer, keysets: Option<&HashSet<Name>>, report: &mut Report) -> Option<Signer> {
    let listener = listener("signer", raw.listen, raw.socket_mode, raw.tls, report);
    let sign_deadline = at_most("signer.sign_deadline", raw.sign_deadline, LONGEST_SIGN_DEADLINE, report);
    if sign_deadline.is_some_and(Span::is_zero) {
        report.refuse("signer.sign_deadline", "0s leaves no time to sign");
    }
    let on_socket = listener.as_ref().is_none_or(|l| matches!(l.address, Address::Unix { .. }));
    let given = raw.client.unwrap_or_default().entries;
    let authenticated = !given.is_empty();
    let clients: Vec<_> =
        given.into_iter().filter_map(|(name, raw)| signer_client(name, raw, on_socket, keysets, report)).collect();
    refuse_shared_credentials(&clients, report);
    let listener = listener?;
    let sans = clients.iter().filter(|client| matches!(client.credential, ClientCredential::San(_)));
    check_client_ca("signer", &listener, sans.map(|client| &client.name), report);
    if !listener.address.is_local() && !authenticated {
        report.refuse(
            "signer.listen",
            format_args!(
                "{} is not a loopback address, so whoever reaches it could sign: add a [signer.client.NAME] with \
                 `token_file`, `san` or `service_account`, or listen on 127.0.0.1",
                listener.address
            ),
        );
    }
    refuse_plain_text("signer", &listener, report);
    if let Address::Unix { mode, .. } = listener.address
        && mode & 0o002 != 0
        && !authenticated
    {
        report.warn("signer.socket_mode", format_args!("{mode:04o} lets every process on this machine sign"));
    }
    Some(Signer { listener, sign_deadline: sign_deadline.unwrap_or(DEFAULT_SIGN_DEADLINE), clients })
}

fn signer_client(
    name: Name,
    raw: raw::SignerClient,
    on_socket: bool,
    keysets: Option<&HashSet<Name>>,
    report: &mut Report,
) -> Option<SignerClient> {
    let path = format!("signer.client.{name}");
    let mut given = Vec::new();
    given.extend(raw.token_file.map(|file| ("token_file", Some(ClientCredential::TokenFile(file)))));
    given.extend(raw.uid.map(|uid| ("uid", Some(ClientCredential::Uid(uid)))));
    given.extend(raw.san.map(|text| ("san", san(&path, &text, report).map(ClientCredential::San))));
    given.extend(raw.service_account.map(|text| ("service_account", service_account(&path, &text, report))));
    let ways: Vec<_> = given.iter().map(|(key, _)| format!("`{key}`")).collect();
    let credential = match <[_; 1]>::try_from(given) {
        Ok([(_, credential)]) => credential,
        Err(given) if given.is_empty() => {
            let reported = ["token_file", "uid", "san", "service_account", "token", "secret", "password"];
            if !reported.iter().any(|key| report.is_broken(&format!("{path}.{key}"))) {
                report.refuse(
                    &path,
                    "says not how it proves who it is: give it `token_file`, `san` or `service_account`, or `uid` on a \
                     Unix socket",
                );
            }
            None
        }
        Err(_) => {
            report.refuse(&path, format_args!("has {}: make a client of each", ways.join(" and ")));
            None
        }
    };
    if matches!(credential, Some(ClientCredential::Uid(_))) && !on_socket {
        report.refuse(
            format_args!("{path}.uid"),
            "a TCP connection does not tell who is at its other end: use `token_file`, or listen on unix:PATH",
        );
    }
    let keysets = raw.keysets.map(|names| client_keysets(&format!("{path}.keysets"), &names, keysets, report));
    if raw.audiences.as_ref().is_some_and(Vec::is_empty) {
        report.refuse(
            format_args!("{path}.audiences"),
            "an empty list allows nothing: leave it out to allow every audience of its keysets",
        );
    }
    Some(SignerClient { name, credential: credential?, keysets, audiences: raw.audiences })
}

fn san(table: &str, text: &str, report: &mut Report) -> Option<San> {
    let parsed = San::parse(text);
    parsed.map_err(|wrong| report.refuse(format_args!("{table}.san"), format_args!("{} {wrong}", quoted(text)))).ok()
}

fn service_account(table: &str, text: &str, report: &mut Report) -> Option<ClientCredential> {
    let path = format!("{table}.service_account");
    let parsed = ServiceAccount::parse(text);
    parsed
        .map(ClientCredential::ServiceAccount)
        .map_err(|wrong| report.refuse(path, format_args!("{} {wrong}", quoted(text))))
        .ok()
}

/// Clients that show certificates, and who vouches for these, belong together.
fn check_client_ca<'a>(
    table: &str,
    listener: &Listener,
    mut clients: impl Iterator<Item = &'a Name>,
    report: &mut Report,
) {
    let ca = format!("{table}.tls.client_ca_file");
    let given = listener.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some());
    let broken = report.is_broken(&format!("{table}.tls")) || report.is_broken(&ca);
    match clients.next() {
        Some(_) if given || broken => {}
        Some(name) if matches!(listener.address, Address::Unix { .. }) => report.refuse(
            format_args!("{table}.client.{name}.san"),
            "nobody shows a certificate on a Unix socket: listen on an address, with TLS",
        ),
        Some(name) => report.refuse(
            format_args!("{table}.client.{name}.san"),
            format_args!(
                "nobody vouches for certificates of clients: add [{table}.tls] with `client_ca_file`, the PEM file of the \
                 authority that signs them"
            ),
        ),
        None if given && !report.is_broken(&format!("{table}.client")) => report.refuse(
            ca,
            format_args!(
                "vouches for certificates that belong to no client: add a [{table}.client.NAME] with `san`, or leave it out"
            ),
        ),
        None => {}
    }
}

fn client_keysets(path: &str, names: &[String], keysets: Option<&HashSet<Name>>, report: &mut Report) -> Vec<Name> {
    if names.is_empty() {
        report.refuse(path, "an empty list allows nothing: leave it out to allow every keyset");
    }
    let mut found = Vec::new();
    for (index, text) in names.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(keysets) = keysets else {
            found.extend(Name::parse(text).map_err(|error| report.refuse(path, error)));
            continue;
        };
        match keysets.get(text.as_str()) {
            Some(name) => found.push(name.clone()),
            // It may be among those that were refused.
            None if report.is_broken("keyset") => {}
            None => {
                let mut known: Vec<_> = keysets.iter().map(Name::as_str).collect();
                known.sort_unstable();
                report.refuse(path, format_args!("there is no keyset {}; {}", quoted(text), suggest(text, &known)));
            }
        }
    }
    found
}

/// A credential that two clients have does not tell which of them it is.
fn refuse_shared_credentials(clients: &[SignerClient], report: &mut Report) {
    let mut owners: HashMap<&ClientCredential, &Name> = HashMap::new();
    for client in clients {
        if let Some(first) = owners.insert(&client.credential, &client.name) {
            let key = match client.credential {
                ClientCredential::TokenFile(_) => "token_file",
                ClientCredential::Uid(_) => "uid",
                ClientCredential::San(_) => "san",
                ClientCredential::ServiceAccount(_) => "service_account",
            };
            report.refuse(
                format_args!("signer.client.{}.{key}", client.name),
                format_args!("the same as that of signer.client.{first}: they could not be told apart"),
            );
        }
    }
}

fn admin(raw: raw::Admin, report: &mut Report) -> Option<Admin> {
    let listener = listener("admin", raw.listen, raw.socket_mode, raw.tls, report);
    let given = raw.token.unwrap_or_default().entries;
    let with_certificates = raw.client.unwrap_or_default().entries;
    let broken = report.is_broken("admin.token") || report.is_broken("admin.client");
    if given.is_empty() && with_certificates.is_empty() && !broken {
        report.refuse(
            "admin.token",
            "missing: nobody could log in; add a table [admin.token.NAME] with `role` and `file`, or [admin.client.NAME] \
             with `role` and `san`, or leave out [admin]",
        );
    }
    let tokens: Vec<_> = given.into_iter().filter_map(|(name, raw)| admin_token(name, raw, report)).collect();
    let clients: Vec<_> =
        with_certificates.into_iter().filter_map(|(name, raw)| admin_client(name, raw, report)).collect();
    refuse_doubles(&tokens, &clients, report);
    let listener = listener?;
    check_client_ca("admin", &listener, clients.iter().map(|client| &client.name), report);
    refuse_plain_text("admin", &listener, report);
    Some(Admin { listener, tokens, clients, page: raw.page.unwrap_or(true) })
}

/// The audit log must tell who it was.
fn refuse_doubles(tokens: &[AdminToken], clients: &[AdminClient], report: &mut Report) {
    let mut owners: HashMap<&SecretSource, &Name> = HashMap::new();
    for token in tokens {
        if let Some(first) = owners.insert(&token.source, &token.name) {
            report.refuse(
                format_args!("admin.token.{}", token.name),
                format_args!("has the token of admin.token.{first}: the audit log could not tell who it was"),
            );
        }
    }
    let mut owners: HashMap<&San, &Name> = HashMap::new();
    for client in clients {
        if let Some(first) = owners.insert(&client.san, &client.name) {
            report.refuse(
                format_args!("admin.client.{}.san", client.name),
                format_args!("the same as that of admin.client.{first}: the audit log could not tell who it was"),
            );
        }
        if let Some(token) = tokens.iter().find(|token| token.name == client.name)
            && token.role != client.role
        {
            report.refuse(
                format_args!("admin.client.{}.role", client.name),
                format_args!(
                    "is {}, and that of admin.token.{} is {}: one name has one role",
                    client.role, token.name, token.role
                ),
            );
        }
    }
}

fn admin_client(name: Name, raw: raw::AdminClient, report: &mut Report) -> Option<AdminClient> {
    let path = format!("admin.client.{name}");
    let role = admin_role(&path, raw.role, report);
    let example = "name the subject alternative name of the certificate, such as \"spiffe://example.com/alice\"";
    let text = report.require(format_args!("{path}.san"), raw.san, example);
    let san = text.and_then(|text| san(&path, &text, report));
    Some(AdminClient { name, role: role?, san: san? })
}

fn admin_role(table: &str, role: Option<String>, report: &mut Report) -> Option<Role> {
    let path = format!("{table}.role");
    let role = report.require(&path, role, "use \"viewer\" or \"operator\"");
    choose(&path, role, &[("viewer", Role::Viewer), ("operator", Role::Operator)], report)
}

fn admin_token(name: Name, raw: raw::AdminToken, report: &mut Report) -> Option<AdminToken> {
    let path = format!("admin.token.{name}");
    let role = admin_role(&path, raw.role, report);
    let source = secret(&path, &ADMIN_TOKEN, raw.file, raw.env, report);
    Some(AdminToken { name, role: role?, source: source? })
}

fn replication(raw: raw::Replication, report: &mut Report) -> Option<Replication> {
    let listener = listener("replication", raw.listen, raw.socket_mode, raw.tls.map(raw::MutualTls::from), report);
    let given = raw.client.unwrap_or_default().entries;
    if given.is_empty() && !report.is_broken("replication.client") {
        report.refuse(
            "replication.client",
            "missing: no signer could read; add a table [replication.client.NAME] with `token_file`, or leave out \
             [replication]",
        );
    }
    let client = |(name, raw): (Name, raw::ReplicationClient)| {
        let token = secret(&format!("replication.client.{name}"), &TOKEN, raw.token_file, raw.token_env, report);
        Some(ReplicationClient { name, token: token? })
    };
    let clients: Vec<_> = given.into_iter().filter_map(client).collect();
    let mut owners: HashMap<&SecretSource, &Name> = HashMap::new();
    for client in &clients {
        if let Some(first) = owners.insert(&client.token, &client.name) {
            report.refuse(
                format_args!("replication.client.{}", client.name),
                format_args!("has the token of replication.client.{first}: they could not be told apart"),
            );
        }
    }
    let listener = listener?;
    refuse_plain_text("replication", &listener, report);
    Some(Replication { listener, clients })
}

fn listener(
    table: &str,
    listen: Option<String>,
    socket_mode: Option<String>,
    tls: Option<raw::MutualTls>,
    report: &mut Report,
) -> Option<Listener> {
    let listen_path = format!("{table}.listen");
    let advice = "say where, such as \"127.0.0.1:8620\" or \"unix:/run/jwksd/jwksd.sock\"; without the table it is off";
    let listen = report.require(&listen_path, listen, advice);
    let mode = socket_mode.as_deref().map(|text| parse_mode(table, text, report));
    let tls = tls.and_then(|raw| tls_files(table, raw, report));
    let mut address = match parse_address(&listen?) {
        Ok(address) => address,
        Err(message) => {
            report.refuse(listen_path, message);
            return None;
        }
    };
    match (&mut address, mode) {
        (Address::Unix { mode, .. }, Some(given)) => *mode = given,
        (Address::Tcp(_), Some(_)) => {
            report.refuse(
                format_args!("{table}.socket_mode"),
                "is for Unix sockets, and this listener has a TCP address",
            );
        }
        (_, None) => {}
    }
    if tls.is_some() && matches!(address, Address::Unix { .. }) {
        report.refuse(format_args!("{table}.tls"), "a Unix socket does not leave the machine: leave TLS out");
    }
    Some(Listener { address, tls })
}

fn tls_files(table: &str, raw: raw::MutualTls, report: &mut Report) -> Option<TlsFiles> {
    let cert_file = report.require(
        format_args!("{table}.tls.cert_file"),
        raw.cert_file,
        "name the PEM file of the certificate chain",
    );
    let key_file =
        report.require(format_args!("{table}.tls.key_file"), raw.key_file, "name the PEM file of the private key");
    Some(TlsFiles { cert_file: cert_file?, key_file: key_file?, client_ca_file: raw.client_ca_file })
}

fn parse_mode(table: &str, text: &str, report: &mut Report) -> u32 {
    let octal = text.len() <= 5 && text.chars().all(|c| c.is_digit(8));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
    let path = format!("{table}.socket_mode");
    match mode {
        Some(mode) if mode & 0o600 == 0o600 => return mode,
        Some(mode) => {
            report.refuse(path, format_args!("{mode:04o} shuts its owner out: use \"0600\", \"0660\" or \"0666\""))
        }
        None => report.refuse(path, format_args!("{} is not a file mode such as \"0660\"", quoted(text))),
    }
    DEFAULT_SOCKET_MODE
}

fn parse_address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return parse_socket_path(path);
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(Address::Tcp(address));
    }
    let given = quoted(text);
    Err(if text.starts_with('/') {
        format!("{given} looks like a Unix socket: write \"unix:{text}\"")
    } else if let Some(port) = text.strip_prefix("localhost:") {
        format!("{given}: names are not resolved; write \"127.0.0.1:{port}\"")
    } else if text.starts_with(':') && text[1..].parse::<u16>().is_ok() {
        format!("{given} has no address: write \"127.0.0.1{text}\", or \"0.0.0.0{text}\" for all interfaces")
    } else if text.parse::<IpAddr>().is_ok() {
        format!("{given} has no port: write it like \"127.0.0.1:8620\" or \"[::1]:8620\"")
    } else {
        format!("{given} is not an address: write \"IP:PORT\" (names are not resolved) or \"unix:PATH\"")
    })
}

fn parse_socket_path(path: &str) -> Result<Address, String> {
    if path.is_empty() || path.ends_with('/') {
        return Err("names no socket: write it like \"unix:/run/jwksd/signer.sock\"".to_owned());
    }
    if path.starts_with("//") {
        return Err(format!("write the path without an authority: \"unix:/{}\"", path.trim_start_matches('/')));
    }
    if path.len() > LONGEST_SOCKET_PATH {
        return Err(format!("the path has {} bytes; a Unix socket's has at most {LONGEST_SOCKET_PATH}", path.len()));
    }
    Ok(Address::Unix { path: PathBuf::from(path), mode: DEFAULT_SOCKET_MODE })
}

/// Tokens do not cross a network in clear text.
fn refuse_plain_text(table: &str, listener: &Listener, report: &mut Report) {
    let broken = report.is_broken(&format!("{table}.tls")) || report.is_broken(&format!("{table}.tls.cert_file"));
    let broken = broken || report.is_broken(&format!("{table}.tls.key_file"));
    if !listener.address.is_local() && listener.tls.is_none() && !broken {
        report.refuse(
            format_args!("{table}.listen"),
            format_args!(
                "{} is not a loopback address, and tokens must not cross a network in clear text: add [{table}.tls] \
                 with `cert_file` and `key_file`, or listen on 127.0.0.1",
                listener.address
            ),
        );
    }
}

fn refuse_shared_addresses(listeners: &Listeners, report: &mut Report) {
    let public = listeners.public.as_ref().map(|l| ("public", l));
    let signer = listeners.signer.as_ref().map(|s| ("signer", &s.listener));
    let admin = listeners.admin.as_ref().map(|a| ("admin", &a.listener));
    let ops = listeners.ops.as_ref().map(|l| ("ops", l));
    let replication = listeners.replication.as_ref().map(|r| ("replication", &r.listener));
    let on: Vec<_> = [public, signer, admin, ops, replication].into_iter().flatten().collect();
    let mut refused = HashMap::new();
    for (index, (table, listener)) in on.iter().enumerate() {
        if let Some((first, other)) = on[..index].iter().find(|(_, other)| collide(&listener.address, &other.address)) {
            refused.insert(*table, format!("{} is taken by {first}.listen, {}", listener.address, other.address));
        }
    }
    for (table, _) in on {
        if let Some(message) = refused.remove(table) {
            report.refuse(format_args!("{table}.listen"), format_args!("{message}: give each listener its own"));
        }
    }
}

/// Whether binding one address excludes the other. Port 0 is a different free port each time.
fn collide(a: &Address, b: &Address) -> bool {
    match (a, b) {
        (Address::Unix { path: a, .. }, Address::Unix { path: b, .. }) => a == b,
        (Address::Tcp(a), Address::Tcp(b)) => {
            // On Linux a socket on [::] takes the port of every IPv4 address too.
            let covers = |any: IpAddr, other: IpAddr| any.is_unspecified() && (any.is_ipv6() || other.is_ipv4());
            let (x, y) = (a.ip().to_canonical(), b.ip().to_canonical());
            a.port() == b.port() && a.port() != 0 && (x == y || covers(x, y) || covers(y, x))
        }
        _ => false,
    }
}
