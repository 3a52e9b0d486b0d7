//! One load on a daemon of its own, for a profiler to look at: `benches/run flood sign|jwks SECONDS`. It prints the
//! daemon's process id first.

use std::time::Duration;

use jwksd_benches::daemon::{Daemon, Keyset};
use jwksd_benches::load::flood;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, seconds] = &arguments[..] else { panic!("say sign, sign-rsa or jwks, and for how many seconds") };
    let algorithm = if what == "sign-rsa" { "RS256" } else { "ES256" };
    let daemon = Daemon::start(&[Keyset { name: "default", algorithm, tables: "" }]);
    let request = if what == "jwks" { daemon.jwks("default") } else { daemon.sign("default") };
    println!("process {}", daemon.server.id());
    let before = daemon.server.cpu();
    let seen = flood(&request, 16, Duration::from_secs(seconds.parse().expect("a number of seconds")));
    // The load begins a tenth of the time before it counts.
    let cpu = (daemon.server.cpu() - before).as_secs_f64() / 1.1 / seen.answered as f64;
    println!("{:.0} per second, {} failed, {:.1} µs of CPU time each", seen.per_second(), seen.failed, cpu * 1e6);
}
