//! `GET /v1/audit`: what people did and what happened by itself, over all keysets, oldest first.

use serde::{Deserialize, Serialize};

use super::problem::{Problem, ProblemType};
use crate::engine::Engine;
use crate::keyring::record::AuditEntry;
use crate::keyring::time::Timestamp;

/// Entries of one answer at most.
const PAGE: usize = 500;

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// The `next` of an earlier answer, or an RFC 3339 time: only what came after it.
    after: Option<String>,
    /// Only this keyset's.
    keyset: Option<String>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct AuditPage {
    items: Vec<AuditItem>,
    /// Give it as `after` to go on from here; also when there is nothing new yet.
    next: Option<String>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct AuditItem {
    action: String,
    reason: Option<String>,
    actor: String,
    #[schema(value_type = String, format = DateTime)]
    time: Timestamp,
    /// Absent for what concerns the whole installation.
    keyset: Option<String>,
    kids: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

/// Where an entry stands among all: time first, then keyset and number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    at: Timestamp,
    keyset: String,
    seq: u64,
}

impl Place {
    /// `<time>~<keyset>~<seq>`; a time alone stands after everything of that moment.
    fn parse(text: &str) -> Option<Place> {
        let mut parts = text.splitn(3, '~');
        let at = Timestamp::parse_rfc3339(parts.next()?)?;
        match (parts.next(), parts.next()) {
            (None, _) => Some(Place { at, keyset: "~".to_owned(), seq: u64::MAX }),
            (Some(keyset), Some(seq)) => Some(Place { at, keyset: keyset.to_owned(), seq: seq.parse().ok()? }),
            _ => None,
        }
    }

    fn text(&self) -> String {
        format!("{}~{}~{}", self.at, self.keyset, self.seq)
    }
}

/// One page of the audit log.
pub(super) fn page(engine: &Engine, query: &AuditQuery) -> Result<AuditPage, Problem> {
    let after = match &query.after {
        None => None,
        Some(text) => Some(Place::parse(text).ok_or_else(|| {
            let detail = "after must be the `next` of an earlier answer or an RFC 3339 time.";
            Problem::new(ProblemType::MalformedRequest).detail(detail)
        })?),
    };
    let mut found: Vec<(Place, AuditItem)> = Vec::new();
    for cell in &engine.directory().order {
        if query.keyset.as_deref().is_some_and(|wanted| wanted != cell.name.as_str()) {
            continue;
        }
        let keyring = cell.snapshot.load().keyring.clone();
        found.extend(keyring.journal.audit.iter().map(|entry| item(entry, Some(cell.name.as_str()))));
    }
    if query.keyset.is_none() {
        let installation = engine.installation();
        let entries = installation.iter().flat_map(|installation| &installation.journal.audit);
        found.extend(entries.map(|entry| item(entry, None)));
    }
    found.retain(|(place, _)| after.as_ref().is_none_or(|after| place > after));
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found.truncate(PAGE);
    let next = found.last().map(|(place, _)| place.text()).or_else(|| query.after.clone());
    Ok(AuditPage { items: found.into_iter().map(|(_, item)| item).collect(), next })
}

fn item(entry: &AuditEntry, keyset: Option<&str>) -> (Place, AuditItem) {
    let place = Place { at: entry.at, keyset: keyset.unwrap_or_default().to_owned(), seq: entry.seq };
    let item = AuditItem {
        action: entry.action.clone(),
        reason: entry.reason.clone(),
        actor: entry.actor.clone(),
        time: entry.at,
        keyset: keyset.map(str::to_owned),
        kids: entry.kids.iter().map(ToString::to_string).collect(),
        detail: entry.detail.clone(),
    };
    (place, item)
}
