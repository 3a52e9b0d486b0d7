//! When rotations are due: a fixed period, or a crontab line in a time zone.
//!
//! Crontab lines are the five fields of crontab(5) and `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`,
//! `@yearly`, `@annually`. The crate `cron` finds the occurrences, but it is only ever shown naive local time and lists
//! of numbers, because its own reading differs from crontab's (weekdays count from 1 = Sunday, day-of-month AND
//! day-of-week) and its walk through a zone with daylight saving can return a time that is not later than the one it
//! was given. This module translates the fields and places local times on the time line itself:
//!
//! - a local time that the clocks skip fires once, at the first instant after the gap;
//! - a local time that occurs twice fires once, at the first of the two.
//!
//! That is what Vixie cron and systemd do for jobs at fixed times. Lines with wildcard hours or minutes follow the same
//! rule here: a key that rotated in the first pass of a repeated hour does not rotate again in the second.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use chrono::{Datelike, Days, NaiveDate, NaiveDateTime, TimeDelta};
use serde::{Deserialize, Serialize};

use super::name::legible;
use super::time::{Span, Timestamp};
use super::zone::Zone;

/// A rotation schedule. Stored as `{"every_ms": 2592000000}` or `{"cron": "0 10 * * 2", "timezone": "Europe/Berlin"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredSchedule", into = "StoredSchedule")]
pub enum Schedule {
    /// Counted from when the active key became active. Never zero.
    Every(Span),
    /// At the occurrences of a crontab line.
    Cron(CronSchedule),
}

impl Schedule {
    /// A period.
    ///
    /// # Errors
    /// [`ScheduleError::ZeroPeriod`] for zero.
    pub fn every(period: Span) -> Result<Self, ScheduleError> {
        if period.is_zero() { Err(ScheduleError::ZeroPeriod) } else { Ok(Schedule::Every(period)) }
    }

    /// A crontab line; see [`CronSchedule::parse`].
    pub fn cron(expression: &str, timezone: Option<&str>) -> Result<Self, ScheduleError> {
        CronSchedule::parse(expression, timezone).map(Schedule::Cron)
    }

    /// When the rotation is due that ends the reign of a key active since `activated`, if none may happen before
    /// `not_before` (for the planner: the last promotion plus propagation).
    ///
    /// - `Every`: `activated + every`, or `not_before` if that is later: a period cannot be missed, only waited out.
    /// - `Cron`: the first occurrence that is later than `activated` and not earlier than `not_before`: occurrences
    ///   before that are skipped, not made up for.
    ///
    /// Always later than `activated`; in the past when it was missed, however often, so missed occurrences coalesce
    /// into one. `None` when nothing is due before the end of the year 9999 (`Every`) or 2100 (`Cron`).
    pub fn due(&self, activated: Timestamp, not_before: Timestamp) -> Option<Timestamp> {
        match self {
            Schedule::Every(every) => {
                let due = activated.as_millis().saturating_add(every.as_millis().max(1));
                (due <= Timestamp::MAX.as_millis()).then(|| Timestamp::from_millis(due).max(not_before))
            }
            Schedule::Cron(cron) => cron.first_after_millis(activated.as_millis().max(not_before.as_millis() - 1)),
        }
    }

    /// The shortest time between two scheduled rotations. For crontab lines: of the years 2000 to 2040.
    pub fn smallest_gap(&self) -> Gap {
        match self {
            Schedule::Every(every) => Gap { span: *every, between: None },
            Schedule::Cron(cron) => cron.gaps().smallest,
        }
    }

    /// The longest time between two scheduled rotations. For crontab lines: of the years 2000 to 2040.
    pub fn largest_gap(&self) -> Gap {
        match self {
            Schedule::Every(every) => Gap { span: *every, between: None },
            Schedule::Cron(cron) => cron.gaps().largest,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Schedule::Every(every) => write!(f, "every {every}"),
            Schedule::Cron(cron) => write!(f, "{cron}"),
        }
    }
}

/// A time between two scheduled rotations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub span: Span,
    /// The first pair of occurrences of a crontab line that is this far apart; `None` for periods.
    pub between: Option<(Timestamp, Timestamp)>,
}

/// A crontab line in a time zone. Cheap to clone; equal when the line as written and the zone are equal.
#[derive(Clone)]
pub struct CronSchedule(Arc<Cron>);

struct Cron {
    expression: String,
    zone: Zone,
    line: Line,
    /// The crate's schedules over naive local time; an occurrence of either is one of ours (two when day-of-month and
    /// day-of-week are both restricted, which crontab joins by OR and the crate by AND).
    queries: Vec<cron::Schedule>,
    gaps: OnceLock<Gaps>,
}

/// What the years 2000 to 2040 contain.
#[derive(Clone, Copy)]
struct Gaps {
    smallest: Gap,
    largest: Gap,
}

impl CronSchedule {
    /// The longest line that is read, in bytes.
    pub const MAX_LEN: usize = 512;

    /// Reads a crontab line: minute, hour, day-of-month, month, day-of-week, or one of the `@` names. `timezone` is a
    /// name of the IANA database; UTC when absent.
    ///
    /// # Errors
    /// Whatever crontab(5) does not define, a zone that does not exist, and lines that do not fire at least twice from
    /// 2000 to 2040, such as `0 0 30 2 *`.
    pub fn parse(expression: &str, timezone: Option<&str>) -> Result<Self, ScheduleError> {
        let expression = expression.split_whitespace().collect::<Vec<_>>().join(" ");
        if expression.len() > Self::MAX_LEN {
            return Err(ScheduleError::TooLong { length: expression.len() });
        }
        let zone = match timezone {
            None => Zone::UTC,
            Some(name) => Zone::named(name).ok_or_else(|| ScheduleError::TimeZone { name: legible(name) })?,
        };
        let line = Line::parse(&expression)?;
        if survey_days().filter(|day| line.includes(*day)).take(2).count() < 2 {
            return Err(ScheduleError::NeverFires { expression: legible(&expression) });
        }
        let queries = line.queries()?;
        Ok(CronSchedule(Arc::new(Cron { expression, zone, line, queries, gaps: OnceLock::new() })))
    }

    /// The line as written, with single spaces.
    pub fn expression(&self) -> &str {
        &self.0.expression
    }

    /// The zone's IANA name.
    pub fn timezone(&self) -> &str {
        self.0.zone.name()
    }

    /// The first occurrence strictly later than `after`. `None` past the year 2100, where the crate's calendar ends.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        self.first_after_millis(after.as_millis())
    }

    fn first_after_millis(&self, after: i64) -> Option<Timestamp> {
        let mut local = self.0.zone.local(after)?;
        // The first local occurrence is the answer, but for the second pass of a repeated hour: there the occurrences
        // up to its end belong to the first pass, in the past. So this ends after at most the occurrences of one
        // overlap, and each round moves `local` forward.
        loop {
            local = self.next_local(local)?;
            let instant = self.0.zone.first_instant(local)?;
            if instant > after {
                return Some(Timestamp::from_millis(instant));
            }
        }
    }

    fn next_local(&self, after: NaiveDateTime) -> Option<NaiveDateTime> {
        let after = after.and_utc();
        self.0.queries.iter().filter_map(|query| query.after(&after).next()).min().map(|next| next.naive_utc())
    }

    /// The shortest and longest time between occurrences from 2000 to 2040, computed once per line.
    ///
    /// Occurrences need not be walked one by one: every matching day has the same times of day, so on a day that lasts
    /// 24 hours the extremes within it are those of the naive times, and only its first and last occurrence touch other
    /// days. A day on which the clocks change (its midnights are not 24 hours apart) is such a run before the change,
    /// one after it, and at most one instant for what was skipped. So this costs one conversion of local time per
    /// matching day, at most 14,976, and about twenty for each change.
    fn gaps(&self) -> Gaps {
        *self.0.gaps.get_or_init(|| {
            let mut survey = Survey::default();
            let times = self.0.line.times_of_day();
            // Of the years looked at every local time has an instant.
            let instant = |day, time| self.0.zone.first_instant(at(day, time)).unwrap_or_default();
            let whole_day = Run::of(&times);
            let mut known = None;
            for day in survey_days().filter(|day| self.0.line.includes(*day)) {
                let Some(tomorrow) = day.checked_add_days(Days::new(1)) else { break };
                let midnight = match known {
                    Some((date, midnight)) if date == day => midnight,
                    _ => instant(day, 0),
                };
                let next_midnight = instant(tomorrow, 0);
                known = Some((tomorrow, next_midnight));
                let shifted = next_midnight - Span::DAY.as_millis();
                if shifted == midnight {
                    survey.visit_run(midnight, &whole_day);
                    continue;
                }
                let before = times.partition_point(|time| instant(day, *time) == midnight + time);
                let after = times.partition_point(|time| instant(day, *time) != shifted + time);
                survey.visit_run(midnight, &Run::of(&times[..before]));
                if before < after {
                    survey.visit(instant(day, times[before]));
                }
                survey.visit_run(shifted, &Run::of(&times[after..]));
            }
            survey.result()
        })
    }
}

impl PartialEq for CronSchedule {
    fn eq(&self, other: &Self) -> bool {
        self.0.expression == other.0.expression && self.0.zone == other.0.zone
    }
}

impl Eq for CronSchedule {}

/// `"0 10 * * 2" (Europe/Berlin)`.
impl fmt::Display for CronSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" ({})", self.0.expression, self.0.zone.name())
    }
}

impl fmt::Debug for CronSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CronSchedule({self})")
    }
}

/// A schedule that cannot be read, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("a period of 0s would rotate without end: write a duration such as \"30d\"")]
    ZeroPeriod,
    #[error("a schedule of {length} bytes is too long: at most {} are read", CronSchedule::MAX_LEN)]
    TooLong { length: usize },
    #[error("`{expression}` is not a schedule: {hint}")]
    Line { expression: String, hint: &'static str },
    #[error(
        "`{expression}` has {count} fields, a crontab line has 5 (minute hour day-of-month month day-of-week): {hint}"
    )]
    FieldCount { expression: String, count: usize, hint: &'static str },
    #[error("{field} `{item}` {problem}: {write}")]
    Field { field: &'static str, item: String, problem: String, write: String },
    #[error(
        "`{name}` is not a time zone of the IANA database: write it like \"Europe/Berlin\", or leave it out for UTC"
    )]
    TimeZone { name: String },
    #[error(
        "`{expression}` never fires, or only once from 2000 to 2040: name a day-of-month that its months have, such as \
         \"0 0 28 2 *\""
    )]
    NeverFires { expression: String },
    #[error("a stored schedule has either every_ms (more than 0), or cron with timezone")]
    Stored,
}

/// How a schedule stands in a record. Members that a newer release adds are passed over, as everywhere in a record.
#[derive(Serialize, Deserialize)]
struct StoredSchedule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    every_ms: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cron: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timezone: Option<String>,
}

impl From<Schedule> for StoredSchedule {
    fn from(schedule: Schedule) -> Self {
        match schedule {
            Schedule::Every(every) => StoredSchedule { every_ms: Some(every.as_millis()), cron: None, timezone: None },
            Schedule::Cron(cron) => StoredSchedule {
                every_ms: None,
                cron: Some(cron.expression().to_owned()),
                timezone: Some(cron.timezone().to_owned()),
            },
        }
    }
}

impl TryFrom<StoredSchedule> for Schedule {
    type Error = ScheduleError;
    fn try_from(stored: StoredSchedule) -> Result<Self, ScheduleError> {
        match (stored.every_ms, stored.cron, stored.timezone) {
            (Some(millis), None, None) if millis > 0 && millis <= Span::MAX.as_millis() => {
                Schedule::every(Span::from_millis(millis))
            }
            (None, Some(expression), timezone) => Schedule::cron(&expression, timezone.as_deref()),
            _ => Err(ScheduleError::Stored),
        }
    }
}

// Local time on the time line.

fn at(day: NaiveDate, millis: i64) -> NaiveDateTime {
    day.and_time(chrono::NaiveTime::MIN) + TimeDelta::milliseconds(millis)
}

/// The local days from 2000-01-01 to 2040-12-31: the years over which the contract judges schedules, so that the answer
/// does not depend on today.
fn survey_days() -> impl Iterator<Item = NaiveDate> {
    let first = NaiveDate::from_ymd_opt(2000, 1, 1).unwrap_or_default();
    first.iter_days().take_while(|day| day.year() <= 2040)
}

/// Times of day between which the clocks do not change.
struct Run {
    ends: Option<(i64, i64)>,
    /// The pairs of consecutive times with the smallest and the largest distance.
    extremes: Vec<(i64, i64)>,
}

impl Run {
    fn of(times: &[i64]) -> Self {
        let pairs = || times.windows(2).map(|pair| (pair[0], pair[1]));
        let distance = |pair: &(i64, i64)| pair.1 - pair.0;
        let extremes = pairs().min_by_key(distance).into_iter().chain(pairs().max_by_key(distance)).collect();
        Run { ends: times.first().copied().zip(times.last().copied()), extremes }
    }
}

/// The extremes among the occurrences visited so far, in Unix milliseconds.
#[derive(Default)]
struct Survey {
    last: Option<i64>,
    smallest: Option<(i64, i64)>,
    largest: Option<(i64, i64)>,
}

impl Survey {
    /// The next occurrence. The same instant again (several local times in one gap) is no further occurrence.
    fn visit(&mut self, instant: i64) {
        if let Some(last) = self.last {
            self.compare(last, instant);
        }
        self.last = Some(self.last.map_or(instant, |last| last.max(instant)));
    }

    /// The occurrences of a run that begins `base` after the epoch.
    fn visit_run(&mut self, base: i64, run: &Run) {
        let Some((first, last)) = run.ends else { return };
        self.visit(base + first);
        for (from, to) in &run.extremes {
            self.compare(base + from, base + to);
        }
        self.last = Some(base + last);
    }

    fn compare(&mut self, from: i64, to: i64) {
        if to <= from {
            return;
        }
        if self.smallest.is_none_or(|(a, b)| to - from < b - a) {
            self.smallest = Some((from, to));
        }
        if self.largest.is_none_or(|(a, b)| to - from > b - a) {
            self.largest = Some((from, to));
        }
    }

    fn result(&self) -> Gaps {
        Gaps { smallest: Self::gap(self.smallest), largest: Self::gap(self.largest) }
    }

    /// Without a pair, which parsing excludes, the span is zero and thus refused as shorter than any propagation.
    fn gap(pair: Option<(i64, i64)>) -> Gap {
        let between = pair.map(|(from, to)| (Timestamp::from_millis(from), Timestamp::from_millis(to)));
        Gap { span: between.map_or(Span::ZERO, |(from, to)| to.since(from)), between }
    }
}

// The crontab line.

/// The five fields as sets of numbers: bit n stands for n. Sunday is 0.
#[derive(Clone, Copy)]
struct Line {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Day-of-month and day-of-week are both restricted, so either may match. As in Vixie cron, a field that begins
    /// with `*` (`*/2` too) is not restricted; then both must match.
    either_day: bool,
}

/// What one field may contain.
struct Field {
    name: &'static str,
    least: u64,
    most: u64,
    names: &'static [&'static str],
}

const MINUTE: Field = Field { name: "minute", least: 0, most: 59, names: &[] };
const HOUR: Field = Field { name: "hour", least: 0, most: 23, names: &[] };
const DAY: Field = Field { name: "day-of-month", least: 1, most: 31, names: &[] };
const MONTH: Field = Field {
    name: "month",
    least: 1,
    most: 12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
};
const WEEKDAY: Field =
    Field { name: "day-of-week", least: 0, most: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] };

impl Line {
    fn parse(expression: &str) -> Result<Self, ScheduleError> {
        let wrong = |hint| Err(ScheduleError::Line { expression: legible(expression), hint });
        let long = match expression.to_ascii_lowercase().as_str() {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            "" => return wrong("write a crontab line such as \"0 10 * * 2\", or @monthly"),
            name if name.starts_with("@every") => return wrong("for a period use `every` instead, such as \"30d\""),
            name if name.starts_with('@') => {
                return wrong("write @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually or five fields");
            }
            name if name.contains("tz=") => return wrong("the time zone stands in `timezone`"),
            _ => expression,
        };
        let fields: Vec<&str> = long.split(' ').collect();
        let [minute, hour, day, month, weekday] = fields[..] else {
            let hint = if fields.len() > 5 { "leave out seconds and years" } else { "write * for any" };
            return Err(ScheduleError::FieldCount { expression: legible(expression), count: fields.len(), hint });
        };
        let weekdays = WEEKDAY.parse(weekday)?;
        Ok(Line {
            minutes: MINUTE.parse(minute)?,
            hours: HOUR.parse(hour)?,
            days: DAY.parse(day)?,
            months: MONTH.parse(month)?,
            weekdays: (weekdays | weekdays >> 7) & 0x7f,
            either_day: !day.starts_with('*') && !weekday.starts_with('*'),
        })
    }

    fn includes(&self, day: NaiveDate) -> bool {
        let in_month = self.days >> day.day() & 1 == 1;
        let in_week = self.weekdays >> day.weekday().num_days_from_sunday() & 1 == 1;
        let in_year = self.months >> day.month() & 1 == 1;
        in_year && if self.either_day { in_month || in_week } else { in_month && in_week }
    }

    /// Milliseconds after midnight, ascending.
    fn times_of_day(&self) -> Vec<i64> {
        let minutes: Vec<u64> = members(self.minutes).collect();
        let of_hour = |hour: u64| minutes.iter().map(move |minute| (hour * 60 + minute) as i64 * 60_000);
        members(self.hours).flat_map(of_hour).collect()
    }

    /// The same in the crate's language: a seconds field in front, plain lists, weekdays from 1 = Sunday.
    fn queries(&self) -> Result<Vec<cron::Schedule>, ScheduleError> {
        let days = list(self.days, &DAY);
        let weekdays = if self.weekdays == 0x7f {
            "*".to_owned()
        } else {
            comma_separated(members(self.weekdays).map(|day| day + 1))
        };
        let day_fields = match self.either_day {
            true => vec![(days, "*".to_owned()), ("*".to_owned(), weekdays)],
            false => vec![(days, weekdays)],
        };
        let (minutes, hours, months) =
            (list(self.minutes, &MINUTE), list(self.hours, &HOUR), list(self.months, &MONTH));
        let query = |(days, weekdays): (String, String)| {
            let expression = format!("0 {minutes} {hours} {days} {months} {weekdays}");
            let hint = "the calendar does not understand it; write it with plain numbers";
            cron::Schedule::from_str(&expression).map_err(|_| ScheduleError::Line { expression, hint })
        };
        day_fields.into_iter().map(query).collect()
    }
}

impl Field {
    /// The set that a comma-separated list of `*`, `n`, `n-m`, `*/s`, `n-m/s` stands for.
    fn parse(&self, text: &str) -> Result<u64, ScheduleError> {
        text.split(',').try_fold(0, |set, item| Ok(set | self.parse_item(item, text)?))
    }

    fn parse_item(&self, item: &str, text: &str) -> Result<u64, ScheduleError> {
        if item.is_empty() {
            return Err(self.wrong(text, "has an empty list entry", "write values with single commas between them"));
        }
        if item.contains(['?', 'L', 'W', '#', '~']) && !self.is_name(item) {
            return Err(self.wrong(item, "is not crontab syntax", &self.what_to_write()));
        }
        let (range, step) = match item.split_once('/') {
            None => (item, None),
            Some((range, step)) => (range, Some(self.parse_step(step, item)?)),
        };
        let (first, last) = match range.split_once('-') {
            _ if range == "*" => (self.least, self.most),
            Some((first, last)) => (self.parse_value(first, item)?, self.parse_value(last, item)?),
            None if step.is_some() => {
                let write = format!("write the range, such as {}-{}/{}", legible(range), self.most, step.unwrap_or(1));
                return Err(self.wrong(item, "has a step without a range", &write));
            }
            None => (self.parse_value(range, item)?, self.parse_value(range, item)?),
        };
        if first > last {
            let write = match (self.most, last) {
                (7, 0) => format!("write {first}-7, where 7 is Sunday"),
                _ => format!("write {first}-{most},{least}-{last}", most = self.most, least = self.least),
            };
            return Err(self.wrong(item, "is a range that runs backwards", &write));
        }
        Ok((first..=last).step_by(step.unwrap_or(1)).fold(0, |set, value| set | 1 << value))
    }

    fn parse_step(&self, step: &str, item: &str) -> Result<usize, ScheduleError> {
        let values = self.most - self.least + 1;
        match number(step) {
            Some(step) if (1..=values).contains(&step) => Ok(step as usize),
            _ => {
                let write = format!("write a whole number from 1 to {values} after the /");
                Err(self.wrong(item, "has a step that cannot be", &write))
            }
        }
    }

    fn parse_value(&self, value: &str, item: &str) -> Result<u64, ScheduleError> {
        let named = self.names.iter().position(|name| name.eq_ignore_ascii_case(value));
        // Months are numbered from 1 and weekdays from 0: the first name is the least value.
        let value = named.map(|at| at as u64 + self.least).or_else(|| number(value));
        value.filter(|value| (self.least..=self.most).contains(value)).ok_or_else(|| {
            let problem = format!("is not between {} and {}", self.least, self.most);
            self.wrong(item, &problem, &self.what_to_write())
        })
    }

    fn is_name(&self, item: &str) -> bool {
        item.split(['-', '/']).any(|part| self.names.iter().any(|name| name.eq_ignore_ascii_case(part)))
    }

    fn what_to_write(&self) -> String {
        let names = match (self.names.first(), self.names.last()) {
            (Some(first), Some(last)) if self.most == 7 => format!(" (0 and 7 are Sunday) or {first} to {last}"),
            (Some(first), Some(last)) => format!(" or {first} to {last}"),
            _ => String::new(),
        };
        format!("write * or {} to {}{names}, ranges with -, steps with /, lists with commas", self.least, self.most)
    }

    fn wrong(&self, item: &str, problem: &str, write: &str) -> ScheduleError {
        ScheduleError::Field {
            field: self.name,
            item: legible(item),
            problem: problem.to_owned(),
            write: write.to_owned(),
        }
    }
}

/// One or two digits; signs, spaces and longer numbers are no field values.
fn number(text: &str) -> Option<u64> {
    let digits = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

fn members(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |value| set >> value & 1 == 1)
}

fn list(set: u64, field: &Field) -> String {
    if members(set).eq(field.least..=field.most) { "*".to_owned() } else { comma_separated(members(set)) }
}

fn comma_separated(values: impl Iterator<Item = u64>) -> String {
    values.map(|value| value.to_string()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone as _;
    use chrono_tz::Tz;
    use proptest::prelude::*;

    use super::*;

    const ZONES: [&str; 8] = [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kathmandu",
        "America/Sao_Paulo",
        "Africa/Casablanca",
        "Pacific/Apia",
    ];

    fn cron(expression: &str, zone: &str) -> CronSchedule {
        CronSchedule::parse(expression, Some(zone)).unwrap()
    }

    fn time(text: &str) -> Timestamp {
        Timestamp::parse_rfc3339(text).unwrap()
    }

    /// The first `n` occurrences after `from`, as RFC 3339 in UTC.
    fn occurrences(expression: &str, zone: &str, from: &str, n: usize) -> Vec<String> {
        stream(&cron(expression, zone), time(from)).take(n).map(|at| at.to_string()).collect()
    }

    fn stream(schedule: &CronSchedule, from: Timestamp) -> impl Iterator<Item = Timestamp> + '_ {
        std::iter::successors(schedule.next_after(from), |last| schedule.next_after(*last))
    }

    fn refusal(expression: &str) -> String {
        CronSchedule::parse(expression, None).unwrap_err().to_string()
    }

    /// Ours and croner's occurrences must be the same until the end of 2040.
    fn assert_croner_agrees(expression: &str, zone: Tz, from: Timestamp, at_most: usize) {
        let theirs = croner::parser::CronParser::new().parse(expression).unwrap();
        let ours = cron(expression, zone.name());
        let mut last = zone.from_utc_datetime(&from.to_chrono().naive_utc());
        for at in stream(&ours, from).take_while(|at| *at < time("2041-01-01T00:00:00Z")).take(at_most) {
            last = theirs.find_next_occurrence(&last, false).unwrap();
            assert_eq!(at.to_chrono(), last, "{expression} in {zone}");
        }
    }

    #[test]
    fn naive_occurrences_are_those_of_croner() {
        let from = time("1999-12-31T23:59:59Z");
        for expression in [
            "0 10 * * 2",
            "0 0 1 * *",
            "30 4 1,15 * 5",
            "0 0 29 2 *",
            "0 0 31 * *",
            "0 0 13 * fri",
            "15 3 * jan-mar,DEC Mon-Fri",
            "0 12 * * 7",
            "0 12 * * 0",
            "5 0 */10 * *",
            "0 0 1-7/2 */3 *",
            "0 6 * 2-11/3 1-5/2",
            "59 23 31 12 *",
            "0 0 30 4,6 6",
        ] {
            assert_croner_agrees(expression, Tz::UTC, from, usize::MAX);
        }
        for expression in ["* * * * *", "*/7 * * * *", "0,30 */5 * * *", "10-20/3 8-18 * * 1-5", "0 * 29 2 *"] {
            for from in ["1999-12-31T23:59:59Z", "2016-02-28T22:10:30Z", "2039-12-30T00:00:00Z"] {
                assert_croner_agrees(expression, Tz::UTC, time(from), 3000);
            }
        }
    }

    #[test]
    fn fixed_times_of_day_agree_with_croner_through_every_change_of_clocks() {
        let from = time("2000-01-01T12:00:00Z");
        // Morocco's clocks no longer change since 2026, which croner's database does not know.
        for zone in ZONES.iter().filter(|zone| !["Pacific/Apia", "Africa/Casablanca"].contains(zone)) {
            for expression in ["0 10 * * 2", "30 2 * * *", "0 0 * * *", "15 1 * * 0", "45 23 * * 6", "30 0 1 * 0"] {
                assert_croner_agrees(expression, zone.parse().unwrap(), from, usize::MAX);
            }
        }
    }

    #[test]
    fn weekdays_count_as_in_crontab_and_not_as_in_quartz() {
        let sunday = ["2026-11-22T10:00:00Z", "2026-11-29T10:00:00Z"];
        for weekday in ["0", "7", "sun", "SUN", "7-7", "0,7"] {
            assert_eq!(occurrences(&format!("0 10 * * {weekday}"), "UTC", "2026-11-21T00:00:00Z", 2), sunday);
        }
        assert_eq!(occurrences("0 10 * * 2", "UTC", "2026-11-21T00:00:00Z", 1), ["2026-11-24T10:00:00Z"], "Tuesday");
        let weekend = ["2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z", "2026-11-27T00:00:00Z"];
        assert_eq!(occurrences("0 0 * * 5-7", "UTC", "2026-11-20T12:00:00Z", 3), weekend);
    }

    #[test]
    fn day_of_month_or_day_of_week_when_both_are_restricted() {
        let either = ["2026-11-02T00:00:00Z", "2026-11-09T00:00:00Z", "2026-11-13T00:00:00Z", "2026-11-16T00:00:00Z"];
        assert_eq!(occurrences("0 0 13 * 1", "UTC", "2026-11-01T00:00:00Z", 4), either);
    }

    #[test]
    fn a_day_field_that_begins_with_a_star_is_not_restricted() {
        let odd_mondays = ["2026-11-09T00:00:00Z", "2026-11-23T00:00:00Z", "2026-12-07T00:00:00Z"];
        assert_eq!(occurrences("0 0 */2 * 1", "UTC", "2026-11-01T00:00:00Z", 3), odd_mondays);
        let sundays_in_range = ["2026-11-01T00:00:00Z", "2026-12-06T00:00:00Z"];
        assert_eq!(occurrences("0 0 1-7 * */7", "UTC", "2026-10-31T00:00:00Z", 2), sundays_in_range);
    }

    #[test]
    fn five_fields_and_every_name_are_read() {
        for (name, long) in [
            ("@hourly", "0 * * * *"),
            ("@daily", "0 0 * * *"),
            ("@midnight", "0 0 * * *"),
            ("@weekly", "0 0 * * 0"),
            ("@monthly", "0 0 1 * *"),
            ("@yearly", "0 0 1 1 *"),
            ("@annually", "0 0 1 1 *"),
        ] {
            let from = "2026-11-21T12:34:56Z";
            assert_eq!(occurrences(name, "Europe/Berlin", from, 9), occurrences(long, "Europe/Berlin", from, 9));
        }
        assert_eq!(cron("  0\t10  * * 2 ", "UTC").expression(), "0 10 * * 2");
    }

    #[test]
    fn the_default_time_zone_is_utc() {
        assert_eq!(CronSchedule::parse("@daily", None).unwrap(), cron("@daily", "UTC"));
    }

    #[test]
    fn a_time_in_a_gap_fires_once_at_the_first_instant_after_it() {
        // Berlin, 2026-03-29: 02:00 CET is 03:00 CEST, 01:00 UTC.
        let expected = ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"];
        assert_eq!(occurrences("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00Z", 3), expected);
        let expected = ["2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z", "2026-03-29T02:30:00Z"];
        assert_eq!(occurrences("30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", 4), expected);
        // São Paulo, 2018-11-04: midnight is 01:00. Lord Howe, 2026-10-04: half an hour from 02:00. Apia had no 2011-12-30.
        assert_eq!(occurrences("0 0 4 11 *", "America/Sao_Paulo", "2018-01-01T00:00:00Z", 1), ["2018-11-04T03:00:00Z"]);
        assert_eq!(
            occurrences("15 2 4 10 *", "Australia/Lord_Howe", "2026-01-01T00:00:00Z", 1),
            ["2026-10-03T15:30:00Z"]
        );
        let expected = ["2011-12-29T22:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T22:00:00Z"];
        assert_eq!(occurrences("0 12 * * *", "Pacific/Apia", "2011-12-29T12:00:00Z", 3), expected);
    }

    #[test]
    fn a_time_that_occurs_twice_fires_once_at_the_first() {
        // Berlin, 2026-10-25: 03:00 CEST is 02:00 CET, 01:00 UTC.
        let expected = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        assert_eq!(occurrences("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00:00Z", 3), expected);
        let expected = ["2026-10-25T00:00:00Z", "2026-10-25T02:00:00Z"];
        assert_eq!(occurrences("0 * * * *", "Europe/Berlin", "2026-10-24T23:59:59Z", 2), expected);
        assert_eq!(
            occurrences("45 1 5 4 *", "Australia/Lord_Howe", "2026-01-01T00:00:00Z", 1),
            ["2026-04-04T14:45:00Z"]
        );
    }

    #[test]
    fn in_the_second_pass_of_a_repeated_hour_the_next_occurrence_is_later() {
        for minute in 0..60 {
            let at = time("2026-10-25T01:00:00Z") + Span::MINUTE.times(minute);
            let next = cron("*/5 * * * *", "Europe/Berlin").next_after(at).unwrap();
            assert_eq!(next.to_string(), "2026-10-25T02:00:00Z", "after {at}");
        }
    }

    #[test]
    fn milliseconds_neither_hide_nor_repeat_an_occurrence() {
        let daily = cron("0 10 * * *", "UTC");
        let noon = time("2026-11-21T10:00:00Z");
        assert_eq!(daily.next_after(noon - Span::from_millis(1)), Some(noon));
        assert_eq!(daily.next_after(noon), Some(noon + Span::DAY));
        assert_eq!(daily.next_after(noon + Span::from_millis(999)), Some(noon + Span::DAY));
    }

    #[test]
    fn a_period_is_due_once_after_activation_and_never_before_it_may_be() {
        let schedule = Schedule::every(Span::DAY).unwrap();
        let start = time("2026-11-21T10:00:00Z");
        assert_eq!(schedule.due(start, start), Some(start + Span::DAY));
        assert_eq!(schedule.due(start, start + Span::HOUR.times(25)), Some(start + Span::HOUR.times(25)));
        assert_eq!(schedule.due(Timestamp::MAX, start), None);
        assert_eq!(Schedule::every(Span::ZERO), Err(ScheduleError::ZeroPeriod));
    }

    #[test]
    fn an_occurrence_is_due_at_not_before_but_not_at_the_activation() {
        let schedule = Schedule::cron("0 10 * * *", None).unwrap();
        let ten = time("2026-11-21T10:00:00Z");
        assert_eq!(schedule.due(ten, Timestamp::EPOCH), Some(ten + Span::DAY));
        assert_eq!(schedule.due(ten - Span::HOUR, ten), Some(ten));
        assert_eq!(schedule.due(ten - Span::HOUR, ten + Span::from_millis(1)), Some(ten + Span::DAY));
    }

    #[test]
    fn any_time_has_an_answer() {
        let schedule = Schedule::cron("@daily", Some("America/New_York")).unwrap();
        assert_eq!(schedule.due(Timestamp::EPOCH, Timestamp::EPOCH), Some(time("1970-01-01T05:00:00Z")));
        assert_eq!(schedule.due(Timestamp::MAX, Timestamp::MAX), None);
        assert_eq!(schedule.due(time("2100-12-31T23:00:00Z"), Timestamp::EPOCH), None);
        let utc = Schedule::cron("@daily", None).unwrap();
        assert_eq!(utc.due(Timestamp::EPOCH, Timestamp::EPOCH), Some(time("1970-01-02T00:00:00Z")));
    }

    /// What the survey of gaps builds on: local time places in order, and a day whose midnights are 24 hours apart has
    /// no change of clocks inside.
    #[test]
    fn local_days_of_every_zone_follow_each_other_and_change_clocks_at_most_once() {
        for name in chrono_tz::TZ_VARIANTS.map(|zone| zone.name()) {
            let zone = Zone::named(name).unwrap();
            let mut days = survey_days().map(|day| (day, zone.first_instant(at(day, 0)).unwrap())).peekable();
            while let (Some((day, midnight)), Some((_, next))) = (days.next(), days.peek()) {
                assert!(midnight <= *next, "{name} {day}");
                if next - midnight == Span::DAY.as_millis() {
                    let noon = Span::HOUR.times(12).as_millis();
                    assert_eq!(zone.first_instant(at(day, noon)), Some(midnight + noon), "{name} {day}");
                }
            }
        }
    }

    /// The extremes found by walking every occurrence.
    fn walked(schedule: &CronSchedule) -> (Gap, Gap) {
        let mut survey = Survey::default();
        let days: Vec<_> = survey_days().collect();
        let from = schedule.0.zone.first_instant(at(days[0], 0)).unwrap() - 1;
        let end = schedule.0.zone.first_instant(at(*days.last().unwrap() + Days::new(1), 0)).unwrap();
        let all = stream(schedule, Timestamp::from_millis(from));
        all.take_while(|at| at.as_millis() < end).for_each(|at| survey.visit(at.as_millis()));
        (survey.result().smallest, survey.result().largest)
    }

    #[test]
    fn gaps_are_those_found_by_walking_every_occurrence() {
        let expressions = [
            "30 2 * * *",
            "0 10 * * 2",
            "0 0 13 * 5",
            "0 0 29 2 *",
            "*/10 0-3 * * 0",
            "10 23,0 * * *",
            "0 * 1-7 3,10 *",
        ];
        for zone in ZONES {
            for expression in expressions {
                let schedule = cron(expression, zone);
                let (smallest, largest) = walked(&schedule);
                assert_eq!(schedule.gaps().smallest.span, smallest.span, "smallest of {schedule}");
                assert_eq!(schedule.gaps().largest.span, largest.span, "largest of {schedule}");
                for gap in [schedule.gaps().smallest, schedule.gaps().largest] {
                    let (from, to) = gap.between.unwrap();
                    assert_eq!(schedule.next_after(from), Some(to), "the pair of {schedule} is not consecutive");
                    assert_eq!(to.since(from), gap.span);
                }
            }
        }
    }

    #[test]
    fn gaps_see_the_clocks_change_even_in_schedules_that_fire_all_day() {
        let smallest = |expression, zone| cron(expression, zone).gaps().smallest.span;
        let largest = |expression, zone| cron(expression, zone).gaps().largest.span;
        assert_eq!(largest("* * * * *", "Europe/Berlin"), Span::MINUTE.times(61));
        assert_eq!(smallest("* * * * *", "Europe/Berlin"), Span::MINUTE);
        assert_eq!(largest("*/10 * * * *", "Australia/Lord_Howe"), Span::MINUTE.times(40));
        assert_eq!(smallest("30 * * * *", "Europe/Berlin"), Span::MINUTE.times(30));
        assert_eq!(smallest("@daily", "Europe/Berlin"), Span::HOUR.times(23));
        assert_eq!(smallest("@daily", "UTC"), Span::DAY);
        assert_eq!(smallest("30 2 * * *", "Europe/Berlin"), Span::HOUR.times(23) + Span::MINUTE.times(30));
        assert_eq!(largest("@daily", "Europe/Berlin"), Span::HOUR.times(25));
        assert_eq!(largest("0 0 29 2 *", "UTC"), Span::DAY.times(1461));
        assert_eq!(largest("@yearly", "UTC"), Span::DAY.times(366));
    }

    #[test]
    fn what_crontab_does_not_define_is_refused_with_the_field_and_what_to_write() {
        for (expression, field, advice) in [
            ("60 * * * *", "minute `60` is not between 0 and 59", "write * or 0 to 59"),
            ("* 24 * * *", "hour `24` is not between 0 and 23", "write * or 0 to 23"),
            ("* * 0 * *", "day-of-month `0` is not between 1 and 31", "1 to 31"),
            ("* * * 13 *", "month `13` is not between 1 and 12", "or jan to dec"),
            ("* * * * 8", "day-of-week `8` is not between 0 and 7", "(0 and 7 are Sunday) or sun to sat"),
            ("5/10 * * * *", "minute `5/10` has a step without a range", "write the range, such as 5-59/10"),
            ("*/0 * * * *", "minute `*/0` has a step that cannot be", "from 1 to 60"),
            ("*/90 * * * *", "minute `*/90` has a step that cannot be", "from 1 to 60"),
            ("0 5-2 * * *", "hour `5-2` is a range that runs backwards", "write 5-23,0-2"),
            ("0 0 * * fri-sun", "day-of-week `fri-sun` is a range that runs backwards", "write 5-7, where 7 is Sunday"),
            ("0 0 L * *", "day-of-month `L` is not crontab syntax", "write * or 1 to 31"),
            ("0 0 15W * *", "day-of-month `15W` is not crontab syntax", "write * or 1 to 31"),
            ("0 0 ? * 1", "day-of-month `?` is not crontab syntax", "write * or 1 to 31"),
            ("0 0 * * 5#2", "day-of-week `5#2` is not crontab syntax", "sun to sat"),
            ("0~30 0 * * *", "minute `0~30` is not crontab syntax", "0 to 59"),
            ("0 0 * * tuesday", "day-of-week `tuesday` is not between 0 and 7", "sun to sat"),
            ("0 0 * monday *", "month `monday` is not between", "jan to dec"),
            ("1,,2 * * * *", "minute `1,,2` has an empty list entry", "single commas"),
            ("+5 * * * *", "minute `+5` is not between", "0 to 59"),
            ("1-2-3 * * * *", "minute `1-2-3` is not between", "0 to 59"),
            ("0 0 10 * * 2", "has 6 fields, a crontab line has 5", "leave out seconds and years"),
            ("0 10 * *", "has 4 fields", "write * for any"),
            ("", "is not a schedule", "write a crontab line"),
            ("@reboot", "`@reboot` is not a schedule", "write @hourly"),
            ("@every 5m", "`@every 5m` is not a schedule", "use `every`"),
            ("CRON_TZ=UTC 0 0 * * *", "is not a schedule", "`timezone`"),
        ] {
            let message = refusal(expression);
            assert!(message.contains(field) && message.contains(advice), "{expression}: {message}");
        }
        assert!(refusal(&"1,".repeat(400)).contains("too long"));
        assert!(refusal("0 0 é * *").contains("day-of-month `é`"));
    }

    #[test]
    fn an_unknown_time_zone_is_refused() {
        let message = CronSchedule::parse("@daily", Some("Europe/Berln")).unwrap_err().to_string();
        assert!(message.contains("`Europe/Berln` is not a time zone"), "{message}");
    }

    #[test]
    fn a_line_that_never_fires_is_refused() {
        for expression in ["0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 */2"] {
            assert!(refusal(expression).contains("never fires"), "{expression}");
        }
        assert!(CronSchedule::parse("0 0 30 2 1", None).is_ok(), "or on Mondays");
    }

    #[test]
    fn schedules_are_stored_as_written_and_read_again() {
        let every = Schedule::every(Span::DAY.times(30)).unwrap();
        let cron = Schedule::cron("0 10 * * 2", Some("Europe/Berlin")).unwrap();
        for (schedule, text) in
            [(every, r#"{"every_ms":2592000000}"#), (cron, r#"{"cron":"0 10 * * 2","timezone":"Europe/Berlin"}"#)]
        {
            assert_eq!(serde_json::to_string(&schedule).unwrap(), text);
            assert_eq!(serde_json::from_str::<Schedule>(text).unwrap(), schedule);
        }
    }

    #[test]
    fn a_stored_schedule_that_cannot_be_read_says_why() {
        for (text, why) in [
            (r#"{"cron":"0 10 * * 9"}"#, "day-of-week `9`"),
            (r#"{"cron":"@daily","timezone":"Mars/Base"}"#, "`Mars/Base` is not a time zone"),
            (r#"{"every_ms":0}"#, "either every_ms (more than 0), or cron"),
            (r#"{"every_ms":1,"cron":"@daily"}"#, "either every_ms"),
            ("{}", "either every_ms"),
            (r#"{"each":5}"#, "either every_ms"),
        ] {
            let error = serde_json::from_str::<Schedule>(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    fn field(least: u64, most: u64) -> impl Strategy<Value = String> {
        let item = prop_oneof![
            (least..=most).prop_map(|value| value.to_string()),
            (least..=most, least..=most).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
            (least..=most, least..=most, 1..9u64).prop_map(|(a, b, s)| format!("{}-{}/{s}", a.min(b), a.max(b))),
            (1..9u64).prop_map(|step| format!("*/{step}")),
        ];
        let list = proptest::collection::vec(item, 1..4).prop_map(|items| items.join(","));
        prop_oneof![Just("*".to_owned()), list]
    }

    fn line() -> impl Strategy<Value = String> {
        (field(0, 59), field(0, 23), field(1, 28), field(1, 12), field(0, 7))
            .prop_map(|(minute, hour, day, month, weekday)| format!("{minute} {hour} {day} {month} {weekday}"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn the_next_occurrence_is_always_later(
            line in line(),
            zone in proptest::sample::select(ZONES.to_vec()),
            from in 946_684_800_000..2_240_524_800_000_i64,
        ) {
            let schedule = cron(&line, zone);
            let mut last = Timestamp::from_millis(from);
            for _ in 0..20 {
                let next = schedule.next_after(last).unwrap();
                prop_assert!(next > last, "{schedule}: {next} after {last}");
                // And none was left out: halfway there, the same one is next.
                let between = last + Span::from_millis(next.since(last).as_millis() / 2);
                prop_assert!(between == next || schedule.next_after(between) == Some(next));
                last = next;
            }
        }

        #[test]
        fn random_lines_fire_as_in_croner(line in line(), from in 946_684_800..2_000_000_000_i64) {
            let fields: Vec<&str> = line.split(' ').collect();
            // Croner joins `*/2` and a weekday by OR, Vixie cron by AND.
            prop_assume!(!fields[2].contains('*') || fields[2] == "*");
            prop_assume!(!fields[4].contains('*') || fields[4] == "*");
            assert_croner_agrees(&line, Tz::UTC, Timestamp::from_secs(from), 50);
        }

        #[test]
        fn no_text_makes_parsing_panic(text in "[ -~é]{0,40}|[-*/,0-9@a-z ]{0,30}") {
            let _ = CronSchedule::parse(&text, Some("Europe/Berlin"));
        }
    }
}
