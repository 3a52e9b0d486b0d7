//! What is told besides the log: access lines and traces.

/// What is told besides the log and the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    pub access_log: AccessLog,
    /// `None`: no traces.
    pub traces: Option<Traces>,
}

/// Which requests get a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLog {
    pub enabled: bool,
    /// Names of listeners.
    pub listeners: Vec<String>,
    /// Of the requests that succeed; those that fail are all logged.
    pub sample_ratio: Share,
}

/// Where traces go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    /// The collector's base URL; `None`: as the environment says.
    pub endpoint: Option<String>,
    /// Of the traces that begin here.
    pub sample_ratio: Share,
}

impl AccessLog {
    /// Every listener but `ops`, whose requests are those of machines that ask every few seconds.
    pub const USUAL: [&str; 4] = ["public", "signer", "admin", "replication"];
}

impl Default for AccessLog {
    fn default() -> Self {
        let listeners = Self::USUAL.map(str::to_owned).to_vec();
        AccessLog { enabled: false, listeners, sample_ratio: Share::ALL }
    }
}

/// A part of a whole, in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    pub const ALL: Share = Share(1_000_000);

    /// From 0 to 1; rounded up, so that a small share is not none.
    pub fn new(share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then(|| Share((share * 1e6).ceil() as u32))
    }

    /// Of a million.
    pub const fn millionths(self) -> u32 {
        self.0
    }

    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}
