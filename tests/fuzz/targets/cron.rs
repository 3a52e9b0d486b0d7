//! Crontab lines: an expression, a time zone and a point in time (Unix seconds), one on each line.

use chrono::{DateTime, Utc};
use jwksd::keyring::schedule::{CronSchedule, Schedule};
use jwksd::keyring::time::{Span, Timestamp};

use super::{Verdict, assert_presentable};

/// So many occurrences are compared.
const COMPARED: usize = 24;

pub fn run(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    let mut lines = text.split('\n');
    let expression = lines.next().unwrap_or_default();
    let zone = lines.next().filter(|zone| !zone.is_empty());
    let from = lines.next().and_then(|secs| secs.trim().parse().ok()).map_or(Timestamp::EPOCH, Timestamp::from_secs);
    let schedule = match CronSchedule::parse(expression, zone) {
        Ok(schedule) => schedule,
        Err(error) => {
            assert_presentable(&error.to_string(), 2048);
            return Verdict::Refused;
        }
    };
    it_is_stored_as_it_was_read(&schedule);
    occurrences_follow_each_other(&schedule, from);
    gaps_are_between_occurrences(&schedule);
    if let Some(line) = comparable(schedule.expression()) {
        agrees_with_croner(&line, schedule.expression(), from);
    }
    Verdict::Accepted
}

fn it_is_stored_as_it_was_read(schedule: &CronSchedule) {
    let schedule = Schedule::Cron(schedule.clone());
    let stored = serde_json::to_string(&schedule).expect("a schedule can be written");
    assert_eq!(serde_json::from_str::<Schedule>(&stored).expect("what was written can be read"), schedule);
}

/// Each is later than the one before, and none is left out between.
fn occurrences_follow_each_other(schedule: &CronSchedule, from: Timestamp) {
    let mut last = from;
    for _ in 0..COMPARED {
        let Some(next) = schedule.next_after(last) else {
            assert!(last.as_secs() > 3_600_000_000, "{schedule} ends after {last}, long before the calendar does");
            return;
        };
        assert!(next > last, "{schedule}: {next} is not after {last}");
        let between = last + Span::from_millis(next.since(last).as_millis() / 2);
        assert!(between == next || schedule.next_after(between) == Some(next), "{schedule}: after {between}");
        last = next;
    }
}

fn gaps_are_between_occurrences(schedule: &CronSchedule) {
    let whole = Schedule::Cron(schedule.clone());
    let (smallest, largest) = (whole.smallest_gap(), whole.largest_gap());
    assert!(!smallest.span.is_zero() && smallest.span <= largest.span, "{schedule}");
    for gap in [smallest, largest] {
        let (from, to) = gap.between.expect("a crontab line that was accepted fires twice");
        assert_eq!(schedule.next_after(from), Some(to), "{schedule}: not consecutive");
        assert_eq!(to.since(from), gap.span, "{schedule}");
    }
}

/// Five fields where croner reads the same as crontab(5): it joins `*/2` and a restricted other day field by OR.
fn comparable(expression: &str) -> Option<String> {
    let long = match expression.to_ascii_lowercase().as_str() {
        "@hourly" => "0 * * * *".to_owned(),
        "@daily" | "@midnight" => "0 0 * * *".to_owned(),
        "@weekly" => "0 0 * * 0".to_owned(),
        "@monthly" => "0 0 1 * *".to_owned(),
        "@yearly" | "@annually" => "0 0 1 1 *".to_owned(),
        other => other.to_owned(),
    };
    let fields: Vec<&str> = long.split(' ').collect();
    let plain = |field: &str| field == "*" || !field.contains('*');
    // Nor does it read a `*` among others.
    let stepped = |field: &str| plain(field) || field.starts_with("*/") && !field.contains(',');
    let [minute, hour, day, month, weekday] = fields[..] else { return None };
    (plain(day) && plain(weekday) && [minute, hour, month].into_iter().all(stepped)).then_some(long)
}

fn agrees_with_croner(line: &str, expression: &str, from: Timestamp) {
    let theirs = croner::parser::CronParser::new().parse(line);
    let theirs = theirs.unwrap_or_else(|error| panic!("croner refuses `{line}`, which is accepted: {error}"));
    let ours = CronSchedule::parse(expression, None).expect("the zone does not make a line readable");
    let end = Timestamp::parse_rfc3339("2041-01-01T00:00:00Z").expect("a time");
    // Croner's years end where chrono's naive ones do; ours begin in 1970.
    let mut last: DateTime<Utc> = from.min(end).to_chrono();
    let mut ours_last = from.min(end);
    for _ in 0..COMPARED {
        let Some(next) = ours.next_after(ours_last).filter(|next| *next < end) else { return };
        last = theirs.find_next_occurrence(&last, false).unwrap_or_else(|error| panic!("croner: `{line}`: {error}"));
        assert_eq!(next.to_chrono(), last, "`{line}` after {ours_last}: ours and croner's");
        ours_last = next;
    }
}
