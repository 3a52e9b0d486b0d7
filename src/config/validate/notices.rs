//! Receivers of notices.

use std::collections::HashSet;

use crate::config::problem::{Report, suggest};
use crate::config::raw;
use crate::config::{ProcessRole, Receiver};
use crate::keyring::name::Name;
use crate::keyring::notice::Event;
use crate::keyring::time::Span;

use super::quoted;
use super::secrets::{SecretKeys, secret};
use super::url::{check_endpoint, parse_url};

/// Each has a task of its own, and a line per keyset in what is stored.
const MOST_RECEIVERS: usize = 8;
const MOST_LEADS: usize = 8;
const LONGEST_LEAD: Span = Span::DAY.times(90);
const LONGEST_QUERY: usize = 1024;

const TIMEOUT: Span = Span::from_secs(10);
const TIMEOUTS: (Span, Span) = (Span::from_millis(100), Span::MINUTE);
const GIVE_UP_AFTER: Span = Span::DAY.times(3);
const GIVE_UPS: (Span, Span) = (Span::SECOND, Span::DAY.times(30));

const SECRET: SecretKeys = SecretKeys {
    file: "secret_file",
    env: "secret_env",
    noun: "the secret that signs",
    example: "NOTICE_SECRET",
    inline: &["secret", "token", "password"],
};

/// `known`: the keysets that there are, where that is known here.
pub(super) fn validate(
    raw: Option<raw::Named<raw::Notice>>,
    role: Option<ProcessRole>,
    known: Option<&HashSet<Name>>,
    report: &mut Report,
) -> Vec<Receiver> {
    let raw = raw.unwrap_or_default().entries;
    if raw.len() > MOST_RECEIVERS {
        report.refuse("notice", format_args!("has {} receivers: at most {MOST_RECEIVERS}", raw.len()));
    }
    let receivers: Vec<Receiver> =
        raw.into_iter().filter_map(|(name, raw)| receiver(name, raw, known, report)).collect();
    if role == Some(ProcessRole::Signer) && !receivers.is_empty() {
        report.warn("notice", "has no effect with role = \"signer\": managers send notices");
        return Vec::new();
    }
    receivers
}

fn receiver(name: Name, raw: raw::Notice, known: Option<&HashSet<Name>>, report: &mut Report) -> Option<Receiver> {
    let table = format!("notice.{name}");
    let path = |key: &str| format!("{table}.{key}");
    let url = report.require(path("url"), raw.url, "say where notices go, such as \"https://hooks.example.com/jwksd\"");
    // Not quoted: its query may be a secret.
    if let Some(Err(message)) = url.as_deref().map(check_url) {
        report.refuse(path("url"), message);
    }
    let secret = secret(&table, &SECRET, raw.secret_file, raw.secret_env, report);
    let events = events(&path("events"), raw.events, report);
    let keysets = raw.keysets.map(|names| keysets(&path("keysets"), names, known, report));
    let before = leads(&path("before"), raw.before, report);
    let timeout = between(&path("timeout"), raw.timeout, TIMEOUT, TIMEOUTS, report);
    let give_up_after = between(&path("give_up_after"), raw.give_up_after, GIVE_UP_AFTER, GIVE_UPS, report);
    Some(Receiver {
        name,
        url: url?,
        secret: secret?,
        events,
        keysets,
        before,
        ca_file: raw.ca_file,
        timeout,
        give_up_after,
    })
}

/// As any endpoint, and with a query if it must be.
fn check_url(url: &str) -> Result<(), &'static str> {
    let (place, query) = url.split_once('?').map_or((url, ""), |(place, query)| (place, query));
    check_endpoint(place)?;
    if query.len() > LONGEST_QUERY {
        return Err("has a query of more than 1024 bytes");
    }
    if !query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        return Err("must not have a fragment, nor characters that do not belong into a query");
    }
    if parse_url(place)?.link_local {
        return Err("is an address of this network segment, where clouds keep credentials: notices do not go there");
    }
    Ok(())
}

fn events(path: &str, given: Option<Vec<String>>, report: &mut Report) -> Vec<Event> {
    let Some(given) = given else { return Event::ALL.to_vec() };
    if given.is_empty() {
        report.refuse(path, "is empty: leave it out for every event");
    }
    let known = Event::ALL.map(Event::as_str);
    let mut events = Vec::new();
    for text in given {
        // `key.*` is every event of keys.
        let all = text.strip_suffix(".*").map(|group| format!("{group}."));
        let meant = Event::ALL.into_iter().filter(|event| match &all {
            Some(group) => event.as_str().starts_with(group),
            None => event.as_str() == text,
        });
        let meant: Vec<Event> = meant.filter(|event| !events.contains(event)).collect();
        if meant.is_empty()
            && !known.iter().any(|name| *name == text || all.as_ref().is_some_and(|g| name.starts_with(g)))
        {
            report.refuse(path, format_args!("{} is not an event; {}", quoted(&text), suggest(&text, &known)));
        }
        events.extend(meant);
    }
    events
}

fn keysets(path: &str, given: Vec<String>, known: Option<&HashSet<Name>>, report: &mut Report) -> Vec<Name> {
    if given.is_empty() {
        report.refuse(path, "is empty: leave it out for every keyset");
    }
    let mut names = Vec::new();
    for text in given {
        match Name::parse(&text) {
            Ok(name) if known.is_none_or(|known| known.contains(&name)) => names.push(name),
            _ => {
                let known: Vec<&str> = known.into_iter().flatten().map(Name::as_str).collect();
                report.refuse(path, format_args!("{} is not a keyset; {}", quoted(&text), suggest(&text, &known)));
            }
        }
    }
    names
}

fn leads(path: &str, given: Option<Vec<Span>>, report: &mut Report) -> Vec<Span> {
    let mut leads = given.unwrap_or_else(|| vec![Span::DAY, Span::HOUR]);
    if leads.len() > MOST_LEADS {
        report.refuse(path, format_args!("has {} times: at most {MOST_LEADS}", leads.len()));
    }
    for lead in &leads {
        if lead.is_zero() || *lead > LONGEST_LEAD {
            report.refuse(path, format_args!("{lead} is not more than nothing and at most {LONGEST_LEAD}"));
        }
    }
    leads.sort();
    leads.dedup();
    leads
}

fn between(path: &str, given: Option<Span>, usual: Span, (least, most): (Span, Span), report: &mut Report) -> Span {
    let given = given.unwrap_or(usual);
    if given < least || given > most {
        report.refuse(path, format_args!("{given} is not between {least} and {most}"));
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_go_where_nobody_reads_along() {
        for good in [
            "https://hooks.example.com/a",
            "https://hooks.example.com/a?sig=a%2Fb&x=1",
            "http://127.0.0.1:9/x",
            "http://localhost:9",
        ] {
            assert_eq!(check_url(good), Ok(()), "{good}");
        }
        for bad in [
            "http://hooks.example.com",
            "https://user:password@hooks.example.com",
            "https://hooks.example.com/#a",
            "https://hooks.example.com/?a#b",
            "https://hooks.example.com/?a b",
            "https://169.254.169.254/latest",
            "ftp://hooks.example.com",
            "hooks.example.com",
        ] {
            assert!(check_url(bad).is_err(), "{bad} was accepted");
        }
    }
}
