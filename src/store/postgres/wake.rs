//! One connection that listens for the writes of others.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::types::{ToSql, Type};

use super::failure::Failure;
use super::pool::Pool;
use super::session::Session;
use crate::random;

/// A silent connection is tried this often, since a cut network does not say so.
const TRY_EVERY: Duration = Duration::from_secs(5);
const LISTENS: &str = "SELECT true FROM pg_listening_channels() AS channel WHERE channel = $1";
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a waiting call looks at.
#[derive(Debug)]
pub(super) struct Wake {
    /// Changes with every notification, and when listening begins or ends.
    changes: watch::Receiver<u64>,
    /// Whether notifications can be relied on.
    listening: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Wake {
    pub(super) fn start(pool: Arc<Pool>) -> Self {
        let (changed, changes) = watch::channel(0);
        let (heard, listening) = watch::channel(false);
        Wake { changes, listening, task: tokio::spawn(listen(pool, changed, heard)) }
    }

    /// Of changes from now on.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        let mut changes = self.changes.clone();
        changes.mark_unchanged();
        changes
    }

    pub(super) fn is_listening(&self) -> bool {
        *self.listening.borrow()
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(pool: Arc<Pool>, changed: watch::Sender<u64>, heard: watch::Sender<bool>) {
    let mut pause = SHORTEST_PAUSE;
    loop {
        if let Ok(mut session) = begin(&pool, &changed).await {
            pause = SHORTEST_PAUSE;
            // What was written before is not told: whoever waits looks again.
            heard.send_replace(true);
            changed.send_modify(|count| *count += 1);
            while is_alive(&pool, &mut session).await {}
            heard.send_replace(false);
            changed.send_modify(|count| *count += 1);
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn begin(pool: &Pool, changed: &watch::Sender<u64>) -> Result<Session, Failure> {
    let work = async {
        let session = pool.dial(Some(changed.clone())).await?;
        session.client.batch_execute(&format!("LISTEN {}", channel(pool))).await?;
        Ok(session)
    };
    tokio::time::timeout(pool.deadline(), work)
        .await
        .unwrap_or_else(|_| Err(Failure::new("PostgreSQL does not answer")))
}

/// As the trigger makes it.
fn channel(pool: &Pool) -> String {
    format!("jwksd_{}", pool.settings.schema)
}

/// Waits, and tries whether the connection still is one.
async fn is_alive(pool: &Pool, session: &mut Session) -> bool {
    tokio::select! {
        () = session.ended() => false,
        () = tokio::time::sleep(TRY_EVERY) => {
            let channel = channel(pool);
            let values: [(&(dyn ToSql + Sync), Type); 1] = [(&channel, Type::TEXT)];
            let ask = session.client.query_typed_opt(LISTENS, &values);
            // Behind a pooler that lends servers by transaction, another session may answer: then polling is all there is.
            matches!(tokio::time::timeout(pool.deadline(), ask).await, Ok(Ok(Some(_))))
        }
    }
}

/// Between half of it and all of it: those that lost a server together do not come back together.
pub(super) fn jittered(pause: Duration) -> Duration {
    random::between(pause / 2, pause)
}
