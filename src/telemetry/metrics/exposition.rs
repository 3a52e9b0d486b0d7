//! The two text formats a scraper can ask for, both encoded by prometheus-client.
//!
//! prometheus-client writes OpenMetrics 1.0, where a counter's family is named without `_total`. Prometheus's text
//! format 0.0.4 names it with. So in that format a counter is described under its full name and its samples are
//! written by the encoder that adds no suffix, the gauges'; nothing is rewritten afterwards.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::histogram::Observed;

/// A format of the metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// Prometheus text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

/// A label name and its value.
pub(super) type Label<'a> = (&'static str, &'a str);

/// Writes families in one of the formats.
pub(super) struct Page<'a> {
    pub(super) encoder: DescriptorEncoder<'a>,
    pub(super) exposition: Exposition,
}

/// Writes the series of one family.
pub(super) struct Family<'a> {
    encoder: MetricEncoder<'a>,
    suffix: Suffix,
}

/// Who writes `_total`.
#[derive(Clone, Copy)]
enum Suffix {
    ByTheEncoder,
    InTheName,
}

impl Exposition {
    /// The format that an `Accept` header prefers (RFC 9110 §12.5.1): OpenMetrics only when it is named and not
    /// ranked below `text/plain`.
    pub fn negotiate(accept: Option<&str>) -> Self {
        let accept = accept.unwrap_or_default();
        let open_metrics = quality(accept, "application/openmetrics-text");
        if open_metrics > 0.0 && open_metrics >= quality(accept, "text/plain") {
            Exposition::OpenMetrics
        } else {
            Exposition::Text
        }
    }

    /// The value of `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Exposition::Text => "text/plain; version=0.0.4; charset=utf-8",
            Exposition::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

impl Page<'_> {
    /// A family of counters; `name` ends in `_total`.
    pub(super) fn counter<F>(&mut self, name: &'static str, help: &str, series: F) -> fmt::Result
    where
        F: FnOnce(&mut Family<'_>) -> fmt::Result,
    {
        let (name, suffix) = match (self.exposition, name.strip_suffix("_total")) {
            (Exposition::OpenMetrics, Some(stem)) => (stem, Suffix::ByTheEncoder),
            _ => (name, Suffix::InTheName),
        };
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        series(&mut Family { encoder, suffix })
    }

    pub(super) fn gauge<F>(&mut self, name: &'static str, help: &str, series: F) -> fmt::Result
    where
        F: FnOnce(&mut Family<'_>) -> fmt::Result,
    {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        series(&mut Family { encoder, suffix: Suffix::InTheName })
    }

    pub(super) fn histogram<F>(&mut self, name: &'static str, help: &str, series: F) -> fmt::Result
    where
        F: FnOnce(&mut Family<'_>) -> fmt::Result,
    {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        series(&mut Family { encoder, suffix: Suffix::InTheName })
    }
}

impl Family<'_> {
    /// A series of a counter or gauge whose value is an integer.
    pub(super) fn integer(&mut self, labels: &[Label<'_>], value: u64) -> fmt::Result {
        self.sample(labels, value)
    }

    /// A series of a counter or gauge whose value is in seconds.
    pub(super) fn seconds(&mut self, labels: &[Label<'_>], value: f64) -> fmt::Result {
        self.sample(labels, value)
    }

    pub(super) fn distribution(&mut self, labels: &[Label<'_>], observed: &Observed) -> fmt::Result {
        let Observed { sum_seconds, count, buckets } = observed;
        self.encoder.encode_family(&labels)?.encode_histogram::<NoLabelSet>(*sum_seconds, *count, buckets, None)
    }

    fn sample(&mut self, labels: &[Label<'_>], value: impl EncodeGaugeValue + EncodeCounterValue) -> fmt::Result {
        let encode = |encoder: &mut MetricEncoder<'_>| match self.suffix {
            Suffix::ByTheEncoder => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
            Suffix::InTheName => encoder.encode_gauge(&value),
        };
        // An empty set would be written as `{}`.
        if labels.is_empty() { encode(&mut self.encoder) } else { encode(&mut self.encoder.encode_family(&labels)?) }
    }
}

/// The weight that `accept` gives to exactly this media type; 0 when it does not name it.
fn quality(accept: &str, media_type: &str) -> f32 {
    accept
        .split(',')
        .filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            if !parts.next()?.eq_ignore_ascii_case(media_type) {
                return None;
            }
            let weight = parts.find_map(|parameter| {
                parameter.strip_prefix("q=").or_else(|| parameter.strip_prefix("Q=")).map(|q| q.parse().unwrap_or(0.0))
            });
            Some(weight.unwrap_or(1.0))
        })
        .fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_an_answer_only_to_those_who_ask_for_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let without = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (accept, expected) in [
            (None, Exposition::Text),
            (Some(""), Exposition::Text),
            (Some("*/*"), Exposition::Text),
            (Some("text/html, */*"), Exposition::Text),
            (Some(without), Exposition::Text),
            (Some(prometheus), Exposition::OpenMetrics),
            (Some("Application/OpenMetrics-Text"), Exposition::OpenMetrics),
            (Some("application/openmetrics-text; q=0"), Exposition::Text),
            (Some("application/openmetrics-text;q=0.4, text/plain"), Exposition::Text),
            (Some("application/openmetrics-text;q=banana"), Exposition::Text),
            (Some(";;;,,,q="), Exposition::Text),
        ] {
            assert_eq!(Exposition::negotiate(accept), expected, "{accept:?}");
        }
    }
}
