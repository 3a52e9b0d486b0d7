//! How many requests one core answers, beside what one core could answer at best and beside other servers: DESIGN.md §12.
//! Every figure of a ratio comes from the same run, in turns.
//!
//! `benches/run throughput` installs nginx and OpenBao and runs it; `--quick` tries whether it works.

use jwksd_benches::daemon::{Daemon, Keyset, body, token};
use jwksd_benches::load::{Request, Seen, flood};
use jwksd_benches::peers::{Loop, Nginx, OpenBao};
use jwksd_benches::{Effort, in_a_loop, median, spread};

/// As many as a small service keeps open; enough that the server never waits for the client.
const CONNECTIONS: usize = 16;

fn main() {
    let effort = Effort::asked_for();
    let tables = "[keyset.es.rotation]\nsuccessors = 3";
    let keysets =
        [Keyset { name: "es", algorithm: "ES256", tables }, Keyset { name: "rs", algorithm: "RS256", tables: "" }];
    let (daemon, sidecar) = (Daemon::start(&keysets), Daemon::start_as_sidecar(&keysets));
    println!(
        "requests or signatures per second of one core: median (smallest … largest) of {} rounds\n",
        effort.rounds
    );
    jwks(&effort, &daemon);
    let bao = OpenBao::start();
    tokens(&effort, [&daemon, &sidecar], &bao, "es", "ES256");
    tokens(&effort, [&daemon, &sidecar], &bao, "rs", "RS256");
}

fn jwks(effort: &Effort, daemon: &Daemon) {
    let answer = daemon.wait_until(&daemon.jwks("es"), |answer| keys(answer) == 4);
    let nginx = Nginx::serving(body(&answer));
    println!("GET jwks.json, 4 keys, {} bytes, {CONNECTIONS} connections", body(&answer).len());
    let asked = [("jwksd", daemon.jwks("es")), ("nginx, the same document as a file", nginx.jwks())];
    let rates = in_turns(effort, &asked);
    report(&asked.map(|(name, _)| name), &rates);
}

fn tokens(effort: &Effort, [daemon, sidecar]: [&Daemon; 2], bao: &OpenBao, keyset: &str, algorithm: &str) {
    let answer = daemon.sign(keyset).once();
    let token = token(&answer);
    let message = token.rsplit_once('.').unwrap().0;
    println!("\n{algorithm} tokens of {} bytes, {CONNECTIONS} connections", token.len());
    let mut asked = vec![("jwksd over TCP", daemon.sign(keyset)), ("jwksd over a Unix socket", sidecar.sign(keyset))];
    let key = if algorithm == "ES256" { "ec" } else { "rsa" };
    asked.push(("OpenBao transit over TCP, the same bytes", bao.transit(key, algorithm, message)));
    if algorithm == "ES256" {
        asked.push(("OpenBao identity token over TCP", bao.identity()));
    }
    let mut looped = Loop::of(algorithm);
    let (mut rates, mut loops) = (vec![Vec::new(); asked.len()], Vec::new());
    for _ in 0..effort.rounds {
        loops.push(in_a_loop(effort.span / 2, || looped.sign(message.as_bytes())));
        for (rates, (name, request)) in rates.iter_mut().zip(&asked) {
            rates.push(answered(effort, name, request));
        }
    }
    let names: Vec<&str> = asked.iter().map(|(name, _)| *name).chain(["aws-lc-rs in a loop"]).collect();
    rates.push(loops);
    report(&names, &rates);
}

fn in_turns(effort: &Effort, asked: &[(&str, Request)]) -> Vec<Vec<f64>> {
    let mut rates = vec![Vec::new(); asked.len()];
    for _ in 0..effort.rounds {
        for (rates, (name, request)) in rates.iter_mut().zip(asked) {
            rates.push(answered(effort, name, request));
        }
    }
    rates
}

fn answered(effort: &Effort, name: &str, request: &Request) -> f64 {
    let seen: Seen = flood(request, CONNECTIONS, effort.span);
    assert_eq!(seen.failed, 0, "{name} refused: {}", request.once());
    seen.per_second()
}

/// Each line of ours is compared with every line of others, round by round.
fn report(names: &[&str], rates: &[Vec<f64>]) {
    for (name, of_name) in names.iter().zip(rates) {
        println!("  {name:<42} {}", spread(of_name));
    }
    for (ours, of_ours) in names.iter().zip(rates).filter(|(name, _)| name.starts_with("jwksd")) {
        for (theirs, of_theirs) in names.iter().zip(rates).filter(|(name, _)| !name.starts_with("jwksd")) {
            let ratios: Vec<f64> = of_ours.iter().zip(of_theirs).map(|(ours, theirs)| ours / theirs).collect();
            println!("    {ours} is {:.2} × {theirs}", median(&ratios));
        }
    }
}

fn keys(answer: &str) -> usize {
    answer.matches("\"kid\"").count()
}
