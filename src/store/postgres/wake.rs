//! One connection that listens for the writes of others.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::failure::Failure;
use super::pool::Pool;
use super::session::Session;
use crate::seal::cipher::random;

/// A silent connection is tried this often, since a cut network does not say so.
const TRY_EVERY: Duration = Duration::from_secs(5);
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
        session.client.batch_execute(&format!("LISTEN jwksd_{}", pool.settings.schema)).await?;
        Ok(session)
    };
    tokio::time::timeout(pool.deadline(), work)
        .await
        .unwrap_or_else(|_| Err(Failure::new("PostgreSQL does not answer")))
}

/// Waits, and tries whether the connection still is one.
async fn is_alive(pool: &Pool, session: &mut Session) -> bool {
    tokio::select! {
        () = session.ended() => false,
        () = tokio::time::sleep(TRY_EVERY) => {
            let answer = tokio::time::timeout(pool.deadline(), session.client.simple_query("")).await;
            answer.is_ok_and(|answer| answer.is_ok())
        }
    }
}

/// Between half of it and all of it: those that lost a server together do not come back together.
pub(super) fn jittered(pause: Duration) -> Duration {
    let [byte] = random::<1>();
    pause / 2 + pause * u32::from(byte) / 510
}
