//! Durations as requests write them.

use serde::{Deserialize, Serialize};

use crate::keyring::time::Span;

/// A duration in a request: `"10m"`, `"1h30m"` or integer seconds (DESIGN §7).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DurationBody(pub Span);

impl<'de> Deserialize<'de> for DurationBody {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Seconds(f64),
            Text(String),
        }
        let seconds = match Either::deserialize(deserializer) {
            Ok(Either::Text(text)) => return Span::parse(&text).map(DurationBody).map_err(serde::de::Error::custom),
            Ok(Either::Seconds(seconds)) => Span::from_json_seconds(seconds),
            Err(_) => None,
        };
        let span = seconds.filter(|span| span.as_secs() <= i64::from(u32::MAX));
        let wrong = || serde::de::Error::custom("must be a duration such as \"10m\", or whole seconds such as 600");
        span.map(DurationBody).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_seconds_are_a_duration_however_json_writes_them() {
        let read = |text: &str| serde_json::from_str::<DurationBody>(text).map(|body| body.0).ok();
        for same in ["600", "600.0", "6e2", "\"10m\""] {
            assert_eq!(read(same), Some(Span::MINUTE.times(10)), "{same}");
        }
        assert_eq!(read("4294967295"), Some(Span::from_secs(4_294_967_295)));
        for wrong in ["600.5", "-1", "4294967296", "1e300", "true", "null", "\"10\"", "[600]"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
