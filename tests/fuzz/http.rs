//! Bytes on a connection of a running daemon: half a head, several requests at once, fields that contradict each other.

use jwksd::simulation::random::Random;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::mutate::mutate;
use crate::support::{Daemon, PATIENCE};
use crate::{SEED, corpus, fresh_seed, keep};

/// So many changed inputs by each of two seeds.
const CHANGES: u64 = 300;
/// No input is longer, in bytes: more than a head may have.
const LONGEST: usize = 40 * 1024;
/// No connection answers more, in bytes.
const LONGEST_ANSWER: usize = 4 * 1024 * 1024;

const TABLES: &str = "[issuer.main]\nurl = \"https://auth.example.com\"\n\n[keyset.default]\nalgorithm = \"ES256\"\nbackend = \"local\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_on_a_connection_are_answered_with_a_failure() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let before = daemon.get("public", "/.well-known/jwks.json").await.text;
    let cases = corpus("http");
    for case in &cases {
        ask(&daemon, &case.bytes).await;
    }
    for seed in [SEED, fresh_seed()] {
        println!("http: JWKSD_FUZZ_SEED={seed}");
        let mut random = Random::new(seed);
        for _ in 0..CHANGES {
            let (case, other) = (&cases[random.index(cases.len())], &cases[random.index(cases.len())]);
            ask(&daemon, &mutate(&case.bytes, &other.bytes, LONGEST, &mut random)).await;
        }
    }
    assert_eq!(daemon.get("public", "/.well-known/jwks.json").await.text, before);
    let panicked: Vec<String> = daemon.logs().into_iter().filter(|line| line.contains("panicked")).collect();
    assert!(panicked.is_empty(), "{panicked:#?}");
}

/// Sends the bytes to each listener that applications and verifiers reach, and nothing after them.
async fn ask(daemon: &Daemon, bytes: &[u8]) {
    for listener in ["public", "signer"] {
        let asked = tokio::time::timeout(PATIENCE, answer(daemon.address(listener), bytes)).await;
        let problem = match asked {
            Ok(answer) => wrong_with(&answer),
            Err(_) => Some(format!("the connection was still open after {PATIENCE:?}")),
        };
        if let Some(problem) = problem {
            let kept = keep("http", bytes);
            panic!("{listener}: {problem}. The input is in {}", kept.display());
        }
    }
}

async fn answer(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut connection = TcpStream::connect(address).await.expect("the daemon listens");
    let (mut reading, mut writing) = connection.split();
    let send = async {
        // The daemon may close before it has read everything.
        let _ = writing.write_all(bytes).await;
        let _ = writing.shutdown().await;
    };
    let mut answer = Vec::new();
    let receive = async {
        // A connection that is reset has said what it had to say.
        let _ = (&mut reading).take(LONGEST_ANSWER as u64 + 1).read_to_end(&mut answer).await;
    };
    tokio::join!(send, receive);
    answer
}

fn wrong_with(answer: &[u8]) -> Option<String> {
    if answer.len() > LONGEST_ANSWER {
        return Some(format!("it is answered with more than {LONGEST_ANSWER} bytes"));
    }
    let text = String::from_utf8_lossy(answer);
    let statuses = text.split("HTTP/1.").skip(1).filter_map(|rest| rest.get(2..5));
    // 505 is what another version of HTTP is told (RFC 9110 §15.6.6).
    let failed = statuses.into_iter().find(|status| status.starts_with('5') && *status != "505");
    failed.map(|status| format!("it is answered with {status}"))
}
