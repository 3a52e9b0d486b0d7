//! One connection: made ready within a limit, watched, closed at once when nobody wants it any more.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::error::Severity;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Connection};

use super::failure::Failure;
use super::settings::Server;
use super::tls::Tls;

/// Unacknowledged bytes and silent peers are given up after about this long, in case nothing above notices.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(10);

/// Session settings by `set_config`, which poolers pass on where they drop options of the start packet. In read committed
/// a compare-and-swap that had to wait for a row compares with what the row became.
const PREPARE: &str = "SELECT set_config('statement_timeout', $1, false), set_config('lock_timeout', $2, false), \
     set_config('idle_in_transaction_session_timeout', $3, false), set_config('client_min_messages', 'warning', false), \
     set_config('default_transaction_isolation', 'read committed', false), \
     set_config('search_path', 'pg_catalog', false), \
     pg_is_in_recovery(), current_setting('server_version_num')::int4";

/// The oldest PostgreSQL whose functions are used: `gen_random_uuid` came with 13.
const OLDEST_SERVER: i32 = 130_000;

/// A connection that is ready, to a server that is no standby.
#[derive(Debug)]
pub(super) struct Session {
    pub client: Client,
    pub opened: Instant,
    driver: JoinHandle<()>,
    warned: Arc<AtomicBool>,
}

impl Session {
    /// `notified` changes with every notification.
    pub(super) async fn open(
        server: &Server,
        tls: &Tls,
        statement_timeout: Duration,
        notified: Option<watch::Sender<u64>>,
    ) -> Result<Self, Failure> {
        let mut config = server.config.clone();
        config.keepalives_idle(NETWORK_TIMEOUT).keepalives_interval(NETWORK_TIMEOUT / 4).keepalives_retries(2);
        config.tcp_user_timeout(NETWORK_TIMEOUT);
        let user = config.get_user().unwrap_or_default().to_owned();
        let (client, connection) = config
            .connect(tls.connector().await?)
            .await
            .map_err(|error| Failure::of_connecting(error, &server.label, &user))?;
        let warned = Arc::new(AtomicBool::new(false));
        let driver = tokio::spawn(drive(connection, warned.clone(), notified));
        let session = Session { client, opened: Instant::now(), driver, warned };
        session.prepare(server, statement_timeout).await?;
        Ok(session)
    }

    async fn prepare(&self, server: &Server, statement_timeout: Duration) -> Result<(), Failure> {
        let millis = |timeout: Duration| timeout.as_millis().to_string();
        // A lock is given up before the statement, so that the message says what it waited for.
        let timeouts =
            [statement_timeout, statement_timeout / 2, statement_timeout + Duration::from_secs(1)].map(millis);
        let [statement, lock, idle] = &timeouts;
        let row = self
            .client
            .query_typed_one(PREPARE, &[(statement, Type::TEXT), (lock, Type::TEXT), (idle, Type::TEXT)])
            .await?;
        if row.try_get(6)? {
            return Err(Failure::new(format!(
                "{} is a standby, which may be behind and takes no writes: the URL must lead to the primary (or name all \
                 servers)",
                server.label
            )));
        }
        let version: i32 = row.try_get(7)?;
        if version < OLDEST_SERVER {
            let (label, major) = (&server.label, version / 10_000);
            return Err(Failure::new(format!("{label} runs PostgreSQL {major}: jwksd needs 13 or newer")));
        }
        Ok(())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Resolves when the connection has ended.
    pub(super) async fn ended(&mut self) {
        let _ = (&mut self.driver).await;
    }

    /// What the server warns of from now on.
    pub(super) fn warnings(&self) -> Warnings {
        self.warned.store(false, Ordering::SeqCst);
        Warnings(self.warned.clone())
    }
}

/// Whether the server warned of something: the answer to a commit does not show it.
pub(super) struct Warnings(Arc<AtomicBool>);

impl Warnings {
    pub(super) fn came(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Not in its own time: behind a cut network an orderly end never comes.
        self.driver.abort();
    }
}

/// Moves bytes until the connection ends. A warning is noted before the answer that it precedes is passed on.
async fn drive<S, T>(mut connection: Connection<S, T>, warned: Arc<AtomicBool>, notified: Option<watch::Sender<u64>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        match message {
            Ok(AsyncMessage::Notification(_)) => {
                notified.iter().for_each(|notified| notified.send_modify(|count| *count += 1));
            }
            Ok(AsyncMessage::Notice(notice)) if notice.parsed_severity() == Some(Severity::Warning) => {
                warned.store(true, Ordering::SeqCst);
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
}
