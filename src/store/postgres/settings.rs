//! What is configured, and the servers that it names.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

use crate::config::Secret;

/// The schema, unless another one is named.
pub const DEFAULT_SCHEMA: &str = "jwksd";

/// With the names of roles and of the channel made from it, it fits PostgreSQL's 63 bytes.
const LONGEST_SCHEMA: usize = 48;

/// How to reach the database.
#[derive(Clone, Debug)]
pub struct PostgresSettings {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…`, or PostgreSQL's `host=… user=…` form; several hosts are
    /// tried in turn for the primary. With TLS the server's certificate and name are always verified, as by libpq's
    /// `verify-full`; without it only loopback addresses and Unix sockets are accepted.
    pub url: Secret,
    /// Authorities that may vouch for the server, as PEM; those of the system when absent. Read at every connect.
    pub ca_file: Option<PathBuf>,
    pub schema: String,
    /// How long the server works on one statement; a whole call ends at most two seconds after that.
    pub statement_timeout: Duration,
    /// Most connections at once, beside the one that listens.
    pub connections: u32,
}

/// One server of the URL.
#[derive(Clone, Debug)]
pub(super) struct Server {
    /// Never logged: it holds the password, which its `Debug` leaves out.
    pub config: Config,
    /// `HOST:PORT` or the socket's folder.
    pub label: String,
}

/// Settings that can be used.
#[derive(Debug)]
pub(super) struct Checked {
    pub servers: Vec<Server>,
    /// `HOST:PORT,…/DATABASE`, for messages.
    pub label: String,
    pub schema: String,
    pub ca_file: Option<PathBuf>,
    pub statement_timeout: Duration,
    pub connections: u32,
}

impl PostgresSettings {
    pub(super) fn check(self) -> Result<Checked, String> {
        check_schema(&self.schema)?;
        if self.statement_timeout < Duration::from_millis(100) || self.statement_timeout > Duration::from_secs(600) {
            return Err("its statement_timeout must be between 100ms and 10m".to_owned());
        }
        if self.connections == 0 || self.connections > 100 {
            return Err("its connections must be between 1 and 100".to_owned());
        }
        let config = parse(&self.url)?;
        let servers = servers(&config)?;
        let user = config.get_user().ok_or("its URL names no user: postgres://USER@HOST/DATABASE")?;
        let database = config.get_dbname().unwrap_or(user);
        let hosts: Vec<&str> = servers.iter().map(|server| server.label.as_str()).collect();
        let label = format!("{}/{database}", hosts.join(","));
        let (ca_file, statement_timeout) = (self.ca_file, self.statement_timeout);
        Ok(Checked { servers, label, schema: self.schema, ca_file, statement_timeout, connections: self.connections })
    }
}

/// Lower-case names need no quotes anywhere, also not where people type them.
fn check_schema(schema: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let starts_well = schema.starts_with(|c: char| c.is_ascii_lowercase()) && !schema.starts_with("pg_");
    if starts_well && schema.chars().all(plain) && schema.len() <= LONGEST_SCHEMA {
        return Ok(());
    }
    Err(format!(
        "its schema must be of lower-case letters, digits and `_`, begin with a letter, not with `pg_`, and have at most \
         {LONGEST_SCHEMA} characters"
    ))
}

/// Messages are made here, never taken from the parser: it may quote the password.
fn parse(url: &Secret) -> Result<Config, String> {
    let text = std::str::from_utf8(url.expose()).map_err(|_| "its URL is not UTF-8")?.trim();
    for option in ["sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword", "passfile", "service"] {
        if text.contains(&format!("{option}=")) {
            let advice = if option == "sslrootcert" { "name the authority in ca_file" } else { "leave it out" };
            return Err(format!("its URL has the option {option}, which is not supported: {advice}"));
        }
    }
    // What these two ask for is what `require` does here.
    let text = text.replace("sslmode=verify-full", "sslmode=require").replace("sslmode=verify-ca", "sslmode=require");
    Config::from_str(&text).map_err(|error| {
        let problem = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        // Only this kind of message has nothing of the URL in it but the name of an option known to the parser.
        if problem.starts_with("invalid value for option") {
            return format!("its URL has an {problem}");
        }
        "its URL is not one of PostgreSQL's (postgres://USER:PASSWORD@HOST:PORT/DATABASE?OPTION=VALUE): check its options, \
         and write special characters in the password as %XX"
            .to_owned()
    })
}

fn servers(config: &Config) -> Result<Vec<Server>, String> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    let fits = |length: usize| length <= 1 || length == count;
    if count == 0 {
        return Err("its URL names no host: postgres://USER@HOST/DATABASE".to_owned());
    }
    if !fits(ports.len()) || (!hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len()) {
        return Err("its URL names other numbers of hosts, addresses and ports".to_owned());
    }
    (0..count)
        .map(|index| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            server(config, hosts.get(index), addresses.get(index).copied(), port)
        })
        .collect()
}

fn server(config: &Config, host: Option<&Host>, address: Option<IpAddr>, port: u16) -> Result<Server, String> {
    let mut alone = Config::new();
    alone.user(config.get_user().unwrap_or_default()).port(port).channel_binding(config.get_channel_binding());
    // The session asks by itself, and says what is wrong.
    alone.target_session_attrs(TargetSessionAttrs::Any).ssl_negotiation(config.get_ssl_negotiation());
    alone.application_name(config.get_application_name().unwrap_or("jwksd"));
    config.get_password().map(|password| alone.password(password));
    config.get_dbname().map(|database| alone.dbname(database));
    config.get_options().map(|options| alone.options(options));
    address.map(|address| alone.hostaddr(address));
    let (label, local) = match host {
        Some(Host::Unix(folder)) => {
            alone.host_path(folder).ssl_mode(SslMode::Disable);
            return Ok(Server { config: alone, label: folder.display().to_string() });
        }
        Some(Host::Tcp(name)) => {
            alone.host(name);
            (format!("{name}:{port}"), address.map_or_else(|| is_loopback(name), |address| address.is_loopback()))
        }
        None => (
            format!("{}:{port}", address.map(|a| a.to_string()).unwrap_or_default()),
            address.is_some_and(|a| a.is_loopback()),
        ),
    };
    // What an attacker between the two could strip is no protection: elsewhere than here, `prefer` is `require`.
    alone.ssl_mode(match config.get_ssl_mode() {
        mode if local => mode,
        SslMode::Disable => {
            return Err(format!(
                "its URL has sslmode=disable for {label}: only loopback addresses and Unix sockets are used without TLS; \
                 leave sslmode out, and name the server's authority in ca_file unless the system trusts it"
            ));
        }
        _ => SslMode::Require,
    });
    Ok(Server { config: alone, label })
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(url: &str) -> Result<Checked, String> {
        let url = Secret::new(url.as_bytes()).unwrap();
        let statement_timeout = Duration::from_secs(5);
        let schema = DEFAULT_SCHEMA.to_owned();
        PostgresSettings { url, ca_file: None, schema, statement_timeout, connections: 4 }.check()
    }

    #[test]
    fn without_tls_only_this_machine_is_talked_to() {
        for url in [
            "postgres://u@localhost/d?sslmode=disable",
            "postgres://u@127.0.0.1:5433/d?sslmode=disable",
            "postgres://u@[::1]/d?sslmode=disable",
            "postgres:///d?user=u&host=/run/postgresql",
            "host=db.example hostaddr=127.0.0.1 user=u sslmode=disable",
        ] {
            assert_eq!(checked(url).unwrap().servers[0].config.get_ssl_mode(), SslMode::Disable, "{url}");
        }
        for url in [
            "postgres://u@db.example/d?sslmode=disable",
            "postgres://u@localhost,10.0.0.1/d?sslmode=disable",
            "host=localhost hostaddr=10.0.0.1 user=u sslmode=disable",
        ] {
            assert!(checked(url).unwrap_err().contains("sslmode=disable"), "{url}");
        }
    }

    #[test]
    fn elsewhere_tls_is_required_even_where_it_is_only_preferred() {
        for url in
            ["postgres://u@db.example/d", "postgres://u@db.example/d?sslmode=verify-full", "host=db.example user=u"]
        {
            assert_eq!(checked(url).unwrap().servers[0].config.get_ssl_mode(), SslMode::Require, "{url}");
        }
        assert_eq!(checked("postgres://u@127.0.0.1/d").unwrap().servers[0].config.get_ssl_mode(), SslMode::Prefer);
    }

    #[test]
    fn each_host_is_a_server_of_its_own() {
        let checked = checked("postgres://u:s3cret@a.example:1,b.example:2/d").unwrap();
        let labels: Vec<_> = checked.servers.iter().map(|server| server.label.as_str()).collect();
        assert_eq!(labels, ["a.example:1", "b.example:2"]);
        assert_eq!(checked.label, "a.example:1,b.example:2/d");
        assert!(!format!("{checked:?}").contains("s3cret"));
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_its_password() {
        for (url, said) in [
            ("postgres://u:s3cret@db.example/d?sslmode=always", "sslmode"),
            ("postgres://u:s3cret@db.example/d?sslrootcert=/ca.pem", "ca_file"),
            ("postgres://u:p?s3cret=1@db.example/d", "%XX"),
            ("postgres://u:x@db.example/d?s3cret=1", "%XX"),
            ("postgres://u:s3cret@db.example:port/d", "port"),
            ("https://u:s3cret@db.example/", "postgres://"),
            ("postgres://db.example/d", "no user"),
            ("postgres:///d?user=u", "no host"),
        ] {
            let problem = checked(url).unwrap_err();
            assert!(problem.contains(said) && !problem.contains("s3cret"), "{url}: {problem}");
        }
    }

    #[test]
    fn schemas_are_plain_names() {
        for (schema, good) in [
            ("jwksd", true),
            ("a_1", true),
            ("", false),
            ("Jwksd", false),
            ("a-b", false),
            ("a\"b", false),
            ("pg_x", false),
        ] {
            assert_eq!(check_schema(schema).is_ok(), good, "{schema}");
        }
        assert!(check_schema(&"a".repeat(49)).is_err());
    }
}
