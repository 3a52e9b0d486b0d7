//! Points in time and lengths of time as the core computes with them: whole milliseconds, arithmetic that
//! saturates, so that the planner is total for any stored or measured value.

use std::fmt;
use std::ops::{Add, Sub};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::name::legible;

/// A point in time: milliseconds since 1970-01-01T00:00:00Z, between the years 1970 and 9999.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// The last millisecond of the year 9999, the end of RFC 3339's range.
const LATEST: i64 = 253_402_300_799_999;

impl Timestamp {
    pub const EPOCH: Timestamp = Timestamp(0);
    pub const MAX: Timestamp = Timestamp(LATEST);

    /// Clamped to the range that RFC 3339 can express.
    pub const fn from_millis(millis: i64) -> Self {
        Timestamp(if millis < 0 {
            0
        } else if millis > LATEST {
            LATEST
        } else {
            millis
        })
    }

    pub const fn from_secs(secs: i64) -> Self {
        Self::from_millis(secs.saturating_mul(1000))
    }

    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds, rounded down (RFC 7519 NumericDate).
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub fn since(self, earlier: Timestamp) -> Span {
        Span::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// RFC 3339 in UTC, with milliseconds only where they are not zero.
    pub fn to_rfc3339(self) -> String {
        let format = if self.0 % 1000 == 0 { SecondsFormat::Secs } else { SecondsFormat::Millis };
        self.to_chrono().to_rfc3339_opts(format, true)
    }

    /// Any RFC 3339 time; `None` for what is not one.
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        DateTime::parse_from_rfc3339(text).ok().map(|t| Self::from_millis(t.timestamp_millis()))
    }

    pub fn to_chrono(self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.0).unwrap_or(DateTime::UNIX_EPOCH)
    }
}

impl Add<Span> for Timestamp {
    type Output = Timestamp;
    fn add(self, span: Span) -> Timestamp {
        Timestamp::from_millis(self.0.saturating_add(span.0))
    }
}

impl Sub<Span> for Timestamp {
    type Output = Timestamp;
    fn sub(self, span: Span) -> Timestamp {
        Timestamp::from_millis(self.0.saturating_sub(span.0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_rfc3339())
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_rfc3339())
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Timestamp::parse_rfc3339(&text).ok_or_else(|| {
            de::Error::custom(format!("`{}` is not an RFC 3339 time such as 2026-11-24T10:00:00Z", legible(&text)))
        })
    }
}

/// A length of time in milliseconds, never negative. Serialised as an integer of milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "i64", into = "i64")]
pub struct Span(i64);

impl Span {
    pub const ZERO: Span = Span(0);
    pub const SECOND: Span = Span(1000);
    pub const MINUTE: Span = Span(60_000);
    pub const HOUR: Span = Span(3_600_000);
    pub const DAY: Span = Span(86_400_000);
    pub const MAX: Span = Span(LATEST);

    /// Clamped to `0..=MAX`.
    pub const fn from_millis(millis: i64) -> Self {
        Span(if millis < 0 {
            0
        } else if millis > LATEST {
            LATEST
        } else {
            millis
        })
    }

    pub const fn from_secs(secs: i64) -> Self {
        Self::from_millis(secs.saturating_mul(1000))
    }

    /// Seconds as a JSON number says them, to which 600.0 and 6e2 are the same as 600: `None` for less than zero, and for
    /// what is not whole.
    pub fn from_json_seconds(seconds: f64) -> Option<Self> {
        (seconds.fract() == 0.0 && seconds >= 0.0).then(|| Span::from_secs(seconds as i64))
    }

    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds, rounded down.
    pub const fn as_secs(self) -> i64 {
        self.0 / 1000
    }

    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1000.0
    }

    pub fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0.unsigned_abs())
    }

    /// From a standard duration, rounded down to milliseconds.
    pub fn from_std(duration: std::time::Duration) -> Self {
        Span::from_millis(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
    }

    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    pub const fn times(self, n: u32) -> Self {
        Span::from_millis(self.0.saturating_mul(n as i64))
    }

    pub const fn saturating_sub(self, other: Span) -> Self {
        Span::from_millis(self.0.saturating_sub(other.0))
    }

    /// `1h30m`, `500ms`, `30d`, `a` with suffixes, with or without spaces; months and years are refused because
    /// their length is not fixed. Zero is `0s`.
    pub fn parse(text: &str) -> Result<Self, SpanError> {
        let wrong = || SpanError { text: legible(text) };
        let calendar = text
            .split(|c: char| !c.is_ascii_alphabetic())
            .any(|unit| matches!(unit, "M" | "month" | "months" | "y" | "yr" | "year" | "years"));
        if calendar {
            return Err(wrong());
        }
        let duration = humantime::parse_duration(text.trim()).map_err(|_| wrong())?;
        if duration.subsec_nanos() % 1_000_000 != 0 {
            return Err(wrong());
        }
        i64::try_from(duration.as_millis()).ok().filter(|&ms| ms <= LATEST).map(Span).ok_or_else(wrong)
    }
}

/// A text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a duration: write it like \"90s\", \"15m\", \"1h30m\" or \"30d\"")]
pub struct SpanError {
    text: String,
}

impl From<i64> for Span {
    fn from(millis: i64) -> Self {
        Span::from_millis(millis)
    }
}

impl From<Span> for i64 {
    fn from(span: Span) -> i64 {
        span.0
    }
}

impl Add for Span {
    type Output = Span;
    fn add(self, other: Span) -> Span {
        Span::from_millis(self.0.saturating_add(other.0))
    }
}

impl std::iter::Sum for Span {
    fn sum<I: Iterator<Item = Span>>(iter: I) -> Span {
        iter.fold(Span::ZERO, Add::add)
    }
}

/// The largest units first, exact: `1d2h`, `15m`, `1s500ms`, `0s`.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            if rest >= size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_instead_of_wrapping() {
        assert_eq!(Timestamp::MAX + Span::MAX, Timestamp::MAX);
        assert_eq!(Timestamp::EPOCH - Span::DAY, Timestamp::EPOCH);
        assert_eq!(Timestamp::EPOCH.since(Timestamp::MAX), Span::ZERO);
        assert_eq!(Span::MAX.times(u32::MAX), Span::MAX);
    }

    #[test]
    fn durations_are_read_and_written_exactly() {
        for text in ["0s", "15m", "1h30m", "30d", "1s500ms", "500ms", "1d2h3m4s5ms"] {
            assert_eq!(Span::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "15", "1 month", "2y", "-5s", "5 bananas", "1us", "99999999999999d"] {
            assert!(Span::parse(text).is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn times_are_rfc_3339_with_milliseconds_where_they_matter() {
        assert_eq!(Timestamp::from_secs(1_795_514_400).to_rfc3339(), "2026-11-24T10:00:00Z");
        assert_eq!(Timestamp::from_millis(1_795_514_400_250).to_rfc3339(), "2026-11-24T10:00:00.250Z");
        assert_eq!(Timestamp::parse_rfc3339("2026-11-24T11:00:00+01:00"), Some(Timestamp::from_secs(1_795_514_400)));
    }
}
