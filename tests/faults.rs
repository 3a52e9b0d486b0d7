//! What goes wrong around the real binary: damaged stores, full and read-only disks, a second daemon, files that change
//! under it, ends under load. Refused or frozen with a message that names the file and the way out, and nothing lost.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::tools::preloaded;
use support::{Daemon, PATIENCE, Process, eventually};
use tokio::time::Instant;

const ISSUER: &str = "[issuer.main]\nurl = \"https://issuer.example.test\"\n";

/// Nothing comes due by itself.
const QUIET: &str = r#"
[issuer.main]
url = "https://issuer.example.test"

[keyset.main]
algorithm = "EdDSA"

[keyset.other]
algorithm = "EdDSA"
"#;

/// A rotation every second and a half.
const RESTLESS: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"

[keyset.main]
algorithm = "EdDSA"
[keyset.main.rotation]
every = "1500ms"
propagation = "1100ms"
[keyset.main.tokens]
max_ttl = "2s"
default_ttl = "2s"
clock_skew = "100ms"
"#;

// ---- A store damaged while nobody was looking

/// What is done to the folder `keyrings` and the file `seal.key`, and what the refusal must name.
struct Damage {
    name: &'static str,
    file: &'static str,
    says: &'static str,
    does: fn(&Path),
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_refused_in_words_that_help_and_left_as_it_is() {
    let mut origin = Daemon::builder().tables(QUIET).start().await;
    let older = fs::read(origin.path("keyrings/main.json")).unwrap();
    let rotate = json!({ "allow_unpropagated": true });
    assert_eq!(origin.admin(Method::POST, "/keysets/main/rotate", Some(rotate)).await.status, 200);
    settled(&origin, "main").await;
    assert!(origin.sigterm().await.success());
    fs::write(origin.path("older"), older).unwrap();

    for damage in DAMAGES {
        let daemon = Daemon::builder().tables(QUIET).prepare();
        copy(&origin.path(""), &daemon.path(""));
        (damage.does)(&daemon.path(""));
        refused(daemon, damage).await;
    }
}

async fn refused(mut daemon: Daemon, damage: &Damage) {
    let before = contents(&daemon.path(""));
    let name = damage.name;
    let Err(status) = daemon.try_start().await else { panic!("{name}: it starts") };
    assert_eq!(status.code(), Some(1), "{name}");
    let logs = daemon.logs();
    let message = logs.iter().filter(|line| !line.starts_with('{')).cloned().collect::<Vec<_>>().join("\n");
    let file = daemon.path("").canonicalize().unwrap().join(damage.file);
    let named = message.contains(file.to_str().unwrap()) || message.contains(&format!(" {} ", damage.file));
    assert!(named, "{name}: names {}: {message}", file.display());
    assert!(message.contains(damage.says), "{name}: says `{}`: {message}", damage.says);
    let way_out = ["docs/restore.md", "run that release or a newer one"].iter().any(|way| message.contains(way));
    assert!(way_out, "{name}: {message}");
    assert_eq!(contents(&daemon.path("")), before, "{name}: something was changed");
}

const RECORD: &str = "keyrings/main.json";
const INSTALLATION: &str = "keyrings/_installation.json";

const DAMAGES: &[Damage] = &[
    Damage {
        name: "a truncated record",
        file: RECORD,
        says: "truncated or damaged",
        does: |folder| change(folder, RECORD, |bytes| bytes.truncate(bytes.len() / 2)),
    },
    Damage {
        name: "an empty record",
        file: RECORD,
        says: "truncated or damaged",
        does: |folder| change(folder, RECORD, Vec::clear),
    },
    Damage {
        name: "a flipped bit",
        file: RECORD,
        says: "changed or forged",
        does: |folder| {
            change(folder, RECORD, |bytes| {
                let at = position(bytes, "\"generation\": ") + "\"generation\": ".len();
                bytes[at] ^= 1;
            });
        },
    },
    Damage {
        name: "a forged public key",
        file: RECORD,
        says: "changed or forged",
        does: |folder| {
            change(folder, RECORD, |bytes| {
                let at = position(bytes, "\"x\": \"") + "\"x\": \"".len();
                bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            });
        },
    },
    Damage {
        name: "swapped records",
        file: RECORD,
        says: "files were swapped",
        does: |folder| {
            let (main, other) = (folder.join(RECORD), folder.join("keyrings/other.json"));
            fs::rename(&main, folder.join("aside")).unwrap();
            fs::rename(&other, &main).unwrap();
            fs::rename(folder.join("aside"), &other).unwrap();
        },
    },
    Damage {
        name: "an older record put back",
        file: RECORD,
        says: "an old copy was put back",
        does: |folder| {
            fs::copy(folder.join("older"), folder.join(RECORD)).unwrap();
        },
    },
    Damage {
        name: "a deleted record",
        file: RECORD,
        says: "is missing",
        does: |folder| fs::remove_file(folder.join(RECORD)).unwrap(),
    },
    Damage {
        name: "a deleted record and its mark",
        file: RECORD,
        says: "is missing",
        does: |folder| {
            fs::remove_file(folder.join(RECORD)).unwrap();
            fs::remove_file(folder.join("keyrings/_seen/main.json")).unwrap();
        },
    },
    Damage {
        name: "a damaged seen mark",
        file: "keyrings/_seen/main.json",
        says: "truncated or damaged",
        does: |folder| change(folder, "keyrings/_seen/main.json", |bytes| bytes.truncate(9)),
    },
    Damage {
        name: "a record of a newer release",
        file: RECORD,
        says: "has format 2",
        does: |folder| {
            change(folder, RECORD, |bytes| {
                let at = position(bytes, "\"format\": 1") + "\"format\": ".len();
                bytes[at] = b'2';
            });
        },
    },
    Damage {
        name: "a damaged installation",
        file: INSTALLATION,
        says: "truncated or damaged",
        does: |folder| change(folder, INSTALLATION, |bytes| bytes.truncate(bytes.len() - 20)),
    },
    Damage {
        name: "a deleted installation",
        file: INSTALLATION,
        says: "the installation's record was lost",
        does: |folder| fs::remove_file(folder.join(INSTALLATION)).unwrap(),
    },
    Damage {
        name: "another seal key",
        file: INSTALLATION,
        says: "was sealed with the key",
        does: |folder| {
            change(folder, "seal.key", |bytes| {
                let at = bytes.len() - 10;
                bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            });
        },
    },
    Damage {
        name: "no seal key",
        file: INSTALLATION,
        says: "restore the seal key file",
        does: |folder| fs::remove_file(folder.join("seal.key")).unwrap(),
    },
    Damage {
        name: "a damaged seal key",
        file: "seal.key",
        says: "does not hold a seal key",
        does: |folder| change(folder, "seal.key", |bytes| bytes.truncate(20)),
    },
    Damage {
        name: "an empty store beside a seal key",
        file: INSTALLATION,
        says: "the store was lost",
        does: |folder| {
            for file in fs::read_dir(folder.join("keyrings")).unwrap() {
                let path = file.unwrap().path();
                if path.is_dir() {
                    for mark in fs::read_dir(&path).unwrap() {
                        fs::remove_file(mark.unwrap().path()).unwrap();
                    }
                } else {
                    fs::remove_file(path).unwrap();
                }
            }
        },
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn a_record_changed_behind_a_running_daemon_freezes_its_keyset_only() {
    let daemon = Daemon::builder().tables(QUIET).start().await;
    settled(&daemon, "main").await;
    let published = kids(&daemon).await;
    let record = daemon.path(RECORD);
    let mut forged = fs::read(&record).unwrap();
    let at = position(&forged, "\"x\": \"") + "\"x\": \"".len();
    forged[at] ^= 1;
    fs::write(&record, &forged).unwrap();

    let rotate = || Some(json!({ "allow_unpropagated": true }));
    daemon.admin(Method::POST, "/keysets/main/rotate", rotate()).await;
    let answer = daemon.admin(Method::POST, "/keysets/main/rotate", rotate()).await;
    assert_eq!(answer.status, 409, "{}", answer.text);
    assert_eq!(answer.json()["type"], "urn:jwksd:problem:keyset-frozen");
    assert!(answer.text.contains("main.json") && answer.text.contains("docs/restore.md"), "{}", answer.text);
    let line = daemon.log_line("the freeze", |line| line.message().contains("the keyset is frozen")).await;
    assert!(line.field("error").contains("main.json"), "{line:?}");
    assert!(alarms(&daemon, "main").await.contains("\"frozen\""));
    assert_eq!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "frozen")]), Some(1.0));

    assert_eq!(fs::read(&record).unwrap(), forged, "nothing is written over it");
    assert_eq!(kids(&daemon).await, published);
    assert!(published.contains(&sign(&daemon, "main").await));
    assert_eq!(alarms(&daemon, "other").await, "[]");
    let answer = daemon.admin(Method::POST, "/keysets/other/rotate", rotate()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

// ---- Disks

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_nothing_but_time() {
    survives(
        |disk| fs::write(disk.0.join("filler"), vec![0; 8 << 20]).unwrap_err().kind(),
        |disk| fs::remove_file(disk.0.join("filler")).unwrap(),
        std::io::ErrorKind::StorageFull,
        "the disk is full",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_disk_costs_nothing_but_time() {
    survives(
        |disk| {
            disk.remount("ro");
            fs::write(disk.0.join("filler"), "").unwrap_err().kind()
        },
        |disk| disk.remount("rw"),
        std::io::ErrorKind::ReadOnlyFilesystem,
        "the file system is read-only",
    )
    .await;
}

async fn survives(
    breaks: fn(&Disk) -> std::io::ErrorKind,
    heals: fn(&Disk),
    kind: std::io::ErrorKind,
    says: &'static str,
) {
    let mut daemon = Daemon::builder().tables(RESTLESS).prepare();
    let disk = Disk::mount(&daemon.path("keyrings"));
    daemon.start_process().await;
    daemon.ready().await;
    assert_eq!(breaks(&disk), kind);
    let line = daemon.log_line("the failing step", |line| line.message().contains("could not be stored")).await;
    assert!(line.field("error").contains(says) && line.field("error").contains("main.json"), "{line:?}");
    assert!(alarms(&daemon, "main").await.contains("store_unavailable"));
    let record = fs::read(daemon.path(RECORD)).unwrap();
    let failures =
        async || daemon.metrics().await.sum("jwksd_rotation_failures_total", &[("reason", "store")]).unwrap();
    let first = failures().await;
    eventually("a retry", PATIENCE, async || (failures().await > first).then_some(())).await;
    let answer = daemon.admin(Method::PUT, "/keysets/main/hold", Some(json!({ "reason": "no space" }))).await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    assert_eq!(answer.json()["type"], "urn:jwksd:problem:store-unavailable");
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(fs::read(daemon.path(RECORD)).unwrap(), record, "the old file is intact");
    let active = keyset(&daemon, "main").await["active_kid"].as_str().unwrap().to_owned();
    assert_eq!(sign(&daemon, "main").await, active);
    assert!(kids(&daemon).await.contains(&active));
    assert_eq!(daemon.get("ops", "/readyz").await.status, 200);

    heals(&disk);
    eventually("the alarms to end", PATIENCE, async || {
        let alarms = alarms(&daemon, "main").await;
        (!alarms.contains("store_unavailable") && !alarms.contains("heartbeat_failed")).then_some(())
    })
    .await;
    eventually("a rotation", PATIENCE, async || (sign(&daemon, "main").await != active).then_some(())).await;
    daemon.restart().await;
    assert!(kids(&daemon).await.contains(&sign(&daemon, "main").await));
    daemon.kill9().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_holds_the_sealed_private_half_after_its_destruction() {
    let daemon = Daemon::builder().tables(QUIET).start().await;
    settled(&daemon, "main").await;
    let record: Value = serde_json::from_slice(&fs::read(daemon.path(RECORD)).unwrap()).unwrap();
    let first = record["body"]["keys"].as_array().unwrap().iter().find(|key| key["state"] == "active").unwrap();
    let (kid, handle) = (first["kid"].as_str().unwrap(), first["private"]["handle"].as_str().unwrap());
    let holding = || {
        let holds = |bytes: &[u8]| bytes.windows(handle.len()).any(|window| window == handle.as_bytes());
        contents(&daemon.path("")).into_iter().filter(move |(_, bytes)| holds(bytes)).map(|(path, _)| path)
    };
    assert_eq!(holding().collect::<Vec<_>>(), [daemon.path(RECORD)]);
    let path = format!("/keysets/main/keys/{kid}/revoke");
    assert_eq!(daemon.admin(Method::POST, &path, Some(json!({ "reason": "leaked" }))).await.status, 200);
    eventually("its destruction", PATIENCE, async || {
        daemon.admin(Method::GET, "/audit", None).await.text.contains("destroyed").then_some(())
    })
    .await;
    assert_eq!(holding().collect::<Vec<_>>(), [] as [PathBuf; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_repeats_is_logged_now_and_then() {
    let daemon = Daemon::builder().tables(QUIET).start().await;
    settled(&daemon, "other").await;
    let count = |what: &str| daemon.logs().iter().filter(|line| line.contains(what)).count();
    assert_eq!(daemon.admin(Method::POST, "/keysets/other/drain", None).await.status, 200);
    for _ in 0..20 {
        assert_eq!(daemon.get("ops", "/readyz/sign").await.status, 503);
    }
    assert_eq!((count("not ready to sign"), count("not-ready")), (1, 0));
    assert_eq!(daemon.admin(Method::DELETE, "/keysets/other/drain", None).await.status, 200);
    assert_eq!(daemon.get("ops", "/readyz/sign").await.status, 200);
    daemon.log_line("ready", |line| line.message() == "ready to sign again").await;
}

// ---- Processes

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_one_store_is_refused_and_told_who_holds_it() {
    let daemon = Daemon::builder().tables(QUIET).start().await;
    for name in ["main", "other"] {
        settled(&daemon, name).await;
    }
    let before = contents(&daemon.path("keyrings"));
    // On free ports, so that only the store is contested.
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(["serve", "--config", "jwksd.toml"]).current_dir(daemon.path(""));
    for listener in ["PUBLIC", "SIGNER", "ADMIN", "OPS"] {
        command.env(format!("JWKSD__{listener}__LISTEN"), "127.0.0.1:0");
    }
    let mut second = Process::start(command);
    second.output.ended().await.unwrap();
    assert_eq!(second.child.wait().unwrap().code(), Some(1));
    let message = second.output.lines().join("\n");
    let folder = daemon.path("keyrings").canonicalize().unwrap();
    for part in [folder.to_str().unwrap(), &format!("process {}", daemon.pid()), "one daemon at a time"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(contents(&daemon.path("keyrings")), before);
    sign(&daemon, "main").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_loses_no_request_that_was_taken() {
    // One line per signature: what was taken, as the daemon sees it.
    let mut daemon = Daemon::builder().env("JWKSD__LOG__SIGNATURES", "true").tables(QUIET).start().await;
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
    let url = daemon.url("signer", "/v1/keysets/main/sign");
    let (answered, stopping) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let load: Vec<_> = (0..16)
        .map(|_| {
            let (client, url, answered, stopping) = (client.clone(), url.clone(), answered.clone(), stopping.clone());
            tokio::spawn(async move {
                loop {
                    let request = client.post(&url).json(&json!({ "claims": { "sub": "s", "aud": "a" } }));
                    match request.send().await {
                        Ok(response) => {
                            assert_eq!(response.status().as_u16(), 200);
                            response.text().await.expect("an answer that began ends");
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        // Nobody listens any more, or the connection closed before the request was taken.
                        Err(error) => {
                            assert!(stopping.load(Ordering::Relaxed), "{error:?}");
                            return;
                        }
                    }
                }
            })
        })
        .collect();
    eventually("load", PATIENCE, async || (answered.load(Ordering::Relaxed) > 200).then_some(())).await;
    stopping.store(true, Ordering::Relaxed);
    let asked = Instant::now();
    let status = daemon.sigterm().await;
    assert_eq!(status.code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    for worker in load {
        worker.await.unwrap();
    }
    let signed = daemon.logs().iter().filter(|line| line.contains("\"jti\"")).count() as u64;
    assert_eq!(signed, answered.load(Ordering::Relaxed), "a request that was taken is answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_delay_serves_on_unready() {
    let mut daemon = Daemon::builder().env("JWKSD__SHUTDOWN_DELAY", "2s").tables(QUIET).start().await;
    let asked = Instant::now();
    daemon.signal(Signal::TERM);
    eventually("/readyz to be 503", PATIENCE, async || {
        let answer = daemon.get("ops", "/readyz").await;
        (answer.status == 503 && answer.text.contains("stopping")).then_some(())
    })
    .await;
    assert_eq!(daemon.get("ops", "/livez").await.status, 200);
    let active = sign(&daemon, "main").await;
    assert!(kids(&daemon).await.contains(&active));
    assert_eq!(daemon.ended().await.code(), Some(0));
    let took = asked.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{took:?}");
}

// ---- Files that change

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_broken_while_running_keeps_what_runs() {
    let daemon = Daemon::builder().tables(QUIET).start().await;
    let good = fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    let reloaded = async || {
        daemon.metrics().await.sum("jwksd_config_last_reload_successful", &[]).expect("it exists from the start")
    };
    assert_eq!(reloaded().await, 1.0);
    let broken = [
        good.replace("[keyset.other]", "[keyset.other"),
        good.clone() + "[keyset.third]\nalgorithm = \"HS256\"\n",
        good.clone() + "[keyset.third]\nalgorithm = \"EdDSA\"\n[keyset.third.rotation]\npropagation = \"1s\"\n",
        good.replace("https://issuer.example.test", "https://else.example.test"),
    ];
    for (number, text) in broken.iter().enumerate() {
        fs::write(daemon.path("jwksd.toml"), text).unwrap();
        daemon.signal(Signal::HUP);
        eventually(&format!("reload {number} to fail"), PATIENCE, async || (reloaded().await == 0.0).then_some(()))
            .await;
        assert_eq!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "config_invalid")]), Some(1.0));
        assert!(kids(&daemon).await.contains(&sign(&daemon, "main").await));
        let answer = daemon.admin(Method::POST, "/reload", None).await;
        assert_eq!(answer.status, 422, "{}", answer.text);
        assert_eq!(daemon.sign_answer("third", json!({ "claims": {} })).await.status, 404);
        // No signal this time: it notices by itself.
        fs::write(daemon.path("jwksd.toml"), &good).unwrap();
        eventually("the good one to be taken", PATIENCE, async || (reloaded().await == 1.0).then_some(())).await;
    }
    assert_eq!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "config_invalid")]), Some(0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_tokens_and_certificates_swapped_by_symlink_are_taken_up() {
    // As Kubernetes mounts them: ..data points to a folder, and one rename exchanges all of it.
    let mut daemon = Daemon::builder().tables(QUIET).prepare();
    daemon.add_tables(
        "[public.tls]\ncert_file = \"mounted/tls.crt\"\nkey_file = \"mounted/tls.key\"\n\
         [admin.token.second]\nrole = \"viewer\"\nfile = \"mounted/token\"\n",
    );
    let (old, new) = (Certificate::new(), Certificate::new());
    let fill = |folder: &str, certificate: &Certificate, token: &str| {
        fs::create_dir_all(daemon.path(folder)).unwrap();
        for (file, text) in [("tls.crt", &certificate.pem), ("tls.key", &certificate.key), ("token", &token.repeat(48))]
        {
            fs::write(daemon.path(folder).join(file), text).unwrap();
            fs::set_permissions(daemon.path(folder).join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
    };
    fill("one", &old, "1");
    fill("two", &new, "2");
    std::os::unix::fs::symlink("one", daemon.path("..data")).unwrap();
    std::os::unix::fs::symlink("..data", daemon.path("mounted")).unwrap();
    daemon.start_process().await;
    daemon.ready().await;

    let port = daemon.address("public").rsplit(':').next().unwrap().to_owned();
    let jwks = async |certificate: &Certificate| {
        let url = format!("https://localhost:{port}/.well-known/jwks.json");
        certificate.client().get(url).send().await.is_ok_and(|response| response.status() == 200)
    };
    let accepted = async |token: &str| {
        let request = reqwest::Client::builder().no_proxy().build().unwrap().get(daemon.url("admin", "/v1/keysets"));
        request.bearer_auth(token.repeat(48)).send().await.unwrap().status() == 200
    };
    assert!(jwks(&old).await && !jwks(&new).await && accepted("1").await && !accepted("2").await);
    std::os::unix::fs::symlink("two", daemon.path("..new")).unwrap();
    fs::rename(daemon.path("..new"), daemon.path("..data")).unwrap();
    eventually("the new files to be taken", PATIENCE, async || (jwks(&new).await && accepted("2").await).then_some(()))
        .await;
    assert!(!jwks(&old).await && !accepted("1").await);

    // The configuration itself, swapped the same way.
    let config = fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    fs::write(daemon.path("two/jwksd.toml"), config + "[keyset.main.tokens]\nmax_ttl = \"20m\"\n").unwrap();
    std::os::unix::fs::symlink("two/jwksd.toml", daemon.path("..config")).unwrap();
    fs::rename(daemon.path("..config"), daemon.path("jwksd.toml")).unwrap();
    eventually("the longer max_ttl", PATIENCE, async || {
        (keyset(&daemon, "main").await["policy"]["max_ttl_seconds"] == 1200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyset_gone_from_the_configuration_stays_published_until_drained() {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    settled(&daemon, "other").await;
    let published = kids(&daemon).await;
    let config = fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    let without = config.split("[keyset.other]").next().unwrap();
    fs::write(daemon.path("jwksd.toml"), without).unwrap();
    daemon.signal(Signal::HUP);
    eventually("the alarm", PATIENCE, async || alarms(&daemon, "other").await.contains("absent").then_some(())).await;
    assert_eq!(kids(&daemon).await, published);
    assert!(published.contains(&sign(&daemon, "other").await), "applications need not know yet");
    daemon.set_tables(QUIET.split("[keyset.other]").next().unwrap());
    daemon.restart().await;
    assert!(alarms(&daemon, "other").await.contains("absent"));
    assert_eq!(kids(&daemon).await, published);

    let active = keyset(&daemon, "other").await["active_kid"].as_str().unwrap().to_owned();
    let answer = daemon.admin(Method::POST, "/keysets/other/drain", Some(json!({ "reason": "moved" }))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(!alarms(&daemon, "other").await.contains("absent"));
    let left = kids(&daemon).await;
    assert!(left.contains(&active), "its last tokens live");
    let claims = || json!({ "claims": { "sub": "s", "aud": "a" } });
    assert_eq!(daemon.sign_answer("other", claims()).await.status, 409);
    assert!(left.contains(&sign(&daemon, "main").await));
    assert_eq!(daemon.get("ops", "/readyz/sign").await.status, 200, "nobody wants it to sign");

    // Put back: everything says that it does not sign, until an operator wants it to.
    fs::write(daemon.path("jwksd.toml"), &config).unwrap();
    let reloaded = daemon.admin(Method::POST, "/reload", None).await.json();
    assert!(reloaded["warnings"].to_string().contains("keyset.other: the keyset is configured, but was drained"));
    daemon.set_tables(QUIET);
    daemon.restart().await;
    daemon
        .log_line("a warning", |line| line.message().contains("was drained") && line.field("keyset") == "other")
        .await;
    let shown = keyset(&daemon, "other").await;
    assert_eq!((&shown["health"], &shown["alarms"]), (&json!("failing"), &json!(["drained"])), "{shown}");
    let unready = daemon.get("ops", "/readyz/sign").await;
    assert_eq!(unready.json()["missing"], json!(["keyset other is drained, but configured"]));
    let refused = daemon.sign_answer("other", claims()).await;
    assert_eq!(refused.json()["type"], "urn:jwksd:problem:keyset-drained");
    assert_eq!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "drained")]), Some(1.0));
    let undone = daemon.admin(Method::DELETE, "/keysets/other/drain", None).await.json();
    assert_eq!(undone["changes"][0]["kid"], active.as_str(), "verifiers still have its last key: {undone}");
    assert_eq!(sign(&daemon, "other").await, active);
    assert_eq!(daemon.get("ops", "/readyz/sign").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_no_longer_fits_starts_degraded() {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    settled(&daemon, "main").await;
    let published = kids(&daemon).await;
    let unfit = format!(
        "{ISSUER}max_age = \"2d\"\n[keyset.main]\nalgorithm = \"EdDSA\"\n[keyset.other]\nalgorithm = \"EdDSA\"\n"
    );
    daemon.set_tables(&unfit);
    daemon.restart().await;
    let main = keyset(&daemon, "main").await;
    assert_eq!(main["health"], "degraded", "{main}");
    assert!(main["alarms"].to_string().contains("degraded"), "{main}");
    assert_eq!(main["policy"]["propagation_seconds"], 86_400, "the stored policy goes on: {main}");
    assert!(main["next_rotation"]["blocked_by"].as_array().unwrap().contains(&json!("degraded")), "{main}");
    assert_eq!(kids(&daemon).await, published);
    assert!(
        daemon.get("public", "/.well-known/jwks.json").await.headers["cache-control"]
            .to_str()
            .unwrap()
            .contains("max-age=300")
    );
    sign(&daemon, "main").await;
    assert!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "degraded")]).unwrap() >= 1.0);
    daemon.set_tables(&format!("{unfit}[keyset.third]\nalgorithm = \"EdDSA\"\n"));
    assert!(daemon.sigterm().await.success());
    let status = daemon.try_start().await.expect_err("a new keyset that does not fit is refused");
    assert_eq!(status.code(), Some(2), "another configuration would start");
    let told = daemon.logs().join("\n");
    assert!(told.contains("keyset.third.rotation.propagation"), "with its path and the arithmetic: {told}");
    daemon.set_tables(QUIET);
    daemon.restart().await;
    assert_eq!(keyset(&daemon, "main").await["health"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_fails_is_an_alarm_that_ends_by_itself() {
    let mut daemon = Daemon::builder().tables(RESTLESS).prepare();
    let fails = daemon.path("syncs-fail");
    daemon.set_env("LD_PRELOAD", Some(preloaded("crashes/shim.c").to_str().unwrap()));
    daemon.set_env("FAULTS_SYNC", Some(fails.to_str().unwrap()));
    daemon.start_process().await;
    daemon.ready().await;
    fs::write(&fails, "").unwrap();
    eventually("the alarm", PATIENCE, async || {
        alarms(&daemon, "main").await.contains("store_unavailable").then_some(())
    })
    .await;
    let active = sign(&daemon, "main").await;
    fs::remove_file(&fails).unwrap();
    eventually("a rotation", PATIENCE, async || (sign(&daemon, "main").await != active).then_some(())).await;
    assert!(!alarms(&daemon, "main").await.contains("frozen"));
}

// ---- Words of these tests

/// A small file system of its own, as root; unmounted on drop.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: &Path) -> Self {
        fs::create_dir(path).unwrap();
        let owner = fs::metadata(path).unwrap();
        let options = format!("size=1m,mode=700,uid={},gid={}", owner.uid(), owner.gid());
        as_root("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", path.to_str().unwrap()]);
        Disk(path.to_owned())
    }

    fn remount(&self, mode: &str) {
        as_root("mount", &["-o", &format!("remount,{mode}"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, since the daemon still has it open.
        as_root("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn as_root(program: &str, arguments: &[&str]) {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", program]);
        sudo
    };
    assert!(command.args(arguments).status().unwrap().success(), "{command:?}");
}

/// A self-signed certificate for localhost.
struct Certificate {
    pem: String,
    key: String,
}

impl Certificate {
    fn new() -> Self {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        Certificate { pem: cert.pem(), key: signing_key.serialize_pem() }
    }

    fn client(&self) -> reqwest::Client {
        let root = reqwest::Certificate::from_pem(self.pem.as_bytes()).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([root]).build().unwrap()
    }
}

async fn sign(daemon: &Daemon, keyset: &str) -> String {
    daemon.sign(keyset, json!({ "claims": { "sub": "s", "aud": "a" } })).await.kid
}

async fn keyset(daemon: &Daemon, name: &str) -> Value {
    daemon.admin(Method::GET, &format!("/keysets/{name}"), None).await.json()
}

async fn alarms(daemon: &Daemon, name: &str) -> String {
    keyset(daemon, name).await["alarms"].to_string()
}

async fn kids(daemon: &Daemon) -> BTreeSet<String> {
    let jwks = daemon.get("public", "/.well-known/jwks.json").await.json();
    jwks["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

/// Waits until a keyset's record says that two successors are published and what ended is destroyed.
async fn settled(daemon: &Daemon, name: &str) {
    eventually(&format!("{name} to settle"), PATIENCE, async || {
        let record = fs::read(daemon.path(&format!("keyrings/{name}.json"))).ok()?;
        let record: Value = serde_json::from_slice(&record).unwrap();
        // The mark of what was seen is written after the record.
        let seen = fs::read(daemon.path(&format!("keyrings/_seen/{name}.json"))).ok()?;
        let seen: Value = serde_json::from_slice(&seen).unwrap();
        if seen["generation"] != record["generation"] {
            return None;
        }
        let keys = record["body"]["keys"].as_array().unwrap();
        let waiting = keys.iter().filter(|key| key["state"] == "pending" && !key["published_at"].is_null());
        let ended = keys.iter().filter(|key| key["state"] == "retired" || key["state"] == "revoked");
        let retiring = keys.iter().filter(|key| key["state"] == "retiring");
        let done = ended.clone().all(|key| key["private"].is_null())
            && retiring.clone().all(|key| !key["stopped_at"].is_null());
        (waiting.count() == 2 && done).then_some(())
    })
    .await;
}

fn change(folder: &Path, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(folder.join(file)).unwrap();
    edit(&mut bytes);
    fs::write(folder.join(file), bytes).unwrap();
}

fn position(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap_or_else(|| panic!("no {text}"))
}

/// Every file below, but for the configuration, which each start writes, and the lock with its holder's number.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else if !["_lock", "jwksd.toml", "_alive.json"].contains(&path.file_name().unwrap().to_str().unwrap()) {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
