//! What systemd is told of a service, by the protocol of sd_notify(3): datagrams to the socket in `NOTIFY_SOCKET`.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::keyring::time::Span;

/// A status is one line, and systemd cuts what is much longer.
const LONGEST_STATUS: usize = 500;

/// Half of it can still be waited for.
const SHORTEST_WATCHDOG: Span = Span::from_millis(2);

/// systemd takes a datagram at once. If it does not, the daemon's work is worth more than the message.
const PATIENCE: Duration = Duration::from_secs(1);

/// The systemd that started this process, if it wants to be told.
#[derive(Debug, Default)]
pub struct Systemd {
    address: Option<SocketAddr>,
    /// How long it waits for a sign of life, from one to the next.
    watchdog: Option<Span>,
}

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The listeners are open, or a reload is over.
    Ready,
    /// A reload begins; the time is CLOCK_MONOTONIC's.
    Reloading(Duration),
    /// The process begins to end.
    Stopping,
    /// The process works: see sd_watchdog_enabled(3).
    Alive,
}

/// Why nothing can be told where something should be.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error("NOTIFY_SOCKET is {0:?}, which is neither a path nor an abstract address (@…): systemd is told nothing")]
    Address(String),
    #[error("WATCHDOG_USEC is {0:?}, which is no number of microseconds: no sign of life is given")]
    Watchdog(String),
}

impl Systemd {
    /// As the variables of the process `pid` say. Without `NOTIFY_SOCKET` there is nobody to tell.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>, pid: u32) -> (Self, Vec<NotifyError>) {
        let mut errors = Vec::new();
        let Some(socket) = variable("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else {
            return (Systemd::default(), errors);
        };
        let address = address(&socket);
        if address.is_none() {
            errors.push(NotifyError::Address(socket));
        }
        let meant = variable("WATCHDOG_PID").is_none_or(|of| of == pid.to_string());
        let watchdog = variable("WATCHDOG_USEC").filter(|_| meant && address.is_some()).and_then(|microseconds| {
            let parsed = microseconds.parse().ok().filter(|parsed| *parsed > 0);
            if parsed.is_none() {
                errors.push(NotifyError::Watchdog(microseconds));
            }
            parsed.map(|parsed| Span::from_std(Duration::from_micros(parsed)).max(SHORTEST_WATCHDOG))
        });
        (Systemd { address, watchdog }, errors)
    }

    /// Whether anybody listens.
    pub fn is_told(&self) -> bool {
        self.address.is_some()
    }

    /// How long it waits from one [`Notice::Alive`] to the next before it ends the process.
    pub fn watchdog(&self) -> Option<Span> {
        self.watchdog
    }

    /// Sends a notice, a line about the service for people, or both in one message. What cannot be sent is logged.
    pub async fn tell(&self, notice: Option<Notice>, status: Option<&str>) {
        let Some(address) = &self.address else { return };
        let message = message(notice, status);
        let sent = tokio::time::timeout(PATIENCE, send(address, &message)).await;
        if let Err(error) = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            tracing::warn!(%error, ?notice, "systemd cannot be told");
        }
    }
}

fn address(socket: &str) -> Option<SocketAddr> {
    match socket.split_at_checked(1)? {
        (_, "") => None,
        ("@", name) => SocketAddr::from_abstract_name(name).ok(),
        ("/", _) => SocketAddr::from_pathname(socket).ok(),
        _ => None,
    }
}

fn message(notice: Option<Notice>, status: Option<&str>) -> String {
    let notice = notice.map(|notice| match notice {
        Notice::Ready => "READY=1".to_owned(),
        Notice::Reloading(at) => format!("RELOADING=1\nMONOTONIC_USEC={}", at.as_micros()),
        Notice::Stopping => "STOPPING=1".to_owned(),
        Notice::Alive => "WATCHDOG=1".to_owned(),
    });
    // A line break would begin another assignment.
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    let status =
        status.map(|text| format!("STATUS={}", text.chars().take(LONGEST_STATUS).map(visible).collect::<String>()));
    notice.into_iter().chain(status).collect::<Vec<_>>().join("\n")
}

/// Connects anew each time: systemd may have been executed anew meanwhile.
async fn send(address: &SocketAddr, message: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(address)?;
    socket.set_nonblocking(true)?;
    tokio::net::UnixDatagram::from_std(socket)?.send(message.as_bytes()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told_by(variables: &[(&str, &str)]) -> (Systemd, Vec<String>) {
        let value =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let (systemd, errors) = Systemd::from_environment(value, 42);
        (systemd, errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_variables_say_whom_to_tell_and_how_often() {
        let (nobody, errors) = told_by(&[("WATCHDOG_USEC", "30000000")]);
        assert_eq!((nobody.is_told(), nobody.watchdog(), errors.len()), (false, None, 0), "nobody listens");
        for socket in ["/run/systemd/notify", "@/org/freedesktop/systemd1/notify/1"] {
            let (systemd, errors) = told_by(&[("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", "30000000")]);
            assert_eq!((systemd.is_told(), systemd.watchdog()), (true, Some(Span::from_secs(30))), "{socket}");
            assert!(errors.is_empty(), "{errors:?}");
        }
        let of = |pid| told_by(&[("NOTIFY_SOCKET", "/s"), ("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", pid)]).0;
        assert_eq!((of("42").watchdog(), of("41").watchdog()), (Some(Span::from_millis(2)), None));
    }

    #[test]
    fn what_cannot_be_understood_is_said_and_used_for_nothing() {
        for socket in ["vsock:2:1234", "relative", "@", "/"] {
            let (systemd, errors) = told_by(&[("NOTIFY_SOCKET", socket), ("WATCHDOG_USEC", "1000")]);
            assert_eq!((systemd.is_told(), systemd.watchdog(), errors.len()), (false, None, 1), "{socket}: {errors:?}");
        }
        for interval in ["", "0", "-1", "1s"] {
            let (systemd, errors) = told_by(&[("NOTIFY_SOCKET", "/s"), ("WATCHDOG_USEC", interval)]);
            assert_eq!((systemd.is_told(), systemd.watchdog(), errors.len()), (true, None, 1), "{interval}");
        }
    }

    #[test]
    fn a_message_has_one_assignment_a_line() {
        let reloading = Notice::Reloading(Duration::from_millis(1_500));
        assert_eq!(message(Some(reloading), None), "RELOADING=1\nMONOTONIC_USEC=1500000");
        assert_eq!(message(Some(Notice::Ready), Some("two\nlines\0")), "READY=1\nSTATUS=two lines ");
        assert_eq!(message(None, Some(&"x".repeat(9_000))).len(), "STATUS=".len() + LONGEST_STATUS);
    }
}
