//! What a daemon costs with 10, 100, 1,000 and 10,000 keysets: start, memory, rest, rotations and signatures, each as a
//! number and as a multiple of what the smallest installation takes. `docs/performance.md` says how to read it.
//!
//! ```console
//! $ benches/run keysets [N …] [--idle SECONDS] [--tokens N] [--rotations N] [--binary PATH]
//! ```

#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::time::Duration;

use support::Outcome;
use support::arguments::Arguments;
use support::client::Connection;
use support::daemon::{Daemon, Site};
use support::process::Process;
use support::table::Table;
use tokio::time::sleep;

const OPTIONS: [&str; 4] = ["idle", "tokens", "rotations", "binary"];

/// Two keysets with three keys each and one that retires fit into a JWKS of ten keys.
const KEYSETS_PER_ISSUER: usize = 2;

const CLAIMS: &str = r#"{"claims":{"sub":"user-4711","aud":"https://api.example.com","scope":"read write"}}"#;

/// Warm starts, of which the fastest counts: the others waited for something else on the machine.
const STARTS: usize = 3;

/// A daemon that uses less than this in [`LULL`] rests.
const AT_REST: Duration = Duration::from_millis(5);
const LULL: Duration = Duration::from_millis(500);

/// What was measured with one number of keysets.
struct Row {
    keysets: usize,
    check: Duration,
    first_start: Duration,
    warm_start: Duration,
    start_cpu: Duration,
    stop: Duration,
    resident: u64,
    /// CPU time per second of rest.
    idle: f64,
    rotation: Duration,
    first: Duration,
    last: Duration,
    all: Duration,
    scrape: Duration,
    scraped_bytes: usize,
    list: Duration,
    resident_at_end: u64,
}

/// How much of everything is done.
struct Plan {
    idle: Duration,
    tokens: u32,
    rotations: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let arguments = Arguments::read(&OPTIONS)?;
    let numbers = match arguments.positional.is_empty() {
        true => vec![10, 100, 1_000, 10_000],
        false => arguments.positional.iter().map(|number| number.parse()).collect::<Result<_, _>>()?,
    };
    let plan = Plan {
        idle: Duration::from_secs(arguments.option("idle", 60)?),
        tokens: arguments.option("tokens", 10_000)?,
        rotations: arguments.option("rotations", 100)?,
    };
    let mut rows = Vec::new();
    for keysets in numbers {
        eprintln!("{keysets} keysets");
        let site = Site::new(arguments.binary()?, &tables(keysets))?;
        rows.push(measure(&site, keysets, &plan).await?);
    }
    print(&rows);
    Ok(())
}

async fn measure(site: &Site, keysets: usize, plan: &Plan) -> Outcome<Row> {
    let check = site.run("check").await?;
    let daemon = site.start().await?;
    let first_start = first_jwks(&daemon).await?;
    rest(daemon.process).await?;
    daemon.stop().await?;
    let (mut warm_start, mut start_cpu, mut stop) = (Duration::MAX, Duration::MAX, Duration::MAX);
    for _ in 1..STARTS {
        let daemon = site.start().await?;
        warm_start = warm_start.min(first_jwks(&daemon).await?);
        start_cpu = start_cpu.min(daemon.process.cpu()?);
        rest(daemon.process).await?;
        stop = stop.min(daemon.stop().await?);
    }
    let daemon = site.start().await?;
    warm_start = warm_start.min(first_jwks(&daemon).await?);
    start_cpu = start_cpu.min(daemon.process.cpu()?);
    rest(daemon.process).await?;
    let resident = daemon.process.resident()?;
    eprintln!("  started in {warm_start:?}; idle for {:?}", plan.idle);
    let idle = passed(daemon.process, plan.idle).await?.as_secs_f64() / plan.idle.as_secs_f64();
    let mut signer = daemon.connect("signer").await?;
    let (first, last) = (|_| 0, |_| keysets - 1);
    // Neighbours in the configuration are no neighbours in memory.
    let all = |number: u32| (number as usize).wrapping_mul(7_919) % keysets;
    let mut signed = async |keyset: &dyn Fn(u32) -> usize| sign(&daemon, &mut signer, plan.tokens, keyset).await;
    signed(&first).await?;
    let (first, last, all) = (signed(&first).await?, signed(&last).await?, signed(&all).await?);
    let (mut ops, mut admin) = (daemon.connect("ops").await?, daemon.connect("admin").await?);
    let scraped_bytes = ops.get("/metrics").await?.ok()?.len();
    let scrape = cost(daemon.process, async || ops.get("/metrics").await?.ok()).await?;
    let list = cost(daemon.process, async || admin.get("/v1/keysets").await?.ok()).await?;
    let rotation = rotate(&daemon, &mut admin, keysets, plan.rotations).await?;
    let resident_at_end = daemon.process.resident()?;
    Ok(Row {
        keysets,
        check,
        first_start,
        warm_start,
        start_cpu,
        stop,
        resident,
        idle,
        rotation,
        first,
        last,
        all,
        scrape,
        scraped_bytes,
        list,
        resident_at_end,
    })
}

/// How long the daemon ran when it had answered the first request for a JWKS.
async fn first_jwks(daemon: &Daemon) -> Outcome<Duration> {
    let mut public = daemon.connect("public").await?;
    public.get("/i0/.well-known/jwks.json").await?.ok()?;
    Ok(daemon.age())
}

/// CPU time of the daemon per token.
async fn sign(
    daemon: &Daemon,
    signer: &mut Connection,
    tokens: u32,
    keyset: &dyn Fn(u32) -> usize,
) -> Outcome<Duration> {
    let paths: Vec<String> = (0..tokens).map(|number| name(keyset(number))).collect();
    let spent = cost(daemon.process, async || {
        for keyset in &paths {
            signer.sign(keyset, CLAIMS).await?.ok()?;
        }
        Ok(())
    });
    Ok(spent.await? / tokens)
}

/// CPU time of the daemon per rotation, with the making of the next successor and everything that follows.
async fn rotate(daemon: &Daemon, admin: &mut Connection, keysets: usize, most: usize) -> Outcome<Duration> {
    let rotated: Vec<usize> = (0..keysets).step_by(keysets.div_ceil(most)).collect();
    let spent = cost(daemon.process, async || {
        for keyset in &rotated {
            let body = r#"{"reason":"measured","allow_unpropagated":true}"#;
            admin.post(&format!("/v1/keysets/{}/rotate", name(*keyset)), body).await?.ok()?;
        }
        rest(daemon.process).await
    });
    Ok(spent.await? / u32::try_from(rotated.len())?)
}

/// CPU time of the process during `work`.
async fn cost<T>(process: Process, work: impl AsyncFnOnce() -> Outcome<T>) -> Outcome<Duration> {
    let before = process.cpu()?;
    work().await?;
    Ok(process.cpu()? - before)
}

/// CPU time of the process while this long passes.
async fn passed(process: Process, time: Duration) -> Outcome<Duration> {
    let wait = async || {
        sleep(time).await;
        Ok(())
    };
    cost(process, wait).await
}

/// Waits until a process has nothing left to do.
async fn rest(process: Process) -> Outcome<()> {
    while passed(process, LULL).await? > AT_REST {}
    Ok(())
}

fn name(keyset: usize) -> String {
    format!("keyset-{keyset}")
}

/// As an installation with one issuer per tenant: everything at its default.
fn tables(keysets: usize) -> String {
    let mut tables = "[defaults.rotation]\nverifiers = [\"envoy\"]\n".to_owned();
    for issuer in 0..keysets.div_ceil(KEYSETS_PER_ISSUER) {
        let _ = writeln!(tables, "[issuer.i{issuer}]\nurl = \"https://issuer.example.test/i{issuer}\"");
    }
    for keyset in 0..keysets {
        let issuer = keyset / KEYSETS_PER_ISSUER;
        let _ = writeln!(tables, "[keyset.{}]\nissuer = \"i{issuer}\"\nalgorithm = \"ES256\"", name(keyset));
    }
    tables
}

fn print(rows: &[Row]) {
    let Some(base) = rows.first() else { return };
    let mut head = vec!["".to_owned()];
    head.extend(rows.iter().map(|row| format!("{} keysets", row.keysets)));
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let mut table = Table::new(&head);
    let mut line = |what: &str, figure: &dyn Fn(&Row) -> f64, unit: &str| {
        let mut cells = vec![format!("{what}, {unit}")];
        for row in rows {
            let multiple = if figure(base) == 0.0 { f64::NAN } else { figure(row) / figure(base) };
            cells.push(format!("{:.*} (×{multiple:.1})", decimals(figure(row)), figure(row)));
        }
        table.row(cells);
    };
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    line("`jwksd check`", &|row| ms(row.check), "ms");
    line("first start to first JWKS", &|row| ms(row.first_start), "ms");
    line("warm start to first JWKS", &|row| ms(row.warm_start), "ms");
    line("CPU until then", &|row| ms(row.start_cpu), "ms");
    line("stop", &|row| ms(row.stop), "ms");
    line("RSS after the start", &|row| mb(row.resident), "MB");
    line("RSS at the end", &|row| mb(row.resident_at_end), "MB");
    line("idle CPU", &|row| row.idle * 100.0, "%");
    line("CPU per rotation", &|row| us(row.rotation), "µs");
    line("CPU per token, first keyset", &|row| us(row.first), "µs");
    line("CPU per token, last keyset", &|row| us(row.last), "µs");
    line("CPU per token, every keyset in turn", &|row| us(row.all), "µs");
    line("CPU per scrape", &|row| ms(row.scrape), "ms");
    line("`/metrics`", &|row| row.scraped_bytes as f64 / 1e6, "MB");
    line("CPU per `GET /v1/keysets`", &|row| ms(row.list), "ms");
    table.print();
}

fn decimals(figure: f64) -> usize {
    match figure {
        figure if figure < 1.0 => 3,
        figure if figure < 100.0 => 1,
        _ => 0,
    }
}
