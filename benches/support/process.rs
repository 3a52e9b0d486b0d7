//! What the system says of a process.

use std::time::Duration;

use super::Outcome;

/// A process by its id.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub u32);

impl Process {
    /// User and system time of all its threads, those that have ended too, to the nanosecond.
    pub fn cpu(self) -> Outcome<Duration> {
        let mut clock: libc::clockid_t = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: both only write what they are given, which outlives the calls.
        let failed = unsafe {
            libc::clock_getcpuclockid(libc::pid_t::try_from(self.0)?, &mut clock) != 0
                || libc::clock_gettime(clock, &mut time) != 0
        };
        if failed {
            return Err(format!("the CPU time of process {} cannot be read", self.0).into());
        }
        Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
    }

    /// Resident memory, in bytes.
    pub fn resident(self) -> Outcome<u64> {
        Ok(self.status("VmRSS")? * 1024)
    }

    /// The most resident memory that it ever had, in bytes.
    pub fn most_resident(self) -> Outcome<u64> {
        Ok(self.status("VmHWM")? * 1024)
    }

    pub fn threads(self) -> Outcome<u64> {
        self.status("Threads")
    }

    fn status(self, name: &str) -> Outcome<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = value.and_then(|value| value.split_whitespace().next());
        Ok(number.ok_or_else(|| format!("the process has no {name}"))?.parse()?)
    }
}
