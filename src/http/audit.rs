//! `GET /v1/audit`: what people did and what happened by itself, over all keysets, oldest first.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::problem::{Problem, ProblemType};
use crate::engine::Engine;
use crate::keyring::record::{AuditEntry, Journal};
use crate::keyring::time::Timestamp;

/// Entries of one answer at most.
const PAGE: usize = 500;

/// Journals that a cursor names at most, so that it fits a request's head. Beyond that the quietest are known by time.
const NAMED_MAX: usize = 150;

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// The `next` of an earlier answer: exactly what that answer and those before it did not contain. Or an RFC 3339 time:
    /// only what came after it.
    after: Option<String>,
    /// Only this keyset's.
    keyset: Option<String>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct AuditPage {
    items: Vec<AuditItem>,
    /// Give it as `after` to go on from here; also when there is nothing new yet. Opaque.
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

/// How far somebody has read: an entry's number within its journal tells, since what is decided first is not always
/// stored first, and a clock may be set back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cursor {
    /// Of journals that are not named, only what came after this time is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Timestamp>,
    /// By keyset, the installation's under the empty name: the number of the first entry that is new.
    named: BTreeMap<String, u64>,
}

impl Cursor {
    fn parse(text: &str) -> Option<Cursor> {
        if let Some(at) = Timestamp::parse_rfc3339(text) {
            return Some(Cursor { after: Some(at), named: BTreeMap::new() });
        }
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()
    }

    fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    /// The entries of a journal that are new.
    fn new_of<'a>(&self, journal: &str, entries: &'a [AuditEntry]) -> &'a [AuditEntry] {
        let read = match (self.named.get(journal), self.after) {
            (Some(next), _) => entries.iter().take_while(|entry| entry.seq < *next).count(),
            (None, Some(after)) => entries.iter().take_while(|entry| entry.at <= after).count(),
            (None, None) => 0,
        };
        &entries[read..]
    }

    /// Leaves out the journals that have been quiet for longest, when there are too many to name. They are known by time
    /// from then on: whatever they hold until `after` was read.
    fn shorten(&mut self, journals: &[JournalRead]) {
        let mut last_read: Vec<(Timestamp, &str)> =
            journals.iter().map(|journal| (journal.last_read_at, journal.name.as_str())).collect();
        last_read.sort();
        let surplus = self.named.len().saturating_sub(NAMED_MAX);
        for (at, name) in last_read.into_iter().take(surplus) {
            self.named.remove(name);
            self.after = self.after.max(Some(at));
        }
    }
}

/// A journal on its way into a page.
struct JournalRead {
    /// The keyset, or empty.
    name: String,
    entries: Vec<AuditEntry>,
    /// How many of them are in the page.
    taken: usize,
    next_seq: u64,
    /// Time of the last entry read, now or before.
    last_read_at: Timestamp,
}

impl JournalRead {
    fn new(name: &str, journal: &Journal, cursor: &Cursor) -> Self {
        let new = cursor.new_of(name, &journal.audit);
        let read = &journal.audit[..journal.audit.len() - new.len()];
        let last_read_at = read.last().map_or(Timestamp::EPOCH, |entry| entry.at);
        let (entries, next_seq) = (new.to_vec(), journal.next_seq);
        JournalRead { name: name.to_owned(), entries, taken: 0, next_seq, last_read_at }
    }

    fn next(&self) -> Option<(Timestamp, &str)> {
        self.entries.get(self.taken).map(|entry| (entry.at, self.name.as_str()))
    }

    fn take(&mut self) -> AuditItem {
        let entry = &self.entries[self.taken];
        self.taken += 1;
        self.last_read_at = entry.at;
        item(entry, Some(self.name.as_str()).filter(|name| !name.is_empty()))
    }

    /// The number of the first entry that is not read.
    fn position(&self) -> u64 {
        self.entries.get(self.taken).map_or(self.next_seq, |entry| entry.seq)
    }
}

/// One page of the audit log.
pub(super) fn page(engine: &Engine, query: &AuditQuery) -> Result<AuditPage, Problem> {
    let mut cursor = match &query.after {
        None => Cursor::default(),
        Some(text) => Cursor::parse(text).ok_or_else(|| {
            let detail = "after must be the `next` of an earlier answer or an RFC 3339 time.";
            Problem::new(ProblemType::MalformedRequest).detail(detail)
        })?,
    };
    if let Some(wanted) = &query.keyset
        && engine.keyset(wanted).is_none()
    {
        let shown: String = wanted.chars().take(63).collect();
        return Err(Problem::new(ProblemType::UnknownKeyset).detail(format!("There is no keyset `{shown}`.")));
    }
    let mut journals = Vec::new();
    for cell in &engine.directory().order {
        if query.keyset.as_deref().is_none_or(|wanted| wanted == cell.name.as_str()) {
            let keyring = cell.snapshot.load().keyring.clone();
            journals.push(JournalRead::new(cell.name.as_str(), &keyring.journal, &cursor));
        }
    }
    if query.keyset.is_none()
        && let Some(installation) = engine.installation()
    {
        journals.push(JournalRead::new("", &installation.journal, &cursor));
    }
    let items = merge(&mut journals);
    cursor.named.extend(journals.iter().map(|journal| (journal.name.clone(), journal.position())));
    if query.keyset.is_none() {
        cursor.shorten(&journals);
    }
    Ok(AuditPage { items, next: Some(cursor.text()) })
}

/// Takes entries by time, each journal's in its own order. Where not all journals can be named, those of one moment stay
/// together, so that a time tells which of them were read.
fn merge(journals: &mut [JournalRead]) -> Vec<AuditItem> {
    let by_time = journals.len() > NAMED_MAX;
    let mut heads: BTreeSet<(Timestamp, usize)> = BTreeSet::new();
    heads.extend(journals.iter().enumerate().filter_map(|(index, journal)| Some((journal.next()?.0, index))));
    let mut items = Vec::new();
    let mut last = Timestamp::EPOCH;
    while let Some((at, index)) = heads.pop_first() {
        if items.len() >= PAGE && !(by_time && at <= last) {
            break;
        }
        items.push(journals[index].take());
        last = at;
        heads.extend(journals[index].next().map(|(at, _)| (at, index)));
    }
    items
}

fn item(entry: &AuditEntry, keyset: Option<&str>) -> AuditItem {
    AuditItem {
        action: entry.action.clone(),
        reason: entry.reason.clone(),
        actor: entry.actor.clone(),
        time: entry.at,
        keyset: keyset.map(str::to_owned),
        kids: entry.kids.iter().map(ToString::to_string).collect(),
        detail: entry.detail.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(times: &[i64], first_seq: u64) -> Journal {
        let mut journal = Journal { next_seq: first_seq, ..Journal::default() };
        for &at in times {
            journal.note(Timestamp::from_secs(at), "rotate", "someone", None, [], None);
        }
        journal
    }

    /// Reads a page; returns what it holds as (journal, number) and the cursor for the next.
    fn read(all: &BTreeMap<String, Journal>, after: &str) -> (Vec<(String, i64)>, String) {
        let mut cursor = if after.is_empty() { Cursor::default() } else { Cursor::parse(after).unwrap() };
        let mut journals: Vec<_> = all.iter().map(|(name, journal)| JournalRead::new(name, journal, &cursor)).collect();
        let items = merge(&mut journals);
        cursor.named.extend(journals.iter().map(|journal| (journal.name.clone(), journal.position())));
        cursor.shorten(&journals);
        let items = items.into_iter().map(|item| (item.keyset.unwrap_or_default(), item.time.as_secs())).collect();
        (items, cursor.text())
    }

    fn named(name: &str, at: i64) -> (String, i64) {
        (name.to_owned(), at)
    }

    #[test]
    fn an_entry_stored_after_a_page_was_read_is_in_the_next_whatever_its_time() {
        let mut all = BTreeMap::from([("a".to_owned(), journal(&[10, 20], 7)), ("b".to_owned(), journal(&[15], 0))]);
        let (first, next) = read(&all, "");
        assert_eq!(first, [named("a", 10), named("b", 15), named("a", 20)]);
        assert_eq!(read(&all, &next), (vec![], next.clone()), "the cursor stays");
        let (recent, by_time) = read(&all, "1970-01-01T00:00:15Z");
        assert_eq!(recent, [named("a", 20)]);
        // Decided before, stored after: a slow write, or a clock that was set back.
        all.get_mut("b").unwrap().note(Timestamp::from_secs(12), "hold", "someone", None, [], None);
        all.insert("new".to_owned(), journal(&[16], 0));
        let (second, _) = read(&all, &next);
        assert_eq!(second, [named("b", 12), named("new", 16)]);
        assert_eq!(read(&all, &by_time).0, second, "also after a first page that began at a time");
    }

    #[test]
    fn a_page_ends_in_the_middle_of_a_journal_and_goes_on_there() {
        let times: Vec<i64> = (0..150).collect();
        let all: BTreeMap<_, _> = (0..5).map(|n| (format!("k{n}"), journal(&times, 3))).collect();
        let (first, next) = read(&all, "");
        let (second, _) = read(&all, &next);
        assert_eq!((first.len(), second.len()), (PAGE, 250));
        let together: BTreeSet<_> = first.into_iter().chain(second).collect();
        assert_eq!(together.len(), 750, "each once");
    }

    #[test]
    fn a_cursor_fits_a_request_however_many_keysets_there_are() {
        let name = |n: usize| format!("{n:0>63}");
        let all: BTreeMap<_, _> = (0..3000).map(|n| (name(n), journal(&[1, 2 + n as i64 / 7], 0))).collect();
        let (mut seen, mut after) = (BTreeSet::new(), String::new());
        loop {
            let (items, next) = read(&all, &after);
            assert!(next.len() < 20_000, "{}", next.len());
            if items.is_empty() {
                break;
            }
            for item in items {
                assert!(seen.insert(item.clone()), "{item:?} twice");
            }
            after = next;
        }
        assert_eq!(seen.len(), 6000);
    }
}
