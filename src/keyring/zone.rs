//! Time zones of the IANA database, whose data the binary brings along: what a crontab line means does not depend on the
//! machine.

use std::sync::OnceLock;

use chrono::{DateTime, NaiveDateTime};
use jiff::civil;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone, TimeZoneDatabase};

/// A time zone. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Zone(TimeZone);

/// By name: an alias may go its own way with a later database.
impl PartialEq for Zone {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Zone {}

impl Zone {
    pub(super) const UTC: Zone = Zone(TimeZone::UTC);

    /// The zone of this name, in the database's spelling; aliases are zones of their own.
    pub(super) fn named(name: &str) -> Option<Self> {
        static DATABASE: OnceLock<TimeZoneDatabase> = OnceLock::new();
        let zone = DATABASE.get_or_init(TimeZoneDatabase::bundled).get(name).ok()?;
        (zone.iana_name() == Some(name)).then_some(Zone(zone))
    }

    pub(super) fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    /// What clocks show at an instant (Unix milliseconds). `None` outside of the years -9999 to 9999.
    pub(super) fn local(&self, instant: i64) -> Option<NaiveDateTime> {
        let offset = self.0.to_offset(jiff::Timestamp::from_millisecond(instant).ok()?);
        DateTime::from_timestamp_millis(instant + millis(offset)).map(|local| local.naive_utc())
    }

    /// The first instant (Unix milliseconds) at which clocks show `local` or, when they skip it, a later time. Never decreases
    /// as `local` grows. `None` outside of the years -9999 to 9999.
    pub(super) fn first_instant(&self, local: NaiveDateTime) -> Option<i64> {
        let local = local.and_utc().timestamp_millis();
        match self.0.to_ambiguous_timestamp(civil_time(local)?).offset() {
            AmbiguousOffset::Unambiguous { offset } | AmbiguousOffset::Fold { before: offset, .. } => {
                Some(local - millis(offset))
            }
            // By the offset that follows, a skipped time is before the change that skips it.
            AmbiguousOffset::Gap { after, .. } => {
                let before_the_change = jiff::Timestamp::from_millisecond(local - millis(after)).ok()?;
                let change = self.0.following(before_the_change).next()?;
                Some(change.timestamp().as_millisecond())
            }
        }
    }
}

fn millis(offset: Offset) -> i64 {
    i64::from(offset.seconds()) * 1000
}

/// Local time, written as if it were UTC.
fn civil_time(local: i64) -> Option<civil::DateTime> {
    jiff::Timestamp::from_millisecond(local).ok().map(|local| Offset::UTC.to_datetime(local))
}

#[cfg(test)]
mod tests {
    use chrono::{Datelike as _, NaiveDate, Offset as _, TimeDelta, TimeZone as _};
    use chrono_tz::{GapInfo, Tz};

    use super::*;

    /// What chrono-tz, with tables of its own, makes of a local time.
    fn theirs(zone: Tz, local: NaiveDateTime) -> i64 {
        if let Some(instant) = zone.from_local_datetime(&local).earliest() {
            return instant.timestamp_millis();
        }
        let (begin, offset) = GapInfo::new(&local, &zone).unwrap().begin.unwrap();
        begin.and_utc().timestamp_millis() - i64::from(offset.fix().local_minus_utc()) * 1000
    }

    fn days(years: std::ops::RangeInclusive<i32>) -> impl Iterator<Item = NaiveDate> {
        let first = NaiveDate::from_ymd_opt(*years.start(), 1, 1).unwrap();
        first.iter_days().take_while(move |day| years.contains(&day.year()))
    }

    /// The databases are of different releases: laws made and mistakes found since let them differ in late years of a few
    /// zones.
    #[test]
    fn local_time_is_what_chrono_tz_says() {
        for zone in chrono_tz::TZ_VARIANTS {
            agrees(zone, days(1999..=2021));
        }
        for zone in [Tz::Europe__Berlin, Tz::America__New_York, Tz::Australia__Lord_Howe, Tz::Asia__Kathmandu] {
            agrees(zone, days(2021..=2041).chain(days(2098..=2099)));
        }
    }

    fn agrees(zone: Tz, days: impl Iterator<Item = NaiveDate>) {
        let ours = Zone::named(zone.name()).unwrap_or_else(|| panic!("there is no {zone}"));
        assert_eq!(ours.name(), zone.name());
        // Days without a change of clocks are looked at by their midnights alone.
        let mut known = None;
        for day in days {
            let midnight = day.and_time(chrono::NaiveTime::MIN);
            let instant = theirs(zone, midnight);
            assert_eq!(ours.first_instant(midnight), Some(instant), "{zone} {midnight}");
            assert_eq!(ours.local(instant), zone.timestamp_millis_opt(instant).single().map(|at| at.naive_local()));
            let yesterday = known.replace((day, instant));
            let Some((yesterday, from)) = yesterday.filter(|(yesterday, _)| yesterday.succ_opt() == Some(day)) else {
                continue;
            };
            if instant - from == 86_400_000 {
                continue;
            }
            for minutes in (0..24 * 60).step_by(5) {
                let local = yesterday.and_time(chrono::NaiveTime::MIN) + TimeDelta::minutes(minutes);
                assert_eq!(ours.first_instant(local), Some(theirs(zone, local)), "{zone} {local}");
                let instant = from + minutes * 60_000;
                let shown = zone.timestamp_millis_opt(instant).single().map(|at| at.naive_local());
                assert_eq!(ours.local(instant), shown, "{zone} {instant}");
            }
        }
    }

    #[test]
    fn an_alias_is_a_zone_of_its_own() {
        let [zone, alias] = ["America/New_York", "US/Eastern"].map(|name| Zone::named(name).unwrap());
        assert_eq!(zone, zone.clone());
        assert_ne!(zone, alias);
    }

    #[test]
    fn only_the_spelling_of_the_database_is_a_name() {
        for name in ["Europe/Berlin", "UTC", "Etc/UTC", "US/Eastern", "GMT"] {
            assert_eq!(Zone::named(name).unwrap().name(), name);
        }
        for name in ["europe/berlin", "", "Berlin", "CET+1", "Etc/Unknown", "../UTC", " UTC"] {
            assert_eq!(Zone::named(name), None, "{name}");
        }
    }
}
