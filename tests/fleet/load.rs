//! What managers and their database have done so far: differences of two looks are the load between them.

use tokio::time::Instant;

use crate::support::Daemon;
use crate::support::postgres::Database;

use crate::signers::Requests;

/// Statements of managers alone, however many rows each touched.
const STATEMENTS: &str = "SELECT coalesce(sum(calls), 0) || ' ' || coalesce(sum(total_exec_time), 0) || ' ' || \
     coalesce(sum(rows), 0) FROM pg_stat_statements JOIN pg_roles ON pg_roles.oid = userid \
     WHERE rolname = 'jwksd_manager'";

/// The costliest of them, for whoever wants to know why.
const COSTLIEST: &str = "SELECT calls || ' calls, ' || round(mean_exec_time::numeric, 2) || ' ms and ' || \
     rows / calls || ' rows each: ' || left(regexp_replace(query, '\\s+', ' ', 'g'), 70) FROM pg_stat_statements \
     JOIN pg_roles ON pg_roles.oid = userid WHERE rolname = 'jwksd_manager' ORDER BY total_exec_time DESC LIMIT 6";

/// One look.
pub struct Look {
    at: Instant,
    requests: u64,
    statements: f64,
    database_ms: f64,
    rows: f64,
    managers: Vec<Process>,
}

/// A process, as the kernel counts.
struct Process {
    pid: u32,
    cpu_seconds: f64,
    rss_mib: f64,
}

/// What was done between two looks.
pub struct Load {
    pub seconds: f64,
    pub requests_per_second: f64,
    pub statements_per_minute: f64,
    rows_per_second: f64,
    /// Of one core, busy with statements of managers.
    database_share: f64,
    /// Of each manager that ran all the time: processor seconds per minute, and what it has in memory.
    managers: Vec<(f64, f64)>,
}

pub async fn look(database: &Database, requests: &Requests, managers: &[&Daemon]) -> Look {
    let rows = database.rows(STATEMENTS).await;
    let [statements, database_ms, rows] = numbers(&rows[0]);
    let managers = managers.iter().map(|manager| process(manager.pid())).collect();
    Look { at: Instant::now(), requests: requests.total(), statements, database_ms, rows, managers }
}

pub async fn costliest(database: &Database) -> String {
    database.rows(COSTLIEST).await.join("\n    ")
}

impl Look {
    pub fn until(&self, later: &Look) -> Load {
        let seconds = (later.at - self.at).as_secs_f64();
        let of = |pid: u32| self.managers.iter().find(|process| process.pid == pid);
        let manager = |process: &Process| {
            let cpu = process.cpu_seconds - of(process.pid)?.cpu_seconds;
            Some((cpu * 60.0 / seconds, process.rss_mib))
        };
        Load {
            seconds,
            requests_per_second: (later.requests - self.requests) as f64 / seconds,
            statements_per_minute: (later.statements - self.statements) * 60.0 / seconds,
            rows_per_second: (later.rows - self.rows) / seconds,
            database_share: (later.database_ms - self.database_ms) / 1000.0 / seconds,
            managers: later.managers.iter().filter_map(manager).collect(),
        }
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.0} s: {:.0} requests/s at the managers; database {:.2} statements/s, {:.0} rows/s, {:.1} % of a core",
            self.seconds,
            self.requests_per_second,
            self.statements_per_minute / 60.0,
            self.rows_per_second,
            self.database_share * 100.0
        )?;
        for (cpu, rss) in &self.managers {
            write!(f, "; manager {cpu:.1} s of processor per minute, {rss:.0} MiB")?;
        }
        Ok(())
    }
}

fn process(pid: u32) -> Process {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the process runs");
    let stat = read("stat");
    // The name before it may hold spaces, and ends with a parenthesis (proc_pid_stat(5): utime and stime are fields 14
    // and 15).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().expect("a number of ticks")).sum();
    let status = read("status");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    let kib: f64 = rss.trim().trim_end_matches("kB").trim().parse().expect("a number of KiB");
    Process { pid, cpu_seconds: ticks / rustix::param::clock_ticks_per_second() as f64, rss_mib: kib / 1024.0 }
}

fn numbers<const N: usize>(text: &str) -> [f64; N] {
    let parsed = text.split(' ').map(|number| number.parse().expect("the database writes numbers"));
    parsed.collect::<Vec<f64>>().try_into().expect("as many as were asked for")
}
