//! Which replicas there are, by the database's clock.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;

use super::failure::Failure;
use super::pool::Pool;
use crate::keyring::name::Name;
use crate::keyring::time::Span;
use crate::store::shared::{Replica, Report};

/// More are not kept: a fleet that starts over and over makes a new name each time.
const MOST_REPLICAS: i64 = 10_000;

/// In passing removes who was silent for a day, and the longest silent where there are too many. Whoever was lost with a
/// crash of the database reports again soon: this write need not be waited for.
const REPORT: &str = "WITH told AS (
        SELECT * FROM jsonb_to_recordset($1::text::jsonb)
            AS told(replica text, role text, version text, publishes boolean, generations jsonb, resumed jsonb)
    ), removed AS (
        DELETE FROM {schema}.replicas WHERE replica NOT IN (SELECT replica FROM told) AND (
            reported_at < clock_timestamp() - interval '1 day'
            OR replica IN (SELECT replica FROM {schema}.replicas ORDER BY reported_at DESC, replica OFFSET $2))
    ), reported AS (
        INSERT INTO {schema}.replicas (replica, role, version, publishes, generations, resumed, reported_at)
        SELECT replica, role, version, publishes, generations, resumed, clock_timestamp() FROM told
        ON CONFLICT (replica) DO UPDATE SET role = excluded.role, version = excluded.version,
            publishes = excluded.publishes, generations = excluded.generations, resumed = excluded.resumed,
            reported_at = excluded.reported_at
    )
    SELECT set_config('synchronous_commit', 'off', true)";

const REPLICAS: &str = "SELECT replica, role, version, publishes, generations::text, resumed::text, \
     (extract(epoch FROM clock_timestamp() - reported_at) * 1000)::bigint FROM {schema}.replicas \
     WHERE reported_at >= clock_timestamp() - $1::bigint * interval '1 millisecond' \
     ORDER BY reported_at DESC, replica LIMIT $2";

/// In a replica's generations, with 0: it tells no receivers of notices. No keyset can be named so, and a release that does
/// not know it passes it over.
const TELLS: &str = "_tells";

/// As [`TELLS`]: it stopped in good order.
const STOPPED: &str = "_stopped";

const FORGET: &str = "DELETE FROM {schema}.replicas WHERE replica = ANY($1)";

pub(super) async fn report(pool: &Pool, replicas: &[Report]) -> Result<(), Failure> {
    // By name, since one statement cannot change a row twice.
    let rows: BTreeMap<&str, serde_json::Value> = replicas
        .iter()
        .map(|report| {
            let Report { replica, role, version, publishes, tells, stopped, generations, resumed } = report;
            let generations: BTreeMap<&str, u64> = generations
                .iter()
                .map(|(keyset, generation)| (keyset.as_str(), *generation))
                .chain((!tells).then_some((TELLS, 0)))
                .chain(stopped.then_some((STOPPED, 0)))
                .collect();
            let row = serde_json::json!({
                "replica": replica, "role": role, "version": version, "publishes": publishes, "generations": generations,
                "resumed": resumed,
            });
            (replica.as_str(), row)
        })
        .collect();
    let rows = serde_json::Value::from_iter(rows.into_values()).to_string();
    let lent = pool.lend().await?;
    lent.client.query_typed(&pool.sql(REPORT), &[(&rows, Type::TEXT), (&MOST_REPLICAS, Type::INT8)]).await?;
    lent.give_back();
    Ok(())
}

pub(super) async fn replicas(pool: &Pool, longest: Span) -> Result<Vec<Replica>, Failure> {
    // Older rows are removed anyway, and PostgreSQL's calendar is shorter than the longest span.
    let longest = longest.as_millis().min(2 * Span::DAY.as_millis());
    let lent = pool.lend().await?;
    let values: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
        [(&longest, Type::INT8), (&MOST_REPLICAS, Type::INT8)];
    let rows = lent.client.query_typed(&pool.sql(REPLICAS), &values).await?;
    lent.give_back();
    let mut replicas = rows.iter().map(replica).collect::<Result<Vec<_>, _>>()?;
    replicas.sort_by(|a, b| a.report.replica.cmp(&b.report.replica));
    Ok(replicas)
}

fn replica(row: &tokio_postgres::Row) -> Result<Replica, Failure> {
    let name: String = row.try_get(0)?;
    let generations: BTreeMap<String, u64> = serde_json::from_str(row.try_get(4)?).map_err(|error| {
        Failure::because(format!("the generations of the replica `{name}` are not numbers by keyset"), error)
    })?;
    let (tells, stopped) = (generations.get(TELLS) != Some(&0), generations.contains_key(STOPPED));
    // A keyset that a newer release may name so is none of ours.
    let generations =
        generations.into_iter().filter_map(|(keyset, at)| Some((Name::parse(&keyset).ok()?, at))).collect();
    let resumed = serde_json::from_str(row.try_get(5)?).map_err(|error| {
        Failure::because(format!("the resumptions of the replica `{name}` are not times by issuer"), error)
    })?;
    let report = Report {
        replica: name,
        role: row.try_get(1)?,
        version: row.try_get(2)?,
        publishes: row.try_get(3)?,
        tells,
        stopped,
        generations,
        resumed,
    };
    // A failover may lead to a server whose clock is behind.
    let age = Span::from_millis(row.try_get::<_, i64>(6)?.max(0));
    Ok(Replica { report, age })
}

pub(super) async fn forget(pool: &Pool, replicas: &[&str]) -> Result<(), Failure> {
    let lent = pool.lend().await?;
    lent.client.execute_typed(&pool.sql(FORGET), &[(&replicas, Type::TEXT_ARRAY)]).await?;
    lent.give_back();
    Ok(())
}
