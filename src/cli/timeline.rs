//! Keys over time as text: `plan`, from a configuration alone, and the same picture of running keysets.

use std::fmt::Write;
use std::io::IsTerminal;

use serde_json::{Value, json};

use super::config::{chosen, foreseeable};
use super::keysets::print_json;
use super::print::plain;
use super::render::{Paint, colour, short_kid, str_of};
use super::{Failure, Global, Outcome, Output, time_or_duration};
use crate::app::system_now;
use crate::keyring::time::{Span, Timestamp};
use crate::keyring::timeline::{AHEAD_MAX, Window, forecast};

/// Columns where there is no terminal that says how many it has.
const USUAL_WIDTH: usize = 100;

/// Rotations that are listed below a picture.
const LISTED: usize = 12;

/// The rotations to come of a configuration that is taken at `from` for the first time.
pub(super) fn plan(global: &Global, keyset: Option<&str>, span: Option<&str>, from: Option<&str>) -> Outcome {
    let config = foreseeable(global)?;
    let start = from.map_or(Ok(system_now()), |from| time_or_duration(from, system_now()))?;
    let ahead = span.map(|span| duration("--for", span)).transpose()?;
    let keysets = chosen(&config, keyset)?;
    let mut plans = Vec::new();
    for known in keysets {
        let ahead = ahead.unwrap_or_else(|| Window::of(&known.policy).ahead);
        let timeline = forecast(&known.name, &known.policy, start, ahead);
        plans.push((known, serde_json::to_value(&timeline).map_err(|error| Failure::Failed(error.to_string()))?));
    }
    if global.output == Output::Json {
        let mut plans: Vec<Value> = plans.into_iter().map(|(_, plan)| plan).collect();
        print_json(&if keyset.is_some() { plans.remove(0) } else { json!({ "keysets": plans }) });
        return Ok(());
    }
    let paint = Paint { on: colour() };
    for (index, (known, plan)) in plans.iter().enumerate() {
        let policy = &known.policy;
        println!(
            "{}{}  {}  {}  {}, each key published {} before it signs",
            if index == 0 { "" } else { "\n" },
            paint.bold(known.name.as_str()),
            policy.algorithm,
            policy.issuer.url,
            policy.rotation.schedule,
            policy.rotation.propagation,
        );
        print!("{}", draw(plan, width(), colour()));
    }
    Ok(())
}

/// As `--past` and the like are written.
pub(super) fn duration(option: &str, text: &str) -> Result<Span, Failure> {
    let span = Span::parse(text).map_err(|error| Failure::Usage(format!("{option}: {error}")))?;
    if span > AHEAD_MAX || span.is_zero() {
        return Err(Failure::Usage(format!("{option}: {text} is not between a moment and ten years")));
    }
    Ok(span)
}

/// Columns of the terminal, else of `COLUMNS`.
pub(super) fn width() -> usize {
    let out = std::io::stdout();
    let terminal = out.is_terminal().then(|| rustix::termios::tcgetwinsize(&out).ok()).flatten();
    let columns = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let width = terminal.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).or_else(columns);
    width.unwrap_or(USUAL_WIDTH).clamp(40, 400)
}

/// A timeline as the API answers it, no wider than `width`.
pub(super) fn draw(timeline: &Value, width: usize, colour: bool) -> String {
    let paint = Paint { on: colour };
    let Some(scale) = Scale::of(timeline, width) else { return String::new() };
    let mut text = String::new();
    let _ = writeln!(text, "{}", paint.dim(&scale.axis()));
    let _ = writeln!(text, "{}", scale.pointer());
    for lane in timeline["keys"].as_array().into_iter().flatten() {
        let kid = lane["kid"].as_str().map_or("to come".to_owned(), |kid| short_kid(&plain(kid)));
        let label = format!(" {:<3} {kid:<7}", lane["serial"].as_u64().unwrap_or(0));
        let drawn = scale.lane(lane, &paint);
        if !drawn.is_empty() {
            let _ = writeln!(text, "{label:<LABEL$}{drawn}");
        }
    }
    let legend: Vec<String> =
        MARKS.iter().map(|(state, mark)| format!("{} {state}", paint.state_as(state, &mark.to_string()))).collect();
    let _ = writeln!(text, "{:LABEL$}{}", "", legend.join("   "));
    if timeline["stands_still"].as_bool().unwrap_or(false) {
        let _ = writeln!(text, " the clock or the record cannot be trusted: nothing moves by itself");
        return text;
    }
    list(&mut text, timeline);
    text
}

/// The rotations to come, one a line.
fn list(text: &mut String, timeline: &Value) {
    let rotations = timeline["rotations"].as_array().map(Vec::as_slice).unwrap_or_default();
    if rotations.is_empty() {
        let _ = writeln!(text, " no rotation until {}", day_and_time(moment(&timeline["until"])));
    }
    for rotation in rotations.iter().take(LISTED) {
        let at = moment(&rotation["at"]);
        let _ = write!(text, " {}  key {} ", day_and_time(at), rotation["serial"]);
        let _ = match rotation["former"].as_u64() {
            Some(former) => writeln!(text, "takes over from key {former}{}", leaves(timeline, former, at)),
            None => writeln!(text, "is the first to sign"),
        };
    }
    if rotations.len() > LISTED {
        let until = day_and_time(moment(&timeline["until"]));
        let _ = writeln!(text, " and {} more until {until} (-o json has them)", rotations.len() - LISTED);
    }
}

/// When a key that was relieved leaves the JWKS.
fn leaves(timeline: &Value, serial: u64, after: Timestamp) -> String {
    let lanes = timeline["keys"].as_array().into_iter().flatten();
    let phases = lanes.filter(|lane| lane["serial"] == serial).flat_map(|lane| lane["phases"].as_array()).flatten();
    let ends = phases.filter(|phase| phase["state"] == "retired").map(|phase| moment(&phase["from"]));
    match ends.filter(|at| *at >= after).min() {
        Some(at) if at.since(after) < Span::DAY => format!(", which leaves at {}", at.to_chrono().format("%H:%M:%S")),
        Some(at) => format!(", which leaves on {}", day_and_time(at)),
        None => String::new(),
    }
}

fn moment(value: &Value) -> Timestamp {
    Timestamp::parse_rfc3339(str_of(value)).unwrap_or(Timestamp::EPOCH)
}

fn day_and_time(at: Timestamp) -> String {
    at.to_chrono().format("%a %e %b %Y %H:%M:%S UTC").to_string()
}

/// Columns left of the picture.
const LABEL: usize = 16;

/// How each state is drawn; other states are not in the JWKS and leave their columns empty.
const MARKS: [(&str, char); 5] =
    [("pending", '·'), ("standby", '─'), ("active", '█'), ("retiring", '░'), ("revoked", '×')];

/// Which column stands for which time.
struct Scale {
    from: i64,
    until: i64,
    now: i64,
    columns: usize,
}

impl Scale {
    fn of(timeline: &Value, width: usize) -> Option<Scale> {
        let [from, now, until] = ["from", "now", "until"].map(|name| moment(&timeline[name]).as_millis());
        (until > from).then(|| Scale { from, until, now, columns: width.saturating_sub(LABEL + 1).max(16) })
    }

    /// The column of a time; columns left and right of the picture are negative or too large.
    fn column(&self, at: i64) -> i64 {
        let columns = i128::try_from(self.columns).unwrap_or(i128::MAX);
        let column = i128::from(at - self.from) * columns / i128::from(self.until - self.from);
        i64::try_from(column).unwrap_or(i64::MAX)
    }

    /// Dates or times at round moments (UTC), as many as fit.
    fn axis(&self) -> String {
        let span = self.until - self.from;
        let most = i64::try_from(self.columns / 10).unwrap_or(1).max(1);
        let step = STEPS.iter().map(|seconds| seconds * 1000).find(|step| span / step <= most).unwrap_or(span);
        let mut line = vec![' '; LABEL + self.columns];
        let mut free = 0;
        let mut at = self.from.div_euclid(step) * step;
        while at < self.until {
            let label: Vec<char> = format!("╷{}", label(at, step)).chars().collect();
            let column = usize::try_from(self.column(at)).ok().filter(|_| at >= self.from);
            if let Some(column) = column.map(|column| column + LABEL).filter(|column| *column >= free)
                && column + label.len() <= line.len()
            {
                line[column..column + label.len()].copy_from_slice(&label);
                free = column + label.len() + 1;
            }
            at += step;
        }
        line.into_iter().collect::<String>().trim_end().to_owned()
    }

    /// Where now is.
    fn pointer(&self) -> String {
        let column = usize::try_from(self.column(self.now)).unwrap_or(0).min(self.columns - 1);
        let (before, after) = ("now ▼", "▼ now");
        match column >= 4 {
            true => format!("{:>width$}", before, width = LABEL + column + 1),
            false => format!("{:width$}{after}", "", width = LABEL + column),
        }
    }

    /// Every phase gets a column at least, however short it is; but what is past stays left of what is to come, so that of
    /// several within one column the last is drawn.
    fn lane(&self, lane: &Value, paint: &Paint) -> String {
        let phases = lane["phases"].as_array().map(Vec::as_slice).unwrap_or_default();
        let mut cells = vec![' '; self.columns];
        let mut least = 0;
        for phase in phases {
            let state = str_of(&phase["state"]);
            let began = moment(&phase["from"]).as_millis();
            let from = self.column(began).max(0);
            let until = phase["until"].as_str().map_or(i64::MAX, |_| self.column(moment(&phase["until"]).as_millis()));
            let Some(mark) = MARKS.iter().find(|(name, _)| *name == state).map(|(_, mark)| *mark) else { continue };
            let mut begin = usize::try_from(from).unwrap_or(usize::MAX).max(least);
            if began <= self.now {
                begin = begin.min(usize::try_from(self.column(self.now)).unwrap_or(0));
            }
            let end = usize::try_from(until).unwrap_or(0).max(begin + 1).min(self.columns);
            if until < 0 || begin >= self.columns {
                continue;
            }
            let end = if state == "revoked" { begin + 1 } else { end };
            cells[begin..end].fill(mark);
            least = begin + 1;
        }
        let mut text = String::new();
        for run in cells.chunk_by(|a, b| a == b) {
            let drawn: String = run.iter().collect();
            let state = MARKS.iter().find(|(_, mark)| *mark == run[0]).map_or("", |(state, _)| *state);
            text.push_str(&if state.is_empty() { drawn } else { paint.state_as(state, &drawn) });
        }
        text.trim_end().to_owned()
    }
}

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Distances between the marks of an axis, in seconds.
const STEPS: [i64; 21] = [
    1,
    5,
    15,
    30,
    MINUTE,
    5 * MINUTE,
    15 * MINUTE,
    30 * MINUTE,
    HOUR,
    3 * HOUR,
    6 * HOUR,
    12 * HOUR,
    DAY,
    2 * DAY,
    7 * DAY,
    14 * DAY,
    28 * DAY,
    56 * DAY,
    112 * DAY,
    364 * DAY,
    1092 * DAY,
];

fn label(at: i64, step: i64) -> String {
    let time = Timestamp::from_millis(at).to_chrono();
    let form = match step / 1000 {
        0..MINUTE => "%H:%M:%S",
        MINUTE..DAY if at.rem_euclid(DAY * 1000) != 0 => "%H:%M",
        MINUTE..=2_419_200 => "%-d %b",
        _ => "%-d %b %y",
    };
    time.format(form).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(state: &str, from: &str, until: Option<&str>) -> Value {
        json!({ "state": state, "from": from, "until": until })
    }

    fn example() -> Value {
        let (start, first) = ("2026-11-24T10:00:00Z", "2026-12-24T10:00:00Z");
        json!({
            "from": start, "now": start, "until": "2027-02-22T10:00:00Z", "stands_still": false,
            "keys": [
                { "serial": 1, "kid": "9kQ2abcdefghxA", "phases": [
                    phase("active", start, Some(first)), phase("retiring", first, Some("2026-12-24T11:17:00Z")),
                    phase("retired", "2026-12-24T11:17:00Z", None)] },
                { "serial": 2, "kid": null, "phases": [
                    phase("pending", start, Some("2026-11-25T10:00:00Z")), phase("standby", "2026-11-25T10:00:00Z", Some(first)),
                    phase("active", first, None)] },
            ],
            "rotations": [
                { "at": start, "trigger": "first", "serial": 1, "former": null },
                { "at": first, "trigger": "schedule", "serial": 2, "former": 1 }],
        })
    }

    #[test]
    fn a_timeline_looks_as_drawn() {
        insta::assert_snapshot!(draw(&example(), 80, false));
    }

    #[test]
    fn what_happened_stands_left_of_now_however_short_it_was() {
        let (start, now) = ("2026-10-24T10:00:00Z", "2026-11-24T10:00:00Z");
        let mut timeline = example();
        timeline["from"] = start.into();
        timeline["now"] = now.into();
        timeline["keys"] = json!([{ "serial": 10, "kid": "9kQ2abcdefghxA", "phases": [
            phase("pending", "2026-11-24T09:58:00Z", Some("2026-11-24T09:59:00Z")),
            phase("active", "2026-11-24T09:59:00Z", Some(now)), phase("revoked", now, None)] }]);
        let drawn = draw(&timeline, 100, false);
        let lines: Vec<Vec<char>> = drawn.lines().map(|line| line.chars().collect()).collect();
        let place = |line: usize, mark| lines[line].iter().rposition(|shown| *shown == mark);
        assert_eq!(place(2, '×'), place(1, '▼'), "{drawn}");
        assert!(drawn.contains("\n 10  9kQ2…xA"), "{drawn}");
    }

    #[test]
    fn a_timeline_is_never_wider_than_asked_and_has_no_colours_unasked() {
        for width in [40, 55, 80, 132, 400] {
            let drawn = draw(&example(), width, false);
            assert!(!drawn.contains('\x1b'));
            let picture: Vec<&str> = drawn.lines().take(4).collect();
            assert!(picture.iter().all(|line| line.chars().count() <= width), "{width}: {drawn}");
            // The retiring key is there for 77 minutes of 90 days, and still shown.
            assert!(drawn.lines().nth(2).is_some_and(|line| line.contains("█░")), "{drawn}");
        }
        assert!(draw(&example(), 80, true).contains("\x1b[32m█"));
    }
}
