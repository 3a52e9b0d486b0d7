//! What was served when: of each replica whether it answered, and of each key where and for how long it was shown. The
//! judge of tokens knows nothing else.

use std::collections::BTreeMap;

use super::random::Random;

/// A time in the simulation: milliseconds of a clock that nobody in it can read.
pub type Moment = i64;

/// From its start, included, to its end, excluded.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    from: Moment,
    to: Moment,
}

const OPEN: Moment = Moment::MAX;

/// Stretches in order, the last of which may be open.
#[derive(Clone, Debug, Default)]
struct Stretches(Vec<Stretch>);

impl Stretches {
    fn begin(&mut self, now: Moment) {
        if self.0.last().is_none_or(|last| last.to != OPEN) {
            self.0.push(Stretch { from: now, to: OPEN });
        }
    }

    fn end(&mut self, now: Moment) {
        if let Some(last) = self.0.last_mut().filter(|last| last.to > now) {
            last.to = now.max(last.from);
        }
    }

    /// How many stretches begin at `at` or before: they are in order, and none overlaps the next.
    fn begun(&self, at: Moment) -> usize {
        self.0.partition_point(|stretch| stretch.from <= at)
    }

    /// The stretch that `at` lies in.
    fn around(&self, at: Moment) -> Option<Stretch> {
        self.0[..self.begun(at)].last().copied().filter(|stretch| at < stretch.to)
    }

    fn contains(&self, at: Moment) -> bool {
        self.around(at).is_some()
    }

    /// The first moment from `at` on that lies in a stretch.
    fn next(&self, at: Moment) -> Option<Moment> {
        let later = || self.0[self.begun(at)..].iter().find(|stretch| stretch.to > stretch.from);
        if self.contains(at) { Some(at) } else { later().map(|stretch| stretch.from) }
    }

    /// The last moment before `at` that lies in a stretch.
    fn last_before(&self, at: Moment) -> Option<Moment> {
        let earlier = &self.0[..self.0.partition_point(|stretch| stretch.from < at)];
        earlier.iter().rev().find(|stretch| stretch.to > stretch.from).map(|stretch| stretch.to.min(at) - 1)
    }

    fn forget_before(&mut self, at: Moment) {
        let keep = self.0.iter().position(|stretch| stretch.to > at).unwrap_or(self.0.len());
        // One more, so that it is known what came last before a long outage.
        if keep > 1 {
            self.0.drain(..keep - 1);
        }
    }
}

/// The whole record, by replica and by serial number of the key.
#[derive(Debug)]
pub struct Served {
    answering: Vec<Stretches>,
    shown: BTreeMap<u64, Vec<Stretches>>,
}

/// The document that somebody got: which replica's, and from when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    pub replica: usize,
    pub of: Moment,
}

impl Served {
    pub fn new(replicas: usize) -> Served {
        Served { answering: vec![Stretches::default(); replicas], shown: BTreeMap::new() }
    }

    pub fn answers(&mut self, replica: usize, now: Moment) {
        self.answering[replica].begin(now);
    }

    pub fn falls_silent(&mut self, replica: usize, now: Moment) {
        self.answering[replica].end(now);
    }

    pub fn shows(&mut self, replica: usize, key: u64, now: Moment) {
        let replicas = self.answering.len();
        self.shown.entry(key).or_insert_with(|| vec![Stretches::default(); replicas])[replica].begin(now);
    }

    pub fn hides(&mut self, replica: usize, key: u64, now: Moment) {
        if let Some(shown) = self.shown.get_mut(&key) {
            shown[replica].end(now);
        }
    }

    /// Whether anybody answers at `now`.
    pub fn is_answered(&self, now: Moment) -> bool {
        self.answering.iter().any(|stretches| stretches.contains(now))
    }

    /// The last moment before `now` at which anybody answered.
    pub fn last_answer(&self, now: Moment) -> Option<Moment> {
        self.answering.iter().filter_map(|stretches| stretches.last_before(now)).max()
    }

    /// What somebody holds at `now` who asked at `then`, of any replica that answered, and went on asking while none did.
    /// `None` when there never was an answer.
    pub fn document(&self, then: Moment, now: Moment, random: &mut Random) -> Option<Document> {
        let replicas = self.answering.len();
        let first = random.index(replicas);
        let from = |of: Moment| {
            let turn = (0..replicas).map(|step| (first + step) % replicas);
            turn.into_iter()
                .find(|replica| self.answering[*replica].contains(of))
                .map(|replica| Document { replica, of })
        };
        from(then)
            .or_else(|| from(self.answering.iter().filter_map(|stretches| stretches.next(then)).min()?))
            .filter(|document| document.of <= now)
            .or_else(|| from(self.last_answer(then)?))
    }

    pub fn contains(&self, document: Document, key: u64) -> bool {
        self.shown.get(&key).is_some_and(|shown| shown[document.replica].contains(document.of))
    }

    /// Since when nobody gets a document without the key any more; `None` where a replica shows it no more.
    pub fn known_since(&self, key: u64, now: Moment) -> Option<Moment> {
        let mut since = self.life(key)?.0;
        for (shown, answering) in self.shown.get(&key)?.iter().zip(&self.answering) {
            let shown_from = match shown.around(now) {
                Some(stretch) => stretch.from,
                None if shown.last_before(now).is_some() => return None,
                None => now,
            };
            // Who did not answer gave nobody a document.
            since = since.max(answering.last_before(shown_from).map_or(since, |last| last + 1));
        }
        Some(since)
    }

    /// Why a document lacks a key, and by how much: it was rendered before its replica showed the key (`true`), or after.
    pub fn lack(&self, document: Document, key: u64, now: Moment) -> (bool, Moment) {
        let shown = self.shown.get(&key).map(|shown| &shown[document.replica]);
        let ended = shown.and_then(|shown| shown.last_before(document.of));
        match ended {
            Some(last) => (false, document.of - last),
            None => (true, shown.and_then(|shown| shown.next(document.of)).unwrap_or(now) - document.of),
        }
    }

    /// When a key was first shown by any replica, and last.
    pub fn life(&self, key: u64) -> Option<(Moment, Option<Moment>)> {
        let stretches = || self.shown.get(&key).into_iter().flatten().flat_map(|stretches| &stretches.0);
        let from = stretches().map(|stretch| stretch.from).min()?;
        let to = stretches().map(|stretch| stretch.to).max()?;
        Some((from, (to != OPEN).then_some(to)))
    }

    /// Drops what nobody asks for any more.
    pub fn forget_before(&mut self, at: Moment) {
        self.answering.iter_mut().for_each(|stretches| stretches.forget_before(at));
        self.shown.retain(|_, shown| shown.iter().flat_map(|s| s.0.last()).any(|stretch| stretch.to > at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_in_an_outage_gets_the_next_answer_or_keeps_the_last() {
        let mut served = Served::new(1);
        let mut random = Random::new(1);
        assert_eq!(served.document(5, 5, &mut random), None);
        served.answers(0, 10);
        served.shows(0, 1, 10);
        served.falls_silent(0, 20);
        served.hides(0, 1, 20);
        served.answers(0, 30);
        let mut of = |then, now| served.document(then, now, &mut random).map(|document| document.of);
        assert_eq!((of(15, 40), of(25, 40), of(25, 28), of(5, 8)), (Some(15), Some(30), Some(19), None));
        assert!(served.contains(Document { replica: 0, of: 19 }, 1));
        assert!(!served.contains(Document { replica: 0, of: 30 }, 1));
        assert_eq!((served.life(1), served.life(2)), (Some((10, Some(20))), None));
    }

    #[test]
    fn a_key_is_known_once_nobody_answers_without_it() {
        let mut served = Served::new(2);
        served.answers(0, 0);
        served.answers(1, 0);
        served.shows(0, 7, 100);
        assert_eq!(served.known_since(7, 150), Some(150), "the other replica does not show it yet");
        served.shows(1, 7, 160);
        assert_eq!(served.known_since(7, 200), Some(160));
        served.hides(0, 7, 300);
        assert_eq!((served.known_since(7, 310), served.known_since(8, 310)), (None, None));
    }

    #[test]
    fn who_was_silent_gave_nobody_a_document_without_the_key() {
        let mut served = Served::new(2);
        served.answers(0, 0);
        served.answers(1, 0);
        served.falls_silent(1, 50);
        served.shows(0, 7, 100);
        served.shows(1, 7, 400);
        served.answers(1, 400);
        assert_eq!(served.known_since(7, 500), Some(100));
    }

    #[test]
    fn a_document_lacks_a_key_because_it_is_older_or_newer() {
        let mut served = Served::new(1);
        served.answers(0, 0);
        served.shows(0, 7, 100);
        served.hides(0, 7, 200);
        let lack = |of, now| served.lack(Document { replica: 0, of }, 7, now);
        assert_eq!((lack(90, 150), lack(230, 240)), ((true, 10), (false, 31)));
        assert_eq!(served.lack(Document { replica: 0, of: 90 }, 8, 95), (true, 5), "never shown");
    }

    #[test]
    fn looking_up_agrees_with_a_search_through_all() {
        let mut stretches = Stretches::default();
        for turn in 0..20 {
            stretches.begin(turn * 10);
            stretches.end(turn * 10 + turn % 7);
        }
        let within = |at: Moment| stretches.0.iter().any(|stretch| stretch.from <= at && at < stretch.to);
        for at in -5..220 {
            assert_eq!(stretches.contains(at), within(at), "{at}");
            assert_eq!(stretches.next(at), (at..220).find(|at| within(*at)), "{at}");
            assert_eq!(stretches.last_before(at), (-5..at).rev().find(|at| within(*at)), "{at}");
        }
    }
}
