//! Connections that calls take turns with. One that a call did not bring to a good end, because it failed, ran out of time
//! or was dropped, is closed: what is still under way on it is nobody's business any more.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::failure::Failure;
use super::migrations;
use super::session::Session;
use super::settings::Checked;
use super::tls::Tls;

/// Beyond statement_timeout, in which a call may connect, and hear of the server's own timeout.
const GRACE: Duration = Duration::from_millis(1500);
/// A connection is replaced after this long: names may lead elsewhere by then, and the schema's version is looked at anew.
const LONGEST_LIFE: Duration = Duration::from_secs(30 * 60);

#[derive(Debug)]
pub(super) struct Pool {
    pub settings: Checked,
    tls: Tls,
    idle: Mutex<Vec<Session>>,
    permits: Arc<Semaphore>,
    /// Index of the server that took the last connection.
    primary: AtomicUsize,
    place: OnceLock<Option<String>>,
}

/// A connection on loan.
pub(super) struct Lent<'a> {
    session: Option<Session>,
    pool: &'a Pool,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(settings: Checked) -> Self {
        let permits = Arc::new(Semaphore::new(settings.connections as usize));
        let tls = Tls::new(settings.ca_file.clone());
        let (idle, primary) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
        Pool { settings, tls, idle, permits, primary, place: OnceLock::new() }
    }

    /// How long a call may take, whatever the network does.
    pub(super) fn deadline(&self) -> Duration {
        self.settings.statement_timeout + GRACE
    }

    /// `sql` with the schema's name filled in.
    pub(super) fn sql(&self, sql: &str) -> String {
        sql.replace("{schema}", &migrations::quoted(&self.settings.schema))
    }

    /// What tells this database from others, once a connection was made.
    pub(super) fn place(&self) -> Option<String> {
        self.place.get().cloned().flatten()
    }

    /// A connection to a primary whose schema this release can work with.
    pub(super) async fn lend(&self) -> Result<Lent<'_>, Failure> {
        let closing = |_| Failure::new("the store is closing");
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(closing)?;
        let session = match self.take_idle() {
            Some(session) => session,
            None => self.connect().await?,
        };
        Ok(Lent { session: Some(session), pool: self, _permit: permit })
    }

    async fn connect(&self) -> Result<Session, Failure> {
        let session = self.dial(None).await?;
        migrations::check(&session.client, &self.settings.schema).await?;
        self.note_place(&session).await;
        Ok(session)
    }

    /// A connection to the first primary, whatever its schema.
    pub(super) async fn dial(&self, notified: Option<watch::Sender<u64>>) -> Result<Session, Failure> {
        let servers = &self.settings.servers;
        let first = self.primary.load(Ordering::Relaxed);
        // One that does not answer leaves the others their part of the time.
        let each = self.deadline() / u32::try_from(servers.len()).unwrap_or(u32::MAX).saturating_add(1);
        let mut problems: Vec<Failure> = Vec::new();
        for index in (0..servers.len()).map(|offset| (first + offset) % servers.len()) {
            let server = &servers[index];
            let open = Session::open(server, &self.tls, self.settings.statement_timeout, notified.clone());
            match tokio::time::timeout(each, open).await {
                Ok(Ok(session)) => {
                    self.primary.store(index, Ordering::Relaxed);
                    return Ok(session);
                }
                Ok(Err(failure)) => problems.push(failure),
                Err(_) => problems.push(Failure::new(format!(
                    "{} does not answer (waited {} ms): check the network, its firewalls, and the server",
                    server.label,
                    each.as_millis()
                ))),
            }
        }
        if problems.len() == 1 {
            return Err(problems.remove(0));
        }
        let texts: Vec<String> = problems.iter().map(Failure::text).collect();
        Err(Failure::new(format!("no server of the URL can be used: {}", texts.join("; "))))
    }

    /// The cluster, the database in it and the schema. A physical standby has all of them in common with its primary, so a
    /// failover is no move; a dump that is restored elsewhere is one.
    async fn note_place(&self, session: &Session) {
        if self.place.get().is_some() {
            return;
        }
        let sql = "SELECT system_identifier::text, (SELECT oid::text FROM pg_database WHERE datname = current_database()) \
             FROM pg_control_system()";
        // Where it is not allowed to be known, nothing is noted.
        if let Ok(row) = session.client.query_typed_one(sql, &[]).await
            && let (Ok(system), Ok(database)) = (row.try_get::<_, String>(0), row.try_get::<_, String>(1))
        {
            let _ = self.place.set(Some(format!("postgres:{system}:{database}:{}", self.settings.schema)));
        }
    }

    fn take_idle(&self) -> Option<Session> {
        let mut idle = self.idle();
        idle.retain(|session| !session.is_closed() && session.opened.elapsed() < LONGEST_LIFE);
        idle.pop()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Session>> {
        // Every change is one push, pop or retain: a panic cannot leave it half done.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lent<'_> {
    /// The call came to a good end: the connection serves the next one.
    pub(super) fn give_back(mut self) {
        self.pool.idle().extend(self.session.take());
    }
}

impl Deref for Lent<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.session.as_ref().expect("it is there until it is given back")
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Session {
        self.session.as_mut().expect("it is there until it is given back")
    }
}
