//! What is told to those who are to hear of a keyring, and what of it they have heard: decisions only.
//!
//! Transitions are read off the keyring's journal, which is written with them: a notice exists exactly when its transition
//! does, whoever looks and however often. What lies ahead comes from the [`Outlook`]. A [`Book`] remembers how far each
//! receiver got; a notice's id depends on what it tells alone, so that one sent twice can be recognised.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::change::SYSTEM;
use super::decide::{Exposure, KeyChange, blocker_names};
use super::name::Name;
use super::outlook::{Alarm, Outlook};
use super::plan::Blocker;
use super::record::{AuditEntry, KeyState, Keyring, Serial};
use super::time::{Span, Timestamp};

/// What a notice is about: the closed set of its `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {
    KeyCreated,
    KeyPropagated,
    KeyActivated,
    KeyRetiring,
    KeyRetired,
    KeyDestroyed,
    KeyRevoked,
    PropagationUpcoming,
    RotationUpcoming,
    RotationRescheduled,
    RemovalUpcoming,
    HoldSet,
    HoldEnded,
    KeysetDrained,
    KeysetUndrained,
    AlarmRaised,
    AlarmCleared,
    /// An operator tries a receiver.
    Test,
}

impl Event {
    /// All that happen by themselves.
    pub const ALL: [Event; 17] = [
        Event::KeyCreated,
        Event::KeyPropagated,
        Event::KeyActivated,
        Event::KeyRetiring,
        Event::KeyRetired,
        Event::KeyDestroyed,
        Event::KeyRevoked,
        Event::PropagationUpcoming,
        Event::RotationUpcoming,
        Event::RotationRescheduled,
        Event::RemovalUpcoming,
        Event::HoldSet,
        Event::HoldEnded,
        Event::KeysetDrained,
        Event::KeysetUndrained,
        Event::AlarmRaised,
        Event::AlarmCleared,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Event::KeyCreated => "key.created",
            Event::KeyPropagated => "key.propagated",
            Event::KeyActivated => "key.activated",
            Event::KeyRetiring => "key.retiring",
            Event::KeyRetired => "key.retired",
            Event::KeyDestroyed => "key.destroyed",
            Event::KeyRevoked => "key.revoked",
            Event::PropagationUpcoming => "propagation.upcoming",
            Event::RotationUpcoming => "rotation.upcoming",
            Event::RotationRescheduled => "rotation.rescheduled",
            Event::RemovalUpcoming => "removal.upcoming",
            Event::HoldSet => "hold.set",
            Event::HoldEnded => "hold.ended",
            Event::KeysetDrained => "keyset.drained",
            Event::KeysetUndrained => "keyset.undrained",
            Event::AlarmRaised => "alarm.raised",
            Event::AlarmCleared => "alarm.cleared",
            Event::Test => "notice.test",
        }
    }

    /// Whether it tells what lies ahead.
    pub const fn is_ahead(self) -> bool {
        matches!(
            self,
            Event::PropagationUpcoming | Event::RotationUpcoming | Event::RotationRescheduled | Event::RemovalUpcoming
        )
    }

    /// Whether it is about an alarm.
    pub const fn is_alarm(self) -> bool {
        matches!(self, Event::AlarmRaised | Event::AlarmCleared)
    }
}

/// One thing to tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// The same however often it is made; `webhook-id`.
    pub id: String,
    pub event: Event,
    /// When it happened, or when it became time to tell it.
    pub at: Timestamp,
    /// From when on nobody needs to be told any more.
    pub until: Option<Timestamp>,
    data: Map<String, Value>,
}

impl Notice {
    fn new(event: Event, at: Timestamp, keyring: &Keyring, of: &[&str], data: Value) -> Notice {
        let mut all = Map::new();
        all.insert("keyset".to_owned(), json!(keyring.keyset.as_str()));
        all.insert("issuer".to_owned(), json!(keyring.policy.issuer.url));
        if let Value::Object(data) = data {
            all.extend(data.into_iter().filter(|(_, value)| !value.is_null()));
        }
        Notice { id: id(keyring, event, of), event, at, until: None, data: all }
    }

    /// What an operator sends to try a receiver; `id` is to be a new one.
    pub fn test(id: String, at: Timestamp) -> Notice {
        Notice { id, event: Event::Test, at, until: None, data: Map::new() }
    }

    /// The JSON that is sent: `type`, `timestamp` and `data` (Standard Webhooks, "Payload structure").
    pub fn body(&self) -> Vec<u8> {
        json!({ "type": self.event.as_str(), "timestamp": self.at, "data": self.data }).to_string().into_bytes()
    }
}

/// 128 bits of a digest: nothing that it is made of can be guessed from it or forged into it.
fn id(keyring: &Keyring, event: Event, of: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in ["jwksd notice", &keyring.lineage, event.as_str()].iter().chain(of) {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part.as_bytes());
    }
    format!("jwksd_{}", URL_SAFE_NO_PAD.encode(&digest.finalize()[..16]))
}

/// How far a receiver has heard a keyset's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Position {
    lineage: String,
    /// The first entry of which something is to be told.
    seq: u64,
    /// Notices of that entry that were told.
    told: usize,
    /// When the last thing told happened.
    at: Timestamp,
}

impl From<Position> for String {
    fn from(position: Position) -> String {
        let Position { lineage, seq, told, at } = position;
        format!("{seq}.{told}.{}.{lineage}", at.as_millis())
    }
}

impl TryFrom<String> for Position {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Position, Self::Error> {
        const NONE: &str = "not a position in a journal";
        let mut parts = text.splitn(4, '.');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok()).ok_or(NONE);
        let (seq, told, at) = (number()?, number()?, number()?);
        Ok(Position {
            lineage: parts.next().ok_or(NONE)?.to_owned(),
            seq,
            told: usize::try_from(told).map_err(|_| NONE)?,
            at: Timestamp::from_millis(i64::try_from(at).map_err(|_| NONE)?),
        })
    }
}

/// What a receiver heard of a transition that lies ahead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    what: Ahead,
    serial: Serial,
    /// When it was said to come; `None`: it was said to be put off.
    at: Option<Timestamp>,
    /// The shortest notice that was given.
    lead: Span,
    /// How often it was said to come at another time.
    round: u32,
}

/// A transition that lies ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Ahead {
    Propagation,
    /// Of the key that signs, or where none does of the first that will.
    Rotation,
    Removal,
}

/// What one receiver has heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// It is told what happens from then on.
    pub since: Timestamp,
    #[serde(default)]
    positions: BTreeMap<Name, Position>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ahead: BTreeMap<Name, Vec<Told>>,
    /// The alarms that it knows of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    alarms: BTreeMap<Name, BTreeMap<String, Timestamp>>,
}

/// What all receivers have heard; stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    pub receivers: BTreeMap<Name, Heard>,
}

/// What is remembered once a notice was delivered, or given up.
#[derive(Clone, Debug, PartialEq)]
pub enum Mark {
    Position(Name, Position),
    Ahead(Name, Told),
    Raised(Name, Alarm, Timestamp),
    Cleared(Name, Alarm),
}

/// A notice that is due, and what to remember of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    pub notice: Notice,
    pub mark: Mark,
}

impl Heard {
    pub fn new(since: Timestamp) -> Heard {
        Heard { since, positions: BTreeMap::new(), ahead: BTreeMap::new(), alarms: BTreeMap::new() }
    }

    /// What of the journal was not told yet, in its order, and how many entries have left it unheard.
    pub fn unheard(&self, keyring: &Keyring) -> (Vec<Due>, u64) {
        let position = self.positions.get(&keyring.keyset);
        let known = position.filter(|position| position.lineage == keyring.lineage);
        let since = position.map_or(self.since, |position| position.at);
        let journal = &keyring.journal.audit;
        let new: Vec<&AuditEntry> = match known {
            // Mostly there is nothing.
            Some(position) if position.seq >= keyring.journal.next_seq => return (Vec::new(), 0),
            Some(position) => journal.iter().filter(|entry| entry.seq >= position.seq).collect(),
            None if position.is_some() => journal.iter().filter(|entry| entry.at > since).collect(),
            None => journal.iter().filter(|entry| entry.at >= since).collect(),
        };
        let lost = match (known, journal.first()) {
            (Some(position), Some(first)) => first.seq.saturating_sub(position.seq),
            _ => 0,
        };
        let mut due = Vec::new();
        for entry in new {
            let notices = of_entry(keyring, entry);
            let told = known.filter(|position| position.seq == entry.seq).map_or(0, |position| position.told);
            let count = notices.len();
            for (index, notice) in notices.into_iter().enumerate().skip(told) {
                let last = index + 1 == count;
                let (seq, told) = if last { (entry.seq + 1, 0) } else { (entry.seq, index + 1) };
                let position = Position { lineage: keyring.lineage.clone(), seq, told, at: entry.at };
                due.push(Due { notice, mark: Mark::Position(keyring.keyset.clone(), position) });
            }
        }
        (due, lost)
    }

    /// What left the journal unheard is not waited for.
    pub fn skip_lost(&mut self, keyring: &Keyring) {
        let (position, first) = (self.positions.get_mut(&keyring.keyset), keyring.journal.audit.first());
        if let (Some(position), Some(first)) = (position, first)
            && position.lineage == keyring.lineage
            && position.seq < first.seq
        {
            (position.seq, position.told) = (first.seq, 0);
        }
    }

    /// What is to be told of what lies ahead, and when to look again.
    pub fn ahead(
        &self,
        keyring: &Keyring,
        outlook: &Outlook,
        leads: &[Span],
        now: Timestamp,
    ) -> (Vec<Due>, Option<Timestamp>) {
        let told = self.ahead.get(&keyring.keyset).map(Vec::as_slice).unwrap_or_default();
        let (mut due, mut wake) = (Vec::new(), None);
        for coming in coming(keyring, outlook) {
            let before = told.iter().find(|told| told.what == coming.what && told.serial == coming.serial);
            if let Some((notice, told)) = coming.next_notice(keyring, before, leads, now) {
                due.push(Due { notice, mark: Mark::Ahead(keyring.keyset.clone(), told) });
            }
            let next = coming.at.into_iter().flat_map(|at| leads.iter().map(move |lead| at - *lead));
            wake = next.filter(|at| *at > now).chain(wake).min();
        }
        (due, wake)
    }

    /// The alarms that came and went since the receiver was told. `raised`: those that last, with the time since when.
    pub fn alarms(&self, keyring: &Keyring, raised: &BTreeMap<Alarm, Timestamp>, now: Timestamp) -> Vec<Due> {
        let none = BTreeMap::new();
        let known = self.alarms.get(&keyring.keyset).unwrap_or(&none);
        let name = || keyring.keyset.clone();
        let came = raised.iter().filter(|(alarm, _)| !known.contains_key(alarm.as_str())).map(|(alarm, since)| {
            let of = [alarm.as_str(), &since.as_millis().to_string()];
            let data = json!({ "alarm": alarm.as_str(), "at": since });
            let notice = Notice::new(Event::AlarmRaised, *since, keyring, &of, data);
            Due { notice, mark: Mark::Raised(name(), *alarm, *since) }
        });
        let gone = Alarm::ALL.into_iter().filter(|alarm| !raised.contains_key(alarm));
        let went = gone.filter_map(|alarm| Some((alarm, known.get(alarm.as_str())?))).map(|(alarm, since)| {
            let of = [alarm.as_str(), &since.as_millis().to_string()];
            let data = json!({ "alarm": alarm.as_str(), "at": now, "raised_at": since });
            let notice = Notice::new(Event::AlarmCleared, now, keyring, &of, data);
            Due { notice, mark: Mark::Cleared(name(), alarm) }
        });
        went.chain(came).collect()
    }

    /// The alarms of a keyset that it was told of.
    pub fn knows_alarm(&self, keyset: &Name, alarm: Alarm) -> Option<Timestamp> {
        self.alarms.get(keyset)?.get(alarm.as_str()).copied()
    }

    /// Remembers.
    pub fn note(&mut self, mark: Mark) {
        match mark {
            Mark::Position(keyset, position) => _ = self.positions.insert(keyset, position),
            Mark::Ahead(keyset, told) => {
                let all = self.ahead.entry(keyset).or_default();
                all.retain(|other| (other.what, other.serial) != (told.what, told.serial));
                all.push(told);
            }
            Mark::Raised(keyset, alarm, since) => {
                self.alarms.entry(keyset).or_default().insert(alarm.as_str().to_owned(), since);
            }
            Mark::Cleared(keyset, alarm) => {
                if let Some(known) = self.alarms.get_mut(&keyset) {
                    known.remove(alarm.as_str());
                }
                self.alarms.retain(|_, known| !known.is_empty());
            }
        }
    }

    /// Drops what has happened meanwhile, or will not: it was told, or needs not be.
    pub fn tidy(&mut self, keyring: &Keyring) {
        let Some(told) = self.ahead.get_mut(&keyring.keyset) else { return };
        told.retain(|told| {
            let state = keyring.key(told.serial).map(|key| key.state);
            match told.what {
                Ahead::Propagation => state == Some(KeyState::Pending),
                Ahead::Removal => state == Some(KeyState::Retiring),
                Ahead::Rotation if keyring.active().is_some() => state == Some(KeyState::Active),
                Ahead::Rotation => matches!(state, Some(KeyState::Pending | KeyState::Standby)),
            }
        });
        self.ahead.retain(|_, told| !told.is_empty());
    }

    /// Drops keysets that there are no more.
    pub fn keep_only(&mut self, keysets: &BTreeSet<Name>) {
        self.positions.retain(|keyset, _| keysets.contains(keyset));
        self.ahead.retain(|keyset, _| keysets.contains(keyset));
        self.alarms.retain(|keyset, _| keysets.contains(keyset));
    }

    /// Of two accounts of what a receiver heard, what is known from either.
    fn join(&mut self, other: Heard) {
        for (keyset, theirs) in other.positions {
            let ours = self.positions.get(&keyset);
            let further = |ours: &Position| match ours.lineage == theirs.lineage {
                true => (theirs.seq, theirs.told) > (ours.seq, ours.told),
                false => theirs.at > ours.at,
            };
            if ours.is_none_or(further) {
                self.positions.insert(keyset, theirs);
            }
        }
        for (keyset, theirs) in other.ahead {
            let ours = self.ahead.entry(keyset).or_default();
            for told in theirs {
                if !ours.iter().any(|ours| (ours.what, ours.serial) == (told.what, told.serial)) {
                    ours.push(told);
                }
            }
        }
    }
}

impl Book {
    /// Takes up what another manager noted meanwhile.
    pub fn join(&mut self, other: Book) {
        for (receiver, theirs) in other.receivers {
            match self.receivers.get_mut(&receiver) {
                Some(ours) => ours.join(theirs),
                None => _ = self.receivers.insert(receiver, theirs),
            }
        }
    }
}

/// Everything that a journal's entry tells, in the order in which it is to be told.
fn of_entry(keyring: &Keyring, entry: &AuditEntry) -> Vec<Notice> {
    let seq = entry.seq.to_string();
    let notice = |event: Event, serial: Option<Serial>, data: Value| {
        let of = [seq.clone(), serial.map(|serial| serial.to_string()).unwrap_or_default()];
        let mut all = json!({
            "generation": entry.generation, "at": entry.at, "trigger": trigger(entry), "actor": entry.actor,
            "reason": reason(entry),
        });
        if let (Value::Object(all), Value::Object(data)) = (&mut all, data) {
            all.extend(data);
        }
        Notice::new(event, entry.at, keyring, &[&of[0], &of[1]], all)
    };
    let mut notices: Vec<Notice> = Vec::new();
    for change in &entry.changes {
        for event in events_of(change) {
            let exposure = (event == Event::KeyRevoked).then(|| Exposure::of(&keyring.policy, entry.at));
            let data = json!({
                "kid": change.kid, "serial": change.serial, "from": change.from, "to": change.to,
                "unpublished_at": change.unpublished_at, "exposure": exposure,
                "unpropagated": (event == Event::KeyActivated).then(|| entry.detail.is_some()),
            });
            notices.push(notice(event, Some(change.serial), data));
        }
    }
    match entry.action.as_str() {
        "destroyed" => notices.extend(entry.kids.iter().map(|kid| {
            let key = keyring.key_by_kid(kid.as_str());
            let (serial, state) = (key.map(|key| key.serial), key.map(|key| key.state));
            notice(Event::KeyDestroyed, serial, json!({ "kid": kid, "serial": serial, "state": state }))
        })),
        "hold" | "rollback" => {
            let until = keyring.hold.as_ref().filter(|hold| hold.since == entry.at).and_then(|hold| hold.until);
            notices.push(notice(Event::HoldSet, None, json!({ "until": until })));
        }
        "resume" | "hold-ended" => notices.push(notice(Event::HoldEnded, None, Value::Null)),
        "drain" => notices.push(notice(Event::KeysetDrained, None, Value::Null)),
        "undrain" => notices.push(notice(Event::KeysetUndrained, None, Value::Null)),
        _ => {}
    }
    notices
}

fn events_of(change: &KeyChange) -> Vec<Event> {
    let entered = match change.to {
        KeyState::Pending => None,
        KeyState::Standby => Some(Event::KeyPropagated),
        KeyState::Active => Some(Event::KeyActivated),
        KeyState::Retiring => Some(Event::KeyRetiring),
        KeyState::Retired => Some(Event::KeyRetired),
        KeyState::Revoked => Some(Event::KeyRevoked),
    };
    match change.from {
        // Nobody ever heard of one that had ended when it joined.
        None if entered == Some(Event::KeyRetired) => Vec::new(),
        // One that was imported joins in any state; only that it signs at once is told beside.
        None => [Some(Event::KeyCreated), entered.filter(|event| *event == Event::KeyActivated)]
            .into_iter()
            .flatten()
            .collect(),
        Some(_) => entered.into_iter().collect(),
    }
}

/// Why it happened: as the label of `jwksd_rotations_total` for what an operator or the schedule promotes.
fn trigger(entry: &AuditEntry) -> &str {
    match entry.action.as_str() {
        "promoted" => entry.reason.as_deref().unwrap_or("schedule"),
        "rotate" => "operator",
        "revoke" => "revocation",
        "created" | "propagated" | "retired" | "destroyed" | "hold-ended" => "schedule",
        action => action,
    }
}

/// The operator's words; what the daemon writes there itself is the trigger.
fn reason(entry: &AuditEntry) -> Option<&str> {
    entry.reason.as_deref().filter(|_| entry.actor != SYSTEM)
}

/// A transition that is planned.
struct Coming<'a> {
    what: Ahead,
    /// The key that it is the next transition of.
    serial: Serial,
    entered_at: Timestamp,
    /// `None`: a hold puts it off.
    at: Option<Timestamp>,
    data: Value,
    waiting_for: &'a [Blocker],
}

/// The transitions that are planned.
fn coming<'a>(keyring: &Keyring, outlook: &'a Outlook) -> Vec<Coming<'a>> {
    let mut all = Vec::new();
    for (serial, next) in &outlook.keys {
        let Some(key) = keyring.key(*serial) else { continue };
        let what = match (key.state, next.state) {
            (KeyState::Pending, KeyState::Standby) => Ahead::Propagation,
            (KeyState::Retiring, KeyState::Retired) => Ahead::Removal,
            (KeyState::Active, KeyState::Retiring) => Ahead::Rotation,
            (KeyState::Standby, KeyState::Active) if keyring.active().is_none() => Ahead::Rotation,
            _ => continue,
        };
        let Some(at) = next.at else { continue };
        let held = next.waiting_for.contains(&Blocker::Hold)
            && keyring.hold.as_ref().is_some_and(|hold| hold.until.is_none_or(|until| until > at));
        let data = match what {
            Ahead::Rotation if key.state == KeyState::Active => {
                let successor =
                    outlook.keys.iter().find(|(_, next)| next.state == KeyState::Active && next.at.is_some());
                let successor = successor.and_then(|(serial, _)| keyring.key(*serial));
                json!({
                    "kid": successor.map(|key| &key.kid), "serial": successor.map(|key| key.serial),
                    "from": successor.map(|key| key.state), "to": KeyState::Active,
                    "predecessor": { "kid": key.kid, "serial": key.serial },
                })
            }
            _ => json!({ "kid": key.kid, "serial": key.serial, "from": key.state, "to": next.state }),
        };
        let at = Some(at).filter(|_| !held);
        all.push(Coming {
            what,
            serial: *serial,
            entered_at: key.entered_at,
            at,
            data,
            waiting_for: &next.waiting_for,
        });
    }
    all
}

impl Coming<'_> {
    /// What is to be told now, if anything, and what is known then.
    fn next_notice(
        &self,
        keyring: &Keyring,
        before: Option<&Told>,
        leads: &[Span],
        now: Timestamp,
    ) -> Option<(Notice, Told)> {
        let round = before.map_or(0, |told| told.round);
        let moved = before.is_some_and(|told| !self.is_as(told));
        if moved && self.what == Ahead::Rotation {
            // The next notices are those that are left at the new time.
            let lead = self.passed(leads, now).unwrap_or(Span::from_millis(i64::MAX));
            let told = Told { what: self.what, serial: self.serial, at: self.at, lead, round: round + 1 };
            let was = before.and_then(|told| told.at);
            return Some((self.notice(keyring, Event::RotationRescheduled, &told, was, now), told));
        }
        let at = self.at.filter(|at| *at > now)?;
        let lead = self.passed(leads, now)?;
        if before.is_some_and(|told| !moved && told.lead <= lead) {
            return None;
        }
        let round = if moved { round + 1 } else { round };
        let told = Told { what: self.what, serial: self.serial, at: Some(at), lead, round };
        let event = match self.what {
            Ahead::Propagation => Event::PropagationUpcoming,
            Ahead::Rotation => Event::RotationUpcoming,
            Ahead::Removal => Event::RemovalUpcoming,
        };
        Some((self.notice(keyring, event, &told, None, at - lead), told))
    }

    /// The shortest of the leads that have begun. One that is longer than the whole wait says nothing new.
    fn passed(&self, leads: &[Span], now: Timestamp) -> Option<Span> {
        let at = self.at?;
        let begun = |lead: &&Span| at - **lead <= now && at - **lead > self.entered_at;
        leads.iter().filter(begun).min().copied()
    }

    /// Whether it comes when it was said to; what is computed from the clock may differ a little.
    fn is_as(&self, told: &Told) -> bool {
        match (self.at, told.at) {
            (Some(at), Some(told_at)) => {
                let tolerance = Span::from_millis(told.lead.as_millis() / 20).min(Span::MINUTE);
                at.since(told_at).max(told_at.since(at)) <= tolerance
            }
            (None, None) => true,
            _ => false,
        }
    }

    fn notice(&self, keyring: &Keyring, event: Event, told: &Told, was: Option<Timestamp>, at: Timestamp) -> Notice {
        let of = [told.serial, told.round.into()].map(|number| number.to_string());
        let (lead, entered) = (told.lead.as_millis().to_string(), self.entered_at.as_millis().to_string());
        let mut data = self.data.clone();
        if let Value::Object(data) = &mut data {
            let blocked = blocker_names(self.waiting_for);
            data.insert("generation".to_owned(), json!(keyring.generation));
            data.insert("at".to_owned(), json!(self.at));
            data.insert("was".to_owned(), json!(was));
            data.insert("blocked_by".to_owned(), if blocked.is_empty() { Value::Null } else { json!(blocked) });
        }
        let notice = Notice::new(event, at, keyring, &[&of[0], &of[1], &lead, &entered], data);
        Notice { until: self.at.filter(|_| event != Event::RotationRescheduled), ..notice }
    }
}
