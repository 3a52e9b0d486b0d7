//! The command line: arguments, and one file per group of commands.

/// As the standard one, but a reader that has gone away ends the command quietly.
macro_rules! println {
    ($($text:tt)*) => { $crate::cli::print::put(&(format!($($text)*) + "\n")) };
}

/// As the standard one, but a reader that has gone away ends the command quietly.
macro_rules! print {
    ($($text:tt)*) => { $crate::cli::print::put(&format!($($text)*)) };
}

/// As the standard one, but it does not matter whether somebody reads.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::cli::print::complain(&(format!($($text)*) + "\n")) };
}

mod client;
mod clock;
mod config;
mod daemon;
mod demo;
mod keysets;
mod migrate;
mod notice;
mod print;
mod recover;
mod render;
mod simulate;
mod timeline;
mod tokens;
mod trust;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use reqwest::Method;

use crate::config::Source;
use crate::keyring::time::{Span, Timestamp};

/// Owns the signing keys of JWT issuers: makes, publishes, rotates and revokes them, and signs with them.
#[derive(Parser)]
#[command(name = "jwksd", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Clone)]
struct Global {
    /// Configuration file (TOML, or JSON by its extension) [default: $JWKSD_CONFIG, config/jwksd.toml, /etc/jwksd/jwksd.toml, built in]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the listener that the command talks to: a URL, host:port or unix:PATH [default: from the configuration;
    /// for operators' commands $JWKSD_SERVER]
    #[arg(long, global = true, value_name = "ADDRESS")]
    server: Option<String>,
    /// File with the bearer token [default: from the configuration; $JWKSD_TOKEN is a token itself]
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// PEM file with the CA of the daemon's certificate [default: the certificate that the configuration names, and the
    /// system's CAs]
    #[arg(long, global = true, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// PEM file with a certificate to show (mutual TLS); a token is then needed no more
    #[arg(long, global = true, value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// PEM file with the private key of --client-cert
    #[arg(long, global = true, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
}

impl Global {
    /// Where the configuration is read from.
    fn source(&self) -> Source {
        Source::find(self.config.as_deref(), variable("JWKSD_CONFIG").as_deref())
    }
}

/// A variable of the environment; an empty one is none.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    Serve {
        /// Everything in memory, a rotation every minute, each step narrated
        #[arg(long)]
        demo: bool,
    },
    /// Make the store, the seal key and missing admin tokens
    Init {
        /// Make a file store for a seal key that is there already: one that was handed out first, not that of a lost store
        #[arg(long)]
        existing_seal: bool,
    },
    /// Validate the configuration; print the derived timing and warnings
    Check,
    /// Draw the rotations to come, from the configuration alone
    Plan {
        keyset: Option<String>,
        /// How far ahead, such as 90d [default: the next two rotations]
        #[arg(long = "for", value_name = "DURATION")]
        span: Option<String>,
        /// When the configuration is taken (RFC 3339, or a duration from now) [default: now]
        #[arg(long, value_name = "TIME")]
        from: Option<String>,
    },
    /// Play the configuration through years with everything that goes wrong; needs no daemon
    Simulate(simulate::SimulateArgs),
    /// Show keysets and their keys
    Status {
        keyset: Option<String>,
        /// Keep showing
        #[arg(short, long)]
        watch: bool,
        /// Also list retired and revoked keys
        #[arg(long)]
        history: bool,
        /// Also draw each keyset's keys over time: past, now and to come
        #[arg(long)]
        timeline: bool,
    },
    /// List the replicas that share the store, and what they lack
    Replicas,
    /// Promote the oldest standby key now
    Rotate {
        keyset: Option<String>,
        /// Also take a key that was not published for `propagation`
        #[arg(long)]
        allow_unpropagated: bool,
        /// Confirm that verifiers accept the algorithm of the waiting keys
        #[arg(long, value_name = "ALG")]
        confirm_algorithm: Option<String>,
        #[command(flatten)]
        action: Action,
    },
    /// Revoke one key, by kid, unique prefix of a kid, or serial
    Revoke {
        /// [KEYSET] KEY; a prefix that begins with a hyphen is given as kid:-PREFIX
        #[arg(required = true, num_args = 1..=2, value_names = ["KEYSET", "KEY"])]
        target: Vec<String>,
        #[command(flatten)]
        action: Action,
    },
    /// Revoke every key of a keyset and start afresh, after a leak of the seal or the store
    Compromise {
        keyset: Option<String>,
        #[command(flatten)]
        action: Action,
    },
    /// Let the most recently demoted key sign again, and hold the schedule
    Rollback {
        keyset: Option<String>,
        #[command(flatten)]
        action: Action,
    },
    /// Stop scheduled promotions and removals
    Hold {
        keyset: Option<String>,
        /// A duration such as 2h, or an RFC 3339 time
        #[arg(long)]
        until: Option<String>,
        #[command(flatten)]
        request: Unasked,
    },
    /// End a hold
    Resume {
        keyset: Option<String>,
        #[command(flatten)]
        request: Unasked,
    },
    /// End a keyset: it signs no more, its keys leave as their tokens expire
    Drain {
        keyset: Option<String>,
        /// Let a drained keyset sign again
        #[arg(long)]
        undo: bool,
        #[command(flatten)]
        action: Action,
    },
    /// What was done, by whom, and every automatic transition
    Audit {
        keyset: Option<String>,
        /// Only what came after this time or cursor
        #[arg(long)]
        after: Option<String>,
    },
    /// Look at the daemon's clock, or accept it after it stepped
    Clock {
        #[command(subcommand)]
        command: ClockCommand,
    },
    /// Bring keys from elsewhere
    Import(keysets::ImportArgs),
    /// Sign a token
    Sign {
        keyset: Option<String>,
        #[arg(long)]
        sub: Option<String>,
        #[arg(long)]
        aud: Vec<String>,
        /// For example 10m
        #[arg(long)]
        ttl: Option<String>,
        /// The token's type, such as at+jwt
        #[arg(long)]
        typ: Option<String>,
        /// name=value; the value may be JSON
        #[arg(long = "claim", value_name = "NAME=VALUE")]
        claims: Vec<String>,
    },
    /// Verify a token (or - for standard input) against the published keys
    Verify {
        token: String,
        /// JWKS to use [default: this daemon's]
        #[arg(long, value_name = "URL")]
        jwks: Option<String>,
        /// Required issuer [default: that of the keys: this daemon's, or with --jwks that of the discovery document beside it]
        #[arg(long)]
        iss: Option<String>,
        /// Required audience
        #[arg(long)]
        aud: Option<String>,
    },
    /// Decode a token (or - for standard input) and point out weaknesses; verifies nothing
    Inspect { token: String },
    /// Compare a JWKS served elsewhere with ours
    Diff {
        url: String,
        /// Issuer to compare with, by name [default: the only one]
        #[arg(long)]
        issuer: Option<String>,
    },
    /// List the verifiers whose caching is known
    Verifiers,
    /// Try the receivers of notices
    Notice {
        #[command(subcommand)]
        command: NoticeCommand,
    },
    /// Re-encrypt everything under the configured seal key (all daemons must be stopped)
    Reseal,
    /// Move everything into another store (all daemons must be stopped)
    Migrate(migrate::MigrateArgs),
    /// Go on after a store was restored from an older copy, or two writers diverged
    Recover(recover::RecoverArgs),
    /// Ask the daemon whether it is ready
    Healthcheck {
        /// To sign, not only to publish
        #[arg(long)]
        sign: bool,
        /// Only whether it is alive: for probes that restart it
        #[arg(long, conflicts_with = "sign")]
        live: bool,
    },
    /// Print a completion script
    Completions { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
enum ClockCommand {
    /// Show the daemon's clock, and whether it is trusted
    Show,
    /// Accept the clock as it is: what waits for time goes on
    Accept {
        #[command(flatten)]
        action: Action,
    },
}

#[derive(Subcommand)]
enum NoticeCommand {
    /// Send a signed test notice and tell what the receiver answers; needs no daemon
    Test {
        /// Which receiver [default: all]
        name: Option<String>,
    },
}

/// What all changing commands have in common.
#[derive(Args, Clone, Default)]
struct Unasked {
    /// For the audit log
    #[arg(long)]
    reason: Option<String>,
    /// Show what would happen and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait until the daemon can do it
    #[arg(long)]
    wait: bool,
}

/// The same for commands that ask before they do something that cannot be undone.
#[derive(Args, Clone, Default)]
struct Action {
    #[command(flatten)]
    request: Unasked,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// What a health check asks for.
#[derive(Clone, Copy)]
enum Health {
    Alive,
    ReadyToPublish,
    ReadyToSign,
}

/// Why a command failed, by exit code (DESIGN §9).
#[derive(Debug)]
enum Failure {
    /// 1
    Failed(String),
    /// 2: wrong usage or configuration
    Usage(String),
    /// 3: refused by the daemon
    Refused(String),
    /// 4: the daemon cannot be reached
    Unreachable(String),
}

type Outcome = Result<(), Failure>;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(kids_marked(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (code, message) = match failure {
                Failure::Failed(message) => (1, message),
                Failure::Usage(message) => (2, message),
                Failure::Refused(message) => (3, message),
                Failure::Unreachable(message) => (4, message),
            };
            eprintln!("jwksd: {}", print::plain_lines(&message));
            ExitCode::from(code)
        }
    }
}

fn run(cli: Cli) -> Outcome {
    let global = cli.global;
    match cli.command {
        Command::Serve { demo: false } => daemon::serve(&global),
        Command::Serve { demo: true } => demo::serve(),
        Command::Init { existing_seal } => daemon::init(&global, existing_seal),
        Command::Reseal => daemon::reseal(&global),
        Command::Migrate(args) => migrate::migrate(&global, &args),
        Command::Recover(args) => recover::recover(&global, args),
        Command::Check => config::check(&global),
        Command::Plan { keyset, span, from } => {
            timeline::plan(&global, keyset.as_deref(), span.as_deref(), from.as_deref())
        }
        Command::Simulate(args) => simulate::simulate(&global, &args),
        Command::Verifiers => config::verifiers(&global),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "jwksd", &mut script);
            print!("{}", String::from_utf8_lossy(&script));
            Ok(())
        }
        Command::Inspect { token } => tokens::inspect(&global, &token),
        Command::Notice { command: NoticeCommand::Test { name } } => in_runtime(notice::test(&global, name.as_deref())),
        command => in_runtime(remote(&global, command)),
    }
}

/// Commands that talk to a daemon.
async fn remote(global: &Global, command: Command) -> Outcome {
    match command {
        Command::Status { keyset, watch, history, timeline } => {
            keysets::status(global, keyset.as_deref(), watch, history, timeline).await
        }
        Command::Replicas => keysets::replicas(global).await,
        Command::Rotate { keyset, allow_unpropagated, confirm_algorithm, action } => {
            keysets::rotate(global, keyset.as_deref(), allow_unpropagated, confirm_algorithm, &action).await
        }
        Command::Revoke { target, action } => keysets::revoke(global, &target, &action).await,
        Command::Compromise { keyset, action } => {
            keysets::act(global, keyset, "compromise", Method::POST, &action).await
        }
        Command::Rollback { keyset, action } => keysets::act(global, keyset, "rollback", Method::POST, &action).await,
        Command::Drain { keyset, undo, action } => {
            let method = if undo { Method::DELETE } else { Method::POST };
            keysets::act(global, keyset, "drain", method, &action).await
        }
        Command::Hold { keyset, until, request } => keysets::hold(global, keyset.as_deref(), until, &request).await,
        Command::Resume { keyset, request } => keysets::resume(global, keyset.as_deref(), &request).await,
        Command::Clock { command: ClockCommand::Show } => clock::show(global).await,
        Command::Clock { command: ClockCommand::Accept { action } } => clock::accept(global, &action).await,
        Command::Audit { keyset, after } => keysets::audit(global, keyset.as_deref(), after).await,
        Command::Import(arguments) => keysets::import(global, arguments).await,
        Command::Sign { keyset, sub, aud, ttl, typ, claims } => {
            tokens::sign(global, keyset.as_deref(), tokens::Wish { sub, aud, ttl, typ, claims }).await
        }
        Command::Verify { token, jwks, iss, aud } => tokens::verify(global, &token, jwks, iss, aud).await,
        Command::Diff { url, issuer } => tokens::diff(global, &url, issuer).await,
        Command::Healthcheck { sign, live } => {
            let asked = match (live, sign) {
                (true, _) => Health::Alive,
                (false, true) => Health::ReadyToSign,
                (false, false) => Health::ReadyToPublish,
            };
            keysets::healthcheck(global, asked).await
        }
        Command::Serve { .. }
        | Command::Init { .. }
        | Command::Reseal
        | Command::Migrate(_)
        | Command::Recover(_)
        | Command::Check
        | Command::Notice { .. }
        | Command::Plan { .. }
        | Command::Simulate(_)
        | Command::Verifiers
        | Command::Completions { .. }
        | Command::Inspect { .. } => Err(Failure::Failed("this command needs no daemon".to_owned())),
    }
}

/// Marks thumbprints among the arguments of `revoke` that begin with a hyphen, as one in 64 does: they are no options.
fn kids_marked(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut revoke = false;
    let marked = |argument: OsString| {
        let thumbprint = revoke
            && argument.to_str().is_some_and(|text| {
                text.starts_with('-') && URL_SAFE_NO_PAD.decode(text).is_ok_and(|digest| digest.len() == 32)
            });
        revoke |= argument == "revoke";
        if !thumbprint {
            return argument;
        }
        let mut kid = OsString::from(keysets::KID_MARK);
        kid.push(argument);
        kid
    };
    arguments.map(marked).collect()
}

/// A client needs one thread.
fn in_runtime(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::Failed(error.to_string()))?.block_on(work)
}

/// A time: RFC 3339, or a duration from now.
fn time_or_duration(text: &str, now: Timestamp) -> Result<Timestamp, Failure> {
    if let Some(at) = Timestamp::parse_rfc3339(text) {
        return Ok(at);
    }
    let span = Span::parse(text).map_err(|_| {
        Failure::Usage(format!("`{text}` is neither an RFC 3339 time (2026-11-24T10:00:00Z) nor a duration (2h)"))
    })?;
    Ok(now + span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_kid_that_begins_with_a_hyphen_is_no_option() {
        let kid = "-Z_DGSn5oW1xPYg1ZzLz4jC3bXo0w4OqG0jv5bnhH-A";
        for arguments in [
            vec!["jwksd", "revoke", kid, "--dry-run"],
            vec!["jwksd", "-o", "json", "revoke", "default", kid, "--dry-run"],
            vec!["jwksd", "revoke", "--dry-run", "kid:-Z"],
        ] {
            let parsed = Cli::try_parse_from(kids_marked(arguments.iter().map(OsString::from))).unwrap();
            let Command::Revoke { target, action } = parsed.command else { panic!("{arguments:?}") };
            assert!(target.last().unwrap().starts_with("kid:-Z") && action.request.dry_run, "{arguments:?}");
        }
        let import = ["jwksd", "import", "--key", "key.pem", "--kid", kid];
        Cli::try_parse_from(kids_marked(import.iter().map(OsString::from))).unwrap();
    }

    #[test]
    fn times_may_be_relative() {
        let now = Timestamp::from_secs(1_800_000_000);
        assert_eq!(time_or_duration("2h", now).unwrap(), now + Span::HOUR.times(2));
        assert_eq!(time_or_duration("2027-01-15T08:00:00Z", now).unwrap(), now);
        assert!(matches!(time_or_duration("tomorrow", now), Err(Failure::Usage(_))));
    }
}
