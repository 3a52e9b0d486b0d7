//! How long a signature takes: at half of what one core signs, while keys rotate, and beside slow RSA signatures.
//!
//! Requests are sent at a fixed rate, and each is timed from when it was to be sent. `benches/run latency` runs it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jwksd_benches::Effort;
use jwksd_benches::bare::{Bare, serve_if_asked};
use jwksd_benches::daemon::{Daemon, Keyset, token};
use jwksd_benches::load::{Request, Seen, flood, pace, pace_all};
use jwksd_benches::peers::Nginx;

const CONNECTIONS: usize = 16;

/// A key waits two seconds, a rotation every two and a half.
const BUSY: &str = "[keyset.busy.rotation]\nevery = \"2500ms\"\npropagation = \"2s\"\nsuccessors = 1\nverifiers = [\"400ms\"]\n\
    [keyset.busy.tokens]\nmax_ttl = \"2s\"\ndefault_ttl = \"2s\"\nclock_skew = \"500ms\"";

fn main() {
    serve_if_asked();
    let effort = Effort::asked_for();
    let daemon = Daemon::start(&[
        Keyset { name: "es", algorithm: "ES256", tables: "" },
        Keyset { name: "rs", algorithm: "RS256", tables: "" },
    ]);
    let nginx = Nginx::serving("{\"keys\":[]}");
    let bare = Bare::answering_like(&daemon.sign("es").once());
    let most = |keyset: &str| flood(&daemon.sign(keyset), CONNECTIONS, effort.span).per_second();
    let (es, rs) = (most("es"), most("rs"));
    println!("one core signs {es:.0} ES256 or {rs:.0} RS256 tokens per second; {CONNECTIONS} connections\n");
    println!("{:<58} {:>8} {:>8} {:>8} {:>8}", "milliseconds", "p50", "p99", "p99.9", "longest");
    for _ in 0..effort.rounds {
        row("nginx, a file, at the same rate as the next", &pace(&nginx.jwks(), es / 2.0, CONNECTIONS, effort.span));
        row("signing and nothing else", &pace(&bare.sign(&daemon.sign("es")), es / 2.0, CONNECTIONS, effort.span));
        row("ES256 at half load", &pace(&daemon.sign("es"), es / 2.0, CONNECTIONS, effort.span));
        // A daemon of its own, so that the others' rows have no rotations in them.
        let busy = Daemon::start(&[Keyset { name: "busy", algorithm: "ES256", tables: BUSY }]);
        let (seen, rotations) = rotating(&busy, es / 2.0, effort.span * 3);
        drop(busy);
        row(&format!("ES256 at half load, {rotations} rotations meanwhile"), &seen);
        // A third of the core for each kind.
        let kinds = [(daemon.sign("es"), es / 3.0), (daemon.sign("rs"), rs / 3.0)];
        let mixed = pace_all(&kinds, CONNECTIONS, effort.span);
        row("ES256 at a third, RS256 at another third", &mixed[0]);
        row("  the RS256 tokens of it", &mixed[1]);
        println!();
    }
}

fn row(name: &str, seen: &Seen) {
    assert_eq!(seen.failed, 0, "{name}: requests failed");
    let [half, most, nearly_all, all] = [0.5, 0.99, 0.999, 1.0].map(|share| seen.percentile(share));
    println!("{name:<58} {half:>8.3} {most:>8.3} {nearly_all:>8.3} {all:>8.3}");
}

/// The keyset that rotates every few seconds, and how many of its keys signed meanwhile.
fn rotating(daemon: &Daemon, rate: f64, span: Duration) -> (Seen, usize) {
    let request = daemon.sign("busy");
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| signers(&request, &ended));
        let seen = pace(&request, rate, CONNECTIONS, span);
        ended.store(true, Ordering::SeqCst);
        (seen, watching.join().unwrap().saturating_sub(1))
    })
}

fn signers(request: &Request, ended: &AtomicBool) -> usize {
    let mut kids = HashSet::new();
    while !ended.load(Ordering::SeqCst) {
        let token = token(&request.once());
        kids.insert(token.split('.').next().unwrap().to_owned());
        std::thread::sleep(Duration::from_millis(200));
    }
    kids.len()
}
