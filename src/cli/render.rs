//! Tables for people.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::IsTerminal;

use serde_json::Value;

use super::print::plain;
use crate::keyring::time::{Span, Timestamp};

/// Whether to colour: on a terminal, unless NO_COLOR is set.
pub(super) fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A keyset's status as drawn in DESIGN §9.
pub(super) fn keyset(keyset: &Value, now: Timestamp, colour: bool) -> String {
    let mut text = String::new();
    let paint = Paint { on: colour };
    let health = match keyset["health"].as_str().unwrap_or_default() {
        "ok" => paint.green("HEALTHY"),
        "degraded" => paint.yellow("DEGRADED"),
        _ => paint.red("FAILING"),
    };
    let _ = writeln!(
        text,
        "{}  {}  {}  generation {}  {health}",
        paint.bold(&shown(&keyset["name"])),
        shown(&keyset["algorithm"]),
        shown(&keyset["issuer"]),
        keyset["generation"]
    );
    for alarm in keyset["alarms"].as_array().into_iter().flatten() {
        let _ = writeln!(text, " {} {}", paint.red("!"), shown(alarm));
    }
    let lagging: BTreeSet<String> = keyset["keys"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|key| key["missing_replicas"].as_array().into_iter().flatten().map(shown))
        .collect();
    if !lagging.is_empty() {
        let names: Vec<String> = lagging.into_iter().collect();
        let _ = writeln!(
            text,
            " {} replicas that lack a waiting key: {} (see jwksd replicas)",
            paint.yellow("!"),
            names.join(", ")
        );
    }
    if let Some(hold) = keyset["hold"].as_object() {
        let until = hold
            .get("until")
            .and_then(Value::as_str)
            .map_or("until resumed".to_owned(), |at| format!("until {}", plain(at)));
        let actor = hold.get("actor").map(shown).unwrap_or_default();
        let reason = hold.get("reason").map(shown).filter(|reason| !reason.is_empty());
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        let _ = writeln!(text, " {} held by {actor} {until}{reason}", paint.yellow("‖"));
    }
    let rows: Vec<[String; 5]> = keyset["keys"].as_array().into_iter().flatten().map(|key| row(key, now)).collect();
    let header = ["#", "KID", "STATE", "SINCE", "NEXT"].map(str::to_owned);
    let widths: Vec<usize> = (0..4)
        .map(|column| rows.iter().chain([&header]).map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for (index, row) in [&header].into_iter().chain(&rows).enumerate() {
        let mut line = String::new();
        for column in 0..4 {
            let padded = format!("{:<width$}", row[column], width = widths[column]);
            let cell = match (index, column) {
                (0, _) => paint.dim(&padded),
                (_, 2) => paint.state(&padded),
                _ => padded,
            };
            let _ = write!(line, " {cell} ");
        }
        let next = if index == 0 { paint.dim(&row[4]) } else { row[4].clone() };
        let _ = writeln!(text, "{line} {next}");
    }
    text
}

fn row(key: &Value, now: Timestamp) -> [String; 5] {
    let since = Timestamp::parse_rfc3339(str_of(&key["entered_at"])).map(|at| rough(now.since(at))).unwrap_or_default();
    [key["serial"].to_string(), short_kid(&shown(&key["kid"])), shown(&key["state"]), since, next(key, now)]
}

fn next(key: &Value, now: Timestamp) -> String {
    let next = &key["next"];
    let state = shown(&next["state"]);
    if let Some(revocation) = key["revocation"].as_object() {
        let actor = revocation.get("actor").map(shown).unwrap_or_default();
        let reason = revocation.get("reason").map(shown).unwrap_or_default();
        return format!("revoked by {actor}: {reason}");
    }
    if state.is_empty() {
        return String::new();
    }
    let waiting: Vec<String> = next["waiting_for"].as_array().into_iter().flatten().map(shown).collect();
    let mut text = match (str_of(&key["state"]), Timestamp::parse_rfc3339(str_of(&next["at"]))) {
        ("standby", _) => match Timestamp::parse_rfc3339(str_of(&next["not_before"])) {
            Some(at) if at > now => {
                format!("{state} at the next rotation, in {} at the earliest", rough(at.since(now)))
            }
            _ => format!("{state} at the next rotation"),
        },
        (_, Some(at)) if at > now && at.since(now) >= Span::DAY => {
            format!("{state} in {} ({})", rough(at.since(now)), at.to_chrono().format("%a %-d %b %H:%M UTC"))
        }
        (_, Some(at)) if at > now => format!("{state} in {}", rough(at.since(now))),
        (_, Some(_)) => format!("{state} now"),
        (_, None) => state.to_owned(),
    };
    if !waiting.is_empty() && str_of(&key["state"]) != "standby" {
        let _ = write!(text, ", waiting for {}", waiting.join(", "));
    }
    text
}

/// `9kQ2…xA`: enough to recognise a kid.
pub(super) fn short_kid(kid: &str) -> String {
    let chars: Vec<char> = kid.chars().collect();
    if chars.len() <= 10 {
        return kid.to_owned();
    }
    let (head, tail) = (&chars[..4], &chars[chars.len() - 2..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

/// The one or two largest units: `29d`, `23h50m`, `1h06m`, `10m`, `45s`.
pub(super) fn rough(span: Span) -> String {
    let secs = span.as_secs();
    match secs {
        0..60 => format!("{secs}s"),
        60..600 if secs % 60 != 0 => format!("{}m{:02}s", secs / 60, secs % 60),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h{:02}m", secs / 3600, secs % 3600 / 60),
        _ => format!("{}d", secs / 86_400),
    }
}

/// An operator's answer (DESIGN §7).
pub(super) fn outcome(outcome: &Value, colour: bool) -> String {
    let paint = Paint { on: colour };
    let mut text = String::new();
    let tense = if outcome["dry_run"].as_bool().unwrap_or(false) { " (dry run, nothing changed)" } else { "" };
    let _ = writeln!(text, "{}{tense}  generation {}", paint.bold(&shown(&outcome["action"])), outcome["generation"]);
    let changes = outcome["changes"].as_array().map(Vec::as_slice).unwrap_or_default();
    if changes.is_empty() {
        let _ = writeln!(text, "  nothing changes");
    }
    for change in changes {
        let from = change["from"].as_str().map_or("new".to_owned(), plain);
        let kid = short_kid(&shown(&change["kid"]));
        let until =
            change["unpublished_at"].as_str().map(|at| format!(", published until {}", plain(at))).unwrap_or_default();
        let _ = writeln!(text, "  {:>3} {kid}  {from} → {}{until}", change["serial"], shown(&change["to"]));
    }
    if outcome["unpropagated"].as_bool().unwrap_or(false) {
        let _ = writeln!(
            text,
            "  {}",
            paint.yellow("the key that signs now was not published for long enough: some verifiers may not know it")
        );
    }
    for verifier in outcome["verifiers"].as_array().into_iter().flatten() {
        let ok = if verifier["ok"].as_bool().unwrap_or(false) { paint.green("ok") } else { paint.yellow("not yet") };
        let by = verifier["sees_new_key_by"].as_str().map_or("an unknown time".to_owned(), plain);
        let _ = writeln!(text, "  verifier {}: sees the key by {by} ({ok})", shown(&verifier["name"]));
    }
    if let Some(exposure) = outcome["exposure"].as_object() {
        match exposure.get("until").and_then(Value::as_str) {
            Some(until) => _ = writeln!(text, "  declared caches may accept the key until {}", plain(until)),
            None => {
                _ = writeln!(
                    text,
                    "  it is not known until when caches may accept the key: read the answer of a newer daemon"
                )
            }
        }
    }
    for name in outcome["restart_verifiers"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  {} restart {}: it keeps the key until then", paint.red("!"), shown(name));
    }
    if outcome["exposure"].is_object() {
        unconfirmed_replicas(&mut text, outcome, &paint);
    }
    for warning in outcome["warnings"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  {} {}", paint.yellow("!"), shown(warning));
    }
    if let Some(at) = outcome["next_standby_at"].as_str() {
        let _ = writeln!(text, "  the next standby key is ready at {}", plain(at));
    }
    text
}

/// Who may use a revoked key for longer than its exposure counts. Daemons of earlier releases do not say.
fn unconfirmed_replicas(text: &mut String, outcome: &Value, paint: &Paint) {
    if outcome.get("unconfirmed_replicas").is_some_and(Value::is_null) {
        let _ = writeln!(
            text,
            "  {} it is not known whether all replicas hear of it: look at `jwksd replicas`",
            paint.yellow("!")
        );
    }
    for replica in outcome["unconfirmed_replicas"].as_array().into_iter().flatten() {
        let seen = replica["last_seen_at"].as_str().map_or("at an unknown time".to_owned(), plain);
        let (verb, way_out) = match replica["publishes"].as_bool().unwrap_or(true) {
            true => ("serve", "take it out of the balancer"),
            false => ("sign with", "stop it"),
        };
        let name = shown(&replica["name"]);
        let _ = writeln!(
            text,
            "  {} replica {name} (seen {seen}) may not hear of it and {verb} the key on: {way_out}",
            paint.red("!")
        );
    }
}

/// The replicas of a store, as `GET /v1/replicas` lists them.
pub(super) fn replicas(list: &Value, now: Timestamp, colour: bool) -> String {
    let paint = Paint { on: colour };
    let mut text = format!(
        "{}\n",
        paint.dim(&format!(
            " {:<28}  {:<8}  {:<9}  {:<6}  {:<10}  SHOWS",
            "REPLICA", "ROLE", "PUBLISHES", "SEEN", "STANDING"
        ))
    );
    for replica in list["replicas"].as_array().into_iter().flatten() {
        let keysets: Vec<&Value> = replica["keysets"].as_array().into_iter().flatten().collect();
        let lacks = |keyset: &Value| -> Vec<String> {
            let name = shown(&keyset["keyset"]);
            let keys = keyset["lacks"].as_array().into_iter().flatten();
            keys.map(|key| format!("{name} key {}", key["serial"])).collect()
        };
        let lacked: Vec<String> = keysets.iter().flat_map(|keyset| lacks(keyset)).collect();
        let standing = match (replica["live"].as_bool().unwrap_or(false), lacked.is_empty()) {
            _ if replica["stopped"] == true => "stopped",
            (false, _) => "silent",
            (true, false) => "lags",
            (true, true) => "up to date",
        };
        let shows = |keyset: &&Value| match keyset["generation"].as_u64() {
            Some(generation) => format!("{} {generation}", shown(&keyset["keyset"])),
            None => format!("{} not at all", shown(&keyset["keyset"])),
        };
        let shows = match lacked.is_empty() {
            true => keysets.iter().map(shows).collect::<Vec<_>>().join(", "),
            false => format!("lacks {}", lacked.join(", ")),
        };
        let own = replica["own"].as_bool().unwrap_or(false);
        let seen = Timestamp::parse_rfc3339(str_of(&replica["last_seen_at"]));
        let seen = if own { "here".to_owned() } else { seen.map(|at| rough(now.since(at))).unwrap_or_default() };
        let publishes = if replica["publishes"].as_bool().unwrap_or(false) { "yes" } else { "no" };
        let padded = format!("{standing:<10}");
        let standing = if standing == "up to date" { paint.green(&padded) } else { paint.yellow(&padded) };
        let (name, role) = (shown(&replica["name"]), shown(&replica["role"]));
        let _ = writeln!(text, " {name:<28}  {role:<8}  {publishes:<9}  {seen:<6}  {standing}  {shows}");
    }
    if !list["complete"].as_bool().unwrap_or(true) {
        let _ = writeln!(text, " there may be others: managers do not tell of them");
    }
    text
}

/// The text of a JSON string, or nothing.
pub(super) fn str_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The same as it may be printed.
fn shown(value: &Value) -> String {
    plain(str_of(value))
}

pub(super) struct Paint {
    pub on: bool,
}

impl Paint {
    fn wrap(&self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(&self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub(super) fn dim(&self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn green(&self, text: &str) -> String {
        self.wrap("32", text)
    }

    fn yellow(&self, text: &str) -> String {
        self.wrap("33", text)
    }

    fn red(&self, text: &str) -> String {
        self.wrap("31", text)
    }

    fn state(&self, padded: &str) -> String {
        self.state_as(padded.trim_end(), padded)
    }

    /// A text in the colour of a state.
    pub(super) fn state_as(&self, state: &str, text: &str) -> String {
        let code = match state {
            "active" => "32",
            "standby" => "36",
            "pending" => "33",
            "revoked" => "31",
            _ => "2",
        };
        self.wrap(code, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_looks_as_drawn() {
        let now = Timestamp::parse_rfc3339("2026-11-24T10:10:00Z").unwrap();
        let key = |serial: u64, kid: &str, state: &str, entered: &str, next: &str, at: Option<&str>| {
            serde_json::json!({ "serial": serial, "kid": kid, "state": state, "entered_at": entered,
                "next": { "state": next, "at": at, "waiting_for": [] } })
        };
        let value = serde_json::json!({
            "name": "default", "algorithm": "ES256", "issuer": "https://auth.example.com", "generation": 44,
            "health": "ok", "alarms": [], "hold": null,
            "keys": [
                key(8, "9kQ2abcdefghxA", "active", "2026-11-24T10:00:00Z", "retiring", Some("2026-12-24T10:00:00Z")),
                key(9, "Ge71abcdefgh0c", "standby", "2026-10-26T10:00:00Z", "active", Some("2026-12-24T10:00:00Z")),
                key(10, "b0Lmabcdefgh4e", "pending", "2026-11-24T10:00:00Z", "standby", Some("2026-11-25T10:00:00Z")),
                key(7, "Zp0dabcdefgh7w", "retiring", "2026-11-24T10:00:00Z", "retired", Some("2026-11-24T11:16:00Z")),
            ],
        });
        insta::assert_snapshot!(keyset(&value, now, false));
    }

    #[test]
    fn a_revocation_names_replicas_that_may_not_hear_of_it() {
        let drawn = |replicas: Value| {
            let exposure = serde_json::json!({ "until": "2026-11-24T10:10:00Z", "unbounded": [] });
            let value =
                serde_json::json!({ "action": "revoke", "exposure": exposure, "unconfirmed_replicas": replicas });
            let drawn = outcome(&value, false);
            drawn.lines().filter(|line| line.contains('!')).map(str::to_owned).collect::<Vec<_>>()
        };
        let replica = |name: &str, publishes: bool| serde_json::json!({ "name": name, "publishes": publishes, "last_seen_at": "2026-11-24T10:00:00Z" });
        assert_eq!(
            drawn(serde_json::json!([replica("a/1", true), replica("b/2", false)])),
            [
                "  ! replica a/1 (seen 2026-11-24T10:00:00Z) may not hear of it and serve the key on: take it out of the balancer",
                "  ! replica b/2 (seen 2026-11-24T10:00:00Z) may not hear of it and sign with the key on: stop it",
            ]
        );
        assert_eq!(
            drawn(Value::Null),
            ["  ! it is not known whether all replicas hear of it: look at `jwksd replicas`"]
        );
        assert_eq!(drawn(serde_json::json!([])), [""; 0]);
    }

    #[test]
    fn replicas_that_lag_are_named_once_above_the_table() {
        let key = |serial: u64| serde_json::json!({ "serial": serial, "kid": "k", "state": "standby", "missing_replicas": ["b/2", "a/1"] });
        let value = serde_json::json!({ "name": "default", "generation": 1, "keys": [key(1), key(2)] });
        let drawn = keyset(&value, Timestamp::EPOCH, false);
        let line = drawn.lines().nth(1).unwrap_or_default();
        assert_eq!(line, " ! replicas that lack a waiting key: a/1, b/2 (see jwksd replicas)");
    }

    #[test]
    fn replicas_are_listed_with_what_they_lack() {
        let replica = |name: &str, own: bool, live: bool, lacks: serde_json::Value| {
            serde_json::json!({ "name": name, "own": own, "role": "all", "publishes": true, "live": live,
                "last_seen_at": "2026-11-24T09:59:55Z", "keysets": [{ "keyset": "default", "generation": 7, "lacks": lacks }] })
        };
        let lacked = serde_json::json!([{ "serial": 9, "kid": "k" }]);
        let mut list = serde_json::json!({ "complete": false, "replicas": [
            replica("here/1", true, true, serde_json::json!([])), replica("there/2", false, true, lacked.clone()),
            replica("gone/3", false, false, lacked.clone()), replica("left/4", false, true, lacked)] });
        list["replicas"][3]["stopped"] = true.into();
        let now = Timestamp::parse_rfc3339("2026-11-24T10:00:00Z").unwrap();
        insta::assert_snapshot!(replicas(&list, now, false));
    }

    #[test]
    fn a_standby_key_that_may_not_sign_yet_says_when_it_may() {
        let now = Timestamp::parse_rfc3339("2026-11-24T10:00:00Z").unwrap();
        let key = |at: &str| serde_json::json!({ "state": "standby", "next": { "state": "active", "not_before": at, "waiting_for": [] } });
        assert_eq!(next(&key("2026-11-24T12:00:00Z"), now), "active at the next rotation, in 2h00m at the earliest");
        assert_eq!(next(&key("2026-11-24T10:00:00Z"), now), "active at the next rotation");
    }

    #[test]
    fn spans_show_their_largest_units() {
        for (secs, text) in [
            (0, "0s"),
            (45, "45s"),
            (65, "1m05s"),
            (600, "10m"),
            (3960, "1h06m"),
            (85_800, "23h50m"),
            (2_505_600, "29d"),
        ] {
            assert_eq!(rough(Span::from_secs(secs)), text);
        }
    }
}
