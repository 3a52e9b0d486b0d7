//! A manager and a signer as two real processes: the signer has neither the store nor the right to write, signs and
//! publishes what the manager decides, and goes on while the manager is away.

mod support;

use serde_json::{Value, json};

use support::ports::ReservedPort;
use support::{Daemon, PATIENCE, eventually};

const JWKS: &str = "/.well-known/jwks.json";
const TOKEN: &str = "a-token-of-signers-0123456789-0123456789-012345";
const KEYSETS: &str = "[issuer.main]\nurl = \"https://issuer.example.test\"\nmax_age = \"1s\"\n\n\
                       [keyset.default]\nalgorithm = \"ES256\"\n";

fn wanted() -> Value {
    json!({ "claims": { "sub": "alice", "aud": "https://api.example.test" } })
}

struct Pair {
    manager: Daemon,
    signer: Daemon,
    _port: ReservedPort,
}

impl Pair {
    async fn start() -> Self {
        let port = ReservedPort::any();
        let replication = format!(
            "[replication]\nlisten = \"127.0.0.1:{}\"\n[replication.client.edge]\ntoken_file = \"edge.token\"\n",
            port.number()
        );
        let mut manager = Daemon::builder().tables(KEYSETS).tables(&replication).prepare();
        std::fs::write(manager.path("edge.token"), TOKEN).expect("the folder is writable");
        manager.restart().await;
        // The records are sealed: without the seal the token alone gives no key.
        let seal = format!("kind = \"file\"\npath = \"{}\"", manager.path("seal.key").display());
        let store = format!(
            "kind = \"upstream\"\nurls = [\"http://127.0.0.1:{}\"]\ntoken_file = \"{}\"\nstate_path = \"state\"",
            port.number(),
            manager.path("edge.token").display()
        );
        let signer = Daemon::builder().seal(&seal).signer_of(&store).start().await;
        Pair { manager, signer, _port: port }
    }

    async fn published(&self) -> (Value, Value) {
        (self.manager.get("public", JWKS).await.json(), self.signer.get("public", JWKS).await.json())
    }

    async fn signs_with(&self, kid: &str) {
        eventually("the signer to use the manager's key", PATIENCE, async || {
            let answer = self.signer.sign_answer("default", wanted()).await;
            (answer.status == 200 && answer.json()["kid"] == kid).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_signer_without_a_store_follows_its_manager_and_outlives_it() {
    let mut pair = Pair::start().await;
    let first = pair.manager.sign("default", wanted()).await.kid;
    pair.signs_with(&first).await;
    let (manager, signer) = pair.published().await;
    assert_eq!(manager, signer);

    let rotation = json!({ "reason": "a test", "allow_unpropagated": true });
    let rotated = pair.manager.admin(reqwest::Method::POST, "/keysets/default/rotate", Some(rotation)).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    let second = pair.manager.sign("default", wanted()).await.kid;
    assert_ne!(first, second);
    pair.signs_with(&second).await;
    eventually("both to publish the same", PATIENCE, async || {
        let (manager, signer) = pair.published().await;
        (manager == signer).then_some(())
    })
    .await;

    pair.manager.sigterm().await;
    let last = pair.signer.get("public", JWKS).await.json();
    pair.signer.sign("default", wanted()).await;
    pair.signer.sigterm().await;
    pair.signer.start_process().await;
    eventually("the copies to be published", PATIENCE, async || {
        let answer = pair.signer.get("public", JWKS).await;
        (answer.status == 200 && answer.json() == last).then_some(())
    })
    .await;
    pair.manager.restart().await;
    pair.signs_with(&second).await;
}
