//! The process metrics that Prometheus's client libraries agree on, read from `/proc` at each scrape.

use std::fs;

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

/// What does not change while the process lives.
pub(super) struct Process {
    start_time_seconds: Option<f64>,
}

/// What the kernel said at one scrape.
pub(super) struct Usage {
    pub(super) cpu_seconds: f64,
    pub(super) resident_memory_bytes: u64,
    pub(super) virtual_memory_bytes: u64,
    /// `None` where `/proc/self/fd` cannot be listed.
    pub(super) open_fds: Option<u64>,
    /// `None` when there is no limit.
    pub(super) max_fds: Option<u64>,
    /// Since 1970; `None` where `/proc/stat` cannot be read.
    pub(super) start_time_seconds: Option<f64>,
}

impl Process {
    /// Computes the start time once: the kernel derives the boot time from the wall clock, so it moves when that steps.
    pub(super) fn new() -> Self {
        let start_time_seconds = (|| {
            let boot = parse_boot_time(&fs::read_to_string("/proc/stat").ok()?)?;
            let started = parse_stat(&fs::read_to_string("/proc/self/stat").ok()?)?.start_ticks;
            Some(boot as f64 + ticks_to_seconds(started))
        })();
        Process { start_time_seconds }
    }

    /// `None` where there is no `/proc`.
    pub(super) fn usage(&self) -> Option<Usage> {
        let stat = parse_stat(&fs::read_to_string("/proc/self/stat").ok()?)?;
        Some(Usage {
            cpu_seconds: ticks_to_seconds(stat.cpu_ticks),
            resident_memory_bytes: stat.resident_pages.saturating_mul(page_size() as u64),
            virtual_memory_bytes: stat.virtual_bytes,
            // The listing itself holds one descriptor open.
            open_fds: fs::read_dir("/proc/self/fd").ok().map(|fds| (fds.count() as u64).saturating_sub(1)),
            max_fds: getrlimit(Resource::Nofile).current,
            start_time_seconds: self.start_time_seconds,
        })
    }
}

#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: u64,
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

/// proc(5), /proc/pid/stat. Fields are counted from the last `)`, because the command's name may hold spaces and
/// parentheses.
fn parse_stat(stat: &str) -> Option<Stat> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    // `state`, the first field here, has number 3 in the manual.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        start_ticks: number(22)?,
        virtual_bytes: number(23)?,
        resident_pages: number(24)?,
    })
}

fn parse_boot_time(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn ticks_to_seconds(ticks: u64) -> f64 {
    ticks as f64 / clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 3 0 900 123456 77 18446744073709551615";
        let expected = Stat { cpu_ticks: 12, start_ticks: 900, virtual_bytes: 123_456, resident_pages: 77 };
        assert_eq!(parse_stat(line), Some(expected));
        for broken in ["", "42", "42 (jwksd)", "42 (jwksd) S 1 2 x"] {
            assert_eq!(parse_stat(broken), None, "{broken}");
        }
    }

    #[test]
    fn the_usage_of_this_process_is_plausible() {
        let usage = Process::new().usage().unwrap();
        assert!(usage.resident_memory_bytes > 1 << 20);
        assert!(usage.virtual_memory_bytes >= usage.resident_memory_bytes);
        let before = usage.open_fds.unwrap();
        let held = fs::File::open("/proc/self/stat").unwrap();
        assert!(Process::new().usage().unwrap().open_fds.unwrap() >= 1 && before >= 1);
        drop(held);
        // After 2020 and before 2100.
        assert!((1.577e9..4.1e9).contains(&usage.start_time_seconds.unwrap()));
    }
}
