//! What a record says of itself, for columns and the audit table. Read without a check of its authenticity: only whoever may
//! write the record gets here, and nothing that jwksd decides depends on it.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::keyring::record::AuditEntry;

/// Header and journal of a record; all of it empty for bytes that are none.
#[derive(Debug, Default)]
pub(super) struct Described {
    pub lineage: Option<String>,
    pub generation: Option<i64>,
    /// Audit entries as a JSON array that PostgreSQL takes, `None` where there is none.
    pub entries: Option<String>,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    lineage: String,
    generation: u64,
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Deserialize)]
struct Body {
    journal: Journal,
}

#[derive(Deserialize)]
struct Journal {
    audit: Vec<Value>,
}

pub(super) fn describe(bytes: &[u8]) -> Described {
    let Ok(envelope) = serde_json::from_slice::<Envelope<'_>>(bytes) else { return Described::default() };
    let entries = serde_json::from_str::<Body>(envelope.body.get()).map(|body| body.journal.audit).unwrap_or_default();
    let entries: Vec<Value> = entries.into_iter().filter_map(row).collect();
    Described {
        lineage: Some(without_nul(&envelope.lineage)),
        generation: i64::try_from(envelope.generation).ok(),
        entries: (!entries.is_empty()).then(|| Value::Array(entries).to_string()),
    }
}

/// An entry as the table takes it, whatever a newer release adds to it.
fn row(entry: Value) -> Option<Value> {
    let entry: AuditEntry = serde_json::from_value(entry).ok()?;
    let seq = i64::try_from(entry.seq).ok()?;
    let text = |text: &Option<String>| text.as_deref().map(without_nul);
    Some(serde_json::json!({
        "seq": seq,
        "at": entry.at,
        "action": without_nul(&entry.action),
        "actor": without_nul(&entry.actor),
        "reason": text(&entry.reason),
        "kids": entry.kids.iter().map(|kid| without_nul(kid.as_str())).collect::<Vec<_>>(),
        "detail": text(&entry.detail),
    }))
}

/// PostgreSQL's text holds every character but this one.
fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
